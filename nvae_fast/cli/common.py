"""Functions that several commands share."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvae_fast.cli import options
from nvae_fast.cli.parser import options_of
from nvae_fast.data import open_dataset
from nvae_fast.data.decode import EVALUATED_ON
from nvae_fast.data.held_out import HeldOut
from nvae_fast.models.latents import linear_temperatures
from nvae_fast.models.nvae import NVAE
from nvae_fast.ops import _extension as extension
from nvae_fast.training import checkpoint, distributed, pictures
from nvae_fast.training.config import check_bounds
from nvae_fast.training.memory import keep_freed_memory
from nvae_fast.training.progress import Progress
from nvae_fast.training.signals import watch_interrupts
from nvae_fast.version import __version__

# Options in which processes may differ: paths of a node, its machine, and what only process 0 does.
_LOCAL = {
    "checkpoint",
    "data",
    "debug",
    "device",
    "grid",
    "inception",
    "json",
    "npy",
    "out",
    "overwrite",
    "progress",
    "quiet",
    "stats",
    "threads",
}


def run_on_processes(
    arguments: argparse.Namespace,
    work: Callable[[argparse.Namespace, distributed.World], int],
    advice: str = "Nothing was written: start all of them again",
) -> int:
    """Run `work` on this process, or on each of those that torchrun, mpirun or srun started. Raises ValueError when they were
    started with other options or versions."""
    with watch_interrupts():
        world = distributed.start_world(arguments.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        with world.report_lost_process(lambda: advice):
            world.agree({"the command": arguments.command})
            world.agree(
                {
                    "the version of nvae_fast": __version__,
                    "the version of PyTorch": str(torch.__version__),
                    **{
                        options.spelled(name): getattr(arguments, name, "not given")
                        for name in options_of(arguments.command)
                        if name not in _LOCAL
                    },
                }
            )
            code = work(arguments, world)
        world.close()
    return code


def load_model(
    arguments: argparse.Namespace, world: distributed.World, say: Callable[[str], None]
) -> tuple[NVAE, dict[str, Any]]:
    """The model of a command's checkpoint with the weights of `--weights`, and what is known about it. Says which weights are
    used where there is a choice."""
    model, facts = checkpoint.load_model(
        arguments.checkpoint, map_location=world.device, weights=arguments.weights
    )
    say_weights(facts, say)
    return model, facts


def say_weights(facts: dict[str, Any], say: Callable[[str], None]) -> None:
    """Say which weights of a checkpoint are used. facts: "weights", and "ema" where there is a choice."""
    if facts["weights"] == "ema":
        say(f"weights: averages (decay {facts['ema']['decay']:g}, {facts['ema']['updates']} steps)")
    elif "ema" in facts:
        say("weights: those of the last step, not their averages")


def open_images(
    data: str, kind: str | None, split: str, model_config: Any, options: dict[str, Any] | None = None
) -> Any:
    """Open ``data`` with the image size, channels and bits of the model. options: the result of :func:`image_options`.

    The processes of the command line belong to it, so that it may set how they end when a memory-mapped file fails.
    """
    extension.report_bus_errors()
    return open_dataset(
        data,
        split=split,
        image_size=model_config.resolution,
        channels=model_config.channels,
        num_bits=model_config.num_x_bits,
        kind=kind,
        likelihood=model_config.likelihood_name,
        **(options or {}),
    )


def images_of(
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    model_config: Any,
    say: Callable[[str], None],
    *,
    split: str | None = None,
    advice: str = "give --data",
) -> tuple[Any, str, str]:
    """(dataset, its name, its split): the images of `--data`, by default those that the checkpoint was trained on.

    split: where `--split` is not given; None: what the data set was published with, else the test part. advice: what to do
    where the checkpoint does not say what it was trained on.
    """
    data, kind = arguments.data, arguments.data_kind
    trained = facts.get("data", {})
    if data is None:
        if trained.get("source") is None:
            raise ValueError(f"{facts['path']} does not say what it was trained on: {advice}")
        data, kind = find_data(trained, Path(facts["path"]).parent), kind or trained.get("kind")
        own = True
    else:
        own = same_data(data, trained.get("source"))
    how = image_options(arguments, model_config, trained)
    if not own:
        how.pop("held_out", None)

    def opened(part: str) -> Any:
        return open_images(data, kind, part, model_config, how)

    dataset, split = None, arguments.split or split
    if split is None and model_config.dataset in EVALUATED_ON:
        part = EVALUATED_ON[model_config.dataset]
        try:
            dataset = opened(part)
        except (FileNotFoundError, ValueError) as error:
            say(f"{error}: the test part is taken, {model_config.dataset} was published on the {part} part")
    if dataset is None:
        dataset = opened(split or ("validation" if "held_out" in how else "test"))
    if own and not dataset.own_split and dataset.split != "train":
        if split is not None:
            raise ValueError(
                f"--split {split}: {data} has no such part, and the model was trained on all of its images: give --split "
                "train, or other images with --data"
            )
        say(f"{data} has no test part: these are the images that the model was trained on")
        dataset = opened("train")
    return dataset, data, dataset.split


def find_data(trained: dict[str, Any], folder: Path) -> str:
    """The data that a checkpoint in ``folder`` names: where they were, or else where they are beside it."""
    source = str(trained.get("source") or trained["name"])
    if trained.get("kind") == source or Path(source).exists():
        return source
    places = [folder / place for place in (trained.get("beside"), source) if place]
    return next((os.path.abspath(place) for place in places if place.exists()), source)


def same_data(data: str, trained: str | None) -> bool:
    """Whether ``data`` are what a checkpoint says that it was trained on: the same name, or the same path."""
    return trained is not None and (data == trained or Path(data).resolve() == Path(trained).resolve())


def image_options(
    arguments: argparse.Namespace, model_config: Any, trained: dict[str, Any] | None
) -> dict[str, Any]:
    """How images are read: as the command line says, else as the run of the checkpoint read them, else as published.

    trained: what a checkpoint says about its data; None or empty for a new run and for an official checkpoint. Runs
    of 0.1.0 say nothing about it and cropped to the short side.
    """
    options: dict[str, Any] = {"max_skipped": arguments.max_skipped_images}
    if (cache := getattr(arguments, "cache", None)) is not None:
        check_bounds("--cache", cache, least=0)
        options["cache_bytes"] = int(cache * (1 << 30))
    if trained and trained.get("held_out") is not None:
        options["held_out"] = HeldOut(**trained["held_out"])
    if not trained or arguments.crop is not None or arguments.resample is not None:
        return {
            **options,
            "crop": arguments.crop,
            "resample": arguments.resample,
            "dataset": model_config.dataset,
        }
    reading = trained.get("reading")
    if reading is None:
        return options
    if reading["only"] is not None:
        return {**options, "resample": reading["resample"], "dataset": model_config.dataset}
    default = {"crop": None, "resample": "lanczos", "only": None}
    return (
        options
        if reading == default
        else {**options, "crop": reading["crop"], "resample": reading["resample"]}
    )


def versions() -> dict[str, str]:
    """{package: version} of the packages that results depend on."""
    versions = {
        "nvae_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "not in this PyTorch",
        "numpy": np.__version__,
    }
    for name in ("triton", "pillow", "scikit-learn", "lmdb", "matplotlib", "tensorboard", "torch-fidelity"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_writable(path: str | Path, overwrite: bool) -> None:
    """Raise ValueError unless a file can be written at ``path``. An existing file needs ``overwrite``."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder, a file name is needed")
    if not file.parent.is_dir():
        raise ValueError(f"the folder of {file} does not exist")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already: --overwrite replaces it")


