"""residual_normal: samples, KL divergence and log-probabilities of residual normals."""

from __future__ import annotations

from typing import Any

import torch
from harness import Tensors
from torch.distributions import Normal, kl_divergence

import nvae_fast as nf
from descriptions import INPUT, Description, sample

# The last: a task of several rows, whose last vector ends outside of the noise that the CPU kernel draws for it.
SIZES = [(2, 3, 4, 4), (61, 1, 1, 1), (3, 5, 7, 11), (1, 2, 13, 1), (2, 4, 11, 31)]
NAMES = ("posterior", "prior", "noise")


def inputs(size: tuple[int, int, int, int] = (2, 3, 4, 5), spread: float = 1.0) -> Tensors:
    b, z, h, w = size
    generator = torch.Generator().manual_seed(1)
    shapes = {"posterior": (b, 2 * z, h, w), "prior": (b, 2 * z, h, w), "noise": (b, z, h, w)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        * (1 if name == "noise" else spread)
        for name, shape in shapes.items()
    }


def without(tensors: Tensors, *names: str) -> Tensors:
    return {name: t for name, t in tensors.items() if name not in names}


def squashed(raw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raw_mu, raw_log_sigma = raw.chunk(2, dim=1)
    return 5 * torch.tanh(raw_mu / 5), torch.exp(5 * torch.tanh(raw_log_sigma / 5)) + 0.01


def formula(
    posterior: torch.Tensor, prior: torch.Tensor, noise: torch.Tensor, residual: bool = True
) -> tuple[torch.Tensor, ...]:
    """Specification section 1, with PyTorch's own distributions."""
    q = Normal(*squashed(posterior + prior if residual else posterior), validate_args=False)
    p = Normal(*squashed(prior), validate_args=False)
    z = q.loc + q.scale * noise
    return z, *(t.sum((2, 3)) for t in (kl_divergence(q, p), q.log_prob(z), p.log_prob(z)))


def op(posterior: Any, prior: Any = None, noise: Any = None, **options: Any) -> tuple[torch.Tensor, ...]:
    return nf.residual_normal(posterior, prior, noise=noise, **options)


ERRORS = [
    ({"posterior": 3}, TypeError, "posterior must be a torch.Tensor, got int"),
    (
        {"posterior": torch.zeros(1, 2, 3, 3, dtype=torch.int64)},
        TypeError,
        "posterior must have one of the dtypes .*got torch.int64",
    ),
    ({"posterior": torch.zeros(2, 4)}, ValueError, r"posterior must have shape \(B, C, H, W\), got \(2, 4\)"),
    (
        {"posterior": torch.zeros(1, 3, 2, 2)},
        ValueError,
        "posterior must have an even number of channels 2Z .*got 3",
    ),
    (
        {"prior": torch.zeros(1, 4, 2, 3)},
        ValueError,
        r"prior must have shape \(1, 4, 2, 2\), got \(1, 4, 2, 3\)",
    ),
    ({"prior": torch.zeros(1, 4, 2, 2, device="meta")}, ValueError, "prior must be on cpu .*got meta"),
    (
        {"noise": torch.zeros(1, 4, 2, 2)},
        ValueError,
        r"noise must have shape \(1, 2, 2, 2\), got \(1, 4, 2, 2\)",
    ),
    ({"noise": torch.zeros(1, 2, 2, 2), "seed": 1}, ValueError, "give either noise or seed, not both"),
    ({"seed": 1.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
    ({"seed": torch.zeros(2, dtype=torch.int64)}, ValueError, r"a seed tensor must be 0-d, got shape \(2,\)"),
    ({"seed": torch.tensor(1.0)}, TypeError, "a seed tensor must be int64, got torch.float32"),
    ({"clamp": 0.0}, ValueError, "clamp must be None or a finite number > 0, got 0.0"),
    ({"clamp": float("nan")}, ValueError, "clamp must be None or a finite number > 0, got nan"),
    ({"residual": "yes"}, TypeError, "residual must be True or False, got 'yes'"),
    ({"residual": None}, TypeError, "residual must be True or False, got None"),
    ({"sigma_floor": -0.01}, ValueError, "sigma_floor must be a finite number >= 0, got -0.01"),
]
SMALL = inputs((2, 2, 2, 1))

DESCRIPTIONS = [
    Description(
        "residual_normal",
        op,
        formula,
        samples=[
            sample(f"{size} residual={residual}", inputs(size), residual=residual)
            for size in SIZES
            for residual in (True, False)
        ],
        small=[
            sample("seed", without(inputs((2, 1, 2, 2)), "noise"), seed=5),
            sample("noise", SMALL),
            sample("no prior", without(SMALL, "prior")),
            sample("no prior, seed", without(SMALL, "prior", "noise"), seed=3),
        ],
        layouts=[
            sample("noise", inputs((3, 2, 5, 3))),
            sample("seed", without(inputs((3, 2, 5, 3)), "noise"), seed=7),
        ],
        differentiable=NAMES,
        results=(INPUT, torch.float32, torch.float32, torch.float32),
        factor=2.5,
        errors=ERRORS,
        good={"posterior": torch.zeros(1, 4, 2, 2)},
        # Raw mu and raw log sigma of one of three latents.
        poison={"posterior": (1, slice(0, None, 3), 1, 0)},
        bad_values=(float("nan"), float("inf"), -float("inf")),
        single=(lambda x: sum(t.sum() for t in nf.residual_normal(x, 0.5 * x, seed=3)), (4, 3, 5)),
        drawn=lambda packed, seed: nf.residual_normal(packed, packed.flip(1), seed=seed).z,
        given=lambda packed, noise: nf.residual_normal(packed, packed.flip(1), noise=noise).z,
        compiler="inductor",
    ),
]
