"""`python -m nvae_fast fid`: the Frechet inception distance between a model's images and a dataset's."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvae_fast.cli import options
from nvae_fast.cli.common import (
    check_temperature,
    check_writable,
    images_of,
    load_model,
    pixel_temperature,
    progress_of,
    report_skipped,
    reporter,
    run_on_processes,
    same_data,
    set_threads,
    temperatures,
)
from nvae_fast.data import ImageDataset
from nvae_fast.distributed import single_process
from nvae_fast.io import atomic_file
from nvae_fast.training import checkpoint, distributed, fid
from nvae_fast.training.config import check_bounds
from nvae_fast.training.fid import FeatureStatistics
from nvae_fast.training.readjust import readjust


def run(arguments: argparse.Namespace) -> int:
    """Report the distance between images of a model and those of a dataset."""
    options.check_numbers(arguments, "number", least=2, most=options.MOST_IMAGES)
    options.check_numbers(arguments, "max_images", "kid", least=2)
    options.check_numbers(arguments, "batch_size", "readjust_passes")
    check_temperature("--temperature", arguments.temperature)
    check_bounds("--pixel-temperature", arguments.pixel_temperature, above=0)
    if arguments.stats is not None:
        stats = Path(arguments.stats)
        if stats.suffix != ".npz" or stats.is_dir():
            raise ValueError(f"--stats must be an .npz file, got {stats}")
        if not stats.exists() and not os.access(stats.parent, os.W_OK):
            raise ValueError(
                f"--stats {stats}: there is no folder {stats.parent} that files can be written to"
            )
        if stats.exists() and arguments.kid is not None:
            raise ValueError(
                f"--kid needs the features of the images, which --stats {stats} does not have: leave out one of the two"
            )
    if arguments.kid is not None:
        _check_subsets(arguments.kid, min(arguments.number, arguments.max_images or arguments.number))
    if arguments.json not in (None, "-"):
        check_writable(arguments.json, overwrite=True)
    set_threads(arguments.threads)
    return run_on_processes(arguments, _fid)


def _fid(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = reporter(arguments.quiet or not world.is_main)
    extract = fid.load_inception(arguments.inception, layer=arguments.layer, device=world.device)
    model, facts = load_model(arguments, world, say)
    features = {"layer": arguments.layer, "inception": checkpoint.file_hash(arguments.inception)}
    known = _known_statistics(arguments, model, features, say)
    temperature = temperatures(arguments.temperature, model)
    of_pixels = pixel_temperature(arguments, model)
    how = {"batch_size": arguments.batch_size, "keep_features": arguments.kid is not None, "world": world}
    world.agree({"--stats (whether the file exists)": known is not None, "--inception": features})
    real = known or _real_statistics(arguments, model, facts, extract, features, how, say)
    if known is None and arguments.stats is not None and world.is_main:
        real.save(arguments.stats)
        say(f"wrote {arguments.stats}")
    if getattr(arguments, "readjust", False):
        with single_process():  # the same statistics on every process, and those of a single one
            readjust(
                model,
                Path(facts["path"]),
                temperature=temperature,
                passes=arguments.readjust_passes,
                keep=world.is_main,
                weights=facts["weights"],
                report=say,
            )
    with contextlib.closing(progress_of(arguments, world, "samples", arguments.number)) as progress:
        drawn = fid.model_statistics(
            model,
            extract,
            arguments.number,
            temperature=temperature,
            pixel_temperature=of_pixels,
            seed=arguments.seed,
            on_batch=progress.update,
            **how,
        )
    if not world.is_main:
        return 0
    _note_of_few(real, drawn, say)
    report: dict[str, Any] = {
        "checkpoint": facts["path"],
        "weights": facts["weights"],
        "fid": fid.frechet_distance(drawn, real),
    }
    if arguments.kid is not None:
        mean, deviation = fid.kernel_distance(drawn, real, size=arguments.kid, seed=arguments.seed % 2**32)
        report.update(kid=mean, kid_standard_deviation=deviation)
    report.update(
        images=drawn.images,
        features=drawn.mu.size,
        temperature=temperature,
        pixel_temperature=of_pixels,
        seed=arguments.seed,
        **features,
    )
    report["reference"] = {"stats": arguments.stats, "images": real.images, **real.facts}
    if arguments.json is None:
        print(_table(report))
    elif arguments.json == "-":
        print(json.dumps(report, indent=2))
    else:
        with atomic_file(arguments.json) as handle:
            handle.write((json.dumps(report, indent=2) + "\n").encode())
        say(f"wrote {arguments.json}")
    return 0


def _known_statistics(
    arguments: argparse.Namespace, model: Any, features: dict[str, str], say: Callable[[str], None]
) -> FeatureStatistics | None:
    """The statistics in the file of --stats, None where there is none yet. Raises ValueError when they do not fit."""
    if arguments.stats is None or not Path(arguments.stats).exists():
        return None
    name = f"--stats {arguments.stats}"
    found = FeatureStatistics.load(arguments.stats)
    if found.mu.size != int(arguments.layer):
        raise ValueError(
            f"{name} has {found.mu.size} features, --layer {arguments.layer} has {arguments.layer}"
        )
    for key in ("data", "data_kind", "split", "max_images", "crop", "resample"):
        option, value = f"--{key.replace('_', '-')}", getattr(arguments, key)
        if value is not None and key not in found.facts:
            say(f"{name} does not say which images it is of: they are used in place of {option} {value}")
        elif (
            value is not None
            and found.facts[key] != value
            and not (key == "data" and same_data(value, found.facts[key]))
        ):
            raise ValueError(
                f"{name} was made with {option} {found.facts[key]}, not {value}: leave {option} out, or give another file"
            )
    size = model.config.resolution
    if found.facts.get("image_size", size) != size:
        raise ValueError(
            f"{name} is of images of {found.facts['image_size']} pixels a side, those of the model have {size}: give "
            "another file"
        )
    if found.facts.get("inception", features["inception"]) != features["inception"]:
        raise ValueError(f"{name} was made with other weights than --inception {arguments.inception}")
    return found


def _real_statistics(
    arguments: argparse.Namespace,
    model: Any,
    facts: dict[str, Any],
    extract: Any,
    features: dict[str, str],
    how: dict[str, Any],
    say: Callable[[str], None],
) -> FeatureStatistics:
    images, data, split = images_of(
        arguments, facts, model.config, say, split="train", advice="give --data, or --stats"
    )
    # The images themselves: all bits, and grey values in place of drawn black and white ones.
    dataset = ImageDataset(images.source, split=split)
    total = min(len(dataset), arguments.max_images or len(dataset))
    if arguments.kid is not None:
        _check_subsets(arguments.kid, total)
    with contextlib.closing(progress_of(arguments, how["world"], "images", total)) as progress:
        found = fid.dataset_statistics(
            dataset, extract, max_images=arguments.max_images, on_batch=progress.update, **how
        )
    report_skipped(dataset, say)
    kind = arguments.data_kind
    if arguments.data is None:
        kind = kind or facts["data"].get("kind")
    origin = {
        "data": data,
        "data_kind": kind,
        "split": split,
        "max_images": arguments.max_images,
        "image_size": dataset.image_size,
        **{key: value for key, value in (dataset.reading or {}).items() if key in ("crop", "resample")},
    }
    return dataclasses.replace(found, facts={**origin, **features})


def _check_subsets(size: int, images: int) -> None:
    if size > images:
        raise ValueError(f"--kid must be at most the number of images, {images}, got {size}")


def _note_of_few(real: FeatureStatistics, drawn: FeatureStatistics, say: Callable[[str], None]) -> None:
    for images, option in ((drawn.images, "--number"), (real.images, "--data")):
        if images is not None and images <= real.mu.size:
            say(
                f"{images} images ({option}) give a covariance of {real.mu.size} features without full rank: such a distance "
                "depends on their number, and compares with those of as many images alone; --layer has fewer features"
            )


def _table(report: dict[str, Any]) -> str:
    reference = report["reference"]
    source = reference.get("data") or reference["stats"]
    count = "" if reference["images"] is None else f"{reference['images']} images of "
    lines = [f"{report['images']} samples and {count}{source}", f"FID  {report['fid']:.4f}"]
    if "kid" in report:
        lines.append(f"KID  {report['kid']:.6f} (standard deviation {report['kid_standard_deviation']:.6f})")
    return "\n".join(lines)
