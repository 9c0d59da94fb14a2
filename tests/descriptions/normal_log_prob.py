"""normal_log_prob: log-probabilities of samples under normals with packed parameters."""

from __future__ import annotations

from typing import Any

import torch
from harness import Tensors
from torch.distributions import Normal

import nvae_fast as nf
from descriptions import Description, sample


def inputs(size: tuple[int, int, int, int] = (2, 3, 4, 5)) -> Tensors:
    b, z, h, w = size
    generator = torch.Generator().manual_seed(3)
    return {
        "z": torch.randn((b, z, h, w), generator=generator, dtype=torch.float64),
        "params": torch.randn((b, 2 * z, h, w), generator=generator, dtype=torch.float64),
    }


def formula(z: torch.Tensor, params: torch.Tensor, floor: float = 0.01) -> torch.Tensor:
    raw_mu, raw_log_sigma = params.chunk(2, dim=1)
    sigma = torch.exp(5 * torch.tanh(raw_log_sigma / 5)) + floor
    return Normal(5 * torch.tanh(raw_mu / 5), sigma, validate_args=False).log_prob(z).sum((2, 3))


def op(z: Any, params: Any = None, **options: Any) -> torch.Tensor:
    return nf.normal_log_prob(z, params, **options)


ERRORS = [
    ({"z": [1.0]}, TypeError, "z must be a torch.Tensor, got list"),
    ({"z": torch.zeros(2, 3)}, ValueError, r"z must have shape \(B, C, H, W\), got \(2, 3\)"),
    (
        {"params": torch.zeros(1, 2, 3, 3)},
        ValueError,
        r"params must have shape \(1, 4, 3, 3\), got \(1, 2, 3, 3\)",
    ),
    (
        {"params": torch.zeros(1, 4, 3, 3).long()},
        TypeError,
        "params must have one of the dtypes .*got torch.int64",
    ),
    ({"params": torch.zeros(1, 4, 3, 3, device="meta")}, ValueError, "params must be on cpu .*got meta"),
    ({"clamp": 0}, ValueError, "clamp must be None or a finite number > 0, got 0"),
    ({"sigma_floor": -1.0}, ValueError, "sigma_floor must be a finite number >= 0, got -1.0"),
]
ONE = inputs((2, 1, 2, 2))

DESCRIPTIONS = [
    Description(
        "normal_log_prob",
        op,
        formula,
        samples=[
            sample(size, inputs(size))
            for size in [(2, 3, 4, 4), (61, 1, 1, 1), (61, 5, 7, 11), (1, 2, 1, 13)]
        ],
        small=[
            sample("params", ONE),
            sample("standard prior", {"z": ONE["z"]}),
            sample("column", inputs((2, 2, 2, 1))),
        ],
        layouts=[sample("params", inputs((3, 2, 5, 3)))],
        differentiable=("z", "params"),
        results=(torch.float32,),
        errors=ERRORS,
        good={"z": torch.zeros(1, 2, 3, 3)},
        poison={"z": (1, 0, 1, 1)},
        single=(lambda x: nf.normal_log_prob(x[:, : x.shape[1] // 2], x), (4, 3, 5)),
    ),
]
