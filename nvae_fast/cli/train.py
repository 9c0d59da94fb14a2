"""`python -m nvae_fast train`: train a model, or continue a run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from nvae_fast.cli import config_file, options
from nvae_fast.cli.choice import Choice, choose
from nvae_fast.cli.common import (
    find_data,
    image_options,
    open_images,
    report_skipped,
    reporter,
    run_on_processes,
    set_threads,
    versions,
)
from nvae_fast.cli.dry_run import describe
from nvae_fast.data import open_dataset
from nvae_fast.data.extras import require
from nvae_fast.data.held_out import check_fraction, validation_part
from nvae_fast.data.inspection import ImageKind, check_kind, inspect_images
from nvae_fast.io import atomic_file
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.training import checkpoint, distributed, pictures, precision, run_folder, seeds
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.loop import Trainer, check_batch_size
from nvae_fast.training.presets import preset as training_preset
from nvae_fast.training.progress import clock
from nvae_fast.training.starting_point import init_from
from nvae_fast.training.validation import held_out

# What may change when a run is resumed without changing its results.
_RESUME_FREE = {
    "time_limit",
    "workers",
    "max_bad_steps",
    "checkpoint_every",
    "keep",
    "log_every",
    "validate_every",
    "validate_final_samples",
    "sample_every",
    "sample_temperature",
    "sample_readjust_passes",
    "tensorboard",
}
# What may change and changes the results, which a message reports.
_RESUME_REPORTED = {
    "epochs",
    "max_steps",
    "learning_rate",
    "learning_rate_min",
    "grad_clip",
    "autocast",
    "accumulate",
    "skip_grad_norm",
    "ema",
    "threads",
}
# What a validation computes: its values are compared with one another, so it cannot change after the first.
_VALIDATION = ("validate_images", "validate_samples")
# The run folder of a run without --preset and --out is runs/<this>.
_UNNAMED = "nvae"
# What the options that start a run conflict with in a run that is resumed.
_OWN = {"--config": "options", "--init-from": "weights"}
# The share of images without a validation part that is held out.
VAL_FRACTION = 0.1
# The pictures at the end of a run.
_PICTURES = ("samples.png", "reconstructions.png")
# Built-in data, which say what kind of images they are.
_BUILT_IN = ("digits", "photos")


def run(arguments: argparse.Namespace) -> int:
    """Train a model or continue a run; see `python -m nvae_fast train --help`."""
    return run_on_processes(
        arguments, _train, "See the run folder for its newest checkpoint, --resume goes on from it"
    )


def _train(arguments: argparse.Namespace, world: distributed.World) -> int:
    with contextlib.ExitStack() as stack:  # holds the lock of the run folder
        return _train_in(stack, arguments, world)


def _train_in(stack: contextlib.ExitStack, arguments: argparse.Namespace, world: distributed.World) -> int:
    say = reporter(arguments.quiet or not world.is_main)
    require("PIL.Image", "pillow", "the pictures that train writes")
    training_names = [field.name for field in dataclasses.fields(TrainingConfig)]
    training_given = options.given(arguments, training_names)
    if "autocast" in training_given:
        training_given["autocast"] = precision.chosen(training_given["autocast"], world.device)
    model_given = options.given(arguments, options.MODEL_HELP)
    for option in ("--config", "--init-from"):
        if arguments.resume and getattr(arguments, option[2:].replace("-", "_")) is not None:
            raise ValueError(
                f"{option} and --resume exclude each other: the run in --out has its own {_OWN[option]}"
            )
    file = None if arguments.config is None else config_file.read(arguments.config)
    if file is not None:
        file.fill_in(arguments)
    if arguments.init_from == "none":  # in place of that of the file
        arguments.init_from = None
    folder = Path(arguments.out or f"runs/{arguments.preset or _UNNAMED}")

    state = None
    if arguments.resume:
        # A dry run does not repair a damaged checkpoint: loading it is then an error.
        if world.is_main and not arguments.dry_run:
            if run_folder.has_checkpoint(folder):
                stack.enter_context(run_folder.lock(folder))
            _, note = run_folder.prepare(folder, resume=True, overwrite=arguments.overwrite)
            if note:
                print(note, file=sys.stderr)  # a damaged checkpoint is worth a line even with --quiet
        world.barrier()
        state = checkpoint.load_training(folder)
        with options.errors_name_options():
            config = _resumed_config(state, training_given, say, world)
        model_config = _resumed_model(state, model_given, arguments.preset)
        images = state["data"]
        data, kind = _resumed_data(arguments, images, folder)
    else:
        given = training_given | model_given
        with config_file.errors_name_file(file, given), options.errors_name_options():
            config, model_config, data, kind = _started(
                arguments, file, training_given, model_given, world, say
            )
        images = None
    if config.validate_every == 0:
        for name in (*_VALIDATION, "validate_final_samples"):
            if name in training_given:
                raise ValueError(
                    f"{options.spelled(name)} is of no use without validation, which --validate-every 0 switches off"
                )
    set_threads(config.threads)
    how = image_options(arguments, model_config, images)
    if images is None:
        how["val_fraction"] = VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction
    dataset = open_images(data, kind, "train", model_config, how)
    if images is not None:
        _check_resumed_images(arguments, images, dataset)

    if arguments.dry_run:
        check_batch_size(config, dataset, world)
        if world.is_main:
            print(f"{len(dataset)} training images of {data}, into {folder}")
            print(describe(model_config, precision.resolved(config, world.device)))
        return 0

    validation = None
    if config.validate_every != 0:
        validation = held_out(dataset, lambda part: open_images(data, kind, part, model_config, how))
        if validation is None:
            say(f"{data} has no validation or test part: training without validation")

    torch.manual_seed(config.seed)
    model = NVAE(model_config)
    if arguments.init_from is not None:
        say(init_from(model, arguments.init_from).summary())
        if world.size > 1:
            world.agree({"the contents of --init-from": distributed.fingerprint(model.state_dict())})
    trainer = Trainer(
        model,
        config,
        dataset,
        folder,
        world=world,
        validation=validation,
        state=state,
        quiet=arguments.quiet,
        progress=arguments.progress,
        data=(data, kind),
    )
    # All arguments have been checked: nothing is written before this point.
    if world.is_main and state is None:
        _, note = run_folder.prepare(folder, overwrite=arguments.overwrite)
        stack.enter_context(run_folder.lock(folder))
        run_folder.prepare(folder)  # another run may have begun there since
        if note:
            say(note)
    world.barrier()
    say(_run_summary(trainer, data, folder))
    if trainer.validation.interval:
        say(trainer.validation.describe())
    if _is_complete(trainer):
        say(
            f"the run in {folder} is complete: {trainer.step} steps. A larger --epochs or --max-steps goes on with it; "
            f"{_next_command(folder)}"
        )
        return 0
    if world.is_main:
        _write_config(trainer, arguments.init_from)
    result = trainer.run()
    report_skipped(dataset, say)
    if validation is not None and dataset.held_out is None:  # else they have one list
        report_skipped(validation, say)
    skipped = f", {result.skipped} step(s) skipped as not finite" if result.skipped else ""
    skipped += f", {result.large} step(s) skipped for their gradient norm" if result.large else ""
    if result.signal is not None:
        say(
            f"stopped at step {result.step} of {trainer.total_steps}{skipped}; saved in "
            f"{folder / checkpoint.NAME}, continue with --resume --out {folder}"
        )
        return 128 + result.signal
    final_pictures(trainer, data, kind, how)
    world.barrier()
    say(f"trained {result.step} steps in {clock(result.seconds)}{skipped}: {folder}")
    say(f"pictures: {', '.join(str(folder / name) for name in _PICTURES)}")
    say(_next_command(folder))
    return 0


def _resumed_data(
    arguments: argparse.Namespace, images: dict[str, Any], folder: Path
) -> tuple[str, str | None]:
    """The data of a run to resume and their kind: those given now, else those that its checkpoint names."""
    kind = images.get("kind")
    if arguments.data is not None and kind in _BUILT_IN:
        kind = None
    return arguments.data or find_data(images, folder), arguments.data_kind or kind


def _check_resumed_images(arguments: argparse.Namespace, images: dict[str, Any], dataset: Any) -> None:
    """Raise ValueError when other images, or other parts of them, are asked for than the checkpoint's run has."""
    if images.get("reading") not in (None, dataset.reading):
        raise ValueError(
            f"--crop and --resample cannot change when a run is resumed: it has {images['reading']}, "
            f"{dataset.reading} was asked for"
        )
    had, fraction = (images.get("held_out") or {}).get("fraction", 0.0), arguments.val_fraction
    # Data with parts of their own are not split, whatever the fraction.
    splits = dataset.held_out is not None or not dataset.own_split
    if fraction is not None and check_fraction(fraction) != had and splits:
        raise ValueError(
            f"--val-fraction cannot change when a run is resumed: it has {had:g}, {fraction:g} was asked for"
        )


