"""`python -m nvae_fast sample`: new images from a model, as a PNG grid or as a folder of files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from nvae_fast.cli import options
from nvae_fast.cli.common import (
    check_picture,
    check_temperature,
    check_writable,
    load_model,
    pixel_temperature,
    progress_of,
    reporter,
    run_on_processes,
    set_threads,
    temperatures,
)
from nvae_fast.data import save_grid
from nvae_fast.data.png import to_pixels
from nvae_fast.distributed import single_process
from nvae_fast.io import atomic_file
from nvae_fast.training import distributed, pictures
from nvae_fast.training.config import check_bounds
from nvae_fast.training.image_files import check_folder, sample_to_folder
from nvae_fast.training.readjust import readjust

# A grid of more images is written only where it is asked for.
FEW = 256
_OTHER_PICTURES = (".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def run(arguments: argparse.Namespace) -> int:
    """Draw images from a model into a PNG grid or a folder."""
    options.check_numbers(arguments, "batch_size", "readjust_passes")
    options.check_numbers(arguments, "number", most=options.MOST_IMAGES)
    options.check_numbers(arguments, "columns", most=10_000)
    check_temperature("--temperature", arguments.temperature)
    check_bounds("--pixel-temperature", arguments.pixel_temperature, above=0)
    if arguments.pixel_temperature is not None and arguments.pixels == "mean":
        raise ValueError("--pixel-temperature needs --pixels sample: the mean of the likelihood has no noise")
    if arguments.out is None:
        few = arguments.number <= FEW or arguments.npy is not None
        arguments.out = "samples.png" if few else "samples"
    _check_target(arguments)
    set_threads(arguments.threads)
    return run_on_processes(arguments, _sample)


def _to_folder(arguments: argparse.Namespace) -> bool:
    return Path(arguments.out).suffix.lower() != ".png"


def _check_target(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if Path(out).suffix.lower() in _OTHER_PICTURES:
        raise ValueError(f"--out must be a PNG file for a grid (.png), or a folder, got {out}")
    if _to_folder(arguments):
        if arguments.npy is not None:
            raise ValueError(f"--npy holds all images in memory, --out {out} is a folder: use --format npz")
        if arguments.columns is not None and arguments.grid is None:
            raise ValueError(f"--columns needs a grid, --out {out} is a folder: give --grid FILE too")
        check_folder(Path(out), arguments.overwrite)  # before statistics are readjusted
    else:
        options.check_numbers(arguments, "number", most=1_000_000)  # in one grid, which is kept in memory
        for option in ("format", "grid"):
            if getattr(arguments, option) is not None:
                raise ValueError(f"--{option} is for a folder of images, --out {out} is a grid")
    if arguments.grid is not None:
        check_picture("--grid", arguments.grid)
    for file in (arguments.npy, arguments.grid, None if _to_folder(arguments) else out):
        if file is not None:
            check_writable(file, arguments.overwrite)


def _sample(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = reporter(arguments.quiet or not world.is_main)
    world.agree({"--out (a folder or a grid)": "a folder" if _to_folder(arguments) else "a grid"})
    model, facts = load_model(arguments, world, say)
    temperature = temperatures(arguments.temperature, model)
    of_pixels = pixel_temperature(arguments, model)
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
    drawn: dict[str, Any] = dict(
        temperature=temperature,
        pixel_temperature=of_pixels,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        pixels=arguments.pixels,
    )
    write = _write_folder if _to_folder(arguments) else _write_grid
    progress = progress_of(arguments, world, "sample", arguments.number)
    try:
        lines = write(arguments, world, model, dict(drawn, on_batch=progress.update))
    finally:
        progress.close()
    for line in lines:
        say(line)
    return 0


def _write_grid(
    arguments: argparse.Namespace, world: distributed.World, model: Any, drawn: dict[str, Any]
) -> list[str]:
    images = pictures.draw_images(model, arguments.number, world=world, **drawn)
    if not world.is_main:
        return []
    how = _how(model, drawn)
    save_grid(images, arguments.out, columns=arguments.columns, title=how)
    wrote = f"wrote {arguments.out}: {how}{_advice(model, drawn)}"
    if arguments.npy is None:
        return [wrote]
    with atomic_file(arguments.npy) as handle:
        np.save(handle, np.ascontiguousarray(to_pixels(images)))
    return [wrote, f"wrote {arguments.npy}"]


def _how(model: Any, drawn: dict[str, Any]) -> str:
    """How the images were drawn, for the title of a grid."""
    pixels = pictures.chosen_pixels(model, drawn["pixels"])
    return pictures.described(pixels, drawn["temperature"], drawn["pixel_temperature"])


def _advice(model: Any, drawn: dict[str, Any]) -> str:
    """What else `--pixels` can do, where the default was taken."""
    chosen = pictures.chosen_pixels(model, drawn["pixels"]) if drawn["pixels"] == "auto" else ""
    return " (--pixels mean shows images without its noise)" if chosen == "sample" else ""


def _write_folder(
    arguments: argparse.Namespace, world: distributed.World, model: Any, drawn: dict[str, Any]
) -> list[str]:
    done = sample_to_folder(
        model,
        arguments.out,
        arguments.number,
        format=arguments.format or "png",
        overwrite=arguments.overwrite,
        world=world,
        **drawn,
    )
    kept = f", {done.kept} were complete before" if done.kept else ""
    lines = [done.note] if done.note else []
    how = _how(model, drawn)
    lines.append(f"wrote {done.written} images into {arguments.out}{kept}: {how}{_advice(model, drawn)}")
    if arguments.grid is not None and world.is_main:
        with single_process():
            few = min(arguments.number, pictures.GRID)
            images = pictures.draw_images(model, few, **dict(drawn, on_batch=None))
        save_grid(images, arguments.grid, columns=arguments.columns, title=how)
        lines.append(f"wrote {arguments.grid}")
    return lines
