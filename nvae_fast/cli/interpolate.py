"""`python -m nvae_fast interpolate`: pictures between pairs of images, through the latent variables of all groups."""

from __future__ import annotations

import argparse

import torch

from nvae_fast.cli import options
from nvae_fast.cli.common import (
    check_picture,
    check_writable,
    images_of,
    load_model,
    report_skipped,
    reporter,
    run_on_processes,
    set_threads,
)
from nvae_fast.cli.latents import MOST, Encoded, check_counts, choose
from nvae_fast.data import save_grid
from nvae_fast.models.latents import interpolate_latents
from nvae_fast.training import distributed

PAIRS = 6


def run(arguments: argparse.Namespace) -> int:
    """Write a row of pictures for each pair of images."""
    check_counts(arguments, "pairs")
    options.check_numbers(arguments, "steps", least=2, most=MOST)
    if arguments.images is not None and len(arguments.images) % 2:
        raise ValueError(f"--images must be pairs, an even number of images, got {len(arguments.images)}")
    check_picture("--out", arguments.out)
    check_writable(arguments.out, arguments.overwrite)
    set_threads(arguments.threads)
    return run_on_processes(arguments, _interpolate)


@torch.no_grad()
def _interpolate(arguments: argparse.Namespace, world: distributed.World) -> int:
    if not world.is_main:
        return 0
    say = reporter(arguments.quiet)
    model, facts = load_model(arguments, world, say)
    dataset, name, split = images_of(arguments, facts, model.config, say)
    chosen = choose(arguments, dataset, f"{name} ({split})", 2 * (arguments.pairs or PAIRS))
    found = Encoded(arguments, model, dataset, chosen)
    start, end = ([z[side::2] for z in found.latents] for side in (0, 1))
    fractions = [step / (arguments.steps - 1) for step in range(arguments.steps)]
    between = [
        found.pictures(interpolate_latents(start, end, fraction, mode=arguments.mode))
        for fraction in fractions
    ]
    columns = [found.images[0::2], *between, found.images[1::2]]
    save_grid(
        torch.stack(columns, dim=1).flatten(0, 1),
        arguments.out,
        columns=len(columns),
        row_labels=[f"{a} to {b}" for a, b in zip(chosen[0::2], chosen[1::2], strict=True)],
        column_labels=["image", *(f"{fraction:.3g}" for fraction in fractions), "image"],
    )
    report_skipped(dataset, say)
    say(f"wrote {arguments.out}: rows are images of {name} ({split}) by number, {arguments.mode}")
    return 0
