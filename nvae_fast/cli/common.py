"""What several commands do."""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvae_fast.data import open_dataset
from nvae_fast.models.latents import linear_temperatures
from nvae_fast.models.nvae import NVAE
from nvae_fast.training import distributed
from nvae_fast.version import __version__


def run_on_processes(
    arguments: argparse.Namespace,
    work: Callable[[argparse.Namespace, distributed.World], int],
    advice: str = "Nothing was written: start all of them again",
) -> int:
    """Run `work` on this process, or on each of those torchrun started."""
    world = distributed.start_world(arguments.device)
    with world.report_lost_process(lambda: advice):
        code = work(arguments, world)
    world.close()
    return code


def open_images(data: str, kind: str | None, split: str, model_config: Any) -> Any:
    """The dataset of ``data``, its images as the model takes them."""
    return open_dataset(
        data,
        split=split,
        image_size=model_config.resolution,
        channels=model_config.channels,
        num_bits=model_config.num_x_bits,
        kind=kind,
    )


def versions() -> dict[str, str]:
    """{package: version} of what results depend on."""
    versions = {
        "nvae_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "not in this PyTorch",
        "numpy": np.__version__,
    }
    for name in ("triton", "pillow", "scikit-learn", "lmdb", "matplotlib", "tensorboard"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_writable(path: str | Path, overwrite: bool) -> None:
    """Raise ValueError unless a file can be written at ``path``; only ``overwrite`` replaces one."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder, a file name is needed")
    if not file.parent.is_dir():
        raise ValueError(f"the folder of {file} does not exist")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already: --overwrite replaces it")


def check_temperature(option: str, value: float | tuple[float, float]) -> None:
    """Raise ValueError unless one number, or both ends of a range, are finite and greater than 0."""
    ends = value if isinstance(value, tuple) else (value,)
    if not all(0 < end < math.inf for end in ends):
        shown = ":".join(f"{end:g}" for end in ends)
        raise ValueError(f"{option} must be greater than 0, got {shown}")


def temperatures(value: float | tuple[float, float], model: NVAE) -> float | list[float]:
    """What `--temperature` means for a model: one number, or one for each group."""
    return linear_temperatures(*value, model.config.num_groups) if isinstance(value, tuple) else value


def images_of(arguments: argparse.Namespace, facts: dict[str, Any], model_config: Any) -> tuple[Any, str]:
    """The dataset of `--data`, by default what the checkpoint was trained on, and its name."""
    data, kind = arguments.data, arguments.data_kind
    if data is None:
        trained = facts.get("data", {})
        data, kind = trained.get("source"), kind or trained.get("kind")
        if data is None:
            raise ValueError(f"{facts['path']} does not say what it was trained on: give --data")
    return open_images(data, kind, arguments.split, model_config), data


def set_threads(arguments: argparse.Namespace) -> None:
    """Apply --threads."""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)


def reporter(quiet: bool) -> Any:
    """A function that prints a line to stderr, or nothing when ``quiet``."""

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    return say


def report_skipped(dataset: Any, say: Any) -> None:
    """Say how many images of ``dataset`` could not be read."""
    if dataset.skipped:
        file, reason = dataset.skipped[0]
        say(f"{len(dataset.skipped)} unreadable image(s) skipped, the first: {file}: {reason}")
