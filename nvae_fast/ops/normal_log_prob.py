"""Log-density of a squashed normal, summed over pixels.

``log p(z) = sum_hw( -((z - mu) / sigma)^2 / 2 - log(2 pi) / 2 - log sigma )`` with ``mu = c(raw_mu)``,
``sigma = exp(c(raw_log_sigma)) + sigma_floor``, ``c(t) = clamp * tanh(t / clamp)``. The flow path of NVAE
(arXiv 2007.03898, section 3.2) needs it for the prior at the transformed z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import operator, room
from nvae_fast.ops._squash import LOG_SQRT_2PI, empty_map, slope, soft_clamp, squash, unpack


def normal_log_prob(
    z: torch.Tensor,
    params: torch.Tensor | None = None,
    *,
    clamp: float | None = 5.0,
    sigma_floor: float = 0.01,
) -> torch.Tensor:
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
    return _room(z, params, clamp, sigma_floor)


def _check(z: torch.Tensor, params: torch.Tensor | None, clamp: float | None, sigma_floor: float) -> None:
    _checks.feature_map("normal_log_prob", "z", z)
    if params is not None:
        b, channels, h, w = z.shape
        _checks.shape("normal_log_prob", "params", params, (b, 2 * channels, h, w), z)
    _checks.squashing("normal_log_prob", clamp, sigma_floor)


def _reference(
    z: torch.Tensor, params: torch.Tensor | None, clamp: float | None, sigma_floor: float
) -> torch.Tensor:
    value = z.to(_checks.accumulate_dtype(z.dtype))
    if params is None:
        raw_mu = raw_log_sigma = torch.zeros_like(value)
    else:
        raw_mu, raw_log_sigma = unpack(params)
    mu, sigma = squash(raw_mu, raw_log_sigma, clamp, sigma_floor)
    return (-0.5 * ((value - mu) / sigma).square() - LOG_SQRT_2PI - sigma.log()).sum((2, 3))


def _fake(
    z: torch.Tensor, params: torch.Tensor | None, clamp: float | None, sigma_floor: float
) -> torch.Tensor:
    return z.new_empty(z.shape[:2], dtype=_checks.accumulate_dtype(z.dtype))


def _backward_formula(
    grad: torch.Tensor,
    z: torch.Tensor,
    params: torch.Tensor | None,
    clamp: float | None,
    sigma_floor: float,
    need_z: bool,
    need_params: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With ``w = (z - mu) / sigma``: z gets ``-g w / sigma``, mu ``g w / sigma``, sigma ``g (w^2 - 1) / sigma``, and the raw
    parameters those times d mu / d raw = 1 - (mu / clamp)^2 and d sigma / d raw = (sigma - floor)(1 - (u / clamp)^2)."""
    results = _backward_fake(grad, z, params, clamp, sigma_floor, need_z, need_params)
    value = z.to(_checks.accumulate_dtype(z.dtype))
    raw_mu, raw_log_sigma = (torch.zeros_like(value),) * 2 if params is None else unpack(params)
    mu, u = soft_clamp(raw_mu, clamp), soft_clamp(raw_log_sigma, clamp)
    sigma = u.exp() + sigma_floor
    w, scaled = (value - mu) / sigma, grad.to(value.dtype)[:, :, None, None] / sigma
    to_raw = torch.cat(
        [scaled * w * slope(mu, clamp), scaled * (w.square() - 1) * u.exp() * slope(u, clamp)], 1
    )
    grad_z, grad_params = (
        out.copy_(g) if out.dim() == 4 else out for out, g in zip(results, (-scaled * w, to_raw), strict=True)
    )
    return grad_z, grad_params


def _backward_fake(
    grad: torch.Tensor,
    z: torch.Tensor,
    params: torch.Tensor | None,
    clamp: float | None,
    sigma_floor: float,
    need_z: bool,
    need_params: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    channels = z.shape[1]
    return (
        empty_map(z, channels) if need_z else z.new_empty(0),
        empty_map(z, 2 * channels, params.dtype) if need_params and params is not None else z.new_empty(0),
    )


def _gpu_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    if args[1].dtype == torch.float64:  # the kernels compute in float32
        return _backward_formula(*args)
    from nvae_fast.kernels import normal_log_prob as kernels

    return kernels.normal_log_prob_backward(*args)


_backward_operator = operator(
    "normal_log_prob_backward",
    "(Tensor grad, Tensor z, Tensor? params, float? clamp, float sigma_floor, bool need_z, bool need_params)"
    " -> (Tensor, Tensor)",
    default=_backward_formula,
    fake=_backward_fake,
    gpu=_gpu_backward,
)


def _backward(
    grads: Sequence[torch.Tensor | None], wanted: Sequence[int], *args: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward_operator(*grads, *args, 0 in wanted, 1 in wanted)


def _gpu(*args: Any) -> torch.Tensor:
    if args[0].dtype == torch.float64:  # the kernels compute in float32
        return _reference(*args)
    from nvae_fast.kernels import normal_log_prob as kernels

    return kernels.normal_log_prob(*args)


_room = room(
    "normal_log_prob",
    "(Tensor z, Tensor? params, float? clamp, float sigma_floor) -> Tensor",
    check=_check,
    reference=_reference,
    differentiable=(0, 1),
    fake=_fake,
    backward=_backward,
    gpu=_gpu,
)