def check_temperature(option: str, value: float | tuple[float, float] | None) -> None:
    """Raise ValueError unless one number, or both ends of a range, are finite and at least 0; None passes."""
    for end in value if isinstance(value, tuple) else (value,):
        check_bounds(option, end, least=0)


def check_picture(option: str, path: str) -> None:
    """Raise ValueError unless ``path`` names a PNG file, the only format that grids are written in."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{option} must be a PNG file, whose name ends in .png, got {path}")


def temperatures(value: float | tuple[float, float], model: NVAE) -> float | list[float]:
    """What `--temperature` means for a model: one number, or one for each group."""
    return linear_temperatures(*value, model.config.num_groups) if isinstance(value, tuple) else value


def pixel_temperature(arguments: argparse.Namespace, model: NVAE) -> float:
    """What `--pixel-temperature` means, 1 by default. Raises ValueError where it is given and the mean is taken."""
    if arguments.pixel_temperature is None:
        return 1.0
    pixels = getattr(arguments, "pixels", None)
    if pictures.chosen_pixels(model, pixels or "auto") == "mean":
        needed = "--pixels sample" if pixels else "another likelihood"
        raise ValueError(
            f"--pixel-temperature needs {needed}: of binary images the mean of the likelihood is taken"
        )
    value: float = arguments.pixel_temperature
    return value


def set_threads(count: int | None) -> None:
    """Apply --threads; None leaves PyTorch's choice. Raises ValueError for more threads than make sense on this machine."""
    if count is None:
        return
    cpus = os.cpu_count() or 1
    most = max(64, 4 * cpus)
    if not 1 <= count <= most:
        bound = "at least 1" if count < 1 else f"at most {most} on this machine, which has {cpus} CPUs"
        raise ValueError(f"--threads must be {bound}, got {count}")
    torch.set_num_threads(count)


def reporter(quiet: bool) -> Any:
    """A function that prints a line to stderr, or nothing if ``quiet``."""

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    return say


def progress_of(arguments: argparse.Namespace, world: distributed.World, label: str, total: int) -> Progress:
    """The progress of ``total`` images as --progress and --quiet ask for it, on the first process alone."""
    quiet = arguments.quiet or not world.is_main
    return Progress(label, total, unit="image", mode=arguments.progress, quiet=quiet)


def report_skipped(dataset: Any, say: Any) -> None:
    """Report how many images of ``dataset`` could not be read."""
    if dataset.skipped:
        file, reason = dataset.skipped[0]
        say(f"{len(dataset.skipped)} unreadable image(s) skipped, the first: {file}: {reason}")
