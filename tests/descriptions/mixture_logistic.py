"""Mixture of discretised logistics: log-probability, samples and mean."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from harness import Tensors

import nvae_fast as nf
from descriptions import INPUT, Description, sample

M = 3
SIZES = [(2, 4, 5), (1, 7, 1), (3, 1, 1), (1, 11, 13)]


def inputs(size: tuple[int, int, int] = (2, 4, 5), bits: int = 8, log_scale: float = -2.5) -> Tensors:
    """Means near the pixels, scales around ``exp(log_scale)``, pixels on the grid with some at both ends."""
    b, h, w = size
    generator = torch.Generator().manual_seed(8)
    params = torch.randn((b, 10 * M, h, w), generator=generator, dtype=torch.float64)
    params[:, M:].view(b, 3, 3, M, h, w)[:, :, 1] += log_scale
    params[:, M:].view(b, 3, 3, M, h, w)[:, :, 0] *= 0.5
    x = torch.randint(0, 2**bits, (b, 3, h, w), generator=generator).double() / (2**bits - 1)
    if x.numel() > 12:
        x.view(-1)[:12:2], x.view(-1)[1:12:2] = 0.0, 1.0
    return {"params": params, "x": x}


def parts(params: torch.Tensor, m: int = M) -> tuple[torch.Tensor, ...]:
    b, _, h, w = params.shape
    means, log_scales, coefficients = params[:, m:].reshape(b, 3, 3, m, h, w).unbind(2)
    return params[:, :m], means, log_scales.clamp(min=-7.0), torch.tanh(coefficients)


def formula(params: torch.Tensor, x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Specification section 6 to the letter, one component after the other."""
    logits, means, log_scales, c = parts(params)
    levels = 2**bits - 1
    r, g, b = (2 * x - 1).detach().unbind(1)
    joint = []
    for m in range(M):
        shift = (0 * r, c[:, 0, m] * r, c[:, 1, m] * r + c[:, 2, m] * g)
        total = F.log_softmax(logits, dim=1)[:, m]
        for colour, value in enumerate((r, g, b)):
            centred = value - means[:, colour, m] - shift[colour]
            log_scale = log_scales[:, colour, m]
            upper = torch.exp(-log_scale) * (centred + 1 / levels)
            lower = torch.exp(-log_scale) * (centred - 1 / levels)
            middle = torch.exp(-log_scale) * centred
            difference = torch.sigmoid(upper) - torch.sigmoid(lower)
            density = middle - log_scale - 2 * F.softplus(middle) - math.log(levels / 2)
            inner = torch.where(difference > 1e-5, torch.log(difference.clamp(min=1e-10)), density)
            inner = torch.where(value > 0.99, -F.softplus(lower), inner)
            total = total + torch.where(value < -0.999, upper - F.softplus(upper), inner)
        joint.append(total)
    return torch.logsumexp(torch.stack(joint), dim=0)


def log_prob(params: Any, x: Any, bits: int = 8) -> torch.Tensor:
    return nf.mixture_logistic_log_prob(params, x, num_mixtures=M, num_bits=bits)


def mean_formula(params: torch.Tensor) -> torch.Tensor:
    logits, means, _, c = parts(params)
    weights = torch.softmax(logits, dim=1)[:, None]
    means, c = (means * weights).sum(2), (c * weights).sum(2)
    r = means[:, 0].clamp(-1, 1)
    g = (means[:, 1] + c[:, 0] * r).clamp(-1, 1)
    b = (means[:, 2] + c[:, 1] * r + c[:, 2] * g).clamp(-1, 1)
    return (torch.stack((r, g, b), dim=1) + 1) / 2


def mean(params: Any) -> torch.Tensor:
    return nf.mixture_logistic_mean(params, num_mixtures=M)


def drawn(params: Any, seed: Any = 42) -> torch.Tensor:
    return nf.mixture_logistic_sample(params, num_mixtures=M, temperature=0.8, seed=seed)


def drawn_formula(params: torch.Tensor, seed: Any = 42) -> torch.Tensor:
    with nf.use_backend("reference"):
        return drawn(params, seed)


def only_params(size: tuple[int, int, int], scale: float = 1.0, log_scale: float = -2.5) -> Tensors:
    return {"params": scale * inputs(size, log_scale=log_scale)["params"]}


