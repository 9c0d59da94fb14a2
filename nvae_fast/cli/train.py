"""`python -m nvae_fast train`: train a model, or continue a run."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from nvae_fast.cli import options
from nvae_fast.cli.common import open_images, report_skipped, reporter, run_on_processes, versions
from nvae_fast.io import atomic_file
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.training import checkpoint, distributed, pictures, run_folder, seeds
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.loop import Trainer
from nvae_fast.training.presets import preset as training_preset
from nvae_fast.training.progress import clock

# What may change when a run is resumed without it ceasing to be the same run.
_RESUME_FREE = {
    "time_limit",
    "workers",
    "max_bad_steps",
    "checkpoint_every",
    "log_every",
    "sample_every",
    "sample_temperature",
    "sample_readjust_passes",
    "tensorboard",
}
# What may change but changes the result: a message says so.
_RESUME_TOLD = {
    "epochs",
    "max_steps",
    "learning_rate",
    "learning_rate_min",
    "grad_clip",
    "autocast",
    "accumulate",
    "threads",
}


def run(arguments: argparse.Namespace) -> int:
    """Train a model or continue a run; see `python -m nvae_fast train --help`."""
    return run_on_processes(
        arguments, _train, "See the run folder for its newest checkpoint, --resume goes on from it"
    )


def _train(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = reporter(arguments.quiet or not world.is_main)
    training_names = [field.name for field in dataclasses.fields(TrainingConfig)]
    training_given = options.given(arguments, training_names)
    if training_given.get("autocast") == "none":
        training_given["autocast"] = None
    model_given = options.given(arguments, options.MODEL_HELP)

    state = None
    if arguments.resume:
        folder = Path(arguments.out or f"runs/{arguments.preset or 'digits_demo'}")
        if world.is_main:
            run_folder.prepare(folder, resume=True, overwrite=arguments.overwrite)
        world.barrier()
        state = checkpoint.load_training(folder)
        config = _resumed_config(state, training_given, say, world)
        model_config = _resumed_model(state, model_given, arguments.preset)
        data = arguments.data or state["data"].get("source") or state["data"]["name"]
        kind = arguments.data_kind or state["data"].get("kind")
    else:
        chosen = training_preset(arguments.preset or "digits_demo")
        config = chosen.training.replace(**training_given)
        model_config = chosen.model_config()
        if model_given:
            model_config = model_config.replace(**model_given)
        data, kind = arguments.data or chosen.data, arguments.data_kind
        if data is None:
            raise ValueError(f"preset {chosen.name} needs --data, the path of its images")
        folder = Path(arguments.out or f"runs/{chosen.name}")
    dataset = open_images(data, kind, "train", model_config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    torch.manual_seed(config.seed)
    model = NVAE(model_config)
    trainer = Trainer(
        model,
        config,
        dataset,
        folder,
        world=world,
        state=state,
        quiet=arguments.quiet,
        progress=arguments.progress,
        data=(data, kind),
    )
    # Everything that can be wrong with the arguments has been found by now: only now is anything written.
    if world.is_main and state is None:
        _, note = run_folder.prepare(folder, overwrite=arguments.overwrite)
        if note:
            say(note)
    world.barrier()
    if world.is_main:
        _write_config(folder, model_config, config, data, dataset)
    say(_run_summary(trainer, data, folder))
    result = trainer.run()
    report_skipped(dataset, say)
    skipped = f", {result.skipped} step(s) skipped as not finite" if result.skipped else ""
    if result.signal is not None:
        say(
            f"stopped at step {result.step} of {trainer.total_steps}{skipped}; saved in "
            f"{folder / checkpoint.NAME}, continue with --resume --out {folder}"
        )
        return 128 + result.signal
    _final_pictures(trainer, data, kind)
    world.barrier()
    say(f"trained {result.step} steps in {clock(result.seconds)}{skipped}: {folder}")
    return 0


def _resumed_config(
    state: dict[str, Any], given: dict[str, Any], say: Any, world: distributed.World
) -> TrainingConfig:
    config = _shared_out(TrainingConfig.from_dict(state["training_config"]), state, say, world)
    changed = {name: value for name, value in given.items() if getattr(config, name) != value}
    for name, value in changed.items():
        if name in _RESUME_TOLD:
            say(f"--{name.replace('_', '-')} changes from {getattr(config, name)} to {value} from here on")
        elif name not in _RESUME_FREE:
            raise ValueError(
                f"--{name.replace('_', '-')} cannot change when a run is resumed: it has "
                f"{getattr(config, name)}, {value} was asked for"
            )
    return config.replace(**changed)


def _shared_out(
    config: TrainingConfig, state: dict[str, Any], say: Any, world: distributed.World
) -> TrainingConfig:
    """The configuration in which this number of processes takes as many images a step as the run's did."""
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
        f"the same {images} images; noise is drawn anew"
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


def _final_pictures(trainer: Trainer, data: str, kind: str | None) -> None:
    config, model = trainer.config, trainer.model
    own = trainer.folder / "samples.png" if trainer.world.is_main else None
    with run_folder.writing(trainer.folder / "samples.png"):
        pictures.write_samples(
            model,
            own,
            temperature=config.sample_temperature,
            seed=seeds.mix_seed(config.seed, seeds.SAMPLES),
            readjust_passes=config.sample_readjust_passes,
        )
    if not trainer.world.is_main:
        return
    try:
        dataset = open_images(data, kind, "test", model.config)
    except (ValueError, OSError):
        # Plain folders and arrays may have no test part; its training images show as much.
        dataset = trainer.dataset
    images = dataset.batch(torch.arange(min(32, len(dataset))), seeds.mix_seed(config.seed, seeds.DATA))
    with run_folder.writing(trainer.folder / "reconstructions.png"):
        pictures.write_reconstructions(model, images, trainer.folder / "reconstructions.png")


def _run_summary(trainer: Trainer, data: str, folder: Path) -> str:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = f"from step {trainer.step} " if trainer.step else ""
    return (
        f"{parameters / 1e6:.2f} M parameters, {len(trainer.dataset)} images of {data}, "
        f"{trainer.total_steps} steps {start}of {trainer.config.batch_size} images"
        + (f" on each of {trainer.world.size} processes" if trainer.world.size > 1 else "")
        + f" on {trainer.world.device}, into {folder}"
    )


def _write_config(folder: Path, model_config: Any, config: TrainingConfig, data: str, dataset: Any) -> None:
    document = {
        "versions": versions(),
        "data": {"source": data, "images": len(dataset)},
        "model": model_config.to_dict(),
        "training": config.to_dict(),
    }
    with run_folder.writing(folder / "config.json"), atomic_file(folder / "config.json") as handle:
        handle.write((json.dumps(document, indent=2) + "\n").encode())
