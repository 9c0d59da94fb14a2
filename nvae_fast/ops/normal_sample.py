"""Sample a squashed normal: ``z = mu + temperature * sigma * eps`` with packed raw parameters.

``mu = c(raw_mu)``, ``sigma = exp(c(raw_log_sigma)) + sigma_floor``, ``c(t) = clamp * tanh(t / clamp)``; NVAE
(arXiv 2007.03898), section 4, for the temperature of the prior when generating.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import operator, room
from nvae_fast.ops._squash import check_noise, draw_like, empty_map, slope, soft_clamp, squash, unpack


def normal_sample(
    params: torch.Tensor,
    *,
    temperature: float = 1.0,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    clamp: float | None = 5.0,
    sigma_floor: float = 0.01,
) -> torch.Tensor:
    """Draw ``z`` (B, Z, H, W), in the dtype of ``params``.

    Args:
        params: packed raw parameters (B, 2Z, H, W).
        temperature: factor on sigma, >= 0; 0 gives the mean.
        noise: standard normal draws (B, Z, H, W); None draws them from ``seed``.
        seed: int or 0-d int64 tensor of the Philox stream; None takes one from the device's default generator.
        clamp, sigma_floor: as in :func:`nvae_fast.residual_normal`.

    Differentiable in params and noise.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a shape, device or value does not fit, or both noise and seed are given.
    """
    if noise is not None and seed is not None:
        raise ValueError("normal_sample: give either noise or seed, not both")
    _checks.packed("normal_sample", "params", params)
    seed_tensor = _checks.seed("normal_sample", seed, params.device) if noise is None else None
    return _room(params, noise, seed_tensor, temperature, clamp, sigma_floor)


def _check(
    params: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    temperature: float,
    clamp: float | None,
    sigma_floor: float,
) -> None:
    _checks.packed("normal_sample", "params", params)
    check_noise("normal_sample", params, noise, seed)
    _checks.temperature("normal_sample", temperature, zero=True)
    _checks.squashing("normal_sample", clamp, sigma_floor)


def _reference(
    params: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    temperature: float,
    clamp: float | None,
    sigma_floor: float,
) -> torch.Tensor:
    mu, sigma = squash(*unpack(params), clamp, sigma_floor)
    return (mu + temperature * sigma * draw_like(params, noise, seed)).to(params.dtype)


def _fake(
    params: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    temperature: float,
    clamp: float | None,
    sigma_floor: float,
) -> torch.Tensor:
    return empty_map(params, params.shape[1] // 2)


def _backward_formula(
    grad_z: torch.Tensor,
    params: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    temperature: float,
    clamp: float | None,
    sigma_floor: float,
    need_params: bool,
    need_noise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From the inputs and the seed alone: mu gets ``g``, sigma ``g temperature eps``, eps ``g temperature sigma``, and the raw
    parameters those times d mu / d raw = 1 - (mu / clamp)^2 and d sigma / d raw = (sigma - floor)(1 - (u / clamp)^2)."""
    results = _backward_fake(
        grad_z, params, noise, seed, temperature, clamp, sigma_floor, need_params, need_noise
    )
    raw_mu, raw_log_sigma = unpack(params)
    mu, u = soft_clamp(raw_mu, clamp), soft_clamp(raw_log_sigma, clamp)
    eps, grad = draw_like(params, noise, seed), grad_z.to(raw_mu.dtype)
    to_mu, to_log_sigma = grad * slope(mu, clamp), grad * temperature * eps * u.exp() * slope(u, clamp)
    gradients = (torch.cat([to_mu, to_log_sigma], 1), grad * temperature * (u.exp() + sigma_floor))
    grad_params, grad_noise = (
        out.copy_(g) if out.dim() == 4 else out for out, g in zip(results, gradients, strict=True)
    )
    return grad_params, grad_noise


def _backward_fake(
    grad_z: torch.Tensor,
    params: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    temperature: float,
    clamp: float | None,
    sigma_floor: float,
    need_params: bool,
    need_noise: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    noise_dtype = params.dtype if noise is None else noise.dtype
    return (
        empty_map(params, params.shape[1]) if need_params else params.new_empty(0),
        empty_map(params, params.shape[1] // 2, noise_dtype)
        if need_noise and noise is not None
        else params.new_empty(0, dtype=noise_dtype),
    )


def _gpu_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    if args[1].dtype == torch.float64:  # the kernels compute in float32
        return _backward_formula(*args)
    from nvae_fast.kernels import normal_sample as kernels

    return kernels.normal_sample_backward(*args)


_backward_operator = operator(
    "normal_sample_backward",
    "(Tensor grad_z, Tensor params, Tensor? noise, Tensor? seed, float temperature, float? clamp, float sigma_floor,"
    " bool need_params, bool need_noise) -> (Tensor, Tensor)",
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
    from nvae_fast.kernels import normal_sample as kernels

    return kernels.normal_sample(*args)


_room = room(
    "normal_sample",
    "(Tensor params, Tensor? noise, Tensor? seed, float temperature, float? clamp, float sigma_floor) -> Tensor",
    check=_check,
    reference=_reference,
    differentiable=(0, 1),
    fake=_fake,
    backward=_backward,
    gpu=_gpu,
)
