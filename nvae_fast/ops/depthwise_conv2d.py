"""Depthwise convolution with an affine map and an activation on load, and statistics of the output.

::

    h = act(scale[c] * x + shift[c])              inside the image only: taps outside contribute exactly 0
    h = nearest-neighbour upsampling of h by 2    when upsample == 2
    y[b,c,i,j] = sum_uv weight[c,0,u,v] * h[b, c, i*stride + (u - K//2)*dilation, j*stride + (v - K//2)*dilation]

PyTorch equivalent: ``F.conv2d(h, weight, stride=stride, padding=K//2*dilation, dilation=dilation, groups=C)``.
Used by NVAE's inverted residual cells (arXiv 2007.03898, section 3.1.1: depthwise 5x5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import _backend, _checks, _devices, _memory
from nvae_fast.ops._activation import ACTIVATIONS, activate
from nvae_fast.ops._layout import empty_map, memory_format
from nvae_fast.ops._op import Gradients, Grads, Tensors, define_kernel, define_op, vjp
from nvae_fast.ops.channel_statistics import ChannelStatistics


@overload
def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, upsample: int = 1,
    scale: Tensor | None = None, shift: Tensor | None = None, activation: str | None = None,
    stats: Literal[False] = False, taps: Sequence[int] | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def depthwise_conv2d(
    x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, upsample: int = 1,
    scale: Tensor | None = None, shift: Tensor | None = None, activation: str | None = None,
    stats: Literal[True], taps: Sequence[int] | None = None,
) -> tuple[Tensor, ChannelStatistics]: ...  # fmt: skip
def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    stats: bool = False,
    taps: Sequence[int] | None = None,
) -> Tensor | tuple[Tensor, ChannelStatistics]:
    """Depthwise convolution with "same" padding; formula in the module's docstring.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, K, K), K odd.
        stride: 1 or 2; dilation: 1 or 2; upsample: 1 or 2 (2 only with stride 1).
        scale, shift: (C,) each, both or neither; applied to x on load.
        activation: None, "swish" or "elu", applied after scale and shift.
        stats: also return ``ChannelStatistics(mean, m2, count)`` of y: (C,) means, (C,) sums of squared deviations from them,
            both differentiable, and how many values of each channel they are of, an int.
        taps: positions ``u * K + v`` of the taps that exist, for masked weights: the others are not read, cost nothing
            where whole rows or columns of them are missing, and their weights have gradient zero. None: all.

    Returns:
        y (B, C, H', W') with H' = ceil(H * upsample / stride) in the dtype of x, or ``(y, statistics)``, these in float32
        (float64 for float64 x). The arithmetic is float32 for half precision.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    op = "depthwise_conv2d"
    stride, dilation, upsample = _checks.choices(
        op, (1, 2), stride=stride, dilation=dilation, upsample=upsample
    )
    if stride == upsample == 2:
        raise ValueError(f"{op}: upsample=2 needs stride=1, got stride=2")
    _checks.feature_map(op, "x", x)
    _checks.feature_map(op, "weight", weight)
    channels, k = x.shape[1], weight.shape[3]
    if k % 2 == 0:
        raise ValueError(f"{op}: weight must have an odd kernel width, got {k}")
    _checks.shape(op, "weight", weight, (channels, 1, k, k), x)
    if scale is not None or shift is not None:
        _checks.together(op, scale=scale, shift=shift)
        _checks.vectors(op, x, scale=scale, shift=shift)
    if activation not in ACTIVATIONS:
        _checks.one_of(op, "activation", activation, ACTIVATIONS)
    if not isinstance(stats, bool):
        _checks.flag(op, "stats", stats)
    live = None if taps is None else _positions(taps, k)
    y, mean, m2 = _op(x, weight, scale, shift, stride, dilation, upsample, activation, stats, live)
    if not stats:
        return y
    return y, ChannelStatistics(mean, m2, y.shape[0] * y.shape[2] * y.shape[3])


