"""Exponential linear unit: between the blocks of NVAE's towers, and in its flows.

::

    y = x if x > 0 else exp(x) - 1

Clevert et al., arXiv 1511.07289, equation 15 with alpha = 1. On the CPU PyTorch's forward pass takes about three times as long.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._layout import empty_map
from nvae_fast.ops._op import define_op


def elu(x: Tensor) -> Tensor:
    """``x if x > 0 else exp(x) - 1`` of a map.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, C, H, W) in the dtype and memory format of x. Differentiable once.

    Raises:
        TypeError, ValueError: x is no floating map.
    """
    _checks.feature_map("elu", "x", x)
    if torch.compiler.is_compiling():  # the compiler fuses it with its neighbours
        return F.elu(x)
    return _op(x)


def _reference(x: Tensor) -> Tensor:
    return F.elu(x)


_op = define_op(
    "elu", _reference, fake=lambda x: empty_map(x, x.shape[1]), differentiable=("x",), fused_backward=True
)
