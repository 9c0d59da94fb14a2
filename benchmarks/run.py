"""The driver: correctness gate first, then every provider in turn, and a report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import charts, machine, measure, model, report
from benchmarks.case import Case, Shape, load_cases, select
from benchmarks.gate import Gate, finite
from benchmarks.providers import (
    FORMAT_NAMES,
    Candidate,
    Execution,
    absent_reason,
    build_inputs,
    candidates,
    one_line,
    time_limit,
)
from benchmarks.settings import CompileBudget, Settings, settings_for
from benchmarks.timing import Clock, clock_for, interleave

# Measured first, because a run with a time budget may not reach the rest: what the package exists for.
FIRST = (
    "residual_normal",
    "depthwise_conv2d",
    "inverted_residual_cell",
    "batch_norm_swish",
    "mixture_logistic_log_prob",
    "weight_norm_many",
)
OPERATOR_SHARE = 0.55  # of a budget, when whole models are asked for too


def measure_case(
    case: Case,
    settings: Settings,
    ceilings: dict[str, float],
    budget: CompileBudget,
    say: Callable[[str], None],
    deadline: float = float("inf"),
) -> tuple[list[dict[str, Any]], list[str]]:
    """Every shape and dtype of ``case`` that can start before ``deadline`` (of `time.perf_counter`): one row for each
    provider and memory format; and what was skipped."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    dtypes = case.dtypes if settings.device.type == "cuda" else case.cpu_dtypes
    for dtype in dtypes:
        for index, shape in enumerate(case.shapes[settings.scale]):
            label = f"{case.name}  {case.label(shape)}  {str(dtype).removeprefix('torch.')}"
            if time.perf_counter() > deadline:
                skipped.append(f"{label} (--budget {settings.budget:g})")
                say(f"skipped: {skipped[-1]}")
                continue
            say(label)
            reason = budget.reason(first=index == 0 or settings.all_shapes_compiled)
            providers = candidates(case, shape, settings.device, compile_reason=reason)
            rows += measure_workload(case, shape, dtype, providers, settings, ceilings, budget)
            torch._dynamo.reset()
    return rows, skipped


def measure_workload(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    providers: list[Candidate],
    settings: Settings,
    ceilings: dict[str, float],
    budget: CompileBudget,
) -> list[dict[str, Any]]:
    """Gate ``providers``, then time those that passed, with a copy of the same bytes among them."""
    device = settings.device
    inputs = build_inputs(case, shape, dtype, device)
    gate = Gate(case, inputs, case.noise(shape) if case.noise else None, dtype)
    rows: dict[str, dict[str, Any]] = {}
    samples: dict[str, Callable[[Clock], None]] = {}
    for provider in providers:
        row = _row(case, shape, dtype, provider)
        rows[provider.name] = row
        if provider.run is None:
            row["status"], row["reason"] = "absent", provider.reason
            continue
        started = time.perf_counter()
        try:
            with time_limit(max(budget.left, 1.0) if provider.compiled else 0, "compilation"):
                verdict = gate.judge(provider)
                row["gate"] = {"tolerance": verdict.tolerance, "errors": finite(verdict.errors)}
                if not verdict.passed:
                    row["status"], row["reason"] = "failed", verdict.reason
                    continue
                execution = Execution(
                    case, provider.run, inputs, dtype=dtype, memory_format=provider.memory_format
                )
                with provider.context(device):
                    execution.both()
            row |= _costs(execution, provider, device)
            samples[provider.name] = _sampler(execution, provider, device)
        except Exception as error:
            # A compiler that gives up is worth knowing, but no fault of ours.
            row["status"] = "absent" if provider.compiled else "failed"
            row["reason"] = one_line(error)
        finally:
            if provider.compiled:
                budget.spent += time.perf_counter() - started
    work = case.work(shape, torch.empty((), dtype=dtype).element_size())
    copies = {name: measure.copy_buffers(w.bytes, device) for name, w in work.items()}
    samples["copy"] = _copy_sampler(copies)
    rows["copy"] = _row(case, shape, dtype, Candidate("copy", "contiguous", None))
    times, failures = interleave(
        samples, clock_for(device), seconds=settings.seconds, warmup=1, min_rounds=settings.min_rounds
    )
    for name, error in failures.items():
        rows[name]["status"], rows[name]["reason"] = "failed", error
    copy_rate = {
        name: 1e-6 * work[name].bytes / series.summary()["median_ms"]
        for name, series in times["copy"].items()
    }
    for name, laps in times.items():
        for lap, series in laps.items():
            summary = series.summary()
            summary["gb_per_s"] = 1e-6 * work[lap].bytes / summary["median_ms"]
            summary["copy_fraction"] = summary["gb_per_s"] / ceilings.get("copy_gb_per_s", copy_rate[lap])
            if work[lap].flops and name != "copy":
                summary["gflops"] = 1e-6 * work[lap].flops / summary["median_ms"]
                summary["matmul_fraction"] = summary["gflops"] / ceilings["matmul_gflops"]
            rows[name]["passes"][lap] = summary
    return list(rows.values())


