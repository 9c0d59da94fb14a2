"""What each command does. Called by `nvae_fast.cli.main` with parsed arguments; returns the exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nvae_fast as nf
from nvae_fast import _backend, cli_options
from nvae_fast._distributed import alone
from nvae_fast._files import atomic_file
from nvae_fast.data import open_dataset, save_grid
from nvae_fast.training import checkpoint, distributed, pictures, run_folder, seeds
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.evaluate import evaluate as evaluate_model
from nvae_fast.training.loop import Trainer
from nvae_fast.training.presets import preset as training_preset
from nvae_fast.training.progress import Progress, clock
from nvae_fast.training.readjust import readjust

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
# What may change but changes what comes out, so that the user is told.
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


def train(arguments: argparse.Namespace) -> int:
    """Train a model or continue a run; see `python -m nvae_fast train --help`."""
    return _together(
        arguments, _train, "See the run folder for its newest checkpoint, --resume goes on from it"
    )


def _train(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = _speaker(arguments.quiet or not world.is_main)
    training_names = [field.name for field in dataclasses.fields(TrainingConfig)]
    training_given = cli_options.given(arguments, training_names)
    if training_given.get("autocast") == "none":
        training_given["autocast"] = None
    model_given = cli_options.given(arguments, cli_options.MODEL_HELP)

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
    dataset = _open(data, kind, "train", model_config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    torch.manual_seed(config.seed)
    model = nf.NVAE(model_config)
    trainer = Trainer(
        model, config, dataset, folder, world=world, state=state, quiet=arguments.quiet, data=(data, kind)
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
    _say_skipped(dataset, say)
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


def evaluate(arguments: argparse.Namespace) -> int:
    """Report the likelihood bounds of images under a model."""
    _threads(arguments)
    return _together(arguments, _evaluate)


def _evaluate(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = _speaker(arguments.quiet or not world.is_main)
    model, facts = checkpoint.load_model(arguments.checkpoint, map_location=world.device)
    data, kind = arguments.data, arguments.data_kind
    if data is None:
        trained = facts.get("data", {})
        data, kind = trained.get("source"), kind or trained.get("kind")
        if data is None:
            raise ValueError(f"{facts['path']} does not say what it was trained on: give --data")
    dataset = _open(data, kind, arguments.split, model.config)
    total = min(len(dataset), arguments.max_images or len(dataset))
    progress = Progress("evaluate", total, unit="image", quiet=arguments.quiet or not world.is_main)
    try:
        result = evaluate_model(
            model,
            dataset,
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            max_images=arguments.max_images,
            autocast=None if arguments.autocast == "none" else arguments.autocast,
            on_batch=lambda done, value: progress.update(done, f"bound {value:.3f} nats"),
            world=world,
        )
    finally:
        progress.close()
    _say_skipped(dataset, say)
    if not world.is_main:
        return 0
    report = {"checkpoint": facts["path"], "data": data, "split": arguments.split, **result.to_dict()}
    if arguments.json is not None:
        text = json.dumps(report, indent=2) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            with atomic_file(arguments.json) as handle:
                handle.write(text.encode())
            say(f"wrote {arguments.json}")
    else:
        print(_evaluation_table(report))
    return 0


def sample(arguments: argparse.Namespace) -> int:
    """Draw images from a model into a PNG grid."""
    for name in ("number", "batch_size", "readjust_passes", "columns"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not arguments.temperature > 0:
        raise ValueError(f"--temperature must be greater than 0, got {arguments.temperature:g}")
    for file in (arguments.out, arguments.npy):
        if file is not None:
            _may_write(file, arguments.overwrite)
    _threads(arguments)
    return _together(arguments, _sample)


def _sample(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = _speaker(arguments.quiet or not world.is_main)
    model, facts = checkpoint.load_model(arguments.checkpoint, map_location=world.device)
    if getattr(arguments, "readjust", False):
        with alone():  # the same statistics on every process, and those of a single one
            readjust(
                model,
                Path(facts["path"]),
                temperature=arguments.temperature,
                passes=arguments.readjust_passes,
                keep=world.is_main,
                report=say,
            )
    progress = Progress("sample", arguments.number, unit="image", quiet=arguments.quiet or not world.is_main)
    try:
        images = pictures.draw_images(
            model,
            arguments.number,
            temperature=arguments.temperature,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            pixels=arguments.pixels,
            on_batch=progress.update,
            world=world,
        )
    finally:
        progress.close()
    if not world.is_main:
        return 0
    save_grid(images, arguments.out, columns=arguments.columns)
    say(f"wrote {arguments.out}")
    if arguments.npy is not None:
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        with atomic_file(arguments.npy) as handle:
            np.save(handle, pixels)
        say(f"wrote {arguments.npy}")
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Rewrite a checkpoint in the other format."""
    source = checkpoint.resolve(arguments.source)
    target = Path(arguments.target)
    _may_write(target, arguments.overwrite)
    if target.exists() and target.samefile(source):
        raise ValueError(f"source and target are the same file: {source}")
    kind = checkpoint.sniff(source)
    if kind == "damaged":
        raise checkpoint.CheckpointError(f"checkpoint {source} is truncated or damaged")
    if kind == "nvae_fast":
        document = checkpoint.load(source)
        model = checkpoint.model_from(document, source)
        progress = document.get("progress", {})
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            nf.save_official(
                model, temporary, epoch=progress.get("epoch", 0), global_step=progress.get("step", 0)
            )
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        print(f"wrote {target} in the official format (weights and options; no optimizer state)")
        return 0
    model = nf.load_official(source)
    document = {
        "nvae_fast": getattr(nf, "__version__", "unknown"),
        "torch": str(torch.__version__),
        "model_config": model.config.to_dict(),
        "model": model.state_dict(),
        "converted_from": source.name,
    }
    checkpoint.save(document, target.parent, name=target.name, keep_previous=False)
    print(f"wrote {target} (for evaluate and sample)")
    return 0


