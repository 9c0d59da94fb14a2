"""Batch normalisation and activation in one op, functional: batch statistics come back, nothing is mutated.

::

    mean, var = statistics of x over (B, H, W), var biased      or the given ones
    y = act( weight * (x - mean) / sqrt(var + eps) + bias )     act: swish(t) = t * sigmoid(t), elu, or none

NVAE (arXiv 2007.03898), section 3.1.1 (BN + swish) and 3.1.2 (swish recomputed in the backward pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nvae_fast.ops import _affine as affine
from nvae_fast.ops import _checks, channel_statistics  # noqa: F401  the operator that batch statistics come from
from nvae_fast.ops._activation import ACTIVATIONS, activate
from nvae_fast.ops._register import operator, room
from nvae_fast.ops._squash import empty_map


class BatchNormOutput(NamedTuple):
    """``y`` like x; ``mean`` and ``var`` (C,): the statistics used, var biased, detached when they are the batch's."""

    y: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


def batch_norm_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None = None,
    var: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = "swish",
) -> BatchNormOutput:
    """Normalise ``x`` and apply the activation; formula in the module's docstring.

    Args:
        x: (B, C, H, W).
        weight, bias: (C,), gamma and beta.
        mean, var: (C,) statistics to use (evaluation, or merged over processes); None for both: the batch's own.
        eps: added to the variance.
        activation: "swish", "elu" or None.

    Returns:
        ``BatchNormOutput(y, mean, var)``: y in the dtype of x, the statistics (C,) that were used, in that of the
        arithmetic: float32, float64 for float64 x.

    Differentiable in x, weight, bias, and in mean and var when they are given.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value, or there is only one value per
            channel to take statistics of.
    """
    return BatchNormOutput(*_room(x, weight, bias, mean, var, eps, activation))


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> None:
    op = "batch_norm_swish"
    _checks.feature_map(op, "x", x)
    channels = (x.shape[1],)
    _checks.shape(op, "weight", weight, channels, x)
    _checks.shape(op, "bias", bias, channels, x)
    if (mean is None) != (var is None):
        raise ValueError(
            f"{op}: mean and var must be given together, got only {'var' if mean is None else 'mean'}"
        )
    if mean is not None and var is not None:
        _checks.shape(op, "mean", mean, channels, x)
        _checks.shape(op, "var", var, channels, x)
    elif x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(
            f"{op}: expected more than one value per channel to take statistics of, got x {tuple(x.shape)}"
        )
    if not (isinstance(eps, (int, float)) and eps > 0):
        raise ValueError(f"{op}: eps must be > 0, got {eps!r}")
    _checks.one_of(op, "activation", activation, ACTIVATIONS)


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = _checks.accumulate_dtype(x.dtype)
    if mean is None or var is None:
        if x.numel() == 0:
            return (
                activate(x * 1, activation),
                weight.new_zeros(weight.shape, dtype=wide),
                weight.new_ones(weight.shape, dtype=wide),
            )
        y, batch_mean, inv_std = torch.native_batch_norm(
            x, weight.to(wide), bias.to(wide), None, None, True, 0.0, eps
        )
        batch_var = (inv_std.detach().pow(-2) - eps).clamp_min(0)
        return activate(y, activation), batch_mean.detach().to(wide), batch_var.to(wide)
    if mean.requires_grad or var.requires_grad:
        column = (slice(None), None, None)
        factor = (weight * torch.rsqrt(var.to(wide) + eps)).to(wide)
        y = ((x.to(wide) - mean[column]) * factor[column] + bias[column]).to(x.dtype)
    else:
        y = F.batch_norm(x, mean.to(wide), var.to(wide), weight.to(wide), bias.to(wide), False, 0.0, eps)
    return activate(y, activation), mean.clone(), var.clone()


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = _checks.accumulate_dtype(x.dtype)
    if mean is None or var is None:
        return (
            empty_map(x, x.shape[1]),
            x.new_empty(x.shape[1], dtype=wide),
            x.new_empty(x.shape[1], dtype=wide),
        )
    return empty_map(x, x.shape[1]), torch.empty_like(mean), torch.empty_like(var)


