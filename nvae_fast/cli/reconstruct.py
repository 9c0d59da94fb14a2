"""`python -m nvae_fast reconstruct`: images beside what the model makes of their latent variables."""

from __future__ import annotations

import argparse

import torch

from nvae_fast.cli.common import (
    check_picture,
    check_temperature,
    check_writable,
    images_of,
    load_model,
    report_skipped,
    reporter,
    run_on_processes,
    set_threads,
    temperatures,
)
from nvae_fast.cli.latents import Encoded, check_counts, choose
from nvae_fast.data import save_grid
from nvae_fast.training import distributed

NUMBER = 10


def run(arguments: argparse.Namespace) -> int:
    """Write images, their reconstructions, and reconstructions from the first groups."""
    check_counts(arguments, "number")
    check_temperature("--temperature", arguments.temperature)
    if arguments.temperature is not None and not arguments.groups:
        raise ValueError("--temperature needs --groups: nothing else is drawn from the prior")
    check_picture("--out", arguments.out)
    check_writable(arguments.out, arguments.overwrite)
    set_threads(arguments.threads)
    return run_on_processes(arguments, _reconstruct)


@torch.no_grad()
def _reconstruct(arguments: argparse.Namespace, world: distributed.World) -> int:
    if not world.is_main:
        return 0
    say = reporter(arguments.quiet)
    model, facts = load_model(arguments, world, say)
    groups = model.config.num_groups
    parts = arguments.groups or []
    for count in parts:
        if not 1 <= count <= groups:
            raise ValueError(f"--groups must be from 1 to {groups}, the groups of this model, got {count}")
    dataset, name, split = images_of(arguments, facts, model.config, say)
    chosen = choose(arguments, dataset, f"{name} ({split})", arguments.number or NUMBER)
    found = Encoded(arguments, model, dataset, chosen)
    rows = [found.images]
    labels = ["image"]
    for count in parts:
        temperature = temperatures(1.0 if arguments.temperature is None else arguments.temperature, model)
        rows.append(found.pictures(found.latents[:count], temperature=temperature, seed=found.prior_seeds))
        labels.append(f"{count} of {groups}\ngroups")
    rows.append(found.pictures(found.latents))
    labels.append("recon-\nstruction")
    save_grid(
        torch.cat(rows),
        arguments.out,
        columns=len(chosen),
        row_labels=labels,
        column_labels=[str(index) for index in chosen],
    )
    report_skipped(dataset, say)
    say(f"wrote {arguments.out}: columns are images of {name} ({split}) by number")
    return 0
