"""Charts of results: a panel for each workload, and one chart of all speed-ups.

``python -m benchmarks.charts docs/images/speed.png`` draws the speed-ups of the committed results; of several files, the first.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
from pathlib import Path
from typing import Any

from benchmarks import report
from nvae_fast.io import atomic_file

COLOURS = {
    "reference": "#9aa5b1",
    "library": "#5b8db8",
    "torch.compile": "#c9a227",
    report.OURS: "#2e8b57",
    "copy": "#dddddd",
}
SLOWER = "#b5533c"


def plot_path(asked: str | None, json_path: Path | None, machine_name: str) -> Path | None:
    """Where the plot goes; None when none is asked for (``asked`` None; empty means the default place).

    Raises:
        ImportError: matplotlib is missing.
    """
    if asked is None:
        return None
    try:
        import matplotlib  # noqa: F401  asked for now, not after minutes of measuring
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install matplotlib") from None
    if asked == "":
        return (
            json_path.with_suffix(".png") if json_path is not None else report.RESULTS / f"{machine_name}.png"
        )
    path = Path(asked)
    if path.is_dir() or path.suffix == "":
        return path / f"{machine_name}.png"
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {path}: expected a directory or a .png, .svg or .pdf file")
    return path


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of the time of all passes, a panel for each workload, with values, and the speed-up over the fastest other route.

    Each provider has one bar, in its faster memory format. The whiskers are the quartiles.
    """
    panels = []
    for key, rows in report.groups(results).items():
        providers = dict.fromkeys(row["provider"] for row in rows)
        fastest = [report.fastest(row for row in rows if row["provider"] == name) for name in providers]
        if any(fastest):
            panels.append((key, [row for row in fastest if row is not None], report.speedup(rows)))
    if not panels:
        raise ValueError("nothing to plot: no provider was timed")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(5.0 * columns, 0.6 + 2.1 * lines)
    for index, ((case, workload, dtype), rows, speedup) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        for place, row in enumerate(rows):
            median = report.total_ms(row)
            low, high = (
                sum(timed[f"{side}_quartile_ms"] for timed in row["passes"].values())
                for side in ("lower", "upper")
            )
            whisker = [[max(median - low, 0.0)], [max(high - median, 0.0)]]
            colour = COLOURS.get(row["provider"], "#888888")
            axes.barh(place, median, xerr=whisker, color=colour, error_kw={"elinewidth": 0.8})
            label = f"{median:.{report.decimals(median)}f} ms"
            if row["provider"] == report.OURS and speedup is not None:
                label += f", {speedup:.2f}x"
            axes.text(max(high, median), place, f" {label}", va="center", fontsize=8)
        names = [
            row["provider"] if row["provider"] == "copy" else f"{row['provider']}\n{row['memory_format']}"
            for row in rows
        ]
        axes.set_yticks(range(len(rows)), names, fontsize=7)
        axes.set_xticks([])
        axes.margins(x=0.35)
        axes.set_xlim(left=0)
        axes.invert_yaxis()
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        passes = " + ".join(rows[0]["passes"])
        axes.set_title("\n".join(textwrap.wrap(f"{case} {workload} {dtype}, {passes}", 58)), fontsize=9)
    title = f"{report.headline(results)}. Speed-up over the fastest other route."
    figure.suptitle("\n".join(textwrap.wrap(title, 60 * columns)), fontsize=9)
    _save(figure, path)


def speedup_chart(results: dict[str, Any], path: Path) -> None:
    """A bar for each operator and whole model: the median of the speed-ups of its workloads, with their range."""
    found: dict[str, list[float]] = {}
    for (case, _, _), rows in report.groups(results).items():
        value = report.speedup(rows)
        if value is not None:
            found.setdefault(case, []).append(value)
    if not found:
        raise ValueError("nothing to plot: no speed-up was measured")
    order = sorted(found, key=lambda case: (case not in report.MODELS, -statistics.median(found[case])))
    figure = _figure(7.0, 1.3 + 0.27 * len(order))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    for place, case in enumerate(order):
        values = found[case]
        middle, low, high = statistics.median(values), min(values), max(values)
        axes.barh(place, middle - 1, left=1, color=COLOURS[report.OURS] if middle >= 1 else SLOWER)
        axes.plot([low, high], [place, place], color="#333333", linewidth=1)
        spread = f" ({low:.2f} to {high:.2f})" if len(values) > 1 else ""
        axes.text(max(high, 1) * 1.05, place, f"{middle:.2f}x{spread}", va="center", fontsize=8)
    axes.set_yticks(range(len(order)), [_title(case) for case in order], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.set_xlim(
        min(0.5, *(min(values) for values in found.values())) * 0.95, max(map(max, found.values())) * 4
    )
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks], fontsize=8)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Speed-up over the fastest route of PyTorch: median and range over shapes", fontsize=9)
    axes.set_xlabel("\n".join(textwrap.wrap(report.headline(results), 100)), fontsize=7)
    _save(figure, path)


def _title(case: str) -> str:
    return case.replace("_", " ") + (", whole model" if case in report.MODELS else "")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)  # inches
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        figure.savefig(file, format=path.suffix.removeprefix(".") or None)


def main(argv: list[str] | None = None) -> int:
    """Draw the speed-ups of a results file. Returns the exit status: 0, or 2 for wrong arguments or files."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.charts", description="A chart of all speed-ups.")
    p.add_argument("out", type=Path, help="picture to write: .png, .svg or .pdf")
    default = next(iter(sorted(report.RESULTS.glob("*.json"))), None)
    p.add_argument(
        "--results",
        type=Path,
        default=default,
        metavar="FILE",
        help="results (default: the first of benchmarks/results)",
    )
    p.add_argument("--panels", action="store_true", help="a panel for each workload, with the times")
    arguments = p.parse_args(argv)
    if arguments.results is None:
        p.error(f"--results must be given: {report.RESULTS} holds none")
    try:
        path = plot_path(str(arguments.out), None, arguments.out.name)
        assert path is not None
        (plot if arguments.panels else speedup_chart)(report.read_json(arguments.results), path)
    except (ValueError, OSError, ImportError) as error:
        p.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
