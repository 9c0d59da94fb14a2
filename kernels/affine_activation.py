"""affine_activation, its sums and its gradient in Triton; formulas are the docstring of nvae_fast/ops/affine_activation.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.planes import (
    add_up,
    coefficient,
    dense,
    empty_like,
    is_last,
    offsets,
    plan,
    program,
    store_partial,
)
from nvae_fast.kernels.pointwise import activate, activation_derivative


@triton.jit
def forward_kernel(
    x, scale, shift, y, channels, pixels, c_tiles, parts,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, TIMES: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    b, c, _, first = program(c_tiles, parts, BC, BP, TIMES, OFFSETS64)
    p = first + tl.arange(0, BP)[None, :]
    mask = (c < channels) & (p < pixels)
    at = offsets(b, c, p, channels, pixels, LAST)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    u = value * coefficient(scale, b, c, 0, channels) + coefficient(shift, b, c, 0, channels)
    tl.store(y + at, activate(u, ACTIVATION).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batches"])
def reduce_kernel(
    grad, x, scale, shift, pivot, g, y, workspace, batches, channels, pixels, c_tiles, parts,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, TIMES: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    """``pivot``, ``g`` and ``y`` may be None."""
    b, c, part, first = program(c_tiles, parts, BC, BP, TIMES, OFFSETS64)
    factor = coefficient(scale, b, c, 0, channels)
    constant = coefficient(shift, b, c, 0, channels)
    sum_g = tl.zeros((BC, BP), tl.float32)
    sum_gx = tl.zeros((BC, BP), tl.float32)
    for i in range(TIMES):
        p = first + i * BP + tl.arange(0, BP)[None, :]
        mask = (c < channels) & (p < pixels)
        at = offsets(b, c, p, channels, pixels, LAST)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        u = value * factor + constant
        d_u = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * activation_derivative(u, ACTIVATION)
        if g is not None:
            tl.store(g + at, d_u.to(g.dtype.element_ty), mask=mask)
        if y is not None:
            tl.store(y + at, activate(u, ACTIVATION).to(y.dtype.element_ty), mask=mask)
        if pivot is not None:
            value -= coefficient(pivot, b, c, 0, channels)
        sum_g += tl.where(mask, d_u, 0.0)
        sum_gx += tl.where(mask, d_u * value, 0.0)
    store_partial(workspace, 0, sum_g, b, c, part, batches, channels, parts)
    store_partial(workspace, 1, sum_gx, b, c, part, batches, channels, parts)


@triton.jit
def gradient_kernel(
    grad, x, scale, shift, alpha, beta, gamma, out, channels, pixels, c_tiles, parts,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, TIMES: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    b, c, _, first = program(c_tiles, parts, BC, BP, TIMES, OFFSETS64)
    p = first + tl.arange(0, BP)[None, :]
    mask = (c < channels) & (p < pixels)
    at = offsets(b, c, p, channels, pixels, LAST)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    upstream = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    u = value * coefficient(scale, b, c, 0, channels) + coefficient(shift, b, c, 0, channels)
    linear = value * coefficient(beta, b, c, 0, channels) + coefficient(gamma, b, c, 0, channels)
    d_u = upstream * activation_derivative(u, ACTIVATION)
    found = d_u * coefficient(alpha, b, c, 0, channels) + linear
    tl.store(out + at, found.to(out.dtype.element_ty), mask=mask)


def affine_activation(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: str | None
) -> torch.Tensor:
    """act(scale x + shift)."""
    last = is_last(x)
    y = empty_like(x, last)
    launch = plan("affine_activation", x, by_channels=last)
    if not launch.empty:
        launch.run(
            forward_kernel, dense(x, last), scale.contiguous(), shift.contiguous(), y,
            ACTIVATION=activation or "", LAST=last,
        )  # fmt: skip
    return y


def affine_activation_reduce(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    pivot: torch.Tensor | None,
    activation: str | None,
    need_g: bool,
    need_y: bool,
) -> tuple[torch.Tensor, ...]:
    """sum g and sum g (x - pivot), (C,); g and act(u), or empty tensors."""
    last = is_last(x)
    g, y = (empty_like(x, last) if need else None for need in (need_g, need_y))
    launch = plan("affine_activation_reduce", x, by_channels=last, sums=True)
    if launch.empty:
        sums = tuple(x.new_zeros(x.shape[1], dtype=torch.float32) for _ in range(2))
    else:
        workspace = launch.workspace(2)
        launch.run(
            reduce_kernel, dense(grad, last), dense(x, last), scale.contiguous(), shift.contiguous(),
            None if pivot is None else pivot.contiguous(), g, y, workspace, launch.batches,
            ACTIVATION=activation or "", LAST=last,
        )  # fmt: skip
        sums = add_up(workspace, per_sample=False)
    return *sums, *(x.new_empty(0) if t is None else t for t in (g, y))


def affine_activation_grad(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    gamma: torch.Tensor,
    activation: str | None,
) -> torch.Tensor:
    """alpha g + beta x + gamma."""
    last = is_last(x)
    out = empty_like(x, last)
    launch = plan("affine_activation_grad", x, by_channels=last)
    if not launch.empty:
        launch.run(
            gradient_kernel, dense(grad, last), dense(x, last),
            *(t.contiguous() for t in (scale, shift, alpha, beta, gamma)), out,
            ACTIVATION=activation or "", LAST=last,
        )  # fmt: skip
    return out
