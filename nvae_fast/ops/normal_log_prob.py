"""Log-density of a squashed normal, summed over pixels.

``log p(z) = sum_hw( -((z - mu) / sigma)^2 / 2 - log(2 pi) / 2 - log sigma )`` with ``mu = c(raw_mu)``,
``sigma = exp(c(raw_log_sigma)) + sigma_floor``, ``c(t) = clamp * tanh(t / clamp)``. The flow path of NVAE
(arXiv 2007.03898, section 3.2) needs it for the prior at the transformed z.

Gradients, which the kernels compute from the inputs alone. With ``w = (z - mu) / sigma``: z gets ``-g w / sigma``, mu
``g w / sigma``, sigma ``g (w^2 - 1) / sigma``, and the raw parameters those times d mu / d raw = 1 - (mu / clamp)^2 and
d sigma / d raw = (sigma - floor)(1 - (u / clamp)^2) at the clamped log sigma u.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._op import define_op
from nvae_fast.ops._squash import LOG_SQRT_2PI, squash, unpack


def normal_log_prob(
    z: Tensor, params: Tensor | None = None, *, clamp: float | None = 5.0, sigma_floor: float = 0.01
) -> Tensor:
    """Log-density of ``z`` (B, Z, H, W) in nats, (B, Z), float32 (float64 for float64 z).

    Args:
        z: where to evaluate.
        params: packed raw parameters (B, 2Z, H, W); None means raw zeros (mu 0, sigma 1 + sigma_floor).
        clamp, sigma_floor: as in :func:`nvae_fast.residual_normal`.

    Differentiable in z and params.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a shape, device or value does not fit.
    """
    op = "normal_log_prob"
    _checks.feature_map(op, "z", z)
    if params is not None:
        b, channels, h, w = z.shape
        _checks.shape(op, "params", params, (b, 2 * channels, h, w), z)
    _checks.squashing(op, clamp, sigma_floor)
    return _op(z, params, clamp, sigma_floor)


def _reference(z: Tensor, params: Tensor | None, clamp: float | None, sigma_floor: float) -> Tensor:
    value = z.to(_checks.accumulate_dtype(z.dtype))
    if params is None:
        raw_mu = raw_log_sigma = torch.zeros_like(value)
    else:
        raw_mu, raw_log_sigma = unpack(params)
    mu, sigma = squash(raw_mu, raw_log_sigma, clamp, sigma_floor)
    return (-0.5 * ((value - mu) / sigma).square() - LOG_SQRT_2PI - sigma.log()).sum((2, 3))


_op = define_op(
    "normal_log_prob",
    _reference,
    fake=lambda z, *_: z.new_empty(z.shape[:2], dtype=_checks.accumulate_dtype(z.dtype)),
    differentiable=("z", "params"),
    triton="normal_log_prob",
    fused_backward=True,
)
