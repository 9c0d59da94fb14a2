"""Weight normalisation of all convolutions of a model in one call.

``w_i = exp(log_weight_norm_i) * weight_i * mask_i / (|| weight_i * mask_i ||_2 + eps)`` for every layer i, the norm over each
output channel, as in :mod:`nvae_fast.ops.weight_norm` (arXiv 1602.07868), with whose kernels it is computed. A model has
hundreds of layers: the fixed cost of a call is paid once instead of once per layer, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops import weight_norm as one_layer
from nvae_fast.ops._op import LIBRARY, NAMESPACE, Operator, define_kernel, refuse_double_backward, vjp

Tensors = Sequence[Tensor]
Masks = Sequence[Tensor | None]
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weight_norm_many(
    weights: Sequence[Tensor],
    log_weight_norms: Sequence[Tensor],
    masks: Masks | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """The normalised weight of every layer; formula in the module's docstring.

    Args:
        weights: (C_out, C_in, K, K) each, of any sizes, on one device.
        log_weight_norms: (C_out, 1, 1, 1) each.
        masks: per layer zeros and ones, shaped like its weight, or None; None means no masks at all.
        eps: added to the norms.
        dtype: of the results, None for that of each weight. The arithmetic is the weight's, or float32 for half precision,
            and is rounded once.

    Differentiable in weights and log_weight_norms. A result that is not used costs no gradient: its weight gets None.

    Raises:
        TypeError, ValueError: an argument has the wrong type, length, shape, device or value.
    """
    for name, value in (("weights", weights), ("log_weight_norms", log_weight_norms), ("masks", masks)):
        if not (isinstance(value, Iterable) or (value is None and name == "masks")):
            raise TypeError(
                f"weight_norm_many: {name} must be a sequence with one entry a layer, got {type(value).__name__}"
            )
    weights, log_weight_norms = list(weights), list(log_weight_norms)
    masks = [None] * len(weights) if masks is None else list(masks)
    _check(weights, log_weight_norms, masks, dtype)
    one_layer.check_eps("weight_norm_many", eps)
    return _op(weights, log_weight_norms, masks, eps, dtype) if weights else []


def _check(weights: Tensors, log_weight_norms: Tensors, masks: Masks, dtype: torch.dtype | None) -> None:
    op, count = "weight_norm_many", len(weights)
    for name, values in (("log_weight_norms", log_weight_norms), ("masks", masks)):
        if len(values) != count:
            raise ValueError(f"{op}: {name} must have one entry per weight ({count}), got {len(values)}")
    if dtype is not None and dtype not in OUTPUTS:
        raise TypeError(f"{op}: dtype must be None or one of {[str(d) for d in OUTPUTS]}, got {dtype!r}")
    for i, (weight, norm, mask) in enumerate(zip(weights, log_weight_norms, masks, strict=True)):
        try:
            one_layer.check_layer("weight_norm", weight, norm, mask)
            _checks.device("weight_norm", "weight", weight, weights[0])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: layer {i}: {str(error).removeprefix('weight_norm: ')}") from None


def _reference(
    weights: Tensors, log_weight_norms: Tensors, masks: Masks, eps: float, dtype: torch.dtype | None
) -> list[Tensor]:
    layers = zip(weights, log_weight_norms, masks, strict=True)
    return [one_layer.normalised(*layer, eps).to(dtype or layer[0].dtype) for layer in layers]


def _backward_formula(
    grads: Tensors, weights: Tensors, log_weight_norms: Tensors, masks: Masks, eps: float,
    need_weights: bool, need_log_weight_norms: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the weights where they are wanted, then of the log norms where they are wanted."""
    found = _empty_gradients(
        grads, weights, log_weight_norms, masks, eps, need_weights, need_log_weight_norms
    )
    needs = (need_weights, need_log_weight_norms, False, False)
    for i, (grad, *layer) in enumerate(zip(grads, weights, log_weight_norms, masks, strict=True)):
        gradients = vjp(one_layer.normalised, (0, 1), [grad], (*layer, eps), needs)
        for k, gradient in enumerate(gradients.values()):
            assert gradient is not None
            found[k * len(grads) + i].copy_(gradient)
    return found


