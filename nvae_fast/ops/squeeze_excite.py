"""Squeeze-and-excitation, optionally with the residual sum that follows it.

::

    g = sigmoid( W2 relu( W1 mean_hw(x) + b1 ) + b2 )          (B, C)
    y = g x                                                    or  skip + residual_scale * g x

NVAE (arXiv 2007.03898), section 3.1.1 and appendix A; Hu et al., arXiv 1709.01507.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nvae_fast.ops import _checks
from nvae_fast.ops._register import room


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
    return _room(x, reduce_weight, reduce_bias, expand_weight, expand_bias, skip, float(residual_scale))


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
) -> torch.Tensor:
    wide = _checks.accumulate_dtype(x.dtype)
    pooled = x.mean((2, 3), dtype=wide).to(reduce_weight.dtype)
    hidden = F.relu(F.linear(pooled, reduce_weight, reduce_bias))
    gate = torch.sigmoid(F.linear(hidden, expand_weight, expand_bias)).to(x.dtype)[:, :, None, None]
    y = x * gate
    if skip is not None:
        return skip + residual_scale * y
    return y if residual_scale == 1.0 else residual_scale * y


_room = room(
    "squeeze_excite",
    "(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, Tensor? skip,"
    " float residual_scale) -> Tensor",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2, 3, 4, 5),
)
