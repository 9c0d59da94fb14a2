"""``python -m benchmarks.growth``: growth of a training step with batch, resolution, groups, depth, width and threads.

Time and memory. From one small model each axis is varied alone: the reference, torch.compile of it with --compile, and this
package's path, in turns. The slope is that of a line through the points in logarithmic scales: 1 is proportional growth, less
means a part that does not grow. Memory is what a step held beyond what was there before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import nvae_fast as nf
from benchmarks import machine, measure
from benchmarks.charts import COLOURS
from benchmarks.model import Bench, Contender, TrainingRun, Workload
from benchmarks.providers import OURS, time_limit
from benchmarks.report import headline, write_text
from benchmarks.timing import Clock, WallClock, interleave
from nvae_fast.io import atomic_file
from nvae_fast.training.graph import WARM_UP

PROVIDERS = ("reference", "torch.compile", OURS)
# The model that every axis starts from, on a CPU; a GPU has room for a wider one.
BASE: dict[str, Any] = {
    "dataset": "photos",
    "num_latent_scales": 2,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 8,
    "num_preprocess_blocks": 1,
    "num_postprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_cells": 2,
    "num_cell_per_cond_enc": 1,
    "num_cell_per_cond_dec": 1,
}
CHANNELS = {"cpu": 8, "cuda": 32}
BATCH = {"cpu": 4, "cuda": 16}
# (what the axis counts, its values); the channels are factors of the base's.
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "batch": ("images", (1, 2, 4, 8, 16)),
    "resolution": ("pixels a side", (16, 32, 64, 128)),
    "groups": ("latent groups at the finest scale", (1, 2, 4, 8)),
    "depth": ("cells a group in either tower", (1, 2, 3, 4)),
    "channels": ("channels at full resolution", (1, 2, 4)),
    "threads": ("CPU threads", (1, 2, 4, 8, 16, 32, 64)),  # as many as there are cores
}


def workload(axis: str, value: int, device: torch.device) -> tuple[int, Workload]:
    """(value on the axis, setting): the base with one thing changed."""
    width, batch = CHANNELS[device.type], BATCH[device.type]
    changes: dict[str, Any] = {}
    if axis == "batch":
        batch = value
    elif axis == "resolution":
        changes["image_size"] = value
    elif axis == "groups":
        changes["num_groups_per_scale"] = value
    elif axis == "threads":
        pass  # the setting is the base
    elif axis == "depth":
        changes |= {"num_cell_per_cond_enc": value, "num_cell_per_cond_dec": value}
    else:
        value = width = width * value
    options = {**BASE, **changes, "num_channels_enc": width, "num_channels_dec": width}
    precision = "bfloat16" if device.type == "cuda" else "float32"
    return value, Workload("photos", nf.NVAEConfig(**options), batch, precision)


def values_of(axis: str, device: torch.device) -> tuple[int, ...]:
    """The values of an axis on this machine; none of threads on a GPU."""
    values = AXES[axis][1]
    if axis != "threads":
        return values
    return tuple(v for v in values if device.type == "cpu" and v <= (os.cpu_count() or 1))


def measure_point(
    setting: Workload, device: torch.device, seconds: float, rounds: int, compile_seconds: float
) -> dict[str, Any]:
    """{provider: median and quartiles of a step in milliseconds, images a second, peak memory in bytes}.

    torch.compile is left out where it takes longer than ``compile_seconds``.
    """
    bench = Bench(setting, device)
    samples: dict[str, Callable[[Clock], None]] = {}
    peaks: dict[str, int | None] = {}
    for provider in PROVIDERS:
        compiled = provider == "torch.compile"
        if compiled and compile_seconds <= 0:
            continue
        backend = "auto" if provider == OURS else "reference"
        contender = Contender(
            provider, "channels_last", backend=backend, plain_noise=compiled, compiled=compiled
        )
        try:
            with (
                contender.context(device),
                time_limit(compile_seconds if compiled else 0, "compilation"),
            ):
                step = TrainingRun(bench, contender, given_noise=False)
                for _ in range(WARM_UP + 2 if device.type == "cuda" else 1):
                    step()
        except Exception:
            if not compiled:
                raise
            continue
        with contender.context(device):
            peaks[provider] = measure.peak_bytes(step, device)

        def sample(clock: Clock, step: TrainingRun = step, contender: Contender = contender) -> None:
            with contender.context(device):
                clock.start()
                step()
                clock.lap("step")

        samples[provider] = sample
    times, failures = interleave(samples, WallClock(device), seconds=seconds, warmup=1, min_rounds=rounds)
    if failures:
        raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    found = {}
    for provider, laps in times.items():
        summary = laps["step"].summary()
        rate = 1e3 * setting.batch / summary["median_ms"]
        found[provider] = {**summary, "images_per_s": rate, "peak_bytes": peaks[provider]}
    return found


def slope(points: list[tuple[float, float]]) -> float | None:
    """Of the least-squares line through (log x, log y); None for fewer than two points."""
    if len(points) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(values) for values in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def run(
    axes: list[str],
    device: torch.device,
    *,
    seconds: float = 1.0,
    rounds: int = 3,
    points: int | None = None,
    compile_seconds: float = 0.0,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All axes as a document. points: only the first so many of each, for tests; compile_seconds: for each point."""
    document = machine.describe(device)
    measure.settle_allocator(device)
    document["settings"] = {
        "seconds": seconds,
        "compile_seconds": compile_seconds,
        "base": BASE,
        "tf32": False,
    }
    document["axes"] = {}
    threads = torch.get_num_threads()
    for axis in axes:
        rows = []
        for factor in values_of(axis, device)[:points]:
            value, setting = workload(axis, factor, device)
            if axis == "threads":
                torch.set_num_threads(value)
            try:
                timed = measure_point(setting, device, seconds, rounds, compile_seconds)
            finally:
                torch.set_num_threads(threads)
            rows.append({"value": value, "workload": setting.label, "providers": timed})
            say(
                f"{axis} {value}: "
                + ", ".join(f"{name} {entry['median_ms']:.1f} ms" for name, entry in timed.items())
            )
        slopes = {
            what: {provider: slope(_points(rows, provider, what)) for provider in PROVIDERS}
            for what in ("median_ms", "peak_bytes")
        }
        for what, found in slopes.items():
            say(f"{axis}: slope of {what} {', '.join(f'{name} {_shown(s)}' for name, s in found.items())}")
        document["axes"][axis] = {"unit": AXES[axis][0], "points": rows, "slopes": slopes}
    return document