def _backward_formula(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: str | None,
    given: bool,
    need_x: bool,
    need_sums: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients from x and the statistics alone. With ``r = 1 / sqrt(var + eps)``, ``u`` what the activation is applied
    to and ``g = grad act'(u)``, sums over the values of a channel::

        weight: r sum g (x - mean)      bias: sum g      mean: -weight r sum g      var: -weight r^3 sum g (x - mean) / 2
        x:      weight r (g - (sum g) / n - (x - mean) r^2 (sum g (x - mean)) / n)        without the sums when statistics
                                                                                          were given
    """
    wide = _checks.accumulate_dtype(x.dtype)
    mean, weight = mean.to(wide), weight.to(wide)
    inverse = torch.rsqrt(var.to(wide) + eps)
    scale = weight * inverse
    shift = torch.addcmul(bias.to(wide), mean, scale, value=-1)
    nothing = torch.zeros_like(scale)
    sum_g = sum_gx = nothing
    if need_sums or (need_x and not given):
        sum_g, sum_gx, _, _ = affine.reduce(grad, x, scale, shift, mean, activation, False, False)
    grad_x = x.new_empty(0)
    if need_x:
        share = 0.0 if given else 1 / max(x.numel() // max(x.shape[1], 1), 1)
        beta = scale * inverse.square() * sum_gx * -share
        gamma = -(scale * sum_g * share + beta * mean)
        grad_x = affine.gradient(grad, x, scale, shift, scale, beta, gamma, activation)
    results = (sum_gx * inverse, sum_g, -sum_g * scale, -0.5 * sum_gx * scale * inverse.square())
    needed = (need_sums, need_sums, need_sums and given, need_sums and given)
    return grad_x, *(r.clone() if n else r.new_empty(0) for r, n in zip(results, needed, strict=True))


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    activation: str | None,
    given: bool,
    need_x: bool,
    need_sums: bool,
) -> tuple[torch.Tensor, ...]:
    wide = _checks.accumulate_dtype(x.dtype)
    sizes = (need_sums, need_sums, need_sums and given, need_sums and given)
    return (
        empty_map(x, x.shape[1]) if need_x else x.new_empty(0),
        *(x.new_empty(x.shape[1] if need else 0, dtype=wide) for need in sizes),
    )


_backward_operator = operator(
    "batch_norm_swish_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor var, float eps, str? activation,"
    " bool given, bool need_x, bool need_sums) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    default=_backward_formula,
    fake=_backward_fake,
)


def _backward(
    grads: Sequence[torch.Tensor | None],
    wanted: Sequence[int],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    eps: float,
    activation: str | None,
    used_mean: torch.Tensor,
    used_var: torch.Tensor,
) -> list[torch.Tensor | None]:
    grad, *of_statistics = grads
    found: list[torch.Tensor | None] = [None] * 5
    if grad is not None:
        need_sums = any(i in wanted for i in (1, 2, 3, 4))
        found = list(
            _backward_operator(
                grad, x, weight, bias, used_mean, used_var, eps, activation, mean is not None, 0 in wanted, need_sums
            )
        )  # fmt: skip
    for i, (given, through) in enumerate(zip((mean, var), of_statistics, strict=True), start=3):
        # What reaches given statistics as outputs; the batch's own are constants.
        before = found[i]
        if given is None:
            found[i] = None
        elif through is not None:
            found[i] = through if before is None or before.numel() == 0 else before + through
    for i, like in enumerate((weight, bias, mean, var), start=1):
        value = found[i]
        if i in wanted and value is not None and like is not None and value.dtype != like.dtype:
            found[i] = value.to(like.dtype)
    return found


def _gpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    eps: float,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two passes: statistics, then normalisation and activation."""
    if mean is None or var is None:
        wide = _checks.accumulate_dtype(x.dtype)
        count = x.numel() // max(x.shape[1], 1)
        used_mean, m2 = torch.ops.nvae_fast.channel_statistics(x, False)
        used_var = m2 / count if count else torch.ones_like(m2)
    else:
        wide, used_mean, used_var = mean.dtype, mean.clone(), var.clone()
        wide = torch.promote_types(wide, _checks.accumulate_dtype(x.dtype))
    scale = weight.to(wide) * torch.rsqrt(used_var.to(wide) + eps)
    shift = torch.addcmul(bias.to(wide), used_mean.to(wide), scale, value=-1)
    return affine.forward(x, scale, shift, activation), used_mean, used_var


_room = room(
    "batch_norm_swish",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, float eps, str? activation)"
    " -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2, 3, 4),
    fake=_fake,
    backward=_backward,
    gpu=_gpu,
    save_outputs=(1, 2),
)
