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

Gradients, which the kernels compute from the inputs and the seed alone. With ``d = (mu_q - mu_p) / sigma_p``,
``r = sigma_q / sigma_p``, ``w = (z - mu_p) / sigma_p`` and the upstream gradients ``g_z, g_kl, g_q, g_p``,
``s = g_z - g_p w / sigma_p`` is what reaches z::

    mu_q:    s + g_kl d / sigma_p              sigma_q: s eps - g_q / sigma_q + g_kl (r / sigma_p - 1 / sigma_q)
    mu_p:    (g_p w - g_kl d) / sigma_p        sigma_p: (g_p (w^2 - 1) + g_kl (1 - d^2 - r^2)) / sigma_p
    eps:     s sigma_q - g_q eps

and through the soft clamp: d mu / d raw = 1 - (mu / clamp)^2, d sigma / d raw = (sigma - floor)(1 - (u / clamp)^2) at the
clamped log sigma u. The residual form adds the posterior's raw gradients to the prior's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._layout import empty_map
from nvae_fast.ops._op import define_op
from nvae_fast.ops._squash import LOG_SQRT_2PI, draw_like, squash, unpack


class ResidualNormal(NamedTuple):
    """What :func:`residual_normal` returns.

    ``z`` (B, Z, H, W) in the dtype of the parameters; ``kl``, ``log_q``, ``log_p`` (B, Z) in nats, summed over pixels,
    float32 (float64 for float64 parameters).
    """

    z: Tensor
    kl: Tensor
    log_q: Tensor
    log_p: Tensor


def residual_normal(
    posterior: Tensor,
    prior: Tensor | None = None,
    *,
    residual: bool = True,
    noise: Tensor | None = None,
    seed: int | Tensor | None = None,
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
    op = "residual_normal"
    _checks.packed(op, "posterior", posterior)
    if prior is not None:
        _checks.shape(op, "prior", prior, posterior.shape, posterior)
    _checks.flag(op, "residual", residual)
    _checks.squashing(op, clamp, sigma_floor)
    draw_from = _checks.noise_or_seed(op, posterior, noise, seed)
    return ResidualNormal(*_op(posterior, prior, noise, draw_from, residual, clamp, sigma_floor))


def _reference(
    posterior: Tensor, prior: Tensor | None, noise: Tensor | None, seed: Tensor | None, residual: bool,
    clamp: float | None, sigma_floor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
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


def _fake(posterior: Tensor, *_: Any) -> tuple[Tensor, ...]:
    z = empty_map(posterior, posterior.shape[1] // 2)
    return z, *(z.new_empty(z.shape[:2], dtype=_checks.accumulate_dtype(z.dtype)) for _ in range(3))


_op = define_op(
    "residual_normal",
    _reference,
    fake=_fake,
    differentiable=("posterior", "prior", "noise"),
    outputs=("z", "kl", "log_q", "log_p"),
    triton="residual_normal",
    fused_backward=True,
)
