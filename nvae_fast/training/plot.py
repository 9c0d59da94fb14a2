"""The curves of training runs in one picture: loss, bits per dimension, learning rate, and the KL of every group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nvae_fast.io import atomic_file
from nvae_fast.training import metrics

FORMATS = ("png", "pdf", "svg")
_VALIDATION = "val/bits_per_dim"
# The first steps are far from the rest: an axis begins with what is left after this part of the run.
_START = 0.03


def plot_runs(runs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str]) -> None:
    """Draw the curves of runs into a picture, beside each other.

    runs: run folders, or their `metrics.jsonl`. path: .png, .pdf or .svg. Above are the loss, the bits per dimension (those
    of validation, where a run has them, as dots) and the learning rate of all runs; below, for each run, the KL of every
    latent group over time, coarsest scale first. Raises FileNotFoundError or ValueError for a run without metrics or
    another suffix, ImportError with the command to run when matplotlib is missing.
    """
    suffix = Path(path).suffix[1:].lower()
    if suffix not in FORMATS:
        raise ValueError(f"plot (--out): the picture must be .png, .pdf or .svg, got {os.fspath(path)}")
    if not runs:
        raise ValueError("plot: no runs")
    found = dict(zip(_names(runs), [_read(run) for run in runs], strict=True))
    figure = _draw(found)
    with atomic_file(path) as handle:
        figure.savefig(handle, format=suffix, dpi=110)


def _read(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    file = Path(run)
    file = file / metrics.NAME if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"plot: no {metrics.NAME} of a run at {file}")
    lines = [line for line in metrics.read_metrics(file) if isinstance(line, dict) and "step" in line]
    if not lines:
        raise ValueError(f"plot: {file} has no lines of metrics yet")
    return lines


def _names(runs: Sequence[str | os.PathLike[str]]) -> list[str]:
    """What to call the runs: as much of the end of their paths as it takes to tell them apart."""
    paths = [Path(run).resolve() for run in runs]
    parts = [(path.parent if path.name == metrics.NAME else path).parts for path in paths]
    for length in range(1, max(map(len, parts))):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("plot: the same run is given twice")


def _column(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the lines that have a value."""
    pairs = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _draw(runs: dict[str, list[dict[str, Any]]]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot needs the package matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(max(13.0, 4.5 * len(runs)), 8.0), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    loss, bits, rate = above.subplots(1, 3)
    colours = [f"C{index % 10}" for index in range(len(runs))]
    for (name, lines), colour in zip(runs.items(), colours, strict=True):
        loss.plot(*_column(lines, "loss"), colour, label=name, linewidth=1.2)
        bits.plot(*_column(lines, "bits_per_dim"), colour, linewidth=1.2)
        rate.plot(*_column(lines, "learning_rate"), colour, linewidth=1.2)
        if _validated(lines):
            dots = _column(lines, _VALIDATION)
            bits.plot(*dots, "o", color=colour, markersize=4, markeredgecolor="black", zorder=3)
    for axis, title in (
        (loss, "loss (nats per image)"),
        (bits, "bits per dimension"),
        (rate, "learning rate"),
    ):
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
        axis.locator_params(axis="x", nbins=5)
    _limit(loss, runs, "loss")
    _limit(bits, runs, "bits_per_dim")
    rate.set_ylim(bottom=0)
    if any(_validated(lines) for lines in runs.values()):
        bits.plot([], [], "o", color="white", markersize=4, markeredgecolor="black", label="validation")
        bits.legend()
    if len(runs) > 1:
        loss.legend()
    _draw_groups(below, runs)
    return figure


def _validated(lines: list[dict[str, Any]]) -> bool:
    return any(_VALIDATION in line for line in lines)


def _limit(axis: Any, runs: dict[str, list[dict[str, Any]]], name: str) -> None:
    """Leave the first steps, which are far from the rest, out of an axis of values."""
    kept = []
    for lines in runs.values():
        steps, values = _column(lines, name)
        if len(steps):
            kept.append(values[steps >= steps[0] + _START * (steps[-1] - steps[0])])
    values = np.concatenate(kept) if kept else np.zeros(0)
    if len(values) and values.min() < values.max():
        margin = 0.05 * (values.max() - values.min())
        axis.set_ylim(values.min() - margin, values.max() + margin)


def _draw_groups(figure: Any, runs: dict[str, list[dict[str, Any]]]) -> None:
    """A map of the KL for each run: steps to the right, groups downwards; at the right edge how many channels are active."""
    axes = figure.subplots(1, len(runs), squeeze=False, sharex=True)[0]
    tables = {name: [line for line in lines if line.get("kl_per_group")] for name, lines in runs.items()}
    largest = max((max(line["kl_per_group"]) for lines in tables.values() for line in lines), default=1.0)
    shown = None
    for axis, (name, lines) in zip(axes, tables.items(), strict=True):
        axis.set_title(f"KL of each group: {name}")
        axis.set_xlabel("step")
        if not lines:
            axis.text(
                0.5, 0.5, "not in this run's metrics", ha="center", va="center", transform=axis.transAxes
            )
            axis.set_axis_off()
            continue
        steps = np.array([line["step"] for line in lines])
        table = np.array([line["kl_per_group"] for line in lines]).T
        groups = len(table)
        shown = axis.pcolormesh(
            steps,
            np.arange(groups),
            table,
            vmin=0,
            vmax=largest,
            cmap="viridis",
            shading="nearest",
            rasterized=True,
        )
        axis.set_ylim(groups - 0.5, -0.5)
        axis.set_ylabel("group (0 is the coarsest)")
        axis.locator_params(axis="x", nbins=5)
        ticks = np.arange(0, groups, 1 + groups // 40)
        axis.set_yticks(ticks)
        active = lines[-1].get("active_per_group") or []
        beside = axis.secondary_yaxis("right")
        beside.set_yticks(
            ticks if len(active) == groups else [], [str(active[t]) for t in ticks if len(active) == groups]
        )
        beside.set_ylabel("active channels at the end")
        for side in (axis, beside):
            side.tick_params(axis="y", labelsize=min(10.0, 190 / len(ticks)))
    if shown is not None:
        figure.colorbar(shown, ax=list(axes), label="nats per image", pad=0.02)
