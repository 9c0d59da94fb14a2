"""Weight normalisation of a convolution with the norm kept in log space.

``w = exp(log_weight_norm) * weight * mask / (|| weight * mask ||_2 + eps)``, the norm over each output channel
(specification section 2; Salimans and Kingma, arXiv 1602.07868; NVAE, arXiv 2007.03898, section 3.1.1).
"""

from __future__ import annotations

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import room


def weight_norm(
    weight: torch.Tensor,
    log_weight_norm: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> torch.Tensor:
    """The normalised weight, shaped like ``weight``; formula in the module's docstring.

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
    if not eps >= 0:
        raise ValueError(f"{op}: eps must be >= 0, got {eps!r}")


def _reference(
    weight: torch.Tensor, log_weight_norm: torch.Tensor, mask: torch.Tensor | None, eps: float
) -> torch.Tensor:
    wide = _checks.accumulate_dtype(weight.dtype)
    masked = weight.to(wide) if mask is None else weight.to(wide) * mask.to(wide)
    norm = torch.linalg.vector_norm(masked, dim=(1, 2, 3), keepdim=True)  # its gradient at 0 is 0, not NaN
    return (torch.exp(log_weight_norm.to(wide)) * (masked / (norm + eps))).to(weight.dtype)


_room = room(
    "weight_norm",
    "(Tensor weight, Tensor log_weight_norm, Tensor? mask, float eps) -> Tensor",
    check=_check,
    reference=_reference,
    differentiable=(0, 1),
)
