"""Mean and sum of squared deviations of the channels of a map, in one pass.

::

    mean[c] = sum_bp x[b,c,p] / n        m2[c] = sum_bp (x[b,c,p] - mean[c])^2        n = B*H*W

or with ``per_sample`` the same of every (b, c), n = H*W. Batch norm and squeeze-and-excitation use these. Parts of
the map are summed as deviations from a value of their own and merged by Chan's formula (Chan, Golub, LeVeque 1979,
"Updating formulae and a pairwise algorithm for computing sample variances"), so that \\|mean\\| far above the spread loses
no digits. PyTorch equivalent: ``torch.var_mean(x, (0, 2, 3), correction=0)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._op import Gradients, Grads, Tensors, define_op


class ChannelStatistics(NamedTuple):
    """``mean``, and ``m2``: the sum of squared deviations from it, (C,) or (B, C); ``count`` values were in each."""

    mean: Tensor
    m2: Tensor
    count: int  # type: ignore[assignment]  # tuple.count gives way


def channel_statistics(x: Tensor, per_sample: bool = False) -> ChannelStatistics:
    """Statistics of the channels of ``x`` (B, C, H, W); formulas in the module's docstring.

    Returns:
        :class:`ChannelStatistics` in float32 (float64 for float64), (C,) or with ``per_sample`` (B, C); zeros where there
        are no values. Differentiable in x.

    Raises:
        TypeError, ValueError: x is not a floating tensor of four dimensions.
    """
    _checks.feature_map("channel_statistics", "x", x)
    mean, m2 = _op(x, per_sample)
    return ChannelStatistics(mean, m2, _count(x, per_sample))


def _count(x: Tensor, per_sample: bool) -> int:
    pixels = x.shape[2] * x.shape[3]
    return pixels if per_sample else x.shape[0] * pixels


def _reference(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    values = x.to(_checks.accumulate_dtype(x.dtype))
    dims = (2, 3) if per_sample else (0, 2, 3)
    count = _count(x, per_sample)
    if x.numel() == 0:
        zero = values.sum(dims)
        return zero, zero.clone()
    var, mean = torch.var_mean(values, dims, correction=0)
    return mean, var * count


def _fake(x: Tensor, per_sample: bool) -> tuple[Tensor, Tensor]:
    size = x.shape[:2] if per_sample else x.shape[1:2]
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    return x.new_empty(size, dtype=acc_dtype), x.new_empty(size, dtype=acc_dtype)


def _backward(grads: Grads, wanted: frozenset[str], a: Any, saved: Tensors) -> Gradients:
    """``dx = dmean / n + 2 dm2 (x - mean)``, in one pass."""
    (grad_mean, grad_m2), (mean,), x = grads, saved, a.x
    column = (x.shape[0] if a.per_sample else 1, x.shape[1], 1, 1)
    constant = torch.zeros_like(mean) if grad_mean is None else grad_mean / max(_count(x, a.per_sample), 1)
    if grad_m2 is None:
        return {"x": constant.to(x.dtype).reshape(column).expand_as(x)}
    factor = 2 * grad_m2
    constant = torch.addcmul(constant, factor, mean, value=-1)
    return {
        "x": torch.addcmul(constant.reshape(column), factor.reshape(column), x.to(mean.dtype)).to(x.dtype)
    }


_op = define_op(
    "channel_statistics",
    _reference,
    fake=_fake,
    differentiable=("x",),
    triton="channel_statistics",
    backward=_backward,
    saves={0: None},
)
