"""Batch normalisation and activation in one functional operator: it returns the batch statistics and mutates nothing.

::

    mean, var = statistics of x over (B, H, W), var biased      or the given ones
    y = act( weight * (x - mean) / sqrt(var + eps) + bias )     act: swish(t) = t * sigmoid(t), elu, or none

NVAE (arXiv 2007.03898), section 3.1.1 (BN + swish) and 3.1.2 (swish recomputed in the backward pass).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import _backend, _checks
from nvae_fast.ops import affine_activation as affine
from nvae_fast.ops._activation import ACTIVATIONS, activate
from nvae_fast.ops._layout import empty_map
from nvae_fast.ops._op import Gradients, Grads, Tensors, define_kernel, define_op


class BatchNormOutput(NamedTuple):
    """``y`` like x; ``mean`` and ``var`` (C,): the statistics used, var biased, detached when they are the batch's."""

    y: Tensor
    mean: Tensor
    var: Tensor


def batch_norm_swish(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = "swish",
) -> BatchNormOutput:
    """Normalise ``x`` and apply the activation; formula in the module's docstring.

    Args:
        x: (B, C, H, W).
        weight, bias: (C,), gamma and beta.
        mean, var: (C,) statistics to use (evaluation, or merged over processes); None for both: those of the batch.
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
    op = "batch_norm_swish"
    check_batch_norm(x, weight, bias, eps, activation)
    if mean is None and var is None:
        if x.shape[0] * x.shape[2] * x.shape[3] == 1:
            raise ValueError(
                f"{op}: expected more than one value per channel to take statistics of, got x {tuple(x.shape)}"
            )
    else:
        _checks.together(op, mean=mean, var=var)
        _checks.vectors(op, x, mean=mean, var=var)
    return BatchNormOutput(*_op(x, weight, bias, mean, var, eps, activation))


def check_batch_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str | None) -> None:
    """The checks that do not depend on where the statistics come from."""
    op = "batch_norm_swish"
    _checks.feature_map(op, "x", x)
    _checks.shape(op, "weight", weight, x.shape[1:2], x)
    _checks.shape(op, "bias", bias, x.shape[1:2], x)
    if not (isinstance(eps, (int, float)) and eps > 0):
        raise ValueError(f"{op}: eps must be > 0, got {eps!r}")
    if activation not in ACTIVATIONS:
        _checks.one_of(op, "activation", activation, ACTIVATIONS)


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    if mean is None or var is None:
        if x.numel() == 0:
            return (
                activate(x * 1, activation),
                weight.new_zeros(weight.shape, dtype=acc_dtype),
                weight.new_ones(weight.shape, dtype=acc_dtype),
            )
        # PyTorch's backward pass in channels_last reads a weight with gaps as if it had none.
        scale, shift = weight.to(acc_dtype).contiguous(), bias.to(acc_dtype).contiguous()
        y, batch_mean, inv_std = torch.native_batch_norm(x, scale, shift, None, None, True, 0.0, eps)
        batch_var = (inv_std.detach().pow(-2) - eps).clamp_min(0)
        return activate(y, activation), batch_mean.detach().to(acc_dtype), batch_var.to(acc_dtype)
    # F.batch_norm takes given statistics for constants.
    if mean.requires_grad or var.requires_grad or _backend.transforms_active():
        column = (slice(None), None, None)
        factor = (weight * torch.rsqrt(var.to(acc_dtype) + eps)).to(acc_dtype)
        y = ((x.to(acc_dtype) - mean[column]) * factor[column] + bias[column]).to(x.dtype)
    else:
        m, v, scale, shift = (t.to(acc_dtype).contiguous() for t in (mean, var, weight, bias))
        y = F.batch_norm(x, m, v, scale, shift, False, 0.0, eps)
    return activate(y, activation), mean.clone(), var.clone()


def _fake(
    x: Tensor, weight: Any, bias: Any, mean: Tensor | None, var: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    if mean is None or var is None:
        acc_dtype = _checks.accumulate_dtype(x.dtype)
        return empty_map(x, x.shape[1]), *(x.new_empty(x.shape[1], dtype=acc_dtype) for _ in range(2))
    return empty_map(x, x.shape[1]), torch.empty_like(mean), torch.empty_like(var)


def _backward_formula(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float,
    activation: str | None, given: bool, need_x: bool, need_sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients from x and the statistics alone. With ``r = 1 / sqrt(var + eps)``, ``u`` what the activation is applied
    to and ``g = grad act'(u)``, sums over the values of a channel::

        weight: r sum g (x - mean)      bias: sum g      mean: -weight r sum g      var: -weight r^3 sum g (x - mean) / 2
        x:      weight r (g - (sum g) / n - (x - mean) r^2 (sum g (x - mean)) / n)        without the sums when statistics
                                                                                          were given
    """
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    mean, weight = mean.to(acc_dtype), weight.to(acc_dtype)
    inverse = torch.rsqrt(var.to(acc_dtype) + eps)
    scale = weight * inverse
    shift = torch.addcmul(bias.to(acc_dtype), mean, scale, value=-1)
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
    to_weight, to_bias, to_mean, to_var = (
        r.clone() if n else r.new_empty(0) for r, n in zip(results, needed, strict=True)
    )
    return grad_x, to_weight, to_bias, to_mean, to_var