def _positions(taps: Any, k: int) -> list[int]:
    if not isinstance(taps, Iterable):
        raise TypeError(f"depthwise_conv2d: taps must be None or a sequence of positions, got {taps!r}")
    live = list(taps)
    inside = all(isinstance(tap, int) and 0 <= tap < k * k for tap in live)
    if not live or not inside or len(set(live)) != len(live):
        raise ValueError(
            f"depthwise_conv2d: taps must be None or different positions between 0 and {k * k - 1}, at least one, got {live}"
        )
    return live


def _runs(taps: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of consecutive positions in ``taps``, each as (first, one past the last)."""
    ordered = sorted(taps)
    starts = [tap for tap in ordered if tap - 1 not in ordered]
    stops = [tap + 1 for tap in ordered if tap + 1 not in ordered]
    return list(zip(starts, stops, strict=True))


def _masked(weight: Tensor, taps: Sequence[int] | None) -> Tensor:
    """``weight`` with zeros where no tap is. Values there, NaN included, have no effect."""
    if taps is None:
        return weight
    live = torch.zeros(weight.shape[-1] ** 2, dtype=torch.bool, device=weight.device)
    # One fill per run of neighbours: a list of positions would be copied from the host, which a CUDA graph cannot record.
    for start, stop in _runs(taps):
        live[start:stop] = True
    return torch.where(live.view(weight.shape[-2:]), weight, weight.new_zeros(()))


def _convolve(
    h: Tensor, weight: Tensor, stride: int, dilation: int, upsample: int, taps: Sequence[int] | None
) -> Tensor:
    if upsample == 2:
        h = F.interpolate(h, scale_factor=2, mode="nearest")
    padding, kind = weight.shape[-1] // 2 * dilation, h.device.type
    # y has the dtype of h, as in the kernels; autocast would make it half precision after a float32 map.
    with torch.autocast(kind, enabled=False) if kind in _backend.DEVICES else nullcontext():
        return F.conv2d(
            h, _masked(weight, taps).to(h.dtype), None, stride, padding, dilation, weight.shape[0]
        )


def _reference(
    x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int, dilation: int,
    upsample: int, activation: str | None, stats: bool, taps: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    h = x
    if scale is not None and shift is not None:
        # In the dtype sums are computed in: a half-precision x would otherwise be rounded twice on its way in.
        affine = h.to(acc_dtype) * scale.to(acc_dtype)[:, None, None] + shift.to(acc_dtype)[:, None, None]
        h = activate(affine, activation).to(x.dtype)
    else:
        h = activate(h, activation)
    y = _convolve(h, weight, stride, dilation, upsample, taps)
    if not stats:
        empty = y.new_empty(0, dtype=acc_dtype)
        return y, empty, empty.clone()
    if y.numel() == 0:  # nothing has mean 0 and spread 0, so that merging by counts never meets a NaN
        zero = y.to(acc_dtype).sum((0, 2, 3))
        return y, zero, zero.clone()
    var, mean = torch.var_mean(y.to(acc_dtype), (0, 2, 3), correction=0)
    return y, mean, var * (y.numel() // max(y.shape[1], 1))


def _fake(
    x: Tensor, weight: Any, scale: Any, shift: Any, stride: int, dilation: int, upsample: int,
    activation: Any, stats: bool, taps: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, c, h, w = x.shape
    size = (b, c, (h * upsample + stride - 1) // stride, (w * upsample + stride - 1) // stride)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return y, *(x.new_empty(c if stats else 0, dtype=_checks.accumulate_dtype(x.dtype)) for _ in range(2))


def _backward_formula(
    grad: Tensor, out: Tensor | None, alpha: Tensor | None, beta: Tensor | None, gamma: Tensor | None,
    pivot: Tensor | None, x: Tensor, weight: Tensor, scale: Tensor | None, shift: Tensor | None, stride: int,
    dilation: int, upsample: int, activation: str | None, taps: Sequence[int] | None, need_x: bool,
    need_weight: bool, need_affine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients from the input and what reached the output; every fused backward kernel computes this.

    ::

        dy = alpha[c] * grad + beta[c] * out + gamma[c]          (grad alone when these are None)
        u = scale * x + shift,  h = act(u),  du = (conv^T dy) * act'(u)
        grad_x = scale * du,  grad_shift = sum du,  grad_scale = sum du * (x - pivot[c])

    grad_scale and grad_shift are wanted with and without scale and shift (then 1 and 0): they are what an affine map
    folded in from outside needs. alpha, beta and gamma fold in batch norm's backward pass over the output, and the
    gradients of the statistics. Gradients that are not wanted come back empty.
    """
    acc_dtype = _checks.accumulate_dtype(x.dtype)

    def column(t: Tensor) -> Tensor:
        return t.to(acc_dtype)[:, None, None]

    dy = grad.to(acc_dtype)
    if alpha is not None and beta is not None and gamma is not None and out is not None:
        dy = column(alpha) * dy + column(beta) * out.to(acc_dtype) + column(gamma)
    centred = x.to(acc_dtype)
    u = centred if scale is None or shift is None else column(scale) * centred + column(shift)
    if pivot is not None:
        centred = centred - column(pivot)

    def convolve(u: Tensor, weight: Tensor) -> Tensor:
        return _convolve(activate(u, activation), weight, stride, dilation, upsample, taps)

    reached = vjp(convolve, (0, 1), [dy], (u, weight.to(acc_dtype)), (need_x or need_affine, need_weight))
    results = _empty_gradients(x, weight, need_x, need_weight, need_affine)
    du, to_weight = reached.get(0), reached.get(1)
    if to_weight is not None:
        results[1].copy_(to_weight)
    if du is None:
        return results
    if need_x:
        results[0].copy_(du if scale is None else column(scale) * du)
    if need_affine:
        results[2].copy_((du * centred).sum((0, 2, 3)))
        results[3].copy_(du.sum((0, 2, 3)))
    return results


def _empty_gradients(
    x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_affine: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    channels = x.shape[1] if need_affine else 0
    return (
        empty_map(x, x.shape[1]) if need_x else x.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else weight.new_empty(0),
        x.new_empty(channels, dtype=acc_dtype),
        x.new_empty(channels, dtype=acc_dtype),
    )


# Not the formula's VJP: the gradients of an affine map and of statistics are folded in from outside.
_gradients = define_kernel(
    "depthwise_conv2d_backward",
    _backward_formula,
    fake=lambda *args: _empty_gradients(args[6], args[7], *args[-3:]),
)


def _backward(grads: Grads, wanted: frozenset[str], a: Any, saved: Tensors) -> Gradients:
    """The gradients of the statistics are part of dy: mean's is spread evenly, m2's is 2 (y - mean)."""
    grad, grad_mean, grad_m2 = grads
    y = alpha = beta = gamma = None
    if grad_mean is not None or grad_m2 is not None:
        y, mean = saved
        grad = torch.zeros_like(y) if grad is None else grad
        beta = torch.zeros_like(mean) if grad_m2 is None else 2 * grad_m2
        gamma = -beta * mean
        if grad_mean is not None:
            gamma = gamma + grad_mean / max(y.shape[0] * y.shape[2] * y.shape[3], 1)
        alpha = torch.ones_like(mean)
    assert grad is not None
    to_x, to_weight, to_scale, to_shift = _gradients(
        grad, y, alpha, beta, gamma, None, a.x, a.weight, a.scale, a.shift, a.stride, a.dilation, a.upsample, a.activation,
        a.taps, "x" in wanted, "weight" in wanted, not wanted.isdisjoint(("scale", "shift")),
    )  # fmt: skip
    return {
        "x": to_x,
        "weight": to_weight,
        "scale": None if a.scale is None else to_scale.to(a.scale.dtype),
        "shift": None if a.shift is None else to_shift.to(a.shift.dtype),
    }


_op = define_op(
    "depthwise_conv2d",
    _reference,
    fake=_fake,
    differentiable=("x", "weight", "scale", "shift"),
    backward=_backward,
    saves={0: "stats", 1: "stats"},
    constant_outputs={1: "stats", 2: "stats"},
)


def kernels(device: torch.device) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, backward) without checks, for the cells: the operators, or their formulas on a GPU that has no CUDA code."""
    if device.type == "cuda" and not _devices.runs(("cuda",), device.index):
        return _reference, _backward_formula
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.ops.nvae_fast.depthwise_conv2d, _gradients
    return _ON_GPU


_ON_GPU = _memory.translated(torch.ops.nvae_fast.depthwise_conv2d), _memory.translated(_gradients)