def _points(rows: list[dict[str, Any]], provider: str, what: str) -> list[tuple[float, float]]:
    found = ((row["value"], row["providers"].get(provider, {}).get(what)) for row in rows)
    return [(x, y) for x, y in found if y]


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(document: dict[str, Any], path: Path) -> None:
    """Time above memory, a column for each axis, both scales logarithmic, quartiles as whiskers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    axes = {name: entry for name, entry in document["axes"].items() if entry["points"]}
    figure = Figure(figsize=(3.4 * len(axes), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (name, entry) in enumerate(axes.items()):
        for row, (what, unit, scale) in enumerate(
            (("median_ms", "training step, ms", 1), ("peak_bytes", "peak memory, MiB", 2**20))
        ):
            panel = figure.add_subplot(2, len(axes), row * len(axes) + column + 1)
            for provider in PROVIDERS:
                points = _points(entry["points"], provider, what)
                if not points:
                    continue
                timed = [p["providers"][provider] for p in entry["points"] if provider in p["providers"]]
                whiskers = None
                if what == "median_ms":
                    whiskers = [
                        [t["median_ms"] - t["lower_quartile_ms"] for t in timed],
                        [t["upper_quartile_ms"] - t["median_ms"] for t in timed],
                    ]
                panel.errorbar(
                    [x for x, _ in points],
                    [y / scale for _, y in points],
                    yerr=whiskers,
                    marker="o",
                    capsize=3,
                    label=f"{provider}, slope {_shown(entry['slopes'][what][provider])}",
                    color=COLOURS[provider],
                )
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            values = [point["value"] for point in entry["points"]]
            panel.set_xticks(values, [str(value) for value in values])
            panel.set_title(name if row == 0 else "", fontsize=11)
            panel.set_xlabel(entry["unit"], fontsize=9)
            if column == 0:
                panel.set_ylabel(unit, fontsize=9)
            panel.tick_params(labelsize=8)
            panel.legend(fontsize=7)
    figure.suptitle(headline(document), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, format=path.suffix.removeprefix(".") or None)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 2 for wrong arguments."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.splitlines()[0])
    p.add_argument("axes", nargs="*", metavar="axis", help=f"what grows (default: {' '.join(AXES)})")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument(
        "--seconds", type=float, default=1.0, help="measuring time of a point, seconds (default 1)"
    )
    p.add_argument(
        "--compile",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="measure torch.compile too, at points where it compiles within that time (default 0: not)",
    )
    p.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    p.add_argument("--plot", type=Path, metavar="PATH", help="draw the curves there (.png, .svg or .pdf)")
    arguments = p.parse_args(argv)
    axes = arguments.axes or list(AXES)
    try:
        unknown = [name for name in axes if name not in AXES]
        if unknown:
            raise ValueError(f"no such axis: {', '.join(unknown)}; there are: {', '.join(AXES)}")
        if arguments.threads is not None and arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        if arguments.seconds < 0:
            raise ValueError(f"--seconds must not be negative, got {arguments.seconds:g}")
        if arguments.compile < 0:
            raise ValueError(f"--compile must not be negative, got {arguments.compile:g}")
        if arguments.plot is not None:
            if arguments.plot.suffix not in (".png", ".svg", ".pdf"):
                raise ValueError(f"--plot {arguments.plot}: expected a .png, .svg or .pdf file")
            try:
                import matplotlib  # noqa: F401  asked for now, not after minutes of measuring
            except ImportError:
                raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
        device = machine.resolve_device(arguments.device)
    except ValueError as error:
        p.error(str(error))
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    document = run(
        axes,
        device,
        seconds=arguments.seconds,
        compile_seconds=arguments.compile,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_text(arguments.json, json.dumps(document, indent=1, allow_nan=False) + "\n")
    if arguments.plot is not None:
        plot(document, arguments.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
