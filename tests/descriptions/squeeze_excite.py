"""squeeze_excite: a gate for each channel from its mean, and the residual branch."""

from __future__ import annotations

from typing import Any

import torch
from harness import Tensors

import nvae_fast as nf
from descriptions import INPUT, Description, sample

NAMES = ("x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "skip")
# Above 64 channels the hidden width C // 16 exceeds the minimum of 4.
SIZES = [(2, 4, 5, 7), (1, 1, 1, 1), (3, 17, 4, 4), (2, 96, 3, 5), (2, 200, 2, 2)]


def inputs(size: tuple[int, int, int, int] = (2, 6, 3, 5), skip: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(6)
    channels = size[1]
    hidden = max(channels // 16, 4)
    shapes = {
        "x": size,
        "reduce_weight": (hidden, channels),
        "reduce_bias": (hidden,),
        "expand_weight": (channels, hidden),
        "expand_bias": (channels,),
        "skip": size,
    }
    found = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    found["x"] += 0.5  # so that the pooled values are not all near 0
    if not skip:
        del found["skip"]
    return found


def formula(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: Any = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    hidden = torch.clamp_min(x.mean((2, 3)) @ reduce_weight.T + reduce_bias, 0)
    gate = torch.sigmoid(hidden @ expand_weight.T + expand_bias)[:, :, None, None]
    y = residual_scale * (gate * x)
    return y if skip is None else skip + y


GOOD = inputs((2, 6, 3, 3))
ERRORS = [
    ({"x": 0}, TypeError, "x must be a torch.Tensor, got int"),
    ({"x": torch.zeros(2, 6)}, ValueError, r"x must have shape \(B, C, H, W\), got \(2, 6\)"),
    (
        {"reduce_weight": torch.zeros(4, 5)},
        ValueError,
        r"reduce_weight must have shape \(4, 6\), got \(4, 5\)",
    ),
    ({"reduce_weight": torch.tensor(0.0)}, ValueError, r"reduce_weight must have shape \(0, 6\), got \(\)"),
    ({"reduce_bias": torch.zeros(6)}, ValueError, r"reduce_bias must have shape \(4,\), got \(6,\)"),
    (
        {"expand_weight": torch.zeros(4, 6)},
        ValueError,
        r"expand_weight must have shape \(6, 4\), got \(4, 6\)",
    ),
    ({"expand_bias": torch.zeros(4)}, ValueError, r"expand_bias must have shape \(6,\), got \(4,\)"),
    ({"expand_bias": torch.zeros(6, device="meta")}, ValueError, "expand_bias must be on cpu .*got meta"),
    (
        {"skip": torch.zeros(2, 6, 3, 4)},
        ValueError,
        r"skip must have shape \(2, 6, 3, 3\), got \(2, 6, 3, 4\)",
    ),
    ({"residual_scale": None}, TypeError, "residual_scale must be a number, got None"),
    ({"residual_scale": "a"}, TypeError, "residual_scale must be a number, got 'a'"),
]

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    # The hidden units are active.
    LAYERS = [torch.randn(s, dtype=torch.float64) for s in ((2, 4), (2,), (4, 2), (4,))]
    LAYERS[1] = 3.5 + LAYERS[1].abs()

DESCRIPTIONS = [
    Description(
        "squeeze_excite",
        nf.squeeze_excite,
        formula,
        samples=[
            sample(f"{size} skip={skip} scale={scale}", inputs(size, skip), residual_scale=scale)
            for size in SIZES
            for skip, scale in ((True, 0.1), (False, 1.0), (False, 0.1))
        ],
        small=[
            sample(f"skip={skip}", inputs((2, 3, 2, 2), skip), residual_scale=0.1) for skip in (True, False)
        ],
        layouts=[sample("skip", inputs((3, 5, 7, 3)))],
        differentiable=NAMES,
        batched=("x", "skip"),
        results=(INPUT,),
        factor=2.5,
        vector_floor=4,
        float64=(1e-12, 1e-12),
        errors=ERRORS,
        good=GOOD,
        halved=("x", "skip"),
        poison={"x": (1, 2, 0, 0)},  # into the whole sample, whose mean it enters
        single=(lambda x: nf.squeeze_excite(x, *LAYERS, skip=x, residual_scale=0.1), (4, 3, 5)),
    ),
]
