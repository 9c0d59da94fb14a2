"""Residual normal distribution: squash, sample, KL and log-densities of one latent group.

NVAE (arXiv 2007.03898), section 3.2, equation 2. Raw parameters are packed as the convolution made them,
``(B, 2Z, H, W)``: first Z channels raw mu, last Z raw log sigma. With ``c(t) = clamp * tanh(t / clamp)``::

    p:  mu_p = c(raw_mu_p)            sigma_p = exp(c(raw_log_sigma_p)) + sigma_floor
    q:  raw_q = raw_posterior + raw_p if residual else raw_posterior, then squashed alike
    z = mu_q + sigma_q * eps
    kl = 1/2 ((mu_q - mu_p) / sigma_p)^2 + 1/2 (sigma_q / sigma_p)^2 - 1/2 - log(sigma_q / sigma_p)
    log_q = -eps^2 / 2 - log(2 pi) / 2 - log sigma_q
    log_p = -((z - mu_p) / sigma_p)^2 / 2 - log(2 pi) / 2 - log sigma_p

The sum of raw values is taken before the clamp; with dmu = mu_q - mu_p and dsigma = sigma_q / sigma_p the KL is
equation 2 exactly. ``prior=None`` is the first group: raw zeros, hence sigma_p = 1 + sigma_floor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import room
from nvae_fast.ops._squash import LOG_SQRT_2PI, check_noise, draw_like, squash, unpack


class ResidualNormal(NamedTuple):
    """What :func:`residual_normal` returns.

    ``z`` (B, Z, H, W) in the dtype of the parameters; ``kl``, ``log_q``, ``log_p`` (B, Z) in nats, summed over pixels,
    float32 (float64 for float64 parameters).
    """

    z: torch.Tensor
    kl: torch.Tensor
    log_q: torch.Tensor
    log_p: torch.Tensor


def residual_normal(
    posterior: torch.Tensor,
    prior: torch.Tensor | None = None,
    *,
    residual: bool = True,
    noise: torch.Tensor | None = None,
    seed: int | torch.Tensor | None = None,
    clamp: float | None = 5.0,
    sigma_floor: float = 0.01,
) -> ResidualNormal:
    """Sample a latent group and measure it against its prior; formulas in the module's docstring.

    Args:
        posterior: packed raw parameters (B, 2Z, H, W), relative to the prior when ``residual``.
        prior: packed raw parameters of the prior, same shape; None means raw zeros (the first group).
        residual: add the prior's raw values to the posterior's before squashing.
        noise: standard normal draws (B, Z, H, W); None draws them from ``seed``.
        seed: int or 0-d int64 tensor of the Philox stream; None takes one from the device's default generator.
        clamp: bound of the soft clamp; None for none.
        sigma_floor: added to every sigma. ``clamp=None, sigma_floor=0`` is the plain Gaussian.

    Returns:
        :class:`ResidualNormal`. Differentiable in posterior, prior and noise.

    Raises:
        TypeError: an argument is not a floating tensor.
        ValueError: a shape, device or value does not fit, or both noise and seed are given.
    """
    if noise is not None and seed is not None:
        raise ValueError("residual_normal: give either noise or seed, not both")
    _checks.packed("residual_normal", "posterior", posterior)
    seed_tensor = _checks.seed("residual_normal", seed, posterior.device) if noise is None else None
    return ResidualNormal(*_room(posterior, prior, noise, seed_tensor, residual, clamp, sigma_floor))


def _check(
    posterior: torch.Tensor,
    prior: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    residual: bool,
    clamp: float | None,
    sigma_floor: float,
) -> None:
    _checks.packed("residual_normal", "posterior", posterior)
    if prior is not None:
        _checks.shape("residual_normal", "prior", prior, tuple(posterior.shape), posterior)
    check_noise("residual_normal", posterior, noise, seed)
    _checks.squashing("residual_normal", clamp, sigma_floor)


def _reference(
    posterior: torch.Tensor,
    prior: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    residual: bool,
    clamp: float | None,
    sigma_floor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    raw_mu_q, raw_log_sigma_q = unpack(posterior)
    if prior is None:
        raw_mu_p, raw_log_sigma_p = torch.zeros_like(raw_mu_q), torch.zeros_like(raw_log_sigma_q)
    else:
        raw_mu_p, raw_log_sigma_p = unpack(prior)
        if residual:
            raw_mu_q, raw_log_sigma_q = raw_mu_q + raw_mu_p, raw_log_sigma_q + raw_log_sigma_p
    mu_p, sigma_p = squash(raw_mu_p, raw_log_sigma_p, clamp, sigma_floor)
    mu_q, sigma_q = squash(raw_mu_q, raw_log_sigma_q, clamp, sigma_floor)
    eps = draw_like(posterior, noise, seed)
    z = mu_q + sigma_q * eps
    ratio = sigma_q / sigma_p
    kl = 0.5 * ((mu_q - mu_p) / sigma_p).square() + 0.5 * ratio.square() - 0.5 - ratio.log()
    log_q = -0.5 * eps.square() - LOG_SQRT_2PI - sigma_q.log()
    log_p = -0.5 * ((z - mu_p) / sigma_p).square() - LOG_SQRT_2PI - sigma_p.log()
    return z.to(posterior.dtype), kl.sum((2, 3)), log_q.sum((2, 3)), log_p.sum((2, 3))


_room = room(
    "residual_normal",
    "(Tensor posterior, Tensor? prior, Tensor? noise, Tensor? seed, bool residual, float? clamp, float sigma_floor)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2),
)
