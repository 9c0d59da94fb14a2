"""Results: the document and its JSON file, the console table, and the tables in README.md, docs/benchmarks.md and
docs/accelerate.md.

``python -m benchmarks.report --readme --page --accelerate`` rewrites what is between the markers in README.md (a few rows) and
in docs/benchmarks.md (all of them) from benchmarks/results/*.json, and in docs/accelerate.md from the table by which
nvae_fast.accelerate chooses; ``--check`` changes nothing and fails when one is stale.

A document holds ``schema``, ``machine``, ``versions``, ``commit`` and whether the code was ``modified``
since, ``date``, ``settings``, ``ceilings`` and ``rows``. A row is one provider in one memory format on one
workload: ``status`` "ok", "absent" or "failed" with its ``reason``, the gate's ``errors`` and ``tolerance``,
and for every pass the median, quartiles and minimum in milliseconds, ``gb_per_s`` against the bytes the pass
must move, ``copy_fraction`` of the copy bandwidth measured in the same run; ``peak_bytes``,
``operator_calls`` (CPU) or ``kernel_launches`` (GPU) of all passes together; of whole models on a GPU also
``host_launches``, where a CUDA graph counts once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from nvae_fast.io import atomic_file
from nvae_fast.patching import wins

SCHEMA = 1
HEAD = ("machine", "versions", "commit", "modified", "date", "settings", "ceilings")
ROW = ("case", "module", "workload", "dtype", "provider", "memory_format", "status", "reason", "passes")
STATUSES = ("ok", "absent", "failed")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    "--readme": ROOT / "README.md",
    "--page": ROOT / "docs" / "benchmarks.md",
    "--accelerate": ROOT / "docs" / "accelerate.md",
}
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (
    "op",
    "shape",
    "dtype",
    "eager",
    "eager channels_last",
    "compile",
    "library",
    "nvae_fast",
    "speed-up",
    "of copy bandwidth",
)
NONE = "\N{EN DASH}"
EXPLANATION = f"""\
Milliseconds of all passes of an op (forward and backward), medians; in brackets half the distance between the
quartiles. `eager` is the reference, plain PyTorch; `compile` and `library` are torch.compile of it and the
best route PyTorch offers, in the faster memory format, as is `nvae_fast`; {NONE} means not measured. Speed-up
is over the fastest of the others, with the 95 % interval that the quartiles give. Every number passed the correctness
gate first."""
WHOLE_MODELS = """\
Whole models, each provider in its faster memory format. Peak memory on a CPU is what a step or a sampling pass held
beyond what was there before, on a GPU model and optimizer too."""
OURS = "nvae_fast"
PYTORCH = ("reference", "torch.compile", "library")
MODELS = ("training_step", "sampling", "evaluation")
# The rows of README: (case, how the workload begins). The last one is slower than PyTorch.
SUMMARY = (
    ("training_step", "cifar10"),
    ("sampling", "cifar10"),
    ("evaluation", "cifar10"),
    ("inverted_residual_cell", "B32"),
    ("residual_normal", "B32"),
    ("weight_norm", "Out40"),
)
SUMMARY_CASES = [case for case, _ in SUMMARY]
SUMMARY_HEAD = (
    "| float32 | fastest route of PyTorch, ms | nvae_fast, ms | speed-up |",
    "|---|---|---:|---:|",
)


def document(head: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Head and rows as one validated document."""
    result = {"schema": SCHEMA, **head, "rows": rows}
    validate(result, "results")
    return result


def validate(results: Any, source: str) -> None:
    """Raises ValueError naming ``source`` and what is missing or wrong."""
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        found = results.get("schema") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"{source}: expected a results document with schema {SCHEMA}, got {found!r}")
    missing = [key for key in (*HEAD, "rows") if key not in results]
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}")
    for index, row in enumerate(results["rows"]):
        missing = [key for key in ROW if key not in row]
        if missing:
            raise ValueError(f"{source}: row {index}: missing {', '.join(missing)}")
        if row["status"] not in STATUSES:
            raise ValueError(
                f"{source}: row {index}: status must be one of {STATUSES}, got {row['status']!r}"
            )
        if row["status"] == "ok" and not row["passes"]:
            raise ValueError(f"{source}: row {index}: status is ok, but nothing was timed")


