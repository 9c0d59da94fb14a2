"""Batch norm with an activation whose batch statistics are those of every process of a group.

With sums over the batches of all processes, n values per channel together, and ``u``, ``g`` as in :mod:`.affine_activation`::

    y  = act(scale x + shift)                        scale = weight rstd,  shift = bias - mean scale
    dx = scale g + beta x + gamma                    beta = -scale rstd^2 (sum g (x - mean)) / n
                                                     gamma = -scale (sum g) / n - beta mean

One exchange forward (count, mean and m2 of every process) and one backward (the two sums). Gradients of weight and bias are
this process's part, as PyTorch's own synchronised batch norm leaves them: whoever averages gradients adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvae_fast.ops import _backend, _checks
from nvae_fast.ops import batch_norm_swish as batch_norm
from nvae_fast.ops._op import DEFINITIONS, refuse_double_backward
from nvae_fast.ops.inverted_residual.coefficients import merged_coefficients, merged_corrections


class SyncBatchNormOutput(NamedTuple):
    """``y`` like x; ``mean`` and biased ``var`` (C,) over all processes, detached; ``count`` (0-d, at least 1) of values."""

    y: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def sync_batch_norm_swish(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    activation: str | None = "swish",
    group: Any = None,
) -> SyncBatchNormOutput:
    """:func:`nvae_fast.batch_norm_swish` with the statistics of every process of ``group``, which must have several.

    Every process must call it, also one whose x is empty: batches may differ in size. Differentiable once in x, weight and
    bias.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    if _backend.transforms_active():
        raise RuntimeError(
            "batch_norm_swish: statistics over several processes cannot be computed under torch.func transforms or "
            "forward-mode differentiation; take those of one process, or the running ones"
        )
    batch_norm.check_batch_norm(x, weight, bias, eps, activation)  # a process may have no values at all
    return SyncBatchNormOutput(*_Merged.apply(x, weight, bias, eps, activation, group))


def _run(x: Tensor, *names: str) -> list[Callable[..., Any]]:
    """Operators where batch norm is fused, their formulas elsewhere."""
    if _backend.fused("batch_norm_swish", x.device):
        return [getattr(torch.ops.nvae_fast, name) for name in names]
    return [DEFINITIONS[name].formula for name in names]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str | None, group: Any
    ) -> tuple[Tensor, ...]:
        channel_statistics, forward = _run(x, "channel_statistics", "affine_activation")
        acc_dtype = _checks.accumulate_dtype(x.dtype)
        mean, m2 = channel_statistics(x, False)
        seen = x.numel() // max(x.shape[1], 1)
        mean, count, var, rstd, scale, shift = merged_coefficients(
            mean, m2, seen, weight.to(acc_dtype), bias.to(acc_dtype), eps, group
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mean, rstd, scale, shift, count)
        ctx.constants = (activation, group, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(mean, var, count)
        return forward(x, scale, shift, activation), mean, var, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        refuse_double_backward("batch_norm_swish", "take statistics of one process for create_graph=True")
        if grad is None:
            return (None,) * 6
        x, mean, rstd, scale, shift, count = ctx.saved_tensors
        activation, group, weight_dtype, bias_dtype = ctx.constants
        reduce, gradient = _run(x, "affine_activation_reduce", "affine_activation_grad")
        sum_g, sum_gx, _, _ = reduce(grad, x, scale, shift, mean, activation, False, False)
        to_x = None
        to_weight = rstd * sum_gx
        if ctx.needs_input_grad[0]:
            _, beta, gamma = merged_corrections(sum_g, sum_gx, mean, rstd, scale, count, group)
            to_x = gradient(grad, x, scale, shift, scale, beta, gamma, activation)
        return to_x, to_weight.to(weight_dtype), sum_g.to(bias_dtype), None, None, None