def _started(
    arguments: argparse.Namespace,
    file: config_file.ConfigFile | None,
    training_given: dict[str, Any],
    model_given: dict[str, Any],
    world: distributed.World,
    say: Any,
) -> tuple[TrainingConfig, NVAEConfig, str, str | None]:
    """The configurations of a new run, its data and their kind. What follows from the images is chosen, and reported."""
    given = {**(file.model if file is not None else {}), **model_given}
    given |= {**(file.training if file is not None else {}), **training_given}
    data, kind = arguments.data, arguments.data_kind
    built_in = data in _BUILT_IN and kind in (None, data) and not Path(data).exists()

    def inspected() -> tuple[ImageKind, int]:
        dataset = open_dataset(
            data,
            kind=kind,
            num_bits=8,
            binarize=False,
            crop=arguments.crop,
            resample=arguments.resample,
            max_skipped=arguments.max_skipped_images,
            cache_bytes=0,
            val_fraction=VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction,
        )
        return inspect_images(dataset), len(dataset)

    chosen, found = None, None
    if arguments.preset is None and data is not None:
        found, count = inspected()
        chosen = choose(found, count, data, built_in, given, world.device)
    config, model_config, data = new_run(arguments.preset, data, training_given, model_given, file, chosen)
    if arguments.data is None or built_in:
        return config, model_config, data, data if data in _BUILT_IN else kind
    if found is None and (model_config.channels == 1 or model_config.likelihood_name == "bernoulli"):
        found, _ = inspected()
    if found is not None:
        check_kind(found, data, model_config, given)
    if chosen is not None and chosen.line:
        say(chosen.line)
    return config, model_config, os.path.abspath(Path(data).expanduser()), kind


