"""Squeeze-and-excitation, optionally with the residual sum that follows it.

::

    g = gate( W2 activation( W1 mean_hw(x) + b1 ) + b2 )       (B, C); activation relu and gate sigmoid by default
    y = g x                                                    or  skip + residual_scale * g x

NVAE (arXiv 2007.03898), section 3.1.1 and appendix A; Hu et al., arXiv 1709.01507. SiLU and hard sigmoid are those of the
EfficientNets (arXiv 1905.11946) and of MobileNetV3 (arXiv 1905.02244).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import _backend, _checks
from nvae_fast.ops._activation import activation_derivative
from nvae_fast.ops._layout import empty_map
from nvae_fast.ops._op import Gradients, Grads, Tensors, define_kernel, define_op, refuse_double_backward
from nvae_fast.ops.inverted_residual.coefficients import gate_backward, gate_coefficients

HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "swish": F.silu}
GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}


def squeeze_excite(
    x: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor | None,
    expand_weight: Tensor,
    expand_bias: Tensor | None,
    *,
    skip: Tensor | None = None,
    residual_scale: float = 1.0,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """Gate the channels of ``x``; formula in the module's docstring.

    Args:
        x: (B, C, H, W).
        reduce_weight (R, C), reduce_bias (R,): W1, b1. expand_weight (C, R), expand_bias (C,): W2, b2. A bias may be None.
        skip: (B, C, H, W) to add, or None.
        residual_scale: factor on the gated x; NVAE's residual cells use 0.1.
        activation: of the hidden units: "relu" or "silu" (also called "swish").
        gate: "sigmoid" or "hardsigmoid", ``clamp(t + 3, 0, 6) / 6``.

    Returns:
        (B, C, H, W) in the dtype of x (with a skip: the wider of the two). Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    op = "squeeze_excite"
    if not isinstance(residual_scale, (int, float)):
        raise TypeError(f"{op}: residual_scale must be a number, got {residual_scale!r}")
    _checks.one_of(op, "activation", activation, tuple(HIDDEN))
    _checks.one_of(op, "gate", gate, tuple(GATES))
    _checks.feature_map(op, "x", x)
    _checks.tensor(op, "reduce_weight", reduce_weight)
    channels, hidden = x.shape[1], reduce_weight.shape[0] if reduce_weight.dim() else 0
    _checks.shape(op, "reduce_weight", reduce_weight, (hidden, channels), x)
    if reduce_bias is None:
        reduce_bias = reduce_weight.new_zeros(hidden)
    _checks.shape(op, "reduce_bias", reduce_bias, (hidden,), x)
    _checks.shape(op, "expand_weight", expand_weight, (channels, hidden), x)
    if expand_bias is None:
        expand_bias = expand_weight.new_zeros(channels)
    _checks.shape(op, "expand_bias", expand_bias, (channels,), x)
    if skip is not None:
        _checks.shape(op, "skip", skip, x.shape, x)
    layers = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    if activation == "relu" and gate == "sigmoid":
        return _op(x, *layers, skip, float(residual_scale))[0]
    if torch.compiler.is_compiling() or not _backend.fused(op, x.device):
        return _formula(x, *layers, skip, float(residual_scale), activation, gate)[0]
    return _Gated.apply(x, skip, float(residual_scale), activation, gate, *layers)


