"""The Triton kernels of weight_norm against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from harness import relative_error, strided
from internals import DEFINITIONS

from nvae_fast.kernels import weight_norm as kernels

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
    return {f"output {i}": t for i, t in enumerate(outputs)} | {
        f"gradient {i}": t for i, t in enumerate(found)
    }


def check(
    name: str, actual: torch.Tensor, native: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype
) -> None:
    """``actual`` is as close to ``expected`` as PyTorch's result ``native`` and its rounding to ``dtype`` allow."""
    lost = max(relative_error(native, expected), relative_error(expected.to(dtype), expected))
    error = relative_error(actual, expected)
    truncated = 2**-7 if dtype == torch.bfloat16 else 0.0  # by the interpreter's stores
    assert error <= max(2.5 * lost, 3e-7, truncated), (
        f"{name}: relative error {error:.3g}, PyTorch's {lost:.3g}"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients(case: Case) -> None:
    """Their dtypes and strides too."""
    forward, backward = DEFINITIONS["weight_norm_many"], DEFINITIONS["weight_norm_many_backward"]
    found = compute(case, forward.launch, backward.launch)
    weights, norms, masks, grads = arguments(case)
    native = compute(case, forward.formula, backward.formula)
    shapes = [
        *forward.fake(weights, norms, masks, 1e-5, case.out),
        *backward.fake(grads, weights, norms, masks, 1e-5, *case.need),
    ]
    truth = compute(case, forward.formula, backward.formula, wide=True)
    assert found.keys() == truth.keys()
    # The gradients of the log norms, one number a channel, are judged together: a single number's relative error does not
    # distinguish rounding from luck.
    norms_of: dict[torch.dtype, list[tuple[torch.Tensor, ...]]] = {}
    for index, ((name, expected), like) in enumerate(zip(truth.items(), shapes, strict=True)):
        actual = found[name]
        assert (actual.dtype, actual.stride()) == (like.dtype, like.stride()), name
        if not native[name].isfinite().all():  # a bad number came in, or float16 overflows
            assert torch.equal(actual.isnan(), native[name].isnan()), name
            assert torch.equal(actual.isinf(), native[name].isinf()), name
        elif index < 2 * len(weights) and case.need[0]:
            check(name, actual, native[name], expected, like.dtype)
        else:
            group = norms_of.setdefault(like.dtype, [])
            group.append((actual.flatten(), native[name].flatten(), expected.flatten()))
    for dtype, group in norms_of.items():
        joined = (torch.cat(tensors) for tensors in zip(*group, strict=True))
        check(f"gradients of log norms | {dtype}", *joined, dtype)


def test_two_runs_are_equal() -> None:
    case = CASES[1]
    first, second = (
        compute(case, *(DEFINITIONS[f"weight_norm_many{end}"].launch for end in ("", "_backward")))
        for _ in range(2)
    )
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_numbers_are_written_by_a_kernel() -> None:
    numbers = [*range(40), 2**40, -3, 0]
    assert kernels.written(numbers, torch.device("cpu"))[: len(numbers)].tolist() == numbers


def test_float64_is_the_references() -> None:
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
    cpu = torch.device("cpu")
    first = kernels._address_table((1, 2**50), cpu)
    assert first.tolist() == [1, 2**50]
    assert kernels._address_table((1, 2**50), cpu) is first
    for i in range(2 * kernels.TABLES):
        kernels._address_table((i,), cpu)
    assert len(kernels._addresses) == kernels.TABLES
