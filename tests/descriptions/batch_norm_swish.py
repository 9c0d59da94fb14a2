"""batch_norm_swish: batch normalisation and an activation, with the batch's statistics or given ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import Tensors

import nvae_fast as nf
from descriptions import INPUT, Description, sample

BATCH = ("x", "weight", "bias")
GIVEN = (*BATCH, "mean", "var")
ACTIVATIONS = ["swish", "elu", None]
SIZES = [(4, 6, 5, 7), (1, 1, 13, 1), (3, 17, 8, 8)]
TWO = (2, 3, 1, 1)


def inputs(
    size: tuple[int, int, int, int] = (4, 6, 5, 7), given: bool = False, offset: float = 0.5
) -> Tensors:
    """Half of the gammas are negative."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    c = size[1]
    weight = normal(c).abs() + 0.5
    weight[::2] *= -1
    tensors = {"x": 1.5 * normal(*size) + offset, "weight": weight, "bias": normal(c)}
    if size == TWO:
        tensors["x"][0] += 1.0  # keep the two values apart
    return {**tensors, "mean": normal(c), "var": normal(c).square() + 0.1} if given else tensors


def activated(t: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation == "swish":
        return t * torch.sigmoid(t)
    return torch.where(t > 0, t, torch.expm1(t.clamp_max(0))) if activation == "elu" else t


def formula(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: Any = None,
    var: Any = None,
    activation: str | None = "swish",
    eps: float = 1e-5,
) -> tuple[torch.Tensor, ...]:
    """y, and the statistics where they are the batch's."""
    used: tuple[torch.Tensor, ...] = ()
    if mean is None:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        used = (mean.detach(), var.detach())
    normalized = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + eps)
    return activated(weight[:, None, None] * normalized + bias[:, None, None], activation), *used


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: Any = None,
    var: Any = None,
    activation: str | None = "swish",
) -> Any:
    """What one would write: F.batch_norm, then the activation."""
    if mean is not None:
        return formula(x, weight, bias, mean, var, activation)
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    y = {"swish": F.silu, "elu": F.elu, None: torch.clone}[activation](y)
    return y, wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)


def op(
    x: Any, weight: Any, bias: Any, mean: Any = None, var: Any = None, **options: Any
) -> tuple[torch.Tensor, ...]:
    found = nf.batch_norm_swish(x, weight, bias, mean, var, **options)
    return found if mean is None else found[:1]


X, C = torch.randn(2, 3, 4, 4), torch.ones(3)
ERRORS = [
    ({"x": "x"}, TypeError, "x must be a torch.Tensor, got str"),
    ({"x": X[0]}, ValueError, r"x must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\), got \(4,\)"),
    ({"bias": torch.ones(3, 1)}, ValueError, r"bias must have shape \(3,\), got \(3, 1\)"),
    ({"bias": torch.ones(3, device="meta")}, ValueError, "bias must be on cpu .*got meta"),
    ({"mean": C}, ValueError, "mean and var must be given together, got only mean"),
    ({"var": C}, ValueError, "mean and var must be given together, got only var"),
    ({"mean": C, "var": C[:2]}, ValueError, r"var must have shape \(3,\), got \(2,\)"),
    ({"x": X[:1, :, :1, :1]}, ValueError, r"expected more than one value per channel .*got x \(1, 3, 1, 1\)"),
    ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
    ({"eps": None}, ValueError, "eps must be > 0, got None"),
    ({"eps": float("nan")}, ValueError, "eps must be > 0, got nan"),
    ({"activation": "gelu"}, ValueError, r"activation must be one of \[None, 'swish', 'elu'\], got 'gelu'"),
]
SMALL = (3, 2, 2, 2)

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    PARAMETERS = [f(4, dtype=torch.float64) for f in (torch.randn, torch.rand, torch.randn, torch.rand)]
    PARAMETERS[1] += 0.5
    PARAMETERS[3] += 0.5

DESCRIPTIONS = [
    Description(
        "batch_norm_swish",
        op,
        formula,
        samples=[
            *(sample(f"{s} {a}", inputs(s), activation=a) for s in SIZES for a in ACTIVATIONS),
            # Two values a channel: whatever they are, the results are 1 and -1, and the gradient cancels to eps: to 7e-6,
            # of terms near 1, so that float32 loses 1.2e-7 / 7e-6 of it.
            *(
                replace(sample(f"{TWO} {a}", inputs(TWO), activation=a), cancels=1e3, rounding=0.017)
                for a in ACTIVATIONS
            ),
            # As constants, in evaluation, and as functions of something, merged over processes.
            *(
                sample(f"given, {a}, {len(names)} gradients", inputs(given=True), names, activation=a)
                for a in ACTIVATIONS
                for names in (BATCH, GIVEN)
            ),
        ],
        small=[
            sample(f"given={given} {a}", inputs(SMALL, given), activation=a)
            for a in ACTIVATIONS
            for given in (False, True)
        ],
        layouts=[sample(f"given={given}", inputs(given=given)) for given in (False, True)],
        differentiable=GIVEN,
        batched=("x",),
        results=(INPUT, torch.float32, torch.float32),
        eager=eager,
        factor=2.5,
        vector_floor=2,
        float64=(1e-13, 1e-12),
        errors=ERRORS,
        good={"x": X, "weight": C, "bias": C},
        poison={"x": (0, 2, 1, 1)},  # into the whole channel, through its statistics
        single=(lambda x: nf.batch_norm_swish(x, *PARAMETERS).y, (4, 3, 5)),
    ),
]
