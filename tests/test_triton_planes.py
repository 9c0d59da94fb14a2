"""The Triton kernels over planes (channel_statistics, batch_norm_swish, plane_affine): run in Triton's interpreter against
the formulas in float64.

The interpreter must be chosen before triton is imported, so the kernels run in a process of their own: this file, started
with the file to write to.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interpreter
import numpy as np
import pytest
import torch

from nvae_fast.ops._op import DEFINITIONS

ROOT = Path(__file__).resolve().parent.parent
FORMATS = {"rows": torch.contiguous_format, "channels": torch.channels_last}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# One pixel, one channel, prime extents, several parts a plane (in the interpreter a program adds up a few tiles).
SIZES = [(2, 6, 5, 7), (3, 17, 1, 1), (2, 1, 9, 9), (1, 20, 40, 57), (2, 130, 4, 4), (0, 3, 4, 4)]


def draws(size: tuple[int, ...], number: int, dtype: torch.dtype, offset: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(size) + number)
    return [(torch.randn(size, generator=generator) + offset).to(dtype) for _ in range(number)]


def calls() -> Iterator[tuple[str, str, list[Any]]]:
    """Name of the case, operator, arguments."""
    for size, (layout, memory_format) in itertools.product(SIZES, FORMATS.items()):
        for dtype in FLOATS if size in SIZES[:2] else FLOATS[:1]:
            x, grad, other = (t.contiguous(memory_format=memory_format) for t in draws(size, 3, dtype))
            far = draws(size, 1, dtype, 100.0)[0].contiguous(memory_format=memory_format)
            rows = draws(size[:2], 3, torch.float32)
            vectors = draws(size[1:2], 5, torch.float32)
            name = f"{size} {layout} {dtype}"
            for per_sample in (False, True):
                yield f"{name} {per_sample}", "channel_statistics", [far, per_sample]
            for activation in ("swish", "elu", None)[: 3 if size in SIZES[:2] else 1]:
                case = f"{name} {activation}"
                yield case, "affine_activation", [x, *vectors[:2], activation]
                need = activation == "swish"
                pivot = vectors[2] if activation != "elu" else None
                args = [grad, x, *vectors[:2], pivot, activation, need, not need]
                yield case, "affine_activation_reduce", args
                yield case, "affine_activation_grad", [grad, x, *vectors, activation]
            turned = other.contiguous(memory_format=FORMATS["rows" if layout == "channels" else "channels"])
            for y, which in ((other, "same"), (turned, "mixed")):
                case = f"{name} {which}"
                yield f"{case} all", "plane_affine", [x, rows[0], y, rows[1][:1], rows[2]]
                yield f"{case} sum", "plane_affine", [x, rows[0], y, None, None]
                yield f"{case} pivot", "plane_dots", [x, y, vectors[0]]
                yield case, "plane_dots", [x, y, None]
            yield name, "plane_affine", [x, rows[0], None, None, rows[1]]


NAMES = (
    "channel_statistics",
    "affine_activation",
    "affine_activation_reduce",
    "affine_activation_grad",
    "plane_affine",
    "plane_dots",
)
TRUTH = {name: DEFINITIONS[name].formula for name in NAMES}


def programs_of(case: str) -> tuple[int, ...]:
    """Launch choices: as they are, and with programs that add up many tiles and have 64-bit offsets."""
    return (1024, 1) if case.startswith(str(SIZES[3])) else (1024,)


def outputs_of(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


def truth(op: str, args: list[Any]) -> list[torch.Tensor]:
    return outputs_of(TRUTH[op](*(a.double() if isinstance(a, torch.Tensor) else a for a in args)))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, unit: float, count: int, name: str) -> None:
    """As vectors. A sum of n numbers about 0 is no larger than sqrt(n), and may be nearly 0."""
    scale = expected.norm().clamp_min(max(count, 1) ** 0.5) if expected.dim() < 3 else expected.norm()
    error = (actual.double() - expected).norm()
    assert error <= max(4e-7, unit) * scale, f"{name}: {float(error / scale):.3g}"


def test_cpu() -> None:
    """The C++ operators (or the formulas, without the extension) at the same calls."""
    for case, op, args in calls():
        for i, (a, e) in enumerate(zip(on_cpu(op, args), truth(op, args), strict=True)):
            assert_near(a, e, torch.finfo(a.dtype).eps, args[0].numel(), f"{op} | {case} | {i}")


def on_cpu(op: str, args: list[Any]) -> list[torch.Tensor]:
    return outputs_of(getattr(torch.ops.nvae_fast, op)(*args))


def run_cases(path: str) -> None:
    """In the process with the interpreter: results to ``path``. Fresh memory holds NaN there."""
    from nvae_fast.kernels import affine_activation as bn
    from nvae_fast.kernels import channel_statistics as cs
    from nvae_fast.kernels import plane_affine as pa
    from nvae_fast.kernels import planes

    functions = {name: getattr(m, name) for m in (bn, cs, pa) for name in TRUTH if hasattr(m, name)}
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found: dict[str, torch.Tensor] = {}
    for programs, wide in ((planes.PROGRAMS, planes._INT32_LIMIT), (1, 0)):
        planes.PROGRAMS, planes._INT32_LIMIT = programs, wide
        for case, op, args in calls():
            if programs not in programs_of(case):
                continue
            for i, out in enumerate(outputs_of(functions[op](*args))):
                found[f"{programs} | {op} | {case} | {i} | {out.dtype} {out.stride()}"] = out.float()
    np.savez(path, **{key: value.numpy() for key, value in found.items()})


def test_interpreter() -> None:
    """Values, dtypes and strides."""
    pytest.importorskip("triton")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.npz"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            "PYTHONWARNINGS": "ignore",
        }
        command = [sys.executable, __file__, str(path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    for case, op, args in calls():
        for i, (expected, like) in enumerate(zip(truth(op, args), on_cpu(op, args), strict=True)):
            for programs in programs_of(case):
                name = f"{programs} | {op} | {case} | {i} | {like.dtype} {like.stride()}"
                assert name in found, (name, [n for n in found if f"| {case} |" in n])
                # bfloat16 is truncated by the interpreter; the others are rounded.
                slack = 2 if like.dtype == torch.bfloat16 else 1
                assert_near(
                    found.pop(name), expected, slack * torch.finfo(like.dtype).eps, args[0].numel(), name
                )
    assert not found, f"not expected: {sorted(found)[:3]}"


if __name__ == "__main__":
    interpreter.prepare()
    run_cases(sys.argv[1])
