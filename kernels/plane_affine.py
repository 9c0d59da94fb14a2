"""plane_affine and plane_dots in Triton; formulas are the docstring of nvae_fast/ops/plane_affine.py. The two maps may be in
different memory formats: then tiles are square, and the compiler turns one of them through shared memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.planes import (
    add_up,
    coefficient,
    dense,
    either,
    empty_like,
    is_last,
    offsets,
    plan,
    program,
    store_partial,
)


@triton.jit
def affine_kernel(
    x, a, y, k, constant, out, a_batch, k_batch, constant_batch, channels, pixels, c_tiles, parts,
    X_LAST: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, TIMES: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    """``y``, ``k`` (its coefficients) and ``constant`` may be None."""
    b, c, _, first = program(c_tiles, parts, BC, BP, TIMES, OFFSETS64)
    p = first + tl.arange(0, BP)[None, :]
    mask = (c < channels) & (p < pixels)
    at = offsets(b, c, p, channels, pixels, LAST)
    value = tl.load(x + offsets(b, c, p, channels, pixels, X_LAST), mask=mask, other=0.0).to(tl.float32)
    found = value * coefficient(a, b, c, a_batch, channels)
    if constant is not None:
        found += coefficient(constant, b, c, constant_batch, channels)
    if y is not None:
        other = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if k is not None:
            other *= coefficient(k, b, c, k_batch, channels)
        found += other
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batches"])
def dots_kernel(
    x, y, pivot, workspace, batches, channels, pixels, c_tiles, parts,
    X_LAST: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, TIMES: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    """``pivot`` may be None."""
    b, c, part, first = program(c_tiles, parts, BC, BP, TIMES, OFFSETS64)
    sum_x = tl.zeros((BC, BP), tl.float32)
    sum_xy = tl.zeros((BC, BP), tl.float32)
    for i in range(TIMES):
        p = first + i * BP + tl.arange(0, BP)[None, :]
        mask = (c < channels) & (p < pixels)
        value = tl.load(x + offsets(b, c, p, channels, pixels, X_LAST), mask=mask, other=0.0).to(tl.float32)
        other = tl.load(y + offsets(b, c, p, channels, pixels, LAST), mask=mask, other=0.0).to(tl.float32)
        if pivot is not None:
            other -= coefficient(pivot, b, c, 0, channels)
        sum_x += value
        sum_xy += tl.where(mask, value * other, 0.0)
    store_partial(workspace, 0, sum_x, b, c, part, batches, channels, parts)
    store_partial(workspace, 1, sum_xy, b, c, part, batches, channels, parts)


def plane_affine(
    x: torch.Tensor,
    a: torch.Tensor,
    y: torch.Tensor | None,
    b: torch.Tensor | None,
    c: torch.Tensor | None,
) -> torch.Tensor:
    """a x + b y + c of the operator's arguments."""
    like = x if y is None else y
    last = is_last(like)
    x, x_last = either(x, last)
    out = empty_like(like, last)
    launch = plan("plane_affine", like, by_channels=last, mixed=x_last != last)
    if not launch.empty:
        planes = [None if t is None else t.contiguous() for t in (a, b, c)]
        batches = [0 if t is None or t.shape[0] == 1 else t.shape[1] for t in planes]
        launch.run(
            affine_kernel, x, planes[0], None if y is None else dense(y, last), planes[1], planes[2], out, *batches,
            X_LAST=x_last, LAST=last,
        )  # fmt: skip
    return out


def plane_dots(x: torch.Tensor, y: torch.Tensor, pivot: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """sum x and sum x (y - pivot), (B, C)."""
    x_last = is_last(x)
    y, last = either(y, x_last)
    launch = plan("plane_dots", x, by_channels=x_last, mixed=x_last != last, sums=True)
    if launch.empty:
        return tuple(x.new_zeros(x.shape[:2], dtype=torch.float32) for _ in range(2))
    workspace = launch.workspace(2)
    pivot = None if pivot is None else pivot.contiguous()
    launch.run(dots_kernel, dense(x, x_last), y, pivot, workspace, launch.batches, X_LAST=x_last, LAST=last)
    return add_up(workspace, per_sample=True)
