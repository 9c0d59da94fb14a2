"""Weight normalisation of all convolutions of a model in one call.

``w_i = exp(log_weight_norm_i) * weight_i * mask_i / (|| weight_i * mask_i ||_2 + eps)`` for every layer i, the norm over each
output channel, as in :mod:`nvae_fast.ops.weight_norm` (arXiv 1602.07868), with whose kernels it is computed. A model has
some hundred layers: what one call costs besides arithmetic counts once instead of that often, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nvae_fast.ops import _backend, _checks
from nvae_fast.ops._register import LIBRARY, NAMESPACE, Room, operator, record_kernels
from nvae_fast.ops.weight_norm import _backward_formula as _one_backward
from nvae_fast.ops.weight_norm import _check as _check_one

Masks = Sequence[torch.Tensor | None]
OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def weight_norm_many(
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
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
    layers = list(weights)
    masks = [None] * len(layers) if masks is None else list(masks)
    return _room(layers, list(log_weight_norms), masks, eps, dtype)


def _check(
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks,
    eps: float,
    dtype: torch.dtype | None,
) -> None:
    op, count = "weight_norm_many", len(weights)
    for name, values in (("log_weight_norms", log_weight_norms), ("masks", masks)):
        if len(values) != count:
            raise ValueError(f"{op}: {name} must have one entry per weight ({count}), got {len(values)}")
    if dtype is not None and dtype not in OUTPUTS:
        raise TypeError(f"{op}: dtype must be None or one of {[str(d) for d in OUTPUTS]}, got {dtype!r}")
    if not (isinstance(eps, (int, float)) and eps >= 0):
        raise ValueError(f"{op}: eps must be >= 0, got {eps!r}")
    for i, (weight, norm, mask) in enumerate(zip(weights, log_weight_norms, masks, strict=True)):
        try:
            _check_one(weight, norm, mask, eps)
            _checks.device("weight_norm", "weight", weight, weights[0])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: layer {i}: {str(error).removeprefix('weight_norm: ')}") from None


def _reference(
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks,
    eps: float,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    results = []
    for weight, log_norm, mask in zip(weights, log_weight_norms, masks, strict=True):
        wide = _checks.accumulate_dtype(weight.dtype)
        masked = weight.to(wide) if mask is None else weight.to(wide) * mask.to(wide)
        norm = torch.linalg.vector_norm(masked, dim=(1, 2, 3), keepdim=True)
        result = torch.exp(log_norm.to(wide)) * (masked / (norm + eps))
        results.append(result.to(dtype or weight.dtype))
    return results


def _fake(
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks,
    eps: float,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    _check(weights, log_weight_norms, masks, eps, dtype)
    return [torch.empty_like(weight, dtype=dtype) for weight in weights]


def _backward_formula(
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks,
    eps: float,
    need_weights: bool,
    need_log_weight_norms: bool,
) -> list[torch.Tensor]:
    """Gradients of the weights where they are wanted, then of the log norms where they are wanted."""
    of_weights, of_norms = [], []
    for layer in zip(grads, weights, log_weight_norms, masks, strict=True):
        of_weight, of_norm = _one_backward(*layer, eps, need_weights, need_log_weight_norms)
        of_weights.append(of_weight)
        of_norms.append(of_norm)
    return [*(of_weights if need_weights else ()), *(of_norms if need_log_weight_norms else ())]


def _backward_fake(
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks,
    eps: float,
    need_weights: bool,
    need_log_weight_norms: bool,
) -> list[torch.Tensor]:
    of_weights = [torch.empty_like(weight) for weight in weights] if need_weights else []
    of_norms = [norm.new_empty(norm.shape) for norm in log_weight_norms] if need_log_weight_norms else []
    return of_weights + of_norms


def _gpu(
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks,
    eps: float,
    dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    # The kernels compute in float32.
    if dtype == torch.float64 or any(weight.dtype == torch.float64 for weight in weights):
        return _reference(weights, log_weight_norms, masks, eps, dtype)
    from nvae_fast.kernels import weight_norm as kernels

    return kernels.weight_norm(weights, log_weight_norms, masks, eps, dtype)


def _gpu_backward(*args: Any) -> list[torch.Tensor]:
    if any(t.dtype == torch.float64 for t in (*args[0], *args[1])):
        return _backward_formula(*args)
    from nvae_fast.kernels import weight_norm as kernels

    return kernels.weight_norm_backward(*args)


_backward_operator = operator(
    "weight_norm_many_backward",
    "(Tensor[] grads, Tensor[] weights, Tensor[] log_weight_norms, Tensor?[] masks, float eps, bool need_weights,"
    " bool need_log_weight_norms) -> Tensor[]",
    default=_backward_formula,
    fake=_backward_fake,
    gpu=_gpu_backward,
)


def _gradients(
    grads: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
    log_weight_norms: Sequence[torch.Tensor],
    masks: Masks,
    eps: float,
    need_weights: bool,
    need_log_weight_norms: bool,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Of every weight and every log norm; None where the result was not used or the gradient is not wanted."""
    of_weights: list[torch.Tensor | None] = [None] * len(weights)
    of_norms: list[torch.Tensor | None] = [None] * len(weights)
    used = [i for i, grad in enumerate(grads) if grad is not None]
    if used and (need_weights or need_log_weight_norms):
        found = _backward_operator(
            [grads[i] for i in used],
            [weights[i] for i in used],
            [log_weight_norms[i] for i in used],
            [masks[i] for i in used],
            eps,
            need_weights,
            need_log_weight_norms,
        )
        for k, i in enumerate(used):
            if need_weights:
                of_weights[i] = found[k]
            if need_log_weight_norms:
                of_norms[i] = found[k - len(used)]
    return of_weights, of_norms