def new_run(
    preset_name: str | None,
    data: str | None,
    training_given: dict[str, Any],
    model_given: dict[str, Any],
    file: config_file.ConfigFile | None = None,
    chosen: Choice | None = None,
) -> tuple[TrainingConfig, NVAEConfig, str]:
    """The configurations of a run and its data: the options given, then those of the file, then those of the preset or, without
    one, what was chosen for the data, then the defaults."""
    training: dict[str, Any] = {}
    model: dict[str, Any] = {"dataset": data} if data in _BUILT_IN else {}
    missing = (
        "--data is missing: give digits, photos or the path of your images. (--preset digits_demo trains a small model on "
        "the built-in digits for about two minutes)"
    )
    if preset_name is not None:
        entry = training_preset(preset_name)
        training, model = entry.training.to_dict(), entry.model_config().to_dict()
        data = data or entry.data
        missing = f"preset {entry.name} needs --data, the path of its images"
    elif chosen is not None:
        training, model = dict(chosen.training), dict(chosen.model)
    for given in (file.training if file is not None else {}, training_given):
        # A length given takes the place of that of the layer below, in whatever unit that is.
        if "epochs" in given:
            training["max_steps"] = None
        if "epochs" in given or "max_steps" in given:
            training["time_limit"] = None
        training.update(given)
    model.update(file.model if file is not None else {})
    configs = TrainingConfig(**training), NVAEConfig(**{**model, **model_given})
    if data is None:
        raise ValueError(missing)
    return *configs, data


def _resumed_config(
    state: dict[str, Any], given: dict[str, Any], say: Any, world: distributed.World
) -> TrainingConfig:
    config = _shared_out(TrainingConfig.from_dict(state["training_config"]), state, say, world)
    changed = {name: value for name, value in given.items() if getattr(config, name) != value}
    if "epochs" in given and "max_steps" not in given and config.max_steps is not None:
        changed["max_steps"] = None  # which would decide in place of the epochs given
    free = _RESUME_FREE if state.get("validation", {}).get("step") else {*_RESUME_FREE, *_VALIDATION}
    for name, value in changed.items():
        if name in _RESUME_REPORTED:
            say(f"{options.spelled(name)} changes from {getattr(config, name)} to {value} from here on")
        elif name not in free:
            raise ValueError(
                f"{options.spelled(name)} cannot change when a run is resumed: it has "
                f"{getattr(config, name)}, {value} was asked for"
            )
    config = config.replace(**changed)
    if config.time_limit is not None and changed.keys() & {"epochs", "max_steps"}:
        say(
            f"the run's --time-limit of {config.time_limit:g} minutes still holds (--time-limit none lifts it)"
        )
    return config


