"""Weight normalisation of a convolution with the norm kept in log space.

``w = exp(log_weight_norm) * weight * mask / (|| weight * mask ||_2 + eps)``, the norm over each output channel
(specification section 2; Salimans and Kingma, arXiv 1602.07868; NVAE, arXiv 2007.03898, section 3.1.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import operator, room


def weight_norm(
    weight: torch.Tensor,
    log_weight_norm: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The normalised weight, shaped like ``weight`` and in its dtype (float32 arithmetic for half precision); formula in the
    module's docstring.

    Args:
        weight: (C_out, C_in, K, K).
        log_weight_norm: (C_out, 1, 1, 1), logarithm of the norm of each output channel.
        mask: zeros and ones, shaped like weight (masked convolutions), or None.
        eps: added to the norm.

    Differentiable in weight and log_weight_norm.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    return _room(weight, log_weight_norm, mask, eps)


def _check(
    weight: torch.Tensor, log_weight_norm: torch.Tensor, mask: torch.Tensor | None, eps: float
) -> None:
    op = "weight_norm"
    _checks.tensor(op, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have shape (C_out, C_in, K, K), got {tuple(weight.shape)}")
    _checks.shape(op, "log_weight_norm", log_weight_norm, (weight.shape[0], 1, 1, 1), weight)
    if mask is not None:
        _checks.shape(op, "mask", mask, tuple(weight.shape), weight)
    if not (isinstance(eps, (int, float)) and eps >= 0):
        raise ValueError(f"{op}: eps must be >= 0, got {eps!r}")


def _reference(
    weight: torch.Tensor, log_weight_norm: torch.Tensor, mask: torch.Tensor | None, eps: float
) -> torch.Tensor:
    wide = _checks.accumulate_dtype(weight.dtype)
    masked = weight.to(wide) if mask is None else weight.to(wide) * mask.to(wide)
    norm = torch.linalg.vector_norm(masked, dim=(1, 2, 3), keepdim=True)  # its gradient at 0 is 0, not NaN
    return (torch.exp(log_weight_norm.to(wide)) * (masked / (norm + eps))).to(weight.dtype)


def _fake(
    weight: torch.Tensor, log_weight_norm: torch.Tensor, mask: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return torch.empty_like(weight)


def _backward_formula(
    grad: torch.Tensor,
    weight: torch.Tensor,
    log_weight_norm: torch.Tensor,
    mask: torch.Tensor | None,
    eps: float,
    need_weight: bool,
    need_log_weight_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients from the inputs alone; every fused backward kernel computes this. With the upstream gradient ``d``, the
    masked weight ``v``, its norm ``n`` and ``s = exp(log_weight_norm) / (n + eps)``, sums over an output channel::

        log_weight_norm: a = s sum(d v)        weight: mask (s d - v a / (n (n + eps)))      (v a / ... is 0 where n is 0)
    """
    wide = _checks.accumulate_dtype(weight.dtype)
    d, v = grad.to(wide), weight.to(wide)
    if mask is not None:
        v = v * mask.to(wide)
    norm = torch.linalg.vector_norm(v, dim=(1, 2, 3), keepdim=True)
    scale = torch.exp(log_weight_norm.to(wide)) / (norm + eps)
    along = scale * (d * v).sum((1, 2, 3), keepdim=True)
    to_weight = scale * d - v * torch.where(norm > 0, along / (norm + eps) / norm, 0.0)
    if mask is not None:
        to_weight = to_weight * mask.to(wide)
    results = _backward_fake(grad, weight, log_weight_norm, mask, eps, need_weight, need_log_weight_norm)
    grad_weight, grad_norm = (
        out.copy_(g) if out.dim() == 4 else out for out, g in zip(results, (to_weight, along), strict=True)
    )
    return grad_weight, grad_norm


def _backward_fake(
    grad: torch.Tensor,
    weight: torch.Tensor,
    log_weight_norm: torch.Tensor,
    mask: torch.Tensor | None,
    eps: float,
    need_weight: bool,
    need_log_weight_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.empty_like(weight) if need_weight else weight.new_empty(0),
        log_weight_norm.new_empty(log_weight_norm.shape)
        if need_log_weight_norm
        else log_weight_norm.new_empty(0),
    )


def _gpu_backward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    grad, weight, log_weight_norm, mask, eps, need_weight, need_norm = args
    if weight.dtype == torch.float64:  # the kernels compute in float32
        return _backward_formula(*args)
    from nvae_fast.kernels import weight_norm as kernels

    found = kernels.weight_norm_backward(
        [grad], [weight], [log_weight_norm], [mask], eps, need_weight, need_norm
    )
    return (
        found[0] if need_weight else weight.new_empty(0),
        found[-1] if need_norm else log_weight_norm.new_empty(0),
    )


_backward_operator = operator(
    "weight_norm_backward",
    "(Tensor grad, Tensor weight, Tensor log_weight_norm, Tensor? mask, float eps, bool need_weight,"
    " bool need_log_weight_norm) -> (Tensor, Tensor)",
    default=_backward_formula,
    fake=_backward_fake,
    gpu=_gpu_backward,
)


def _backward(
    grads: Sequence[torch.Tensor | None], wanted: Sequence[int], *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward_operator(grads[0], *args, 0 in wanted, 1 in wanted)


def _gpu(
    weight: torch.Tensor, log_weight_norm: torch.Tensor, mask: torch.Tensor | None, eps: float
) -> torch.Tensor:
    if weight.dtype == torch.float64:  # the kernels compute in float32
        return _reference(weight, log_weight_norm, mask, eps)
    from nvae_fast.kernels import weight_norm as kernels

    return kernels.weight_norm([weight], [log_weight_norm], [mask], eps, None)[0]


_room = room(
    "weight_norm",
    "(Tensor weight, Tensor log_weight_norm, Tensor? mask, float eps) -> Tensor",
    check=_check,
    reference=_reference,
    differentiable=(0, 1),
    fake=_fake,
    backward=_backward,
    gpu=_gpu,
)
