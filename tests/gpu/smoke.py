"""The first thing to run on a GPU: one launch of every operator, one training step and one sample of every preset.

    python tests/gpu/smoke.py --out FOLDER                  # everything, in parallel processes
    python tests/gpu/smoke.py --group residual_normal       # one group, in this process: for a debugger or compute-sanitizer
    python tests/gpu/smoke.py --list
    python tests/gpu/smoke.py --operators --eager --under "compute-sanitizer --tool memcheck --error-exitcode 9"

A group is an operator (a benchmark case) or a preset. Each runs in a process of its own, because an illegal access leaves a
CUDA context unusable. Operators are compared with the float64 reference in every dtype and memory format, eagerly and
captured in a CUDA graph; two runs must be equal bit for bit. Presets are scaled down: one training step and one sample in
float32 and bfloat16, eagerly and captured. Everything that fails is shown; exit status 1 when anything did. FOLDER/smoke.json
holds every check with its time and, where it failed, the whole output of its process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

import torch  # noqa: E402

import nvae_fast as nf  # noqa: E402
from benchmarks import model as whole  # noqa: E402
from benchmarks.case import Case, load_cases  # noqa: E402
from benchmarks.gate import Gate  # noqa: E402
from benchmarks.providers import OURS, Candidate, Execution, absent_reason, build_inputs  # noqa: E402
from nvae_fast.ops._backend import missing  # noqa: E402
from nvae_fast.training import Sampler, Step, TrainingConfig  # noqa: E402
from nvae_fast.training.graph import WARM_UP, CudaRecorder  # noqa: E402

PRESETS = ("mnist", "cifar10", "celeba_64", "imagenet_32", "celeba_256", "ffhq")
INSTALLATION = "installation"
DTYPES = (torch.float32, torch.bfloat16)
RESULTS = "smoke.json"
SCALE = "tiny"  # of the benchmark cases' shapes
# Relative to the eager step: a captured one runs the same kernels on the same numbers.
CAPTURED_TOLERANCE = 1e-5

Check = tuple[str, Callable[[], str]]  # name, function that returns a note and raises when it fails


def groups() -> list[str]:
    """Every group; presets before operators, because they take longest."""
    return [INSTALLATION, *PRESETS, *load_cases()]


def checks(group: str, device: torch.device, captured: bool) -> Iterator[Check]:
    """The checks of a group; ``captured``: those in a CUDA graph too."""
    if group == INSTALLATION:
        yield group, lambda: _complete(device)
    elif group in PRESETS:
        for precision in ("float32", "bfloat16"):
            yield from preset_checks(group, precision, device, captured)
    else:
        yield from operator_checks(load_cases()[group], device, captured)


def operator_checks(case: Case, device: torch.device, captured: bool) -> Iterator[Check]:
    """Values and gradients of ``case``, eagerly and captured."""
    reason = absent_reason(case.op, device)
    for dtype in (dtype for dtype in DTYPES if dtype in case.tolerances):
        for shape in case.shapes[SCALE]:
            inputs = build_inputs(case, shape, dtype, device)
            gate = Gate(case, inputs, case.noise(shape) if case.noise else None, dtype)
            for memory_format in case.memory_formats:
                ours = Candidate(OURS, memory_format, case.run, backend="auto")
                run = Execution(case, case.run, inputs, dtype=dtype, memory_format=memory_format)
                name = f"{case.name} {case.label(shape)} {str(dtype).removeprefix('torch.')} {memory_format}"
                yield f"{name} values", lambda gate=gate, ours=ours: _judge(gate, ours, reason)
                yield f"{name} repeatable", lambda run=run: _repeat(run)
                if captured:
                    yield f"{name} captured", lambda run=run: _capture(run, device)


def _fail(reason: str) -> str:
    raise AssertionError(reason)


def _judge(gate: Gate, ours: Candidate, reference: str) -> str:
    """``reference``: why the operator has no fused kernel here, where it has none."""
    verdict = gate.judge(ours)
    note = f", reference: {reference}" if reference else ""
    return f"error {verdict.worst:.1e}{note}" if verdict.passed else _fail(verdict.reason)


def _complete(device: torch.device) -> str:
    """No part of the package is missing that has kernels for ``device``."""
    lacking = missing()
    if device.type == "cpu":
        lacking.pop("triton", None)
        lacking.pop("csrc/cuda", None)
    for part, sentence in lacking.items():
        _fail(f"{part}: {sentence}")
    return "every part is there"


def _tensors(execution: Execution) -> list[torch.Tensor]:
    outputs, gradients = execution.both()
    return [t.detach() for t in (*outputs, *gradients)]


def _repeat(execution: Execution) -> str:
    _same(_tensors(execution), _tensors(execution), "a second run")
    return ""


def _capture(execution: Execution, device: torch.device) -> str:
    """A captured forward and backward pass, replayed twice, equals the eager one bit for bit."""
    expected = _tensors(execution)
    recorder = CudaRecorder(device)
    recorder.warm_up(lambda: _tensors(execution))
    replay, captured = recorder.capture(lambda: _tensors(execution))
    for _ in range(2):
        for tensor in captured:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        replay()
        _same(captured, expected, "the captured run")
    return ""


def _same(actual: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if not torch.equal(a, e):
            _fail(
                f"result {index} of {what} differs by up to {float((a.double() - e.double()).abs().max()):.3g}"
            )


def preset_checks(preset: str, precision: str, device: torch.device, captured: bool) -> Iterator[Check]:
    """A training step and a sample of ``preset``, scaled down, eagerly and captured."""
    batch, config = whole.scaled(preset)
    bench = whole.Bench(whole.Workload(preset, config, batch, precision), device)
    ours = whole.Contender(OURS, "channels_last", backend="auto")
    autocast = "bf16" if precision == "bfloat16" else None
    found: dict[str, float] = {}

    def step(graph: bool) -> str:
        model = bench.build(ours).train()
        settings = TrainingConfig(autocast=autocast, weight_decay_norm=whole.REGULARIZER, cuda_graph=graph)
        taken = Step(model, settings)
        images = bench.images.contiguous(memory_format=torch.channels_last)
        for number in range(WARM_UP + 2):
            result = taken(images, seed=number, coefficient=0.5, weight=1e-2, learning_rate=1e-3)
            if result.skipped:
                _fail(f"step {number} has a loss or gradient that is not finite")
        if graph:
            relative = abs(result.loss - found["loss"]) / abs(found["loss"]) if "loss" in found else 0.0
            if not relative <= CAPTURED_TOLERANCE:
                _fail(f"loss {result.loss:.8g}, eagerly {found['loss']:.8g}")
        found.setdefault("loss", result.loss)
        return f"loss {result.loss:.6g}, {taken.mode}"

    def sample(pixels: str) -> str:
        model = bench.build(ours).eval()
        eager = Sampler(model, temperature=0.7, pixels=pixels, autocast=autocast)
        expected = eager(2, seed=WARM_UP)
        sampler = Sampler(model, temperature=0.7, pixels=pixels, autocast=autocast)
        for number in range(WARM_UP + 1):
            images = sampler(2, seed=number)
        if not bool(images.isfinite().all()):
            _fail("values that are not finite")
        _same([images], [expected], "the captured sampler")
        return f"mean {float(images.mean()):.4f}"

    name = f"{preset} {precision}"
    yield f"{name} training step, eager", lambda: step(False)
    if captured:
        yield f"{name} training step, captured", lambda: step(True)
    for pixels in ("sample", "mean"):
        yield f"{name} sampler, {pixels}", lambda pixels=pixels: sample(pixels)


def run_group(group: str, device: torch.device, captured: bool) -> list[dict[str, Any]]:
    """Every check of ``group``, one after another; what fails is noted, not raised."""
    results: list[dict[str, Any]] = []
    pending = checks(group, device, captured)
    while True:
        started = time.perf_counter()
        name = group
        try:
            try:
                name, check = next(pending)
            except StopIteration:
                return results
            note, error = check(), ""
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as raised:
            note, error = "", traceback.format_exc()
            first = " ".join(f"{type(raised).__name__}: {raised}".split())[:300]
            print(f"FAILED {name}: {first}", flush=True)
        seconds = round(time.perf_counter() - started, 2)
        results.append(
            {"group": group, "check": name, "ok": not error, "note": note, "seconds": seconds, "error": error}
        )
        if not error:
            print(f"ok     {name}  {note}  ({seconds} s)", flush=True)


def in_process(group: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """``run_group`` in a process of its own; one that dies or takes too long is a failed check."""
    log, error, results = "", "", []
    with tempfile.TemporaryDirectory() as folder:
        command = [*shlex.split(arguments.under), sys.executable, __file__, "--group", group, "--out", folder]
        command += ["--device", arguments.device, *(["--eager"] if arguments.eager else [])]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=arguments.seconds, check=False, cwd=ROOT
            )
            log = done.stdout + done.stderr
            if done.returncode not in (0, 1):
                error = f"the process ended with exit status {done.returncode}"
        except subprocess.TimeoutExpired as expired:
            parts = (expired.stdout, expired.stderr)
            log = "".join(t.decode() if isinstance(t, bytes) else t or "" for t in parts)
            error = f"the process took more than {arguments.seconds:g} s"
        path = Path(folder) / RESULTS
        if path.exists():
            results = json.loads(path.read_text(encoding="utf-8"))["checks"]
    if error or not results:
        what = {"ok": False, "note": "", "seconds": 0.0, "error": error or "the process left no results"}
        results.append({"group": group, "check": group, **what, "log": log})
    for result in results:
        if not result["ok"]:
            print(f"FAILED {result['check']}: {result['error'].strip().splitlines()[-1]}", flush=True)
    print(f"{group}: {sum(r['ok'] for r in results)} of {len(results)} checks passed", flush=True)
    return results


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="smoke.py", description=__doc__.splitlines()[0])
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    p.add_argument("--group", help="run one group in this process")
    p.add_argument("--only", nargs="*", default=[], metavar="GROUP", help="of all groups, these")
    p.add_argument("--operators", action="store_true", help="of all groups, the operators")
    p.add_argument("--eager", action="store_true", help="nothing in a CUDA graph")
    p.add_argument("--under", default="", metavar="COMMAND", help="what each process runs under")
    p.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at a time")
    p.add_argument("--seconds", type=float, default=150, help="time of one process")
    p.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", help="folder of the results")
    p.add_argument("--list", action="store_true", help="name the groups and leave")
    return p


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    p = parser()
    arguments = p.parse_args(argv)
    if arguments.list:
        print("\n".join(groups()))
        return 0
    unknown = [g for g in [*arguments.only, *filter(None, [arguments.group])] if g not in groups()]
    if unknown:
        p.error(f"no such group: {', '.join(unknown)}; there are: {', '.join(groups())}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: PyTorch sees no GPU here")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    started = time.perf_counter()
    if arguments.group:
        captured = arguments.device == "cuda" and not arguments.eager
        results = run_group(arguments.group, torch.device(arguments.device), captured)
    else:
        chosen = arguments.only or (list(load_cases()) if arguments.operators else groups())
        with ThreadPoolExecutor(arguments.jobs) as pool:
            found = pool.map(lambda group: in_process(group, arguments), chosen)
            results = [result for group in found for result in group]
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    seconds = round(time.perf_counter() - started, 1)
    facts = {"device": name, "torch": torch.__version__, "seconds": seconds, "backends": nf.backends()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**facts, "checks": results}, indent=1)
    (arguments.out / RESULTS).write_text(text, encoding="utf-8")
    failed = sum(not result["ok"] for result in results)
    print(f"{name}: {len(results) - failed} passed, {failed} failed, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