def _shared_out(
    config: TrainingConfig, state: dict[str, Any], say: Any, world: distributed.World
) -> TrainingConfig:
    """The configuration in which this number of processes takes as many images per step as the run to resume."""
    before = state["progress"]["world_size"]
    if before == world.size:
        return config
    images = config.batch_size * before
    if images % world.size:
        fitting = ", ".join(str(n) for n in range(1, images + 1) if images % n == 0)
        raise ValueError(
            f"a step of this run has {images} images ({before} processes with {config.batch_size} each), which "
            f"{world.size} processes cannot share evenly: resume with one of {fitting} processes"
        )
    size = images // world.size
    say(
        f"resumed by {world.size} process(es), so far {before}: --batch-size {config.batch_size} becomes {size}, a step has "
        f"the same {images} images; the noise differs from that of the earlier steps"
    )
    return config.replace(batch_size=size, accumulate=min(config.accumulate, size))


def _resumed_model(state: dict[str, Any], given: dict[str, Any], preset_name: str | None) -> Any:
    config = NVAEConfig(**state["model_config"])
    wanted = dict(given)
    if preset_name is not None:
        base = training_preset(preset_name).model_config()
        wanted = (base.replace(**given) if given else base).to_dict()
    have = config.to_dict()
    for name, value in wanted.items():
        if have.get(name) != value:
            raise ValueError(
                f"the model cannot change when a run is resumed: it has {name}={have.get(name)}, "
                f"{value} was asked for"
            )
    return config


def _is_complete(trainer: Trainer) -> bool:
    """Whether a resumed run has nothing to do: all steps are taken, nothing is to be evaluated, and the pictures are there."""
    return (
        trainer.step > 0
        and trainer.done
        and not trainer.validation.pending(trainer)
        and all((trainer.folder / name).exists() for name in _PICTURES)
    )


def _next_command(folder: Path) -> str:
    quoted = shlex.quote(str(folder))
    return f"next: python -m nvae_fast sample {quoted}, for new images; evaluate {quoted} for the likelihood"


def final_pictures(trainer: Trainer, data: str, kind: str | None, how: dict[str, Any]) -> None:
    config, model = trainer.config, trainer.evaluated_model
    samples, reconstructions = (trainer.folder / name for name in _PICTURES)
    own = samples if trainer.world.is_main else None
    with run_folder.writing(samples):
        pictures.write_samples(
            model,
            own,
            temperature=config.sample_temperature,
            seed=seeds.mix_seed(config.seed, seeds.SAMPLES),
            readjust_passes=config.sample_readjust_passes,
            step=trainer.step,
        )
    if not trainer.world.is_main:
        return
    try:
        # Images that were held out are open already.
        split = trainer.dataset.held_out is not None
        dataset = (
            validation_part(trainer.dataset) if split else open_images(data, kind, "test", model.config, how)
        )
    except (ValueError, OSError):
        # Folders and arrays may have no test part; training images are shown instead.
        dataset = trainer.dataset
    images = dataset.batch(torch.arange(min(32, len(dataset))), seeds.mix_seed(config.seed, seeds.DATA))
    with run_folder.writing(reconstructions):
        pictures.write_reconstructions(model, images, reconstructions)


def _run_summary(trainer: Trainer, data: str, folder: Path) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    model = trainer.model.config
    images = (
        f"{model.dataset} ({model.channels}x{model.resolution}x{model.resolution}, {model.likelihood_name})"
    )
    start = f"from step {trainer.step} " if trainer.step else ""
    return (
        f"{parameters / 1e6:.2f} M parameters, {len(trainer.dataset)} images of {data} as {images}, "
        f"{trainer.total_steps} steps {start}of {trainer.config.batch_size} images"
        + (f" on each of {trainer.world.size} processes" if trainer.world.size > 1 else "")
        + f" on {trainer.world.device} in {precision.described(trainer.config.autocast)}, into {folder}"
    )


def _write_config(trainer: Trainer, started_from: str | None) -> None:
    """Write config.json, which --config reads. started_from: the value of --init-from; a resumed run keeps what is there."""
    path, (source, kind) = trainer.folder / "config.json", trainer.data
    reading = getattr(trainer.dataset, "reading", None) or {}
    document = {
        "versions": versions(),
        "init_from": started_from or _recorded(path, "init_from"),
        "data": {
            "source": source,
            "kind": kind,
            # A crop for images of one size alone is the one that the dataset was published with.
            "crop": None if reading.get("only") else reading.get("crop"),
            "resample": reading.get("resample"),
            "val_fraction": 0.0 if trainer.dataset.held_out is None else trainer.dataset.held_out.fraction,
            "images": len(trainer.dataset),
        },
        "model": trainer.model.config.to_dict(),
        "training": trainer.config.to_dict(),
    }
    with run_folder.writing(path), atomic_file(path) as handle:
        handle.write((json.dumps(document, indent=2) + "\n").encode())


def _recorded(path: Path, key: str) -> Any:
    """The value of a key of a config.json; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")).get(key)
    except (OSError, ValueError, AttributeError):
        return None
