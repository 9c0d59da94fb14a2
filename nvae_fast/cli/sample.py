"""`python -m nvae_fast sample`: new images from a model, as a PNG grid."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from nvae_fast.cli import options
from nvae_fast.cli.common import check_writable, progress_of, reporter, run_on_processes, set_threads
from nvae_fast.data import save_grid
from nvae_fast.distributed import single_process
from nvae_fast.io import atomic_file
from nvae_fast.training import checkpoint, distributed, pictures
from nvae_fast.training.config import check_bounds
from nvae_fast.training.readjust import readjust


def run(arguments: argparse.Namespace) -> int:
    """Draw images from a model into a PNG grid."""
    options.check_numbers(arguments, "batch_size", "readjust_passes")
    options.check_numbers(arguments, "number", most=1_000_000)  # in one grid, which is kept in memory
    options.check_numbers(arguments, "columns", most=10_000)
    check_bounds("--temperature", arguments.temperature, above=0)
    for file in (arguments.out, arguments.npy):
        if file is not None:
            check_writable(file, arguments.overwrite)
    set_threads(arguments.threads)
    return run_on_processes(arguments, _sample)


def _sample(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = reporter(arguments.quiet or not world.is_main)
    model, facts = checkpoint.load_model(arguments.checkpoint, map_location=world.device)
    if getattr(arguments, "readjust", False):
        with single_process():  # the same statistics on every process, and those of a single one
            readjust(
                model,
                Path(facts["path"]),
                temperature=arguments.temperature,
                passes=arguments.readjust_passes,
                keep=world.is_main,
                report=say,
            )
    progress = progress_of(arguments, world, "sample", arguments.number)
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
