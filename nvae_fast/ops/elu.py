"""Exponential linear unit: between the blocks of NVAE's towers, and in its flows.

::

    y = x if x > 0 else exp(x) - 1

Clevert et al., arXiv 1511.07289, equation 15 with alpha = 1. On the CPU PyTorch's forward pass takes about three times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from nvae_fast.ops import _checks
from nvae_fast.ops._activation import activation_slope
from nvae_fast.ops._register import operator, room
from nvae_fast.ops._squash import empty_map


def elu(x: torch.Tensor) -> torch.Tensor:
    """``x if x > 0 else exp(x) - 1`` of a map.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, C, H, W) in the dtype and memory format of x. Differentiable once.

    Raises:
        TypeError, ValueError: x is no floating map.
    """
    if torch.compiler.is_compiling():  # which makes one loop of it and its neighbours
        _check(x)
        return F.elu(x)
    return _room(x)


def _check(x: torch.Tensor) -> None:
    _checks.feature_map("elu", "x", x)


def _backward_formula(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    wide = x.to(_checks.accumulate_dtype(x.dtype))
    return empty_map(x, x.shape[1]).copy_(grad * activation_slope(wide, "elu"))


def _like(*maps: torch.Tensor) -> torch.Tensor:
    return empty_map(maps[-1], maps[-1].shape[1])


_slope = operator("elu_backward", "(Tensor grad, Tensor x) -> Tensor", default=_backward_formula, fake=_like)


def _backward(
    grads: Sequence[torch.Tensor | None], wanted: Sequence[int], x: torch.Tensor
) -> list[torch.Tensor | None]:
    return [None if grads[0] is None else _slope(grads[0], x)]


_room = room(
    "elu",
    "(Tensor x) -> Tensor",
    check=_check,
    reference=F.elu,
    differentiable=(0,),
    fake=_like,
    backward=_backward,
)
