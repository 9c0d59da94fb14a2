"""Depthwise convolution with an affine map and an activation on load and statistics on the way out.

::

    h = act(scale[c] * x + shift[c])              inside the image only: taps outside contribute exactly 0
    h = nearest-neighbour upsampling of h by 2    when upsample == 2
    y[b,c,i,j] = sum_uv weight[c,0,u,v] * h[b, c, i*stride + (u - K//2)*dilation, j*stride + (v - K//2)*dilation]

PyTorch equivalent: ``F.conv2d(h, weight, stride=stride, padding=K//2*dilation, dilation=dilation, groups=C)``.
Used by NVAE's inverted residual cells (arXiv 2007.03898, section 3.1.1: depthwise 5x5).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.nn.functional as F

from nvae_fast.ops import _checks
from nvae_fast.ops._activation import ACTIVATIONS, activate
from nvae_fast.ops._register import room
from nvae_fast.ops.channel_statistics import ChannelStatistics


@overload
def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str | None = None,
    stats: Literal[False] = False,
) -> torch.Tensor: ...
@overload
def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str | None = None,
    stats: Literal[True],
) -> tuple[torch.Tensor, ChannelStatistics]: ...
def depthwise_conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str | None = None,
    stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ChannelStatistics]:
    """Depthwise convolution with "same" padding; formula in the module's docstring.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, K, K), K odd.
        stride: 1 or 2; dilation: 1 or 2; upsample: 1 or 2 (2 only with stride 1).
        scale, shift: (C,) each, both or neither; applied to x on load.
        activation: None, "swish" or "elu", applied after scale and shift.
        stats: also return :class:`ChannelStatistics` of y (mean and m2 differentiable).

    Returns:
        y (B, C, H', W') with H' = ceil(H * upsample / stride), or ``(y, statistics)``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    y, mean, m2 = _room(x, weight, scale, shift, stride, dilation, upsample, activation, stats)
    if not stats:
        return y
    return y, ChannelStatistics(mean, m2, y.shape[0] * y.shape[2] * y.shape[3])


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: int,
    dilation: int,
    upsample: int,
    activation: str | None,
    stats: bool,
) -> None:
    op = "depthwise_conv2d"
    _checks.feature_map(op, "x", x)
    _checks.feature_map(op, "weight", weight)
    channels, k = x.shape[1], weight.shape[3]
    if k % 2 == 0:
        raise ValueError(f"{op}: weight must have an odd kernel width, got {k}")
    _checks.shape(op, "weight", weight, (channels, 1, k, k), x)
    if (scale is None) != (shift is None):
        raise ValueError(
            f"{op}: scale and shift must be given together, got only {'shift' if scale is None else 'scale'}"
        )
    if scale is not None and shift is not None:
        _checks.shape(op, "scale", scale, (channels,), x)
        _checks.shape(op, "shift", shift, (channels,), x)
    _checks.one_of(op, "stride", stride, (1, 2))
    _checks.one_of(op, "dilation", dilation, (1, 2))
    _checks.one_of(op, "upsample", upsample, (1, 2))
    if upsample == 2 and stride == 2:
        raise ValueError(f"{op}: upsample=2 needs stride=1, got stride=2")
    _checks.one_of(op, "activation", activation, ACTIVATIONS)


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: int,
    dilation: int,
    upsample: int,
    activation: str | None,
    stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = x
    if scale is not None and shift is not None:
        # In the dtype sums are computed in: a half-precision x would otherwise be rounded twice on its way in.
        wide = _checks.accumulate_dtype(x.dtype)
        affine = h.to(wide) * scale.to(wide)[:, None, None] + shift.to(wide)[:, None, None]
        h = activate(affine, activation).to(x.dtype)
    else:
        h = activate(h, activation)
    if upsample == 2:
        h = F.interpolate(h, scale_factor=2, mode="nearest")
    k = weight.shape[-1]
    y = F.conv2d(
        h,
        weight.to(h.dtype),
        stride=stride,
        padding=k // 2 * dilation,
        dilation=dilation,
        groups=weight.shape[0],
    )
    if not stats:
        empty = y.new_empty(0, dtype=_checks.accumulate_dtype(y.dtype))
        return y, empty, empty.clone()
    if y.numel() == 0:  # nothing has mean 0 and spread 0, so that merging by counts never meets a NaN
        zero = y.to(_checks.accumulate_dtype(y.dtype)).sum((0, 2, 3))
        return y, zero, zero.clone()
    var, mean = torch.var_mean(y.to(_checks.accumulate_dtype(y.dtype)), (0, 2, 3), correction=0)
    return y, mean, var * (y.numel() // max(y.shape[1], 1))


_room = room(
    "depthwise_conv2d",
    "(Tensor x, Tensor weight, Tensor? scale, Tensor? shift, int stride, int dilation, int upsample,"
    " str? activation, bool stats) -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2, 3),
)