def failed(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows whose gate was red or that broke down."""
    return [row for row in results["rows"] if row["status"] == "failed"]


# ------------------------------------------------------------------------------------------------------ JSON


def read_json(path: Path) -> dict[str, Any]:
    """A results file, validated.

    Raises:
        ValueError: it is none. OSError: it cannot be read.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    validate(results, str(path))
    return results


def write_json(results: dict[str, Any], path: Path) -> None:
    """Write a results file whole or not at all."""
    validate(results, "results")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check_target(path: Path, cases: Iterable[str], *, overwrite: bool) -> None:
    """Refuse, before anything is measured, to lose results that this run would not replace.

    Raises:
        ValueError: the file holds other cases, or is something else, and ``overwrite`` is not set.
    """
    if path.is_dir():
        raise ValueError(f"--json {path}: is a directory, expected a file")
    if not path.exists() or overwrite:
        return
    try:
        kept = {row["case"] for row in read_json(path)["rows"]} - set(cases)
    except ValueError as error:
        raise ValueError(
            f"--json: would replace a file that holds no results ({error}); add --overwrite"
        ) from None
    if kept:
        raise ValueError(
            f"--json {path}: holds cases this run does not measure ({', '.join(sorted(kept))}); "
            "choose another file, or add --overwrite"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic_file(path) as file:
        file.write(text.encode())


# --------------------------------------------------------------------------------------------------- console


def groups(results: dict[str, Any]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Rows by (case, workload, dtype), in the order of measurement."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault((row["case"], row["workload"], row["dtype"]), []).append(row)
    return found


def total_ms(row: dict[str, Any]) -> float:
    """All passes of a row: the sum of their medians, milliseconds."""
    return sum(timed["median_ms"] for timed in row["passes"].values())


def console(results: dict[str, Any]) -> str:
    """A table for each workload."""
    lines = [headline(results)]
    for (case, workload, dtype), rows in groups(results).items():
        lines += ["", f"{case}  {workload}  {dtype}"]
        said: set[tuple[str, str]] = set()
        for row in rows:
            name = f"{row['provider']} {row['memory_format']}" if row["provider"] != "copy" else "copy"
            if row["status"] != "ok":
                if (row["provider"], row["reason"]) not in said:
                    said.add((row["provider"], row["reason"]))
                    lines.append(f"  {row['provider']:<28}{row['status']}: {row['reason']}")
                continue
            cells = [f"{lap} {_timed(timed)}" for lap, timed in row["passes"].items()]
            if row.get("peak_bytes") is not None:
                cells.append(f"{row['peak_bytes'] / 2**20:.1f} MiB peak")
            cells += [f"{row[key]} {what}" for key, what in _COUNTS.items() if row.get(key) is not None]
            lines.append(f"  {name:<28}" + "   ".join(cells))
    return "\n".join(lines)


_COUNTS = {
    "operator_calls": "operator calls",
    "kernel_launches": "kernel launches",
    "host_launches": "launches by the host",
}


def _timed(timed: dict[str, Any]) -> str:
    spread = f"[{timed['lower_quartile_ms']:.3f} {timed['upper_quartile_ms']:.3f}]"
    text = f"{timed['median_ms']:9.3f} ms {spread}"
    if "gb_per_s" in timed:
        text += f" {timed['gb_per_s']:7.2f} GB/s {100 * timed['copy_fraction']:4.0f}% of copy"
    if "matmul_fraction" in timed:
        text += f" {100 * timed['matmul_fraction']:3.0f}% of matmul"
    if "images_per_s" in timed:
        text += f" {timed['images_per_s']:8.1f} images/s"
    return text


def headline(results: dict[str, Any]) -> str:
    """Machine, versions, commit and day in a line."""
    m, v = results["machine"], results["versions"]
    where = m.get("gpu") or f"{m['processor']}, {m['threads']} threads"
    versions = f"nvae_fast {v['nvae_fast']}, torch {v['torch']}"
    commit = f"commit {results['commit']}" if results["commit"] else "no commit"
    changed = " with local changes" if results["modified"] else ""
    return f"{m['name']}: {where}; {versions}; {commit}{changed}; {results['date'][:10]}"


# ------------------------------------------------------------------------------------- README and docs


def speedup(rows: list[dict[str, Any]]) -> float | None:
    """Time of the fastest route of PyTorch, divided by ours; None where one was not timed."""
    ours = fastest(row for row in rows if row["provider"] == OURS)
    others = fastest(row for row in rows if row["provider"] in PYTORCH)
    return total_ms(others) / total_ms(ours) if ours and others else None


def speedup_cell(rows: list[dict[str, Any]]) -> str:
    """The speed-up and its 95 % interval.

    The standard error of a median is 0.93 interquartile ranges over the root of the number of samples (of normally distributed
    ones); relative errors of passes and providers add up as independent ones do.
    """
    value = speedup(rows)
    if value is None:
        return NONE
    variance = 0.0
    for providers in ((OURS,), PYTORCH):
        row = fastest(row for row in rows if row["provider"] in providers)
        assert row is not None
        errors = (
            0.93 * (timed["upper_quartile_ms"] - timed["lower_quartile_ms"]) / math.sqrt(timed["samples"])
            for timed in row["passes"].values()
        )
        variance += sum(error**2 for error in errors) / total_ms(row) ** 2
    factor = math.exp(1.96 * math.sqrt(variance))
    return f"{value:.2f}x [{value / factor:.2f} {value * factor:.2f}]"


def summary_table(documents: list[dict[str, Any]]) -> str:
    """What README shows of each document: where it was measured, a few rows, and the workloads that are slower than PyTorch."""
    parts = []
    for results in documents:
        lines, slower = [], []
        for (name, workload, dtype), rows in groups(results).items():
            others = fastest(row for row in rows if row["provider"] in PYTORCH)
            ours = fastest(row for row in rows if row["provider"] == OURS)
            value = speedup(rows)
            if value is None or others is None or dtype != "float32":
                continue
            if any(name == case and workload.startswith(start) for case, start in SUMMARY):
                cells = (
                    f"{name} {workload}",
                    f"{others['provider']}, {_cell(others)}",
                    _cell(ours),
                    speedup_cell(rows),
                )
                lines.append((SUMMARY_CASES.index(name), f"| {' | '.join(cells)} |"))
            if value < 1:
                slower.append(f"{name} {workload} ({value:.2f}x)")
        if lines:
            table = [line for _, line in sorted(lines, key=lambda line: line[0])]
            parts += [_wrapped(f"Measured on {headline(results)}."), "\n".join([*SUMMARY_HEAD, *table])]
        if lines and slower:
            parts.append(_wrapped(f"Slower than PyTorch there: {', '.join(slower)}."))
    return "\n\n".join(parts) or "No measurements are committed yet: `make bench` makes them."


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 128, break_long_words=False, break_on_hyphens=False)


def accelerate_table() -> str:
    """The measurements in nvae_fast/patching/measured: for each machine, dtype and part the speed-ups over all sizes."""
    tables = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(wins.FOLDER.glob("*.json")))
    return "\n\n".join(text for table in tables for text in _parts_tables(table))


def _parts_tables(table: dict[str, Any]) -> Iterator[str]:
    """A table in Markdown for each device and dtype of one machine."""
    found: dict[tuple[str, str], dict[str, dict[tuple[str, str], list[float]]]] = {}
    for device, dtype, part, mode, layout, _, _, _, ratio, *_ in table["rows"]:
        of_part = found.setdefault((device, dtype), {}).setdefault(part, {})
        of_part.setdefault((mode, layout), []).append(ratio)
    measured = table["measured_on"]
    m, v = measured["machine"], measured["versions"]
    where = f"{m['name']}: {m['processor']}, {measured['threads']} thread; torch {v['torch']}; {measured['date'][:10]}"
    columns = [
        (mode, layout) for mode in ("training", "evaluation") for layout in ("contiguous", "channels_last")
    ]
    for (_, dtype), parts in found.items():
        lines = [
            _wrapped(f"{dtype}, median and range over sizes. Measured on {where}."),
            "",
            f"| part | {' | '.join(f'{mode}, {layout}' for mode, layout in columns)} |",
            f"|---|{'---:|' * len(columns)}",
        ]
        for part, ratios in sorted(parts.items()):
            cells = [
                f"{statistics.median(ratios[c]):.2f} ({min(ratios[c]):.2f} to {max(ratios[c]):.2f})"
                if c in ratios
                else NONE
                for c in columns
            ]
            lines.append(f"| {part} | {' | '.join(cells)} |")
        yield "\n".join(lines)


def page_table(documents: list[dict[str, Any]]) -> str:
    """All results in Markdown. Every number in it is in a results file."""
    if not documents:
        return "No measurements are committed yet: `make bench` makes them."
    parts = [EXPLANATION]
    for results in documents:
        parts += ["", f"**{headline(results)}**", "", *_markdown(results)]
        whole = _whole_models(results)
        if whole:
            parts += ["", WHOLE_MODELS, "", *whole]
    return "\n".join(parts)


def _markdown(results: dict[str, Any]) -> list[str]:
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * 3}{'---:|' * (len(COLUMNS) - 3)}",
    ]
    for (case, workload, dtype), rows in groups(results).items():
        timed = [row for row in rows if row["status"] == "ok" and row["provider"] != "copy"]
        if not timed:
            continue
        eager = [row for row in timed if row["provider"] == "reference"]
        first = fastest(row for row in eager if row["memory_format"] == "NCHW")
        second = fastest(row for row in eager if row["memory_format"] == "channels_last")
        compiled = fastest(row for row in timed if row["provider"] == "torch.compile")
        library = fastest(row for row in timed if row["provider"] == "library")
        ours = fastest(row for row in timed if row["provider"] == OURS)
        cells = [
            case,
            workload,
            dtype,
            *map(_cell, (first, second, compiled, library, ours)),
            speedup_cell(timed),
            _share(ours),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _whole_models(results: dict[str, Any]) -> list[str]:
    """A table of throughput, memory and calls, for the rows that have images per second; empty without any."""
    lines = []
    for (case, workload, dtype), rows in groups(results).items():
        for provider in (*PYTORCH, OURS):
            row = fastest(
                row
                for row in rows
                if row["status"] == "ok"
                and row["provider"] == provider
                and all("images_per_s" in timed for timed in row["passes"].values())
            )
            if row is None:
                continue
            (timed,) = row["passes"].values()
            peak = row.get("peak_bytes")
            counts = [f"{row[key]:,} {what}" for key, what in _COUNTS.items() if row.get(key) is not None]
            rate = timed["images_per_s"]
            cells = [
                f"{case} {workload}",
                dtype,
                f"{provider} {row['memory_format']}",
                f"{rate:.{decimals(rate)}f}",
                NONE if peak is None else f"{peak / 2**20:.0f}",
                ", ".join(counts) or NONE,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    head = "| whole model | dtype | provider | images/s | peak memory, MiB | calls a step |"
    return [head, "|---|---|---|---:|---:|---|", *lines] if lines else []


def fastest(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that was timed with the least time; None without any."""
    return min((row for row in rows if row["status"] == "ok"), key=total_ms, default=None)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return NONE
    spread = sum(t["upper_quartile_ms"] - t["lower_quartile_ms"] for t in row["passes"].values()) / 2
    digits = decimals(total_ms(row))
    return f"{total_ms(row):.{digits}f} [{spread:.{digits}f}]"


def decimals(value: float) -> int:
    """How many decimals show three significant digits; none above a hundred."""
    return next((digits for digits, least in ((0, 100.0), (1, 10.0), (2, 1.0)) if value >= least), 3)


def _share(row: dict[str, Any] | None) -> str:
    if row is None or any("copy_fraction" not in timed for timed in row["passes"].values()):
        return NONE
    return " / ".join(f"{100 * timed['copy_fraction']:.0f}%" for timed in row["passes"].values())


def with_table(readme: str, table: str, source: str = "README.md") -> str:
    """``readme`` with the text between the markers replaced.

    Raises:
        ValueError: there is not exactly one pair of markers.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"{source}: expected one {BEGIN} followed by one {END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 for a stale table, 2 for wrong arguments or files."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.report", description="The tables of results.")
    for option, file in PAGES.items():
        text = f"rewrite the table of {file.relative_to(ROOT)}"
        p.add_argument(option, nargs="?", type=Path, const=file, metavar="PATH", help=text)
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where the JSON files are")
    p.add_argument("--check", action="store_true", help="change nothing; exit 1 when a table is stale")
    arguments = p.parse_args(argv)
    tables: dict[Path | None, Callable[[], str]] = {
        arguments.readme: lambda: summary_table(documents()),
        arguments.page: lambda: page_table(documents()),
        arguments.accelerate: accelerate_table,
    }
    tables.pop(None, None)
    if not tables:
        p.error(f"give at least one of {', '.join(PAGES)}")

    def documents() -> list[dict[str, Any]]:
        return [read_json(file) for file in sorted(arguments.results.glob("*.json"))]

    stale = False
    for path, table in tables.items():
        assert path is not None
        try:
            old = path.read_text(encoding="utf-8")
            new = with_table(old, table(), str(path))
        except (ValueError, OSError) as error:
            p.error(str(error))
        if arguments.check and old != new:
            print(f"{path}: the results table is stale; run python -m benchmarks.report {' '.join(PAGES)}")
            stale = True
        elif old != new:
            write_text(path, new)
    return int(stale)


if __name__ == "__main__":
    raise SystemExit(main())