def info(arguments: argparse.Namespace) -> int:
    """Print versions, devices and the backend of every operation."""
    report: dict[str, Any] = {
        "versions": _versions(),
        "machine": {
            "platform": platform.platform(),
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "extension": _extension(),
        "missing": _backend.missing(),
        "backends": nf.backends(),
    }
    if arguments.json:
        print(json.dumps(report, indent=2, default=str))
        return 0
    for title in ("versions", "machine", "extension", "missing"):
        print(title if report[title] else f"{title}: nothing")
        for name, value in report[title].items():
            print(f"  {name:<16} {_short(value)}")
    print("backends")
    for op, devices in report["backends"].items():
        print(f"  {op}")
        for device, value in devices.items():
            print(f"    {device:<6} {_short(value)}")
    return 0


def _together(
    arguments: argparse.Namespace,
    work: Callable[[argparse.Namespace, distributed.World], int],
    advice: str = "Nothing was written: start all of them again",
) -> int:
    """Run `work` on this process, or on each of those torchrun started."""
    world = distributed.start_world(arguments.device)
    with world.contact(lambda: advice):
        code = work(arguments, world)
    world.close()
    return code


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
    config = nf.NVAEConfig(**state["model_config"])
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


def _open(data: str, kind: str | None, split: str, model_config: Any) -> Any:
    return open_dataset(
        data,
        split=split,
        image_size=model_config.resolution,
        channels=model_config.channels,
        num_bits=model_config.num_x_bits,
        kind=kind,
    )


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
        dataset = _open(data, kind, "test", model.config)
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
        "versions": _versions(),
        "data": {"source": data, "images": len(dataset)},
        "model": model_config.to_dict(),
        "training": config.to_dict(),
    }
    with run_folder.writing(folder / "config.json"), atomic_file(folder / "config.json") as handle:
        handle.write((json.dumps(document, indent=2) + "\n").encode())


def _evaluation_table(report: dict[str, Any]) -> str:
    rows = [
        ("negative ELBO", report["negative_elbo"], report["negative_elbo_bits_per_dim"]),
        (
            f"-log p(x), K = {report['samples']}",
            report["negative_log_likelihood"],
            report["negative_log_likelihood_bits_per_dim"],
        ),
        ("reconstruction", report["reconstruction"], None),
        ("KL", report["kl"], None),
    ]
    lines = [f"{report['images']} images of {report['data']} ({report['split']})"]
    lines.append(f"{'':<24} {'nats':>12} {'bits/dim':>10}")
    for name, nats, bits in rows:
        lines.append(f"{name:<24} {nats:12.4f} {'' if bits is None else f'{bits:10.5f}'}".rstrip())
    lines.append(
        f"{'active latent channels':<24} {report['active_channels']:>7} of {report['latent_channels']}"
    )
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    versions = {
        "nvae_fast": getattr(nf, "__version__", "unknown"),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "not in this PyTorch",
        "numpy": np.__version__,
    }
    from importlib import metadata

    for name in ("triton", "pillow", "scikit-learn", "lmdb", "matplotlib", "tensorboard"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _extension() -> dict[str, Any]:
    from nvae_fast.ops import _extension as extension

    loaded = extension.load()
    return {"loaded": loaded, "reason": extension.reason(), **extension.info()}


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return "none" if value is None else str(value)


def _may_write(path: str | Path, overwrite: bool) -> None:
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder, a file name is needed")
    if not file.parent.is_dir():
        raise ValueError(f"the folder of {file} does not exist")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already: --overwrite replaces it")


def _threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)


def _speaker(quiet: bool) -> Any:
    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    return say


def _say_skipped(dataset: Any, say: Any) -> None:
    if dataset.skipped:
        file, reason = dataset.skipped[0]
        say(f"{len(dataset.skipped)} unreadable image(s) skipped, the first: {file}: {reason}")
