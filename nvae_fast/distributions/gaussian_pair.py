"""The plain Gaussian pair of very deep VAEs (arXiv 2011.10650): no clamp, no floor. Public as part of
:mod:`nvae_fast.distributions`."""

from __future__ import annotations

from typing import Any

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._layout import pack
from nvae_fast.ops.normal_sample import normal_sample
from nvae_fast.ops.residual_normal import ResidualNormal, residual_normal

_PLAIN: dict[str, Any] = dict(clamp=None, sigma_floor=0.0)

Seed = int | torch.Tensor | None


def check_pair(op: str, names: tuple[str, str], mu: Any, log_sigma: Any) -> None:
    _checks.feature_map(op, names[0], mu)
    _checks.shape(op, names[1], log_sigma, tuple(mu.shape), mu)
    if log_sigma.dtype != mu.dtype:
        raise TypeError(f"{op}: {names[1]} must have {names[0]}'s dtype {mu.dtype}, got {log_sigma.dtype}")


def same_dtype(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in the wider of their dtypes: the kernels read their maps in one."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def absolute_normal(posterior: torch.Tensor, prior: torch.Tensor | None, **options: Any) -> ResidualNormal:
    """The absolute form; z in the dtype of ``posterior`` whatever that of ``prior``."""
    dtype = posterior.dtype
    if prior is not None:
        posterior, prior = same_dtype(posterior, prior)
    found = residual_normal(posterior, prior, residual=False, **options)
    return found._replace(z=found.z.to(dtype))


def draw_gaussian(
    mu: torch.Tensor, log_sigma: torch.Tensor, seed: Seed = None, noise: torch.Tensor | None = None
) -> torch.Tensor:
    """``mu + exp(log_sigma) * eps``, (B, Z, H, W) in their dtype; one kernel, no clamp, no floor.

    Args:
        mu, log_sigma: (B, Z, H, W). Halves of one tensor are read in place, anything else is concatenated.
        seed: as in :meth:`Normal.sample`. noise: standard normal draws (B, Z, H, W) in place of a seed.

    Differentiable in mu, log_sigma and noise.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or both noise and seed are given.
    """
    op = "draw_gaussian"
    check_pair(op, ("mu", "log_sigma"), mu, log_sigma)
    seed = _check_draws(op, mu, seed, noise)
    return normal_sample(pack(mu, log_sigma), seed=seed, noise=noise, **_PLAIN)


def gaussian_analytical_kl(
    mu1: torch.Tensor, mu2: torch.Tensor, logsigma1: torch.Tensor, logsigma2: torch.Tensor
) -> torch.Tensor:
    """KL of N(mu1, exp(logsigma1)) from N(mu2, exp(logsigma2)) of every element, (B, Z, H, W) in nats, plain PyTorch::

        -1/2 + logsigma2 - logsigma1 + (exp(logsigma1)^2 + (mu1 - mu2)^2) / (2 exp(logsigma2)^2)

    All (B, Z, H, W); float32 for half-precision arguments. Summed over pixels: :func:`draw_gaussian_with_kl`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
    """
    _check_four("gaussian_analytical_kl", mu1, mu2, logsigma1, logsigma2)
    mu1, mu2, logsigma1, logsigma2 = (
        t.to(_checks.accumulate_dtype(t.dtype)) for t in (mu1, mu2, logsigma1, logsigma2)
    )
    # Divided before it is squared: no square overflows where the quotient does not.
    sigma2 = logsigma2.exp()
    distance, ratio = (mu1 - mu2) / sigma2, logsigma1.exp() / sigma2
    return -0.5 + logsigma2 - logsigma1 + 0.5 * (ratio.square() + distance.square())


def draw_gaussian_with_kl(
    mu1: torch.Tensor,
    mu2: torch.Tensor,
    logsigma1: torch.Tensor,
    logsigma2: torch.Tensor,
    seed: Seed = None,
    noise: torch.Tensor | None = None,
) -> ResidualNormal:
    """:func:`draw_gaussian` of the first and :func:`gaussian_analytical_kl` summed over pixels, in one kernel.

    Args:
        mu1, logsigma1: of the posterior, (B, Z, H, W). mu2, logsigma2: of the prior.
        seed, noise: as in :func:`draw_gaussian`.

    Returns:
        :class:`nvae_fast.ResidualNormal`: z (B, Z, H, W); kl, log_q and log_p of that z, (B, Z).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device, or both noise and seed are given.
    """
    op = "draw_gaussian_with_kl"
    _check_four(op, mu1, mu2, logsigma1, logsigma2)
    seed = _check_draws(op, mu1, seed, noise)
    posterior, prior = pack(mu1, logsigma1), pack(mu2, logsigma2)
    return absolute_normal(posterior, prior, seed=seed, noise=noise, **_PLAIN)


def _check_four(
    op: str, mu1: torch.Tensor, mu2: torch.Tensor, logsigma1: torch.Tensor, logsigma2: torch.Tensor
) -> None:
    check_pair(op, ("mu1", "logsigma1"), mu1, logsigma1)
    check_pair(op, ("mu2", "logsigma2"), mu2, logsigma2)
    _checks.shape(op, "mu2", mu2, tuple(mu1.shape), mu1)


def _check_draws(op: str, mu: torch.Tensor, seed: Seed, noise: torch.Tensor | None) -> Seed:
    """The seed as a tensor, or None where noise is given."""
    if noise is None:
        return _checks.seed(op, seed, mu.device)
    if seed is not None:
        raise ValueError(f"{op}: give either noise or seed, not both")
    _checks.shape(op, "noise", noise, tuple(mu.shape), mu)
    return None
