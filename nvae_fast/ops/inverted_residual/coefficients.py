"""The arithmetic between the kernels of the inverted residual cell: from sums over maps to coefficients of affine maps.

On vectors (C,) and (B, C), one operator replaces five to twenty calls, whose dispatch would take longer than their work. None
is differentiable. Arguments are float32 or float64, all of one dtype. A missing mean or bias counts as 0, a missing weight
as 1. A gate without scale and shift is computed from the maps themselves, without BN3.

::

    coefficients   var = m2 / count,  rstd = 1 / sqrt(var + eps),  scale = weight rstd,  shift = bias - mean scale
    corrections    BN's backward pass as dx = scale g + beta x + gamma, from sum_g = sum g and sum_gx = sum g (x - mean):
                   grad_weight = rstd sum_gx,  beta = -scale rstd grad_weight / count,
                   gamma = -scale sum_g / count - beta mean
    merge_planes   mean and m2 (C,) of B planes of equal size from each one's (B, C), by Chan's formula
    gate           pooled = scale mean + shift,  hidden = relu(W1 pooled + b1),  gate = sigmoid(W2 hidden + b2),
                   factor = residual_scale gate scale,  offset = residual_scale gate shift
    gate_backward  from sum_x = sum_p grad and sum_xp = sum_p grad (p - mean3): the layers' gradients; through (B, C), what
                   reaches the pooled value; sum_y, dot_y (C,): sums of BN3's gradient and of it times phat;
                   factor = residual_scale gate
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast import distributed
from nvae_fast.ops._op import define_kernel


def _coefficients(
    mean: Tensor | None, m2: Tensor, weight: Tensor | None, bias: Tensor | None, count: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    var = m2 / count
    rstd = torch.rsqrt(var + eps)
    scale = rstd.clone() if weight is None else weight * rstd
    shift = torch.zeros_like(scale) if bias is None else bias.clone()
    return var, rstd, scale, shift if mean is None else shift - mean * scale


def _corrections(
    sum_g: Tensor, sum_gx: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor, count: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = rstd * sum_gx
    beta = -scale * rstd * grad_weight / count
    gamma = -scale * sum_g / count
    return grad_weight, beta, gamma if mean is None else gamma - beta * mean


def _merge_planes(mean: Tensor, m2: Tensor, pixels: int) -> tuple[Tensor, Tensor]:
    merged = mean.sum(0) / max(mean.shape[0], 1)
    return merged, m2.sum(0) + pixels * (mean - merged).square().sum(0)


def _gate(
    mean: Tensor, scale: Tensor | None, shift: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    residual_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    pooled = mean.clone() if scale is None or shift is None else mean * scale + shift
    hidden = torch.relu(torch.addmm(b1, pooled, w1.t()))
    gate = torch.sigmoid(torch.addmm(b2, hidden, w2.t()))
    factor = residual_scale * gate
    if scale is None or shift is None:
        return pooled, hidden, gate, factor, torch.zeros_like(gate)
    return pooled, hidden, gate, factor * scale, factor * shift


def _gate_backward(
    sum_x: Tensor, sum_xp: Tensor, plane_mean: Tensor | None, mean: Tensor | None, rstd: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, pooled: Tensor, hidden: Tensor, gate: Tensor, w1: Tensor, w2: Tensor,
    residual_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    to_y, to_dot = residual_scale * sum_x, residual_scale * sum_xp
    to_gate = to_dot
    if rstd is not None and weight is not None and bias is not None:
        to_dot = to_dot * rstd
        to_gate = weight * to_dot + bias * to_y
    to_logit = to_gate * gate * (1 - gate)
    to_hidden = (to_logit @ w2) * (hidden > 0)
    through = to_hidden @ w1
    sum_y, dot_y = gate.new_zeros(gate.shape[1]), gate.new_zeros(gate.shape[1])
    if plane_mean is not None and mean is not None and rstd is not None:
        sum_y = (gate * to_y + through).sum(0)
        dot_y = (gate * to_dot + through * (plane_mean - mean) * rstd).sum(0)
    layers = to_hidden.t() @ pooled, to_hidden.sum(0), to_logit.t() @ hidden, to_logit.sum(0)
    return *layers, through, sum_y, dot_y, residual_scale * gate


def _like(*positions: int) -> Any:
    """A fake: empty results shaped like the arguments at these positions."""
    return lambda *args: tuple(torch.empty_like(args[i]) for i in positions)


coefficients = define_kernel("batch_norm_coefficients", _coefficients, fake=_like(1, 1, 1, 1))
corrections = define_kernel("batch_norm_corrections", _corrections, fake=_like(0, 0, 0))
merge_planes = define_kernel(
    "merge_planes",
    _merge_planes,
    fake=lambda mean, m2, pixels: (mean.new_empty(mean.shape[1]), mean.new_empty(mean.shape[1])),
)
gate_coefficients = define_kernel(
    "gate_coefficients",
    _gate,
    fake=lambda mean, scale, shift, w1, *_: (
        torch.empty_like(mean), mean.new_empty(mean.shape[0], w1.shape[0]), *(torch.empty_like(mean) for _ in range(3)),
    ),
)  # fmt: skip
gate_backward = define_kernel(
    "gate_gradients",
    _gate_backward,
    fake=lambda sum_x, sum_xp, plane_mean, mean, rstd, weight, bias, pooled, hidden, gate, w1, w2, scale: (
        torch.empty_like(w1), w1.new_empty(w1.shape[0]), torch.empty_like(w2), w2.new_empty(w2.shape[0]),
        torch.empty_like(sum_x), gate.new_empty(gate.shape[1]), gate.new_empty(gate.shape[1]), torch.empty_like(sum_x),
    ),
)  # fmt: skip


def merged_coefficients(
    mean: Tensor, m2: Tensor, count: int, weight: Tensor | None, bias: Tensor | None, eps: float, group: Any
) -> tuple[Any, ...]:  # fmt: skip
    """Mean, count, var, 1 / std, scale and shift over the processes of ``group``, from this process's mean, m2 and count."""
    mean, m2, total = distributed.merge(mean, m2, count, group)
    return mean, total, *coefficients(mean, m2 / total, weight, bias, 1.0, eps)


def merged_corrections(
    sum_g: Tensor, sum_gx: Tensor, mean: Tensor | None, rstd: Tensor, scale: Tensor, count: Tensor, group: Any
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """This process's gradient of gamma; beta and gamma of dx = scale g + beta x + gamma over the processes of ``group``."""
    g, gx = (t / count for t in distributed.totals((sum_g, sum_gx), group))
    _, beta, gamma = corrections(g, gx, mean, rstd, scale, 1.0)
    return rstd * sum_gx, beta, gamma
