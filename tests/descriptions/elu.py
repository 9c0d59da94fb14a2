"""elu."""

from __future__ import annotations

import torch

from descriptions import INPUT, Description, sample
from nvae_fast.ops.elu import elu

# One pixel, one channel, lengths with and without tails, longer than a task.
SIZES = [(2, 6, 5, 7), (3, 17, 1, 1), (1, 1, 1, 1), (2, 32, 8, 8), (3, 20, 40, 57)]


def inputs(size: tuple[int, int, int, int] = (2, 6, 5, 7)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {"x": 2 * torch.randn(size, generator=generator, dtype=torch.float64)}


def formula(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.expm1(x.clamp_max(0)))


DESCRIPTIONS = [
    Description(
        "elu",
        elu,
        formula,
        samples=[sample(size, inputs(size)) for size in SIZES],
        small=[sample("x", inputs((2, 3, 2, 2)))],
        layouts=[sample("x", inputs())],
        differentiable=("x",),
        results=(INPUT,),
        float64=(1e-15, 4e-15),
        errors=[
            ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
            ({"x": torch.zeros(3, 4, 4)}, ValueError, r"x must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
        ],
        good={"x": torch.zeros(1, 2, 3, 3)},
        poison={"x": (1, 0, 1, 1)},
        single=(elu, (4, 3, 5)),
    ),
]