P, X = torch.zeros(2, 30, 4, 4), torch.zeros(2, 3, 4, 4)
OF_30 = r"params must have 10 \* num_mixtures = 30 .*got shape "
ERRORS = [
    ({"params": 0}, TypeError, "params must be a torch.Tensor, got int"),
    ({"params": P[:, :29]}, ValueError, OF_30 + r"\(2, 29, 4, 4\)"),
    ({"params": P[0]}, ValueError, r"params must have shape \(B, C, H, W\), got \(30, 4, 4\)"),
    ({"x": X[:1]}, ValueError, r"x must have shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    ({"x": X.byte()}, TypeError, "x must have one of the dtypes .*got torch.uint8"),
    ({"x": X.to("meta")}, ValueError, "x must be on cpu .*got meta"),
    ({"num_mixtures": 0}, ValueError, "num_mixtures must be >= 1, got 0"),
    ({"num_bits": 0}, ValueError, "num_bits must be between 1 and 16, got 0"),
    ({"num_bits": 8.0}, TypeError, "num_bits must be an int, got 8.0"),
    ({"num_mixtures": "3"}, TypeError, "num_mixtures must be an int, got '3'"),
    ({"num_bits": 17}, ValueError, "num_bits must be between 1 and 16, got 17"),
]
SAMPLE_ERRORS = [
    ({"num_mixtures": None}, TypeError, "num_mixtures must be an int, got None"),
    ({"params": P[:, :20]}, ValueError, OF_30 + r"\(2, 20, 4, 4\)"),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    ({"seed": 0.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
]
MEAN_ERRORS = [
    ({"num_mixtures": 3.0}, TypeError, "num_mixtures must be an int, got 3.0"),
    ({"params": P.long()}, TypeError, "params must have one of the dtypes .*got torch.int64"),
    (
        {"num_mixtures": 2},
        ValueError,
        r"params must have 10 \* num_mixtures = 20 .*got shape \(2, 30, 4, 4\)",
    ),
]
PIXELS = torch.full((1, 3, 2, 2), 0.2, dtype=torch.float64)

DESCRIPTIONS = [
    Description(
        "mixture_logistic_log_prob",
        log_prob,
        formula,
        samples=[
            sample(f"{size} {bits} bits", inputs(size, bits), bits=bits) for size in SIZES for bits in (8, 5)
        ],
        small=[sample("pixels", inputs((2, 2, 1), log_scale=-0.5))],
        layouts=[sample("8 bits", inputs((3, 5, 2)))],
        differentiable=("params",),
        results=(torch.float32,),
        float64=(1e-10, 1e-9),  # the difference of sigmoids in the formula cancels to 1e-5
        errors=ERRORS,
        good={"params": P, "x": X, "num_mixtures": 3},
        call=lambda params, x, **options: nf.mixture_logistic_log_prob(params, x, **options),
        poison={"params": (1, slice(None), 2, 3), "x": (1, slice(None), 2, 3)},
        bad_values=(float("nan"),),
        single=(
            lambda x: nf.mixture_logistic_log_prob(x, PIXELS.expand(len(x), 3, 2, 2), num_mixtures=1),
            (10, 2, 2),
        ),
    ),
    Description(
        "mixture_logistic_mean",
        mean,
        mean_formula,
        samples=[sample(size, only_params(size)) for size in SIZES],
        small=[sample("pixels", only_params((2, 2, 1), 0.3, -0.5))],
        layouts=[sample("pixels", only_params((3, 5, 2)))],
        differentiable=("params",),
        results=(INPUT,),
        keeps_format=False,
        factor=2.5,
        errors=MEAN_ERRORS,
        good={"params": P, "num_mixtures": 3},
        call=nf.mixture_logistic_mean,
        poison={"params": (1, slice(None), 2, 3)},
        bad_values=(float("nan"),),
        single=(lambda x: nf.mixture_logistic_mean(x, num_mixtures=1), (10, 2, 2)),
    ),
    Description(
        "mixture_logistic_sample",
        drawn,
        drawn_formula,
        samples=[sample(size, only_params(size)) for size in SIZES],
        small=[sample("pixels", only_params((2, 1, 2)))],
        layouts=[sample("pixels", only_params((3, 5, 7)))],
        differentiable=(),
        results=(INPUT,),
        keeps_format=False,
        errors=SAMPLE_ERRORS,
        good={"params": P, "num_mixtures": 3},
        call=nf.mixture_logistic_sample,
        poison={"params": (1, slice(None), 2, 3)},
        bad_values=(float("nan"),),
        drawn=drawn,
    ),
]
