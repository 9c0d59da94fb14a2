"""`python -m nvae_fast plot`: the curves of training runs as a picture."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvae_fast.cli.common import check_writable, reporter
from nvae_fast.training.plot import plot_runs


def run(arguments: argparse.Namespace) -> int:
    """Draw the curves of one or several runs."""
    out = arguments.out
    if out is None:
        if len(arguments.runs) > 1:
            raise ValueError(f"--out is needed for the picture of {len(arguments.runs)} runs")
        first = Path(arguments.runs[0])
        out = (first if first.is_dir() else first.parent) / "curves.png"
    check_writable(out, arguments.overwrite)
    plot_runs(arguments.runs, out)
    reporter(arguments.quiet)(f"wrote {out}")
    return 0
