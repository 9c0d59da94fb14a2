"""The squashing of raw parameters that the normal rooms share (specification section 1)."""

from __future__ import annotations

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops.philox import philox_normal

LOG_SQRT_2PI = 0.9189385332046727  # log(2 pi) / 2


def soft_clamp(t: torch.Tensor, clamp: float | None) -> torch.Tensor:
    """``clamp * tanh(t / clamp)``: a differentiable clamp; the identity for None."""
    return t if clamp is None else clamp * torch.tanh(t / clamp)


def slope(u: torch.Tensor, clamp: float | None) -> torch.Tensor | float:
    """The derivative of :func:`soft_clamp` where its value is ``u``: ``1 - (u / clamp)^2``."""
    return 1.0 if clamp is None else 1.0 - (u / clamp).square()


def squash(
    raw_mu: torch.Tensor, raw_log_sigma: torch.Tensor, clamp: float | None, sigma_floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mu = soft_clamp(raw_mu)``, ``sigma = exp(soft_clamp(raw_log_sigma)) + sigma_floor``."""
    return soft_clamp(raw_mu, clamp), torch.exp(soft_clamp(raw_log_sigma, clamp)) + sigma_floor


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 2Z, H, W) -> raw mu and raw log sigma, (B, Z, H, W) each, in the dtype sums are computed in."""
    raw_mu, raw_log_sigma = packed.to(_checks.accumulate_dtype(packed.dtype)).chunk(2, dim=1)
    return raw_mu, raw_log_sigma


def memory_format(t: torch.Tensor) -> torch.memory_format:
    """The format of maps that belong to packed parameters: channels_last when the channels of ``t`` are adjacent and there
    is more than one pixel (csrc/cpu/packed.h has the same rule)."""
    if t.stride(1) == 1 and t.shape[2] * t.shape[3] > 1:
        return torch.channels_last
    return torch.contiguous_format


def empty_map(packed: torch.Tensor, channels: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised (B, channels, H, W) on the device and in the memory format of ``packed``."""
    b, _, h, w = packed.shape
    return torch.empty(
        (b, channels, h, w),
        dtype=dtype or packed.dtype,
        device=packed.device,
        memory_format=memory_format(packed),
    )


def draw_like(packed: torch.Tensor, noise: torch.Tensor | None, seed: torch.Tensor | None) -> torch.Tensor:
    """The noise given, or standard normals (B, Z, H, W) of ``seed``, in the dtype sums are computed in."""
    dtype = _checks.accumulate_dtype(packed.dtype)
    if noise is not None:
        return noise.to(dtype)
    assert seed is not None  # the checks saw to it
    b, channels, h, w = packed.shape
    return philox_normal(
        (b, channels // 2, h, w), seed, dtype=dtype, device=packed.device, memory_format=memory_format(packed)
    )


def check_noise(op: str, packed: torch.Tensor, noise: torch.Tensor | None, seed: torch.Tensor | None) -> None:
    """Exactly one of noise (B, Z, H, W) and seed (0-d int64 on the device of ``packed``) is given."""
    if (noise is None) == (seed is None):
        raise ValueError(
            f"{op}: give either noise or seed, not both; got {'neither' if noise is None else 'both'}"
        )
    if noise is not None:
        b, channels, h, w = packed.shape
        _checks.shape(op, "noise", noise, (b, channels // 2, h, w), packed)
    elif seed is not None:
        if seed.dtype != torch.int64 or seed.dim() != 0:
            raise ValueError(
                f"{op}: seed must be an int or a 0-d int64 tensor, got {seed.dtype} {tuple(seed.shape)}"
            )
        _checks.device(op, "seed", seed, packed)
