"""Noise with one Philox stream per image, which does not depend on the position of the image in a batch.

A 0-d seed is one stream for a batch; the noise of an image depends on its position. With one seed per image, its noise is the
same in any batch and on any process. It is drawn before the kernels, which take it as given noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch

from nvae_fast.ops.philox import philox_normal


def is_per_image(seed: Any) -> TypeGuard[torch.Tensor]:
    """Return whether ``seed`` holds one seed per image: a tensor of one dimension."""
    return isinstance(seed, torch.Tensor) and seed.dim() == 1


def check_per_image(op: str, seeds: torch.Tensor, n: int, device: torch.device) -> None:
    """Raise unless ``seeds`` is an int64 tensor (n,) on ``device``."""
    if seeds.dtype != torch.int64:
        raise TypeError(f"{op}: a seed tensor must be int64, got {seeds.dtype}")
    if seeds.numel() != n:
        raise ValueError(f"{op}: seed must be one number or one per image ({n}), got {seeds.numel()}")
    if seeds.device != device:
        raise ValueError(f"{op}: seed must be on {device}, got {seeds.device}")


def per_image_noise(
    seeds: torch.Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Standard normals (B, *shape) of every shape; those of image b are consecutive draws of the stream ``seeds[b]``."""
    sizes = [math.prod(shape) for shape in shapes]
    rows = [philox_normal((sum(sizes),), seed, dtype=dtype) for seed in seeds.unbind()]
    draws = torch.stack(rows) if rows else torch.empty(0, sum(sizes), dtype=dtype, device=seeds.device)
    return [
        part.reshape(-1, *shape) if rows else part.new_empty(0, *shape)
        for part, shape in zip(draws.split(sizes, dim=1), shapes, strict=True)
    ]
