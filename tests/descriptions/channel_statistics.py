"""channel_statistics: mean and sum of squared deviations of every channel."""

from __future__ import annotations

from typing import Any

import torch
from harness import Tensors

from descriptions import Description, sample
from nvae_fast.ops.channel_statistics import channel_statistics

# One pixel, one channel, rows shorter and longer than a task, tails of vectors, more channels than a block.
SIZES = [(4, 6, 5, 7), (3, 17, 1, 1), (2, 1, 9, 9), (2, 3, 40, 57), (1, 33, 20, 15), (2, 1030, 2, 3)]


def inputs(size: tuple[int, int, int, int] = (4, 6, 5, 7), offset: float = 0.5) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    scale = 0.1 + torch.rand(size[1], generator=generator, dtype=torch.float64)[:, None, None]
    return {"x": (torch.randn(size, generator=generator, dtype=torch.float64) + offset) * scale}


def formula(x: torch.Tensor, per_sample: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    dims = (2, 3) if per_sample else (0, 2, 3)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    mean = wide.mean(dims)
    centred = wide - (mean[:, :, None, None] if per_sample else mean[:, None, None])
    return mean, centred.square().sum(dims)


def op(x: Any, per_sample: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return channel_statistics(x, per_sample)[:2]


def both(tensors: Tensors, label: Any = "") -> list[Any]:
    """Over the batch and of each sample."""
    return [sample(f"{label} per_sample={each}", tensors, per_sample=each) for each in (False, True)]


DESCRIPTIONS = [
    Description(
        "channel_statistics",
        op,
        formula,
        samples=[one for size in SIZES for one in both(inputs(size), size)],
        small=both(inputs((3, 2, 2, 3))) + both(inputs((3, 2, 2, 2)), "even"),
        layouts=both(inputs()),
        differentiable=("x",),
        results=(torch.float32, torch.float32),
        factor=3,
        float64=(1e-12, 1e-12),
        errors=[
            ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
            ({"x": torch.zeros(3)}, ValueError, r"x must have shape \(B, C, H, W\), got \(3,\)"),
            (
                {"x": torch.zeros(1, 2, 3, 3, dtype=torch.int64)},
                TypeError,
                "x must have one of the dtypes .*got torch.int64",
            ),
        ],
        good={"x": torch.zeros(1, 2, 3, 3)},
        # Means that are not finite differ from PyTorch's: tests/test_channel_statistics.py.
        single=(lambda x: sum(t.sum() for t in channel_statistics(x, True)[:2]), (4, 3, 5)),
    ),
]