def _no_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "weight_norm_many: double backward is not supported; use nvae_fast.use_backend('reference')"
            " for create_graph=True"
        )


class _Differentiable(torch.autograd.Function):
    """For eager calls: autograd sees no tensors inside lists, so it gets ``*weights, *log_weight_norms``."""

    @staticmethod
    def forward(
        ctx: Any, count: int, masks: Masks, eps: float, dtype: torch.dtype | None, *tensors: torch.Tensor
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.count, ctx.masks, ctx.eps = count, masks, eps  # masks are constants
        return tuple(_room._run(tensors[:count], tensors[count:], masks, eps, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        _no_double_backward()
        n, tensors, needed = ctx.count, ctx.saved_tensors, ctx.needs_input_grad[4:]
        with torch._C._AutoDispatchBelowAutograd():
            of_weights, of_norms = _gradients(
                grads, tensors[:n], tensors[n:], ctx.masks, ctx.eps, any(needed[:n]), any(needed[n:])
            )
        return None, None, None, None, *of_weights, *of_norms


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, log_norms, masks, eps, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.count, ctx.has_mask, ctx.eps = len(weights), [mask is not None for mask in masks], eps
    ctx.save_for_backward(*weights, *log_norms, *(mask for mask in masks if mask is not None))


def _operator_backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> Any:
    _no_double_backward()
    n, tensors = ctx.count, ctx.saved_tensors
    given = iter(tensors[2 * n :])
    masks = [next(given) if has else None for has in ctx.has_mask]
    need_weights, need_norms = (any(_flags(ctx.needs_input_grad[i])) for i in (0, 1))
    of_weights, of_norms = _gradients(
        grads, tensors[:n], tensors[n : 2 * n], masks, ctx.eps, need_weights, need_norms
    )
    # PyTorch takes a list with a None in it for one argument without gradient.
    return of_weights, of_norms, [None] * n if all(ctx.has_mask) else None, None, None


def _flags(needed: bool | Sequence[bool]) -> Sequence[bool]:
    return [needed] if isinstance(needed, bool) else needed


class _Lists(Room):
    """A room whose arguments are lists of tensors."""

    def __init__(self) -> None:
        self.name, self.check, self.reference = "weight_norm_many", _check, _reference
        self.operator = getattr(torch.ops, NAMESPACE).weight_norm_many
        self._kernel = self.operator.default

    def __call__(self, *args: Any) -> Any:
        weights, log_norms, masks, eps, dtype = args
        _check(*args)
        if not weights:
            return []
        if not _backend.fused(self.name, weights[0].device):
            return _reference(*args)
        if torch.compiler.is_compiling():
            return self.operator(*args)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, *log_norms)):
            return list(_Differentiable.apply(len(weights), masks, eps, dtype, *weights, *log_norms))
        return self._run(*args)


LIBRARY.define(
    "weight_norm_many(Tensor[] weights, Tensor[] log_weight_norms, Tensor?[] masks, float eps, ScalarType? dtype)"
    " -> Tensor[]"
)
LIBRARY.impl("weight_norm_many", _reference, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::weight_norm_many", _fake, lib=LIBRARY)
torch.library.register_autograd(
    f"{NAMESPACE}::weight_norm_many", _operator_backward, setup_context=_setup_context, lib=LIBRARY
)
record_kernels("weight_norm_many", _gpu, _reference)
_room = _Lists()
