"""The soft clamp of raw parameters, and the noise, that the operators on normals share."""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._layout import empty_map, memory_format  # noqa: F401
from nvae_fast.ops.philox import philox_normal

LOG_SQRT_2PI = 0.9189385332046727  # log(2 pi) / 2


def soft_clamp(t: Tensor, clamp: float | None) -> Tensor:
    """``clamp * tanh(t / clamp)``: a differentiable clamp; the identity for None."""
    return t if clamp is None else clamp * torch.tanh(t / clamp)


def squash(
    raw_mu: Tensor, raw_log_sigma: Tensor, clamp: float | None, sigma_floor: float
) -> tuple[Tensor, Tensor]:
    """``mu = soft_clamp(raw_mu)``, ``sigma = exp(soft_clamp(raw_log_sigma)) + sigma_floor``."""
    return soft_clamp(raw_mu, clamp), torch.exp(soft_clamp(raw_log_sigma, clamp)) + sigma_floor


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2Z, H, W) -> raw mu and raw log sigma, (B, Z, H, W) each, in the dtype sums are computed in."""
    raw_mu, raw_log_sigma = packed.to(_checks.accumulate_dtype(packed.dtype)).chunk(2, dim=1)
    return raw_mu, raw_log_sigma


def draw_like(packed: Tensor, noise: Tensor | None, seed: Tensor | None) -> Tensor:
    """The noise given, or standard normals (B, Z, H, W) of ``seed``, in the dtype sums are computed in."""
    dtype = _checks.accumulate_dtype(packed.dtype)
    if noise is not None:
        return noise.to(dtype)
    assert seed is not None  # the checks saw to it
    b, channels, h, w = packed.shape
    return philox_normal(
        (b, channels // 2, h, w), seed, dtype=dtype, device=packed.device, memory_format=memory_format(packed)
    )
