"""Weight normalisation of a convolution with the norm kept in log space.

``w = exp(log_weight_norm) * weight * mask / (|| weight * mask ||_2 + eps)``, the norm over each output channel
(Salimans and Kingma, arXiv 1602.07868; NVAE, arXiv 2007.03898, section 3.1.1).

Gradients, which the kernels compute from the inputs alone. With the upstream gradient ``d``, the masked weight ``v``, its norm
``n`` and ``s = exp(log_weight_norm) / (n + eps)``, sums over an output channel::

    log_weight_norm: a = s sum(d v)        weight: mask (s d - v a / (n (n + eps)))      (v a / ... is 0 where n is 0)
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._op import define_op, kernels


def weight_norm(
    weight: Tensor, log_weight_norm: Tensor, mask: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
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
    check_layer("weight_norm", weight, log_weight_norm, mask)
    check_eps("weight_norm", eps)
    return _op(weight, log_weight_norm, mask, eps)


def check_layer(op: str, weight: Tensor, log_weight_norm: Tensor, mask: Tensor | None) -> None:
    _checks.tensor(op, "weight", weight)
    if weight.dim() != 4:
        raise ValueError(f"{op}: weight must have shape (C_out, C_in, K, K), got {tuple(weight.shape)}")
    _checks.shape(op, "log_weight_norm", log_weight_norm, (weight.shape[0], 1, 1, 1), weight)
    if mask is not None:
        _checks.shape(op, "mask", mask, weight.shape, weight)


def check_eps(op: str, eps: float) -> None:
    if not (isinstance(eps, (int, float)) and eps >= 0):
        raise ValueError(f"{op}: eps must be >= 0, got {eps!r}")


def normalised(weight: Tensor, log_weight_norm: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """The formula, not rounded to the dtype of ``weight`` yet."""
    acc_dtype = _checks.accumulate_dtype(weight.dtype)
    masked = weight.to(acc_dtype) if mask is None else weight.to(acc_dtype) * mask.to(acc_dtype)
    norm = torch.linalg.vector_norm(masked, dim=(1, 2, 3), keepdim=True)  # its gradient at 0 is 0, not NaN
    return torch.exp(log_weight_norm.to(acc_dtype)) * (masked / (norm + eps))


def _reference(weight: Tensor, log_weight_norm: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    return normalised(weight, log_weight_norm, mask, eps).to(weight.dtype)


def _launch_backward(
    grad: Tensor, weight: Tensor, log_norm: Tensor, mask: Tensor | None, eps: float, *needs: bool
) -> tuple[Tensor, Tensor]:
    found = kernels("weight_norm").weight_norm_backward([grad], [weight], [log_norm], [mask], eps, *needs)
    return (found[0] if needs[0] else weight.new_empty(0), found[-1] if needs[1] else log_norm.new_empty(0))


_op = define_op(
    "weight_norm",
    _reference,
    fake=lambda weight, *_: torch.empty_like(weight),
    differentiable=("weight", "log_weight_norm"),
    triton=lambda weight, log_norm, mask, eps: kernels("weight_norm").weight_norm(
        [weight], [log_norm], [mask], eps, None
    )[0],
    fused_backward=_launch_backward,
    gradient=lambda args, name: torch.empty_like(getattr(args, name)),
)