def _backward_fake(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    given, need_x, need_sums = args[-3:]
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    sizes = (need_sums, need_sums, need_sums and given, need_sums and given)
    return (
        empty_map(x, x.shape[1]) if need_x else x.new_empty(0),
        *(x.new_empty(x.shape[1] if need else 0, dtype=acc_dtype) for need in sizes),
    )


# Not the formula's VJP, which would take the statistics again: it is given them.
_gradients = define_kernel("batch_norm_swish_backward", _backward_formula, fake=_backward_fake)


def _backward(grads: Grads, wanted: frozenset[str], a: Any, saved: Tensors) -> Gradients:
    grad, *of_statistics = grads
    mean, var = saved
    names = ("x", "weight", "bias", "mean", "var")
    found: Gradients = {}
    if grad is not None:
        every = _gradients(
            grad, a.x, a.weight, a.bias, mean, var, a.eps, a.activation, a.mean is not None, "x" in wanted, wanted != {"x"},
        )  # fmt: skip
        found = {name: value for name, value in zip(names, every, strict=True) if name in wanted}
    for name, through in zip(("mean", "var"), of_statistics, strict=True):
        if name in wanted and through is not None:  # what reaches given statistics as outputs
            before = found.get(name)
            found[name] = through if before is None else before + through
    for name in names[1:]:
        value = found.get(name)
        if value is not None:
            found[name] = value.to(getattr(a, name).dtype)
    return found


def _launch(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Two passes: statistics, then normalisation and activation."""
    if mean is None or var is None:
        count = x.numel() // max(x.shape[1], 1)
        used_mean, m2 = torch.ops.nvae_fast.channel_statistics(x, False)
        used_var = m2 / count if count else torch.ones_like(m2)
    else:
        used_mean, used_var = mean.clone(), var.clone()
    acc_dtype = torch.promote_types(used_mean.dtype, _checks.accumulate_dtype(x.dtype))
    scale = weight.to(acc_dtype) * torch.rsqrt(used_var.to(acc_dtype) + eps)
    shift = torch.addcmul(bias.to(acc_dtype), used_mean.to(acc_dtype), scale, value=-1)
    return affine.forward(x, scale, shift, activation), used_mean, used_var


_op = define_op(
    "batch_norm_swish",
    _reference,
    fake=_fake,
    differentiable=("x", "weight", "bias", "mean", "var"),
    triton=_launch,
    backward=_backward,
    saves={1: None, 2: None},
    constant_outputs={1: "mean", 2: "mean"},
)