def measure_models(
    cases: list[str],
    settings: Settings,
    say: Callable[[str], None],
    deadline: float = float("inf"),
    save: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Whole training steps and sampling of as many settings as time allows; rows, and what was skipped. ``save`` is called
    with the rows so far after each setting."""
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    budget = CompileBudget(
        settings.model_compile_seconds, 1, quick=settings.quick, option="--model-compile-seconds"
    )
    budget.next_case()
    started = time.perf_counter()
    choice = model.workloads(
        settings.device,
        quick=settings.scale == "quick",
        tiny=settings.scale == "tiny",
        full=settings.full_models,
    )
    for index, workload in enumerate(choice):
        late = time.perf_counter() > deadline
        if late or (index and time.perf_counter() - started > settings.models_until):
            limit = f"--budget {settings.budget:g}" if late else f"--models-until {settings.models_until:g}"
            skipped.append(f"{workload.label} ({limit})")
            say(f"skipped: {skipped[-1]}")
            continue
        rows += model.measure_model(
            workload,
            settings.device,
            cases=cases,
            compile_budget=budget,
            compiled=index == 0 or settings.all_shapes_compiled,
            seconds=settings.model_seconds,
            min_rounds=settings.min_rounds,
            say=say,
        )
        save(rows)
    return rows, skipped


def _row(case: Case, shape: Shape, dtype: torch.dtype, provider: Candidate) -> dict[str, Any]:
    return {
        "case": case.name,
        "module": case.module,
        "workload": case.label(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "provider": provider.provider,
        "memory_format": FORMAT_NAMES[provider.memory_format],
        "status": "ok",
        "reason": "",
        "note": f"{case.library.name}: {case.library.note}".rstrip(": ")
        if provider.library and case.library
        else "",
        "passes": {},
    }


def _costs(execution: Execution, provider: Candidate, device: torch.device) -> dict[str, Any]:
    """Peak memory and operator calls (CPU) or kernel launches (GPU) of forward and backward together."""
    with provider.context(device):
        costs: dict[str, Any] = {"peak_bytes": measure.peak_bytes(execution.both, device)}
        if device.type == "cuda":
            costs["kernel_launches"] = measure.kernel_launches(execution.both)
        elif not provider.compiled:
            costs["operator_calls"] = measure.operator_calls(execution.both)
    return costs


def _sampler(execution: Execution, provider: Candidate, device: torch.device) -> Callable[[Clock], None]:
    # Between two samples of one provider run all the others, which leave nothing of its code and little of its
    # memory in the caches of a CPU: a pass before the clock starts makes the sample one of a loop of its own.
    warm = device.type == "cpu"

    def sample(clock: Clock) -> None:
        with provider.context(device):
            if warm:
                execution.both()
            clock.start()
            outputs = execution.forward()
            clock.lap("forward")
            if execution.differentiable:
                execution.backward(outputs)
                clock.lap("backward")

    return sample


def _copy_sampler(copies: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Callable[[Clock], None]:
    def sample(clock: Clock) -> None:
        for source, target in copies.values():
            if target.device.type == "cpu":  # warm, as the others
                target.copy_(source)
        clock.start()
        for name, (source, target) in copies.items():
            target.copy_(source)
            clock.lap(name)

    return sample


def run(
    names: list[str],
    settings: Settings,
    say: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Measure the cases ``names`` and return a results document (see ``report``). ``save`` is called with the document so
    far after each case, so that a run that is cut short leaves what it measured."""
    cases = load_cases()
    started = time.perf_counter()
    facts = machine.describe(settings.device)
    ceilings = measure.ceilings(settings.device)
    measure.settle_allocator(settings.device)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    ops = [name for name in names if name in cases]
    whole = [name for name in names if name in model.CASES]
    if settings.budget is not None:
        ops.sort(key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    end = started + (settings.budget if settings.budget is not None else float("inf"))
    operators_end = started + (end - started) * (OPERATOR_SHARE if whole else 1.0)
    budget = CompileBudget(
        settings.compile_seconds, len(ops), quick=settings.quick, option="--compile-seconds"
    )

    def document(more: list[dict[str, Any]]) -> dict[str, Any]:
        return report.document(
            {
                **facts,
                "settings": {"scale": settings.scale, "seconds": settings.seconds, "tf32": False},
                "ceilings": {name: round(value, 2) for name, value in ceilings.items()},
                "skipped": skipped,
                "run_seconds": round(time.perf_counter() - started, 1),
            },
            [*rows, *more],
        )

    for name in ops:
        budget.next_case()
        found, left_out = measure_case(cases[name], settings, ceilings, budget, say, operators_end)
        rows += found
        skipped += left_out
        if found:
            save(document([]))
    if whole:
        found, left_out = measure_models(whole, settings, say, end, lambda more: save(document(more)))
        rows += found
        skipped += left_out
    return document([])


def available() -> dict[str, str]:
    """Every case that can be asked for, and its operator module."""
    return {name: case.module for name, case in load_cases().items()} | dict.fromkeys(
        model.CASES, model.MODULE
    )


def listing(device: torch.device) -> str:
    """The cases, what they are, their shapes, and whether this package has its own kernel for them on
    ``device``."""
    lines = []
    for case in load_cases().values():
        reason = absent_reason(case.op, device)
        ours = f"nvae_fast absent: {reason}" if reason else "nvae_fast present"
        library = case.library.name if case.library else "none"
        shapes = ", ".join(case.label(shape) for shape in case.shapes[device.type])
        lines += [
            f"{case.name}  ({case.module})  {case.summary}",
            f"    {shapes}",
            f"    library: {library}; {ours}",
        ]
    for name, summary in model.CASES.items():
        labels = ", ".join(workload.label for workload in model.workloads(device))
        lines += [f"{name}  ({model.MODULE})  {summary}", f"    {labels}"]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Check every provider of every op against the float64 reference, then time them side by "
        "side. Exit status 1 when a provider computes something wrong.",
    )
    p.add_argument(
        "cases",
        nargs="*",
        metavar="case",
        help="cases or operator modules to measure (default: all; see --list)",
    )
    p.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda when there is a GPU"
    )
    p.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--json", type=Path, metavar="PATH", help="write the results there")
    p.add_argument(
        "--plot", nargs="?", const="", metavar="PATH_OR_DIR",
        help="draw the results as PNG there; without a path beside the JSON, or in benchmarks/results",
    )  # fmt: skip
    p.add_argument(
        "--quick", action="store_true", help="one small shape a case, no torch.compile: under a minute"
    )
    p.add_argument(
        "--seconds", type=float, help="measuring time of one shape, seconds (default 0.8, GPU 0.4, quick 0.2)"
    )
    p.add_argument(
        "--compile-seconds",
        type=float,
        help="torch.compile time in all for single ops, seconds (default 120, GPU 80, quick 0)",
    )
    p.add_argument(
        "--model-compile-seconds",
        type=float,
        help="torch.compile time in all for whole models, seconds (default 0, GPU 90)",
    )
    p.add_argument(
        "--models-until",
        type=float,
        help="skip the settings that would start later than this after the first, seconds (default 120, GPU 90)",
    )
    p.add_argument(
        "--budget",
        type=float,
        help="time of the whole run, seconds (default: no limit): the most telling cases first, operators before whole models, "
        "and what would start later is skipped and named",
    )
    p.add_argument(
        "--compile-all-shapes", action="store_true", help="compile every shape, not only a case's first"
    )
    p.add_argument(
        "--full-models",
        action="store_true",
        help="on a CPU, two whole models in earnest (mnist, and cifar10 with 64 channels and 10 groups; a quarter of an "
        "hour on two cores), the other settings scaled down",
    )
    p.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a results file even if it holds cases this run leaves out",
    )
    p.add_argument("--list", action="store_true", help="list the cases and exit")
    p.add_argument(
        "--machine-name", action="store_true", help="print this machine's name for a results file and exit"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 for a red gate, 2 for wrong arguments."""
    p = parser()
    arguments = p.parse_args(argv)
    try:
        device = machine.resolve_device(arguments.device)
        if arguments.machine_name:
            print(machine.machine_name(device))
            return 0
        if arguments.list:
            print(listing(device))
            return 0
        names = select(arguments.cases, available())
        plot = charts.plot_path(arguments.plot, arguments.json, machine.machine_name(device))
        if arguments.json is not None:
            report.check_target(arguments.json, names, overwrite=arguments.overwrite)
        if arguments.threads is not None:
            if arguments.threads < 1:
                raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
            torch.set_num_threads(arguments.threads)
    except (ValueError, ImportError, OSError) as error:
        p.error(str(error))
    settings = settings_for(device, quick=arguments.quick)
    for name in ("seconds", "compile_seconds", "model_compile_seconds", "models_until", "budget"):
        value = getattr(arguments, name)
        if value is not None:
            if value < 0:
                p.error(f"--{name.replace('_', '-')} must not be negative, got {value:g}")
            setattr(settings, name, value)
    settings.all_shapes_compiled = arguments.compile_all_shapes
    settings.full_models = arguments.full_models
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False

    def save(document: dict[str, Any]) -> None:
        if arguments.json is not None:
            report.write_json(document, arguments.json)

    results = run(names, settings, say=lambda line: print(line, file=sys.stderr, flush=True), save=save)
    print(report.console(results))
    if arguments.json is not None:
        save(results)
        print(f"results: {arguments.json}")
    if plot is not None:
        charts.plot(results, plot)
        print(f"plot: {plot}")
    red = report.failed(results)
    for row in red:
        print(
            f"RED {row['case']} {row['workload']} {row['provider']} {row['memory_format']}: {row['reason']}"
        )
    return 1 if red else 0