def _reference(
    x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor,
    skip: Tensor | None, residual_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y, and the pooled x (B, C), which the backward pass needs."""
    return _formula(
        x, reduce_weight, reduce_bias, expand_weight, expand_bias, skip, residual_scale, "relu", "sigmoid"
    )


def _formula(
    x: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor, expand_bias: Tensor,
    skip: Tensor | None, residual_scale: float, activation: str, gate: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    pooled = x.mean((2, 3), dtype=acc_dtype)
    with _no_autocast(x):
        hidden = HIDDEN[activation](F.linear(pooled.to(reduce_weight.dtype), reduce_weight, reduce_bias))
        factor = GATES[gate](F.linear(hidden, expand_weight, expand_bias)).to(x.dtype)[:, :, None, None]
    y = x * factor
    if skip is not None:
        y = skip + residual_scale * y
    elif residual_scale != 1.0:
        y = residual_scale * y
    return y, pooled.detach()


def _fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    skip = args[-2]
    like = x if skip is None else skip
    y = empty_map(like, x.shape[1], torch.promote_types(x.dtype, like.dtype))
    return y, x.new_empty(x.shape[:2], dtype=_checks.accumulate_dtype(x.dtype))


def _layers(pooled: Tensor, *parameters: Tensor) -> Any:
    """The four tensors of the two layers, in the dtype of ``pooled``."""
    return [p if p.dtype == pooled.dtype else p.to(pooled.dtype) for p in parameters]


def _no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The layers of the gate are too small to gain from half precision."""
    kind = x.device.type
    active = kind in _backend.DEVICES and torch.is_autocast_enabled(
        kind
    )  # other devices may know no autocast
    return torch.autocast(kind, enabled=False) if active else nullcontext()


def _launch(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """Two passes: x is read to be pooled, then read and gated on the way to the sum. On the CPU one operator does the same."""
    *layers, skip, residual_scale = args
    ops = torch.ops.nvae_fast
    with _no_autocast(x):
        pooled = ops.channel_statistics(x, True)[0]
        w1, b1, w2, b2 = _layers(pooled, *layers)
        factor = gate_coefficients(pooled, None, None, w1, b1, w2, b2, residual_scale)[3]
        if skip is not None:
            skip = skip.to(torch.promote_types(x.dtype, skip.dtype))
        return ops.plane_affine(x, factor, skip, None, None), pooled


def _sums_dtype(grad: Tensor) -> torch.dtype:
    """The dtype of sums over ``grad``. A float64 skip gives a gradient wider than the pooled values of a narrower x."""
    return torch.promote_types(grad.dtype, torch.float32)


def _gradients(
    grad: Tensor, x: Tensor, pooled: Tensor, reduce_weight: Tensor, reduce_bias: Tensor, expand_weight: Tensor,
    expand_bias: Tensor, residual_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Of x and of the two layers. Two passes: the sums ``sum_p grad x`` reach the gate, and
    ``dx = residual_scale gate grad + (what reaches the pooled value) / HW``."""
    ops = torch.ops.nvae_fast
    pooled = pooled.to(_sums_dtype(grad))
    w1, b1, w2, b2 = _layers(pooled, reduce_weight, reduce_bias, expand_weight, expand_bias)
    _, hidden, gate, _, _ = gate_coefficients(pooled, None, None, w1, b1, w2, b2, residual_scale)
    sum_x, sum_xp = ops.plane_dots(grad, x, None)
    *of_layers, through, _, _, factor = gate_backward(
        sum_x, sum_xp, None, None, None, None, None, pooled, hidden, gate, w1, w2, residual_scale,
    )  # fmt: skip
    shift = through / max(x.shape[2] * x.shape[3], 1)
    return (ops.plane_affine(grad, factor, None, None, shift), *of_layers)


# On the CPU one operator, which reads grad once.
_gradients_kernel = define_kernel(
    "squeeze_excite_gradients",
    _gradients,
    fake=lambda grad, x, pooled, w1, b1, w2, b2, _: (
        empty_map(grad, grad.shape[1]), *(torch.empty_like(t, dtype=_sums_dtype(grad)) for t in (w1, b1, w2, b2)),
    ),
)  # fmt: skip


def _backward(grads: Grads, wanted: frozenset[str], a: Any, saved: Tensors) -> Gradients:
    """From x and the pooled values; the gate is computed again."""
    (grad, _), (pooled,) = grads, saved
    if grad is None:
        return {}
    found: Gradients = {"skip": grad.to(a.skip.dtype)} if "skip" in wanted else {}
    if wanted == {"skip"}:
        return found
    names = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")
    if grad.dtype == torch.float64:  # from a skip of that dtype
        grad = grad.to(pooled.dtype)
    layers = a.reduce_weight, a.reduce_bias, a.expand_weight, a.expand_bias
    with _no_autocast(a.x):
        of_x, *of_layers = _gradients_kernel(grad, a.x, pooled, *layers, a.residual_scale)
    for name, value in (("x", of_x), *zip(names, of_layers, strict=True)):
        if name in wanted:
            found[name] = value.to(getattr(a, name).dtype)
    return found


_op = define_op(
    "squeeze_excite",
    _reference,
    fake=_fake,
    differentiable=("x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "skip"),
    triton=_launch,
    backward=_backward,
    saves={1: None},
    constant_outputs={1: None},
)


class _Gated(torch.autograd.Function):
    """The same two passes with other activations, composed of operators."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, skip: Tensor | None, residual_scale: float, activation: str, gate: str, *layers: Tensor
    ) -> Tensor:  # fmt: skip
        ops = torch.ops.nvae_fast
        with _no_autocast(x):
            pooled = ops.channel_statistics(x, True)[0]
            *_, factor = _small(pooled, _layers(pooled, *layers), activation, gate)
            added = None if skip is None else skip.to(torch.promote_types(x.dtype, skip.dtype))
            y: Tensor = ops.plane_affine(x, residual_scale * factor, added, None, None)
        ctx.save_for_backward(x, pooled, *layers)
        ctx.constants = (residual_scale, activation, gate, None if skip is None else skip.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_double_backward("squeeze_excite")
        x, pooled, *layers = ctx.saved_tensors
        residual_scale, activation, gate, skip_dtype = ctx.constants
        ops, needs = torch.ops.nvae_fast, ctx.needs_input_grad
        to_x = None
        with torch.no_grad(), _no_autocast(x):
            w1, b1, w2, b2 = _layers(pooled, *layers)
            before, hidden, logits, factor = _small(pooled, (w1, b1, w2, b2), activation, gate)
            grad_of_map = (
                grad.to(pooled.dtype) if grad.dtype == torch.float64 else grad
            )  # from a skip of that dtype
            to_gate = residual_scale * ops.plane_dots(grad_of_map, x, None)[1]
            if gate == "sigmoid":
                to_logits = to_gate * (factor * (1 - factor))
            else:
                to_logits = to_gate * ((logits > -3) & (logits < 3)) / 6
            to_hidden = to_logits @ w2
            if activation == "relu":
                to_before = to_hidden * (before > 0)
            else:
                to_before = to_hidden * activation_derivative(before, "swish")
            if needs[0]:
                shift = (to_before @ w1) / max(x.shape[2] * x.shape[3], 1)
                to_x = ops.plane_affine(grad_of_map, residual_scale * factor, None, None, shift).to(x.dtype)
            of_layers = (to_before.t() @ pooled, to_before.sum(0), to_logits.t() @ hidden, to_logits.sum(0))
        return (
            to_x, grad.to(skip_dtype) if needs[1] else None, None, None, None,
            *(value.to(like.dtype) for value, like in zip(of_layers, layers, strict=True)),
        )  # fmt: skip


def _small(pooled: Tensor, layers: Any, activation: str, gate: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden units before and after the activation, logits and the gate."""
    w1, b1, w2, b2 = layers
    before = torch.addmm(b1, pooled, w1.t())
    hidden = HIDDEN[activation](before)
    logits = torch.addmm(b2, hidden, w2.t())
    return before, hidden, logits, GATES[gate](logits)


# y and what is saved for the backward pass, without gradients, where the kernels are; arguments are trusted.
without_grad = _op.without_grad
