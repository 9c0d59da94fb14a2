"""Batch norm with an activation whose batch statistics are those of every process of a group.

With the sums over the batches of all processes, n values a channel together, and ``u``, ``g`` as in :mod:`._affine`::

    y  = act(scale x + shift)                        scale = weight rstd,  shift = bias - mean scale
    dx = scale g + beta x + gamma                    beta = -scale rstd^2 (sum g (x - mean)) / n
                                                     gamma = -scale (sum g) / n - beta mean

One exchange forward (count, mean and m2 of every process) and one backward (the two sums). Gradients of weight and bias are
this process's part, as PyTorch's own synchronised batch norm leaves them: whoever averages gradients adds them up.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from nvae_fast import distributed
from nvae_fast.ops import _affine, _backend, _checks, _coefficients
from nvae_fast.ops import batch_norm_swish as batch_norm
from nvae_fast.ops import channel_statistics as statistics


class MergedNorm(NamedTuple):
    """``y`` like x; ``mean`` and biased ``var`` (C,) of all processes, detached, and of how many values (0-d, at least 1)."""

    y: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor
    count: torch.Tensor  # type: ignore[assignment]  # tuple.count gives way


def merged_batch_norm_swish(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float = 1e-5,
    activation: str | None = "swish",
    group: Any = None,
) -> MergedNorm | None:
    """:func:`nvae_fast.batch_norm_swish` with the statistics of every process of ``group``; None where there is only one.

    Every process must call it, also one whose x is empty: batches may differ in size. Differentiable once in x, weight and
    bias.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    if distributed.world_size(group) == 1:
        return None
    _checks.feature_map("batch_norm_swish", "x", x)
    # Its own check but for the number of values, of which a process may have none: statistics stand in as given.
    batch_norm._check(x, weight, bias, weight, weight, eps, activation)
    return MergedNorm(*_Merged.apply(x, weight, bias, eps, activation, group))


def coefficients_of(
    mean: torch.Tensor | None,
    m2: torch.Tensor,
    count: int | torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """var, 1 / std, scale and shift of a batch norm; the count is a tensor where processes merged theirs."""
    if isinstance(count, int):
        return _coefficients.coefficients(mean, m2, weight, bias, float(count), eps)
    return _coefficients.coefficients(mean, m2 / count, weight, bias, 1.0, eps)


def corrections_of(
    sum_g: torch.Tensor,
    sum_gx: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor,
    scale: torch.Tensor,
    count: int | torch.Tensor,
    group: Any,
) -> tuple[torch.Tensor, ...]:
    """This process's gradient of gamma, and beta and gamma of dx = scale g + beta x + gamma over all of them."""
    if isinstance(count, int):
        return _coefficients.corrections(sum_g, sum_gx, mean, rstd, scale, float(count))
    g, gx = (t / count for t in distributed.totals((sum_g, sum_gx), group))
    _, beta, gamma = _coefficients.corrections(g, gx, mean, rstd, scale, 1.0)
    return rstd * sum_gx, beta, gamma


class _Passes(NamedTuple):
    """The passes over maps: operators where batch norm is fused, their formulas elsewhere."""

    statistics: Any
    forward: Any
    reduce: Any
    gradient: Any


def _passes(device: torch.device) -> _Passes:
    if _backend.fused("batch_norm_swish", device):
        of = torch.ops.nvae_fast.channel_statistics
        return _Passes(of, _affine.forward, _affine.reduce, _affine.gradient)
    return _Passes(statistics._reference, *_affine.FORMULAS)


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        activation: str | None,
        group: Any,
    ) -> tuple[torch.Tensor, ...]:
        passes = _passes(x.device)
        wide = _checks.accumulate_dtype(x.dtype)
        mean, m2 = passes.statistics(x, False)
        count: Any
        mean, m2, count = distributed.merge(mean, m2, x.numel() // max(x.shape[1], 1), group)
        var, rstd, scale, shift = coefficients_of(mean, m2, count, weight.to(wide), bias.to(wide), eps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, rstd, scale, shift, count)
        ctx.constants = (activation, group, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(mean, var, count)
        return passes.forward(x, scale, shift, activation), mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *unused: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("batch_norm_swish: double backward over several processes is not supported")
        if grad is None:
            return (None,) * 6
        x, mean, rstd, scale, shift, count = ctx.saved_tensors
        activation, group, weight_dtype, bias_dtype = ctx.constants
        passes = _passes(x.device)
        sum_g, sum_gx, _, _ = passes.reduce(grad, x, scale, shift, mean, activation, False, False)
        to_x = None
        to_weight = rstd * sum_gx
        if ctx.needs_input_grad[0]:
            _, beta, gamma = corrections_of(sum_g, sum_gx, mean, rstd, scale, count, group)
            to_x = passes.gradient(grad, x, scale, shift, scale, beta, gamma, activation)
        return to_x, to_weight.to(weight_dtype), sum_g.to(bias_dtype), None, None, None
