"""Sample a squashed normal: ``z = mu + temperature * sigma * eps`` with packed raw parameters.

``mu = c(raw_mu)``, ``sigma = exp(c(raw_log_sigma)) + sigma_floor``, ``c(t) = clamp * tanh(t / clamp)``; NVAE
(arXiv 2007.03898), section 4, for the temperature of the prior when generating.
"""

from __future__ import annotations

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import room
from nvae_fast.ops._squash import check_noise, draw_like, squash, unpack


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


_room = room(
    "normal_sample",
    "(Tensor params, Tensor? noise, Tensor? seed, float temperature, float? clamp, float sigma_floor) -> Tensor",
    check=_check,
    reference=_reference,
    differentiable=(0, 1),
)
