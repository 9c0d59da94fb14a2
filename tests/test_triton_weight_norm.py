"""The Triton kernels of weight_norm: run in Triton's interpreter against the reference in float64, and compiled ahead of
time for sm_80, sm_90 and sm_100.

The interpreter must be chosen before triton is imported, so the kernels run in a process of their own: this file, started
with the file to write to.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from harness import relative_error, strided

from nvae_fast.ops._op import DEFINITIONS

ROOT = Path(__file__).resolve().parent.parent
# Rows shorter than a tile, of one tile and a part, of several; more rows than a program has; empty layers.
SIZES = [(4, 3, 3, 3), (9, 2, 1, 1), (7, 5, 1, 1), (17, 1, 5, 5), (3, 130, 3, 3), (5, 64, 2, 2)]
SIZES += [(0, 3, 3, 3), (2, 0, 1, 1)]
MASKED = (0, 3, 4)


@dataclass(frozen=True)
class Case:
    """One call and its backward pass."""

    name: str
    dtype: torch.dtype = torch.float32
    out: torch.dtype | None = None
    last: bool = False  # channels_last
    masked: bool = True
    mixed: bool = False  # layers of several dtypes
    change: bool = False  # strided inputs
    need: tuple[bool, bool] = (True, True)
    value: float | None = None  # in one place of one layer


CASES = [
    Case("plain", masked=False),
    Case("masked"),
    Case("channels_last", last=True),
    Case("strided", change=True),
    Case("bf16 results", out=torch.bfloat16, last=True),
    Case("bf16", dtype=torch.bfloat16),
    Case("fp16", dtype=torch.float16, out=torch.float32),
    Case("mixed", mixed=True),
    Case("weights only", need=(True, False)),
    Case("log norms only", need=(False, True)),
    Case("nan", value=float("nan")),
    Case("inf", value=float("inf")),
]


def arguments(case: Case) -> tuple[list[Any], ...]:
    """Weights, log norms, masks, upstream gradients; one channel of the third layer is zero."""
    generator = torch.Generator().manual_seed(7)
    form = torch.channels_last if case.last else torch.contiguous_format
    half = (torch.float32, torch.bfloat16, torch.float16)
    weights, norms, masks, grads = [], [], [], []
    for i, size in enumerate(SIZES):
        dtype = half[i % 3] if case.mixed else case.dtype

        def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            t = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=form)
            return strided(t) if case.change else t

        weight = draw(*size)
        if i == 2:
            weight[3] = 0
        if i == 4 and case.value is not None:
            weight[1, 7, 1, 1] = case.value
        weights.append(weight)
        norms.append(0.5 * draw(size[0], 1, 1, 1))
        masks.append((draw(*size) > -0.3).to(dtype) if case.masked and i in MASKED else None)
        grads.append(draw(*size, dtype=case.out or dtype))
    return weights, norms, masks, grads


def compute(case: Case, forward: Any, backward: Any, wide: bool = False) -> dict[str, torch.Tensor]:
    weights, norms, masks, grads = arguments(case)
    if wide:
        weights, norms, masks, grads = (
            [None if t is None else t.double() for t in ts] for ts in (weights, norms, masks, grads)
        )
    outputs = forward(weights, norms, masks, 1e-5, None if wide else case.out)
    found = backward(grads, weights, norms, masks, 1e-5, *case.need)
    return {f"{case.name} | output {i}": t for i, t in enumerate(outputs)} | {
        f"{case.name} | gradient {i}": t for i, t in enumerate(found)
    }


FEW = 8


def run(path: str) -> None:
    """In the process with the interpreter. Fresh memory holds NaN there."""
    from nvae_fast.kernels import weight_norm as kernels

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    found: dict[str, torch.Tensor] = {}
    for case in CASES:
        once = compute(case, kernels.weight_norm, kernels.weight_norm_backward)
        if case.name == "masked":
            again = compute(case, kernels.weight_norm, kernels.weight_norm_backward)
            assert all(torch.equal(value, again[key]) for key, value in once.items()), "two runs differ"
        found |= {f"{key} | {value.dtype} | {value.stride()}": value.float() for key, value in once.items()}
    numbers = [*range(40), 2**40, -3, 0]
    assert kernels.written(numbers, torch.device("cpu"))[: len(numbers)].tolist() == numbers
    np.savez(path, **{key: value.numpy() for key, value in found.items()})


def test_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, __file__, str(tmp_path / "found.npz")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {key: torch.from_numpy(value) for key, value in np.load(tmp_path / "found.npz").items()}
    forward, backward = DEFINITIONS["weight_norm_many"], DEFINITIONS["weight_norm_many_backward"]
    formulas = forward.formula, backward.formula
    for case in CASES:
        weights, norms, masks, grads = arguments(case)
        native = compute(case, *formulas)
        shapes = [
            *forward.fake(weights, norms, masks, 1e-5, case.out),
            *backward.fake(grads, weights, norms, masks, 1e-5, *case.need),
        ]
        truth = compute(case, *formulas, wide=True)
        losses = {
            key: max(relative_error(native[key], t), relative_error(t.to(like.dtype), t))
            for (key, t), like in zip(truth.items(), shapes, strict=True)
            if native[key].isfinite().all() and t.to(like.dtype).isfinite().all()
        }
        for (key, expected), like in zip(truth.items(), shapes, strict=True):
            name = f"{key} | {like.dtype} | {like.stride()}"
            assert name in found, f"{name} is missing; there are {[n for n in found if n.startswith(key)]}"
            actual = found.pop(name)
            if not native[key].isfinite().all():  # a bad number came in, or float16 overflows
                assert torch.equal(actual.isnan(), native[key].isnan()), name
                assert torch.equal(actual.isinf(), native[key].isinf()), name
                continue
            lost = losses[key]
            if (
                expected.numel() <= FEW
            ):  # on a handful of sums PyTorch is right by luck: all of them together are judged
                lost = max(lost, *(losses[k] for k, t in truth.items() if t.numel() <= FEW and k in losses))
            error = relative_error(actual, expected)
            truncated = 2**-7 if like.dtype == torch.bfloat16 else 0.0  # by the interpreter's stores
            assert error <= max(2.5 * lost, 3e-7, truncated), (
                f"{name}: relative error {error:.3g}, PyTorch's {lost:.3g}"
            )
    assert not found, f"not expected: {sorted(found)}"


def test_float64_is_the_references() -> None:
    pytest.importorskip("triton")
    from nvae_fast.kernels import weight_norm as kernels

    w, g = torch.randn(3, 2, 1, 1, dtype=torch.float64), torch.zeros(3, 1, 1, 1, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"^weight_norm: the GPU kernel computes in float32; .*got torch.float64"
    ):
        kernels.weight_norm([w], [g], [None], 1e-5, None)
    calls = {
        "weight_norm": (w, g, None, 1e-5),
        "weight_norm_many": ([w.float()], [g.float()], [None], 1e-5, torch.float64),
        "weight_norm_many_backward": ([w], [w], [g], [None], 1e-5, True, True),
    }
    for name, args in calls.items():
        found, expected = DEFINITIONS[name].launch(*args), DEFINITIONS[name].formula(*args)
        for a, e in zip(found, expected, strict=True):
            assert torch.equal(a, e)


def test_plan_covers_every_row_once() -> None:
    pytest.importorskip("triton")
    from nvae_fast.kernels import weight_norm as kernels

    shapes = tuple((size[0], int(np.prod(size[1:]))) for size in SIZES)
    sizes, blocks, programs = kernels._plan(shapes)
    assert sizes == tuple(n for shape in shapes for n in shape)
    rows = [
        (blocks[2 * p], r)
        for p in range(programs)
        for r in range(blocks[2 * p + 1], min(blocks[2 * p + 1] + kernels.ROWS, shapes[blocks[2 * p]][0]))
    ]
    assert rows == [(i, r) for i, (n, columns) in enumerate(shapes) if columns for r in range(n)]


def test_tables_are_reused_and_bounded() -> None:
    pytest.importorskip("triton")
    from nvae_fast.kernels import weight_norm as kernels

    cpu = torch.device("cpu")
    first = kernels._address_table((1, 2**50), cpu)
    assert first.tolist() == [1, 2**50]
    assert kernels._address_table((1, 2**50), cpu) is first
    for i in range(2 * kernels.TABLES):
        kernels._address_table((i,), cpu)
    assert len(kernels._addresses) == kernels.TABLES


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_kernel", "write_kernel"])
def test_kernels_compile_without_spills(
    kernel: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    import aot

    from nvae_fast.kernels import weight_norm as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(kernels, kernel)
    out = torch.float32 if capability == 90 else torch.bfloat16
    known: dict[str, Any] = {
        "TYPE": kernels._TYPES[torch.float32], "OUT": kernels._TYPES[out], "HAS_MASK": True, "NEED_WEIGHT": True,
        "NEED_LOG_NORM": True, "ROWS": kernels.ROWS, "COLUMNS": kernels.COLUMNS, "OFFSET": kernels._OFFSET,
    }  # fmt: skip
    constants = {name: value for name, value in known.items() if name in function.arg_names}
    types: dict[str, Any] = dict.fromkeys(("addresses", "sizes", "blocks", "table"), "*i64") | {"eps": "fp32"}
    types["values"] = ("i64",) * kernels.WRITTEN
    signature = {name: types.get(name, "i64") for name in function.arg_names if name not in constants}
    usage, ptx = aot.triton_usage(function, signature, constants, capability)
    assert usage.spill_bytes == 0, usage
    assert usage.stack_bytes == 0
    assert usage.registers <= 96, "five programs of 128 threads to a multiprocessor"
    assert "atom" not in ptx, "sums are added in a fixed order"


if __name__ == "__main__":
    interpreter.prepare()
    run(sys.argv[1])
