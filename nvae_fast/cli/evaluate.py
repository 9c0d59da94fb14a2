"""`python -m nvae_fast evaluate`: the likelihood bounds of images under a model."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from nvae_fast.cli import options
from nvae_fast.cli.common import (
    check_writable,
    images_of,
    load_model,
    progress_of,
    report_skipped,
    reporter,
    run_on_processes,
    set_threads,
)
from nvae_fast.io import atomic_file
from nvae_fast.training import distributed
from nvae_fast.training.evaluation import evaluate


def run(arguments: argparse.Namespace) -> int:
    """Report the likelihood bounds of images under a model."""
    options.check_numbers(arguments, "samples", "batch_size", "max_images")
    if arguments.json not in (None, "-"):
        check_writable(arguments.json, overwrite=True)
    set_threads(arguments.threads)
    return run_on_processes(arguments, _evaluate)


def _evaluate(arguments: argparse.Namespace, world: distributed.World) -> int:
    say = reporter(arguments.quiet or not world.is_main)
    model, facts = load_model(arguments, world, say)
    dataset, data, split = images_of(arguments, facts, model.config, say)
    total = min(len(dataset), arguments.max_images or len(dataset))
    progress = progress_of(arguments, world, "evaluate", total)
    try:
        result = evaluate(
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
    report_skipped(dataset, say)
    if not world.is_main:
        return 0
    report = {
        "checkpoint": facts["path"],
        "weights": facts["weights"],
        "data": data,
        "split": split,
        **result.to_dict(),
    }
    if arguments.json is not None:
        text = json.dumps(report, indent=2) + "\n"
        if arguments.json == "-":
            sys.stdout.write(text)
        else:
            with atomic_file(arguments.json) as handle:
                handle.write(text.encode())
            say(f"wrote {arguments.json}")
    if arguments.json is None or (arguments.json != "-" and not arguments.quiet):
        print(_evaluation_table(report))
    else:
        say(_evaluation_table(report))  # on stderr: stdout is the JSON
    return 0


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
