"""`python -m nvae_fast prepare`: a data set as it is downloaded into LMDB databases."""

from __future__ import annotations

import argparse

from nvae_fast.cli.common import reporter
from nvae_fast.data import prepare
from nvae_fast.data.decode import Reading
from nvae_fast.training.progress import Progress

# Sizes that data sets are trained at where none is given.
_SIZES = {"ffhq": 256, "imagenet": 32}


def run(arguments: argparse.Namespace) -> int:
    """Write the databases, say how many images they hold, and name those that were skipped."""
    say = reporter(arguments.quiet)
    lines: dict[str, Progress] = {}

    def progress(split: str, done: int, count: int) -> None:
        if split not in lines:
            for line in lines.values():
                line.close()
            lines[split] = Progress(
                split, count, unit="image", mode=arguments.progress, quiet=arguments.quiet
            )
        lines[split].update(done, force=done == count)

    try:
        summary = prepare(
            arguments.kind,
            arguments.source,
            arguments.target,
            size=arguments.size or _SIZES.get(arguments.kind),
            reading=Reading(arguments.crop, arguments.resample or "lanczos"),
            validation=arguments.validation,
            max_skipped=arguments.max_skipped_images,
            workers=arguments.workers,
            on_images=progress,
        )
    finally:
        for line in lines.values():
            line.close()
    for split, facts in summary["splits"].items():
        print(f"{split}: {facts['images']} images")
        for name, reason in facts["skipped"]:
            say(f"  skipped: {name}: {reason}")
    return 0
