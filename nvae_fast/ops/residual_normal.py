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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import operator, room
from nvae_fast.ops._squash import (
    LOG_SQRT_2PI,
    check_noise,
    draw_like,
    empty_map,
    slope,
    soft_clamp,
    squash,
    unpack,
)


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
        :class:`ResidualNormal`: z in the dtype of posterior, kl, log_q and log_p in float32 (float64 for float64), the
        arithmetic too. Differentiable in posterior, prior and noise.

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
    _checks.flag("residual_normal", "residual", residual)
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


def _fake(
    posterior: torch.Tensor,
    prior: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    residual: bool,
    clamp: float | None,
    sigma_floor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    z = empty_map(posterior, posterior.shape[1] // 2)
    kl, log_q, log_p = (z.new_empty(z.shape[:2], dtype=_checks.accumulate_dtype(z.dtype)) for _ in range(3))
    return z, kl, log_q, log_p


def _backward_formula(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    grad_log_q: torch.Tensor | None,
    grad_log_p: torch.Tensor | None,
    posterior: torch.Tensor,
    prior: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    residual: bool,
    clamp: float | None,
    sigma_floor: float,
    need_posterior: bool,
    need_prior: bool,
    need_noise: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients from the inputs and the seed alone; every fused backward kernel computes this.

    With ``d = (mu_q - mu_p) / sigma_p``, ``r = sigma_q / sigma_p``, ``w = (z - mu_p) / sigma_p`` and the upstream gradients
    ``g_z, g_kl, g_q, g_p``; ``s = g_z - g_p w / sigma_p`` is what reaches z::

        mu_q:    s + g_kl d / sigma_p              sigma_q: s eps - g_q / sigma_q + g_kl (r / sigma_p - 1 / sigma_q)
        mu_p:    (g_p w - g_kl d) / sigma_p        sigma_p: (g_p (w^2 - 1) + g_kl (1 - d^2 - r^2)) / sigma_p
        eps:     s sigma_q - g_q eps

    and through the squashing: d mu / d raw = 1 - (mu / clamp)^2, d sigma / d raw = (sigma - floor)(1 - (u / clamp)^2) at the
    clamped log sigma u. The residual form adds the posterior's raw gradients to the prior's.
    """
    raw_mu_q, raw_log_sigma_q = unpack(posterior)
    raw_mu_p, raw_log_sigma_p = (torch.zeros_like(raw_mu_q),) * 2 if prior is None else unpack(prior)
    if residual and prior is not None:
        raw_mu_q, raw_log_sigma_q = raw_mu_q + raw_mu_p, raw_log_sigma_q + raw_log_sigma_p

    mu_p, u_p = soft_clamp(raw_mu_p, clamp), soft_clamp(raw_log_sigma_p, clamp)
    mu_q, u_q = soft_clamp(raw_mu_q, clamp), soft_clamp(raw_log_sigma_q, clamp)
    sigma_p, sigma_q = u_p.exp() + sigma_floor, u_q.exp() + sigma_floor
    eps = draw_like(posterior, noise, seed)

    def sums(grad: torch.Tensor | None) -> torch.Tensor | float:
        return 0.0 if grad is None else grad.to(eps.dtype)[:, :, None, None]

    g_kl, g_q, g_p = sums(grad_kl), sums(grad_log_q), sums(grad_log_p)
    d, r = (mu_q - mu_p) / sigma_p, sigma_q / sigma_p
    w = (mu_q - mu_p + sigma_q * eps) / sigma_p
    s = (0.0 if grad_z is None else grad_z.to(eps.dtype)) - g_p * w / sigma_p
    to_mu_q = (s + g_kl * d / sigma_p) * slope(mu_q, clamp)
    to_log_sigma_q = (
        (s * eps - g_q / sigma_q + g_kl * (r / sigma_p - 1 / sigma_q)) * u_q.exp() * slope(u_q, clamp)
    )
    to_mu_p = (g_p * w - g_kl * d) / sigma_p * slope(mu_p, clamp)
    to_log_sigma_p = (
        (g_p * (w.square() - 1) + g_kl * (1 - d.square() - r.square()))
        / sigma_p
        * u_p.exp()
        * slope(u_p, clamp)
    )
    if residual:
        to_mu_p, to_log_sigma_p = to_mu_p + to_mu_q, to_log_sigma_p + to_log_sigma_q
    results = _backward_fake(
        grad_z, grad_kl, grad_log_q, grad_log_p, posterior, prior, noise, seed, residual, clamp, sigma_floor,
        need_posterior, need_prior, need_noise,
    )  # fmt: skip
    gradients = (
        torch.cat([to_mu_q, to_log_sigma_q], 1),
        torch.cat([to_mu_p, to_log_sigma_p], 1),
        s * sigma_q - g_q * eps,
    )
    grad_posterior, grad_prior, grad_noise = (
        out.copy_(g) if out.dim() == 4 else out for out, g in zip(results, gradients, strict=True)
    )
    return grad_posterior, grad_prior, grad_noise


def _backward_fake(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    grad_log_q: torch.Tensor | None,
    grad_log_p: torch.Tensor | None,
    posterior: torch.Tensor,
    prior: torch.Tensor | None,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    residual: bool,
    clamp: float | None,
    sigma_floor: float,
    need_posterior: bool,
    need_prior: bool,
    need_noise: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    channels = posterior.shape[1]
    nothing = posterior.new_empty(0)
    return (
        empty_map(posterior, channels) if need_posterior else nothing,
        empty_map(posterior, channels) if need_prior and prior is not None else posterior.new_empty(0),
        empty_map(posterior, channels // 2, noise.dtype)
        if need_noise and noise is not None
        else posterior.new_empty(0, dtype=posterior.dtype if noise is None else noise.dtype),
    )


def _gpu_backward(*args: Any) -> tuple[torch.Tensor, ...]:
    if args[4].dtype == torch.float64:  # the kernels compute in float32
        return _backward_formula(*args)
    from nvae_fast.kernels import residual_normal as kernels

    return kernels.residual_normal_backward(*args)


_backward_operator = operator(
    "residual_normal_backward",
    "(Tensor? grad_z, Tensor? grad_kl, Tensor? grad_log_q, Tensor? grad_log_p, Tensor posterior, Tensor? prior,"
    " Tensor? noise, Tensor? seed, bool residual, float? clamp, float sigma_floor, bool need_posterior,"
    " bool need_prior, bool need_noise) -> (Tensor, Tensor, Tensor)",
    default=_backward_formula,
    fake=_backward_fake,
    gpu=_gpu_backward,
)


def _backward(
    grads: Sequence[torch.Tensor | None], wanted: Sequence[int], *args: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward_operator(*grads, *args, 0 in wanted, 1 in wanted, 2 in wanted)


def _gpu(*args: Any) -> tuple[torch.Tensor, ...]:
    if args[0].dtype == torch.float64:  # the kernels compute in float32
        return _reference(*args)
    from nvae_fast.kernels import residual_normal as kernels

    return kernels.residual_normal(*args)


_room = room(
    "residual_normal",
    "(Tensor posterior, Tensor? prior, Tensor? noise, Tensor? seed, bool residual, float? clamp, float sigma_floor)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2),
    fake=_fake,
    backward=_backward,
    gpu=_gpu,
)
