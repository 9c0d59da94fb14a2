"""The memory format in which a model computes, and that of its results.

The kernels of a CPU are those of channels_last: an NCHW model would convert the input of every cell. It converts its images
and its first feature instead, and its results back.
"""

from __future__ import annotations

import torch

from nvae_fast.ops import _backend
from nvae_fast.ops._layout import memory_format
from nvae_fast.ops.inverted_residual.train import NAME as CELL


def to_computed_format(t: torch.Tensor) -> torch.Tensor:
    """``t`` (B, C, H, W) in the memory format that is fastest on its device."""
    if t.device.type != "cpu" or not _backend.fused(CELL, t.device):
        return t
    if t.shape[1] == 1:  # both formats fit: by its strides a convolution chooses the format of its result
        b, _, h, w = t.shape
        return t.reshape(b, h, w, 1).permute(0, 3, 1, 2)
    return t.contiguous(memory_format=torch.channels_last)


def to_given_format(t: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
    """``t`` in NCHW unless it is in channels_last and one of ``given``, the images or a weight, is too."""
    if memory_format(t) is torch.channels_last and torch.channels_last not in map(memory_format, given):
        return t.contiguous()
    return t
