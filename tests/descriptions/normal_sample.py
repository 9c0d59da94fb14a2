"""normal_sample: samples of normals from packed parameters."""

from __future__ import annotations

from typing import Any

import torch
from harness import Tensors

import nvae_fast as nf
from descriptions import INPUT, Description, sample

NAMES = ("params", "noise")


def inputs(size: tuple[int, int, int, int] = (2, 3, 4, 5)) -> Tensors:
    b, z, h, w = size
    generator = torch.Generator().manual_seed(2)
    return {
        "params": 2 * torch.randn((b, 2 * z, h, w), generator=generator, dtype=torch.float64),
        "noise": torch.randn((b, z, h, w), generator=generator, dtype=torch.float64),
    }


def formula(params: torch.Tensor, noise: torch.Tensor, temperature: float = 0.7) -> torch.Tensor:
    raw_mu, raw_log_sigma = params.chunk(2, dim=1)
    sigma = temperature * (torch.exp(5 * torch.tanh(raw_log_sigma / 5)) + 0.01)
    return 5 * torch.tanh(raw_mu / 5) + sigma * noise


def op(params: Any, noise: Any = None, **options: Any) -> torch.Tensor:
    return nf.normal_sample(params, noise=noise, **{"temperature": 0.7, **options})


PARAMS, NOISE = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, 2)
ERRORS = [
    ({"params": None}, TypeError, "params must be a torch.Tensor, got NoneType"),
    (
        {"params": torch.zeros(1, 3, 2, 2)},
        ValueError,
        "params must have an even number of channels 2Z .*got 3",
    ),
    ({"params": torch.zeros(4, 2, 2)}, ValueError, r"params must have shape \(B, C, H, W\), got \(4, 2, 2\)"),
    ({"noise": PARAMS}, ValueError, r"noise must have shape \(1, 2, 2, 2\), got \(1, 4, 2, 2\)"),
    ({"noise": NOISE, "seed": 1}, ValueError, "give either noise or seed, not both"),
    ({"seed": "1"}, TypeError, "seed must be an int or a 0-d int64 tensor, got str"),
    ({"temperature": -0.1}, ValueError, "temperature must be a finite number >= 0, got -0.1"),
    ({"temperature": float("inf")}, ValueError, "temperature must be a finite number >= 0, got inf"),
    ({"clamp": -5.0}, ValueError, "clamp must be None or a finite number > 0, got -5.0"),
    ({"sigma_floor": float("inf")}, ValueError, "sigma_floor must be a finite number >= 0, got inf"),
]
ONE = inputs((2, 1, 2, 2))
LARGER = inputs((3, 2, 5, 3))

DESCRIPTIONS = [
    Description(
        "normal_sample",
        op,
        formula,
        samples=[
            sample(size, inputs(size)) for size in [(2, 3, 4, 4), (1, 1, 1, 1), (3, 5, 7, 11), (2, 4, 11, 31)]
        ],
        small=[
            sample("noise", ONE),
            sample("seed", {"params": ONE["params"]}, seed=3),
            sample("column", inputs((2, 2, 2, 1))),
        ],
        layouts=[sample("noise", LARGER), sample("seed", {"params": LARGER["params"]}, seed=1)],
        differentiable=NAMES,
        results=(INPUT,),
        errors=ERRORS,
        good={"params": PARAMS},
        call=nf.normal_sample,
        poison={"params": (1, 0, 1, 1)},
        single=(lambda x: nf.normal_sample(x, seed=3), (4, 3, 5)),
        drawn=lambda packed, seed: nf.normal_sample(packed, temperature=0.7, seed=seed),
        given=lambda packed, noise: nf.normal_sample(packed, temperature=0.7, noise=noise),
    ),
]
