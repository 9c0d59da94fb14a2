"""Batch normalisation and activation in one op, functional: batch statistics come back, nothing is mutated.

::

    mean, var = statistics of x over (B, H, W), var biased      or the given ones
    y = act( weight * (x - mean) / sqrt(var + eps) + bias )     act: swish(t) = t * sigmoid(t), elu, or none

NVAE (arXiv 2007.03898), section 3.1.1 (BN + swish) and 3.1.2 (swish recomputed in the backward pass).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from nvae_fast.ops import _checks
from nvae_fast.ops._activation import ACTIVATIONS, activate
from nvae_fast.ops._register import room


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
    if not eps > 0:
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


_room = room(
    "batch_norm_swish",
    "(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, float eps, str? activation)"
    " -> (Tensor, Tensor, Tensor)",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2, 3, 4),
)
