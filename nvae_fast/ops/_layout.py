"""Memory formats of feature maps, and empty maps that follow them."""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(t: Tensor) -> torch.memory_format:
    """The format of maps that belong to ``t`` (B, C, H, W): channels_last when its channels are adjacent and there is more
    than one pixel (csrc/cpu/packed.h has the same rule)."""
    if t.stride(1) == 1 and t.shape[2] * t.shape[3] > 1:
        return torch.channels_last
    return torch.contiguous_format


def empty_map(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, channels, H, W) on the device and in the memory format of ``like``."""
    b, _, h, w = like.shape
    return torch.empty(
        (b, channels, h, w), dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(like)
    )