def _empty_gradients(grads: Tensors, weights: Tensors, norms: Tensors, *args: Any) -> list[Tensor]:
    need_weights, need_norms = args[-2:]
    of_weights = [torch.empty_like(weight) for weight in weights] if need_weights else []
    return of_weights + ([norm.new_empty(norm.shape) for norm in norms] if need_norms else [])


_backward_kernel: Any = define_kernel(
    "weight_norm_many_backward",
    _backward_formula,
    fake=_empty_gradients,
    triton="weight_norm.weight_norm_backward",
)


def _gradients(
    grads: Sequence[Tensor | None], weights: Tensors, log_weight_norms: Tensors, masks: Masks, eps: float,
    need_weights: bool, need_log_weight_norms: bool,
) -> tuple[list[Tensor | None], list[Tensor | None]]:  # fmt: skip
    """Of every weight and every log norm; None where the result was not used or the gradient is not wanted."""
    refuse_double_backward("weight_norm_many")
    n, used = len(weights), [i for i, grad in enumerate(grads) if grad is not None]
    of_weights: list[Tensor | None] = [None] * n
    of_norms = of_weights.copy()
    if not used or not (need_weights or need_log_weight_norms):
        return of_weights, of_norms
    layers: list[Any] = [grads, weights, log_weight_norms, masks]
    if len(used) < n:
        layers = [[values[i] for i in used] for values in layers]
    found = _backward_kernel(*layers, eps, need_weights, need_log_weight_norms)
    for k, i in enumerate(used):
        if need_weights:
            of_weights[i] = found[k]
        if need_log_weight_norms:
            of_norms[i] = found[k - len(used)]
    return of_weights, of_norms


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, log_norms, masks, ctx.eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.has_mask = [mask is not None for mask in masks]
    ctx.save_for_backward(*weights, *log_norms, *(mask for mask in masks if mask is not None))


def _backward(ctx: Any, grads: Sequence[Tensor | None], needs: Any = None) -> tuple[Any, ...]:
    n, tensors = len(ctx.has_mask), ctx.saved_tensors
    given = iter(tensors[2 * n :])
    masks = [next(given) if has else None for has in ctx.has_mask]
    needs = [any([need] if isinstance(need, bool) else need) for need in needs or ctx.needs_input_grad[:2]]
    of_weights, of_norms = _gradients(grads, tensors[:n], tensors[n : 2 * n], masks, ctx.eps, *needs)
    # PyTorch takes a list with a None in it for one argument without gradient.
    return of_weights, of_norms, [None] * n if all(ctx.has_mask) else None, None, None


class _Flat(torch.autograd.Function):
    """For eager calls: autograd sees no tensors inside lists, so it is given those to differentiate one by one."""

    @staticmethod
    def forward(ctx: Any, args: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = tuple(_op.without_grad(*args))
        _setup_context(ctx, (tensors[: len(outputs)], tensors[len(outputs) :], *args[2:]), outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, needs = len(grads), ctx.needs_input_grad[1:]
        with torch._C._AutoDispatchBelowAutograd():
            of_weights, of_norms, *_ = _backward(ctx, grads, (needs[:n], needs[n:]))
        return None, *of_weights, *of_norms


def _apply(weights: Tensors, log_weight_norms: Tensors, *rest: Any) -> list[Tensor]:
    return list(_Flat.apply((weights, log_weight_norms, *rest), *weights, *log_weight_norms))


_forward_kernel: Any = define_kernel(
    "weight_norm_many",
    _reference,
    fake=lambda weights, norms, masks, eps, dtype: [torch.empty_like(w, dtype=dtype) for w in weights],
    triton="weight_norm.weight_norm",
)
torch.library.register_autograd(
    f"{NAMESPACE}::weight_norm_many", _backward, setup_context=_setup_context, lib=LIBRARY
)
_op: Operator[[Tensors, Tensors, Masks, float, torch.dtype | None], list[Tensor]] = Operator(
    _forward_kernel, 0, None, _apply
)
