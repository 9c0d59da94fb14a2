"""Squeeze-and-excitation, optionally with the residual sum that follows it.

::

    g = sigmoid( W2 relu( W1 mean_hw(x) + b1 ) + b2 )          (B, C)
    y = g x                                                    or  skip + residual_scale * g x

NVAE (arXiv 2007.03898), section 3.1.1 and appendix A; Hu et al., arXiv 1709.01507.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from nvae_fast.ops import (  # noqa: F401  operators that this one is made of
    _checks,
    _coefficients,
    channel_statistics,
    plane_affine,
)
from nvae_fast.ops._register import room
from nvae_fast.ops._squash import empty_map


def squeeze_excite(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    *,
    skip: torch.Tensor | None = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    """Gate the channels of ``x``; formula in the module's docstring.

    Args:
        x: (B, C, H, W).
        reduce_weight (R, C), reduce_bias (R,): W1, b1. expand_weight (C, R), expand_bias (C,): W2, b2.
        skip: (B, C, H, W) to add, or None.
        residual_scale: factor on the gated x; NVAE's residual cells use 0.1.

    Returns:
        (B, C, H, W) in the dtype of x (with a skip: the wider of the two). Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    if not isinstance(residual_scale, (int, float)):
        raise TypeError(f"squeeze_excite: residual_scale must be a number, got {residual_scale!r}")
    return _room(x, reduce_weight, reduce_bias, expand_weight, expand_bias, skip, float(residual_scale))[0]


def gated_sum(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: torch.Tensor,
    residual_scale: float,
) -> torch.Tensor:
    """:func:`squeeze_excite` without gradients, where the cell's kernels are (it needs no others); arguments are trusted."""
    return _room._run(x, reduce_weight, reduce_bias, expand_weight, expand_bias, skip, residual_scale)[0]


def _check(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: torch.Tensor | None,
    residual_scale: float,
) -> None:
    op = "squeeze_excite"
    _checks.feature_map(op, "x", x)
    _checks.tensor(op, "reduce_weight", reduce_weight)
    channels, hidden = x.shape[1], reduce_weight.shape[0] if reduce_weight.dim() else 0
    _checks.shape(op, "reduce_weight", reduce_weight, (hidden, channels), x)
    _checks.shape(op, "reduce_bias", reduce_bias, (hidden,), x)
    _checks.shape(op, "expand_weight", expand_weight, (channels, hidden), x)
    _checks.shape(op, "expand_bias", expand_bias, (channels,), x)
    if skip is not None:
        _checks.shape(op, "skip", skip, tuple(x.shape), x)


def _reference(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: torch.Tensor | None,
    residual_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and the pooled x (B, C), which the backward pass needs."""
    wide = _checks.accumulate_dtype(x.dtype)
    pooled = x.mean((2, 3), dtype=wide)
    hidden = F.relu(F.linear(pooled.to(reduce_weight.dtype), reduce_weight, reduce_bias))
    gate = torch.sigmoid(F.linear(hidden, expand_weight, expand_bias)).to(x.dtype)[:, :, None, None]
    y = x * gate
    if skip is not None:
        y = skip + residual_scale * y
    elif residual_scale != 1.0:
        y = residual_scale * y
    return y, pooled.detach()


def _fake(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: torch.Tensor | None,
    residual_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = x.dtype if skip is None else torch.promote_types(x.dtype, skip.dtype)
    like = x if skip is None else skip
    return empty_map(like, x.shape[1], dtype), x.new_empty(
        x.shape[:2], dtype=_checks.accumulate_dtype(x.dtype)
    )


def _weights(pooled: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """The two layers in the dtype of ``pooled``."""
    return [p if p.dtype == pooled.dtype else p.to(pooled.dtype) for p in parameters]


def _no_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    """The layers of the gate are too small to gain from half precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _fused(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: torch.Tensor | None,
    residual_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two passes: x is read to be pooled, then read and gated on the way to the sum. On the CPU one operator does the same."""
    ops = torch.ops.nvae_fast
    with _no_autocast(x):
        pooled = ops.channel_statistics(x, True)[0]
        weights = _weights(pooled, reduce_weight, reduce_bias, expand_weight, expand_bias)
        factor = _coefficients.gate(pooled, None, None, *weights, residual_scale)[3]
        if skip is not None:
            skip = skip.to(torch.promote_types(x.dtype, skip.dtype))
        return ops.plane_affine(x, factor, skip, None, None), pooled


def _backward(
    grads: Sequence[torch.Tensor | None],
    wanted: Sequence[int],
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: torch.Tensor | None,
    residual_scale: float,
    pooled: torch.Tensor,
) -> list[torch.Tensor | None]:
    """From x and the pooled values; the gate is computed again. Two passes: the sums ``sum_p grad x`` reach the gate, and
    ``dx = residual_scale gate grad + (what reaches the pooled value) / HW``."""
    grad, ops = grads[0], torch.ops.nvae_fast
    found: list[torch.Tensor | None] = [None] * 6
    if grad is None:
        return found
    if skip is not None and 5 in wanted:
        found[5] = grad if grad.dtype == skip.dtype else grad.to(skip.dtype)
    if all(i == 5 for i in wanted):
        return found
    with _no_autocast(x):
        w1, b1, w2, b2 = _weights(pooled, reduce_weight, reduce_bias, expand_weight, expand_bias)
        _, hidden, gate, _, _ = _coefficients.gate(pooled, None, None, w1, b1, w2, b2, residual_scale)
        sum_x, sum_xp = ops.plane_dots(grad, x, None)
        *layers, through, _, _, factor = _coefficients.gate_backward(
            sum_x, sum_xp, None, None, None, None, None, pooled, hidden, gate, w1, w2, residual_scale
        )
        found[1:5] = layers
        if 0 in wanted:
            shift = through / max(x.shape[2] * x.shape[3], 1)
            to_x = ops.plane_affine(grad, factor, None, None, shift)
            found[0] = to_x if to_x.dtype == x.dtype else to_x.to(x.dtype)
    for i, like in enumerate((reduce_weight, reduce_bias, expand_weight, expand_bias), start=1):
        value = found[i]
        assert value is not None
        if i not in wanted:
            found[i] = None
        elif value.dtype != like.dtype:
            found[i] = value.to(like.dtype)
    return found


_room = room(
    "squeeze_excite",
    "(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, Tensor? skip,"
    " float residual_scale) -> (Tensor y, Tensor pooled)",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2, 3, 4, 5),
    fake=_fake,
    backward=_backward,
    gpu=_fused,
    save_outputs=(1,),
)
