"""Normals by the definition of the Philox stream, in float64."""

from __future__ import annotations

import numpy as np
import torch

TOLERANCE = 1e-6


def exact_normals(words: torch.Tensor) -> torch.Tensor:
    """The definition in float64, from the words alone: (n, 4) -> 4n."""
    w = words.cpu().numpy().astype(np.uint64)
    # float32 up to u, whose rounding belongs to the definition; from there on exactly.
    u = (w[:, 0::2].astype(np.float32) + np.float32(0.5)).astype(np.float64) * 2.0**-32
    r = np.sqrt(-2 * np.log(u))
    angle = w[:, 1::2].astype(np.float64) * (2 * np.pi / 2**32)
    return torch.from_numpy(np.stack([r * np.cos(angle), r * np.sin(angle)], axis=2).reshape(-1))
