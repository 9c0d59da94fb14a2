"""Mixture of discretised logistics, M = 10: log-probability, sample, mean. No library has it. Bytes a pixel,
M = 10: the log-probability reads 100 parameters and 3 colours and writes 1 number; its backward reads them
and the upstream gradient (104) and writes 100; sample and mean read 100 and write 3."""

from __future__ import annotations

import torch

import nvae_fast as nf
from benchmarks.case import Case, Inputs, Shape, Work
from benchmarks.sizes import per_preset

MIXTURES = 10
LEVELS = 255
SHAPES = {
    "cpu": ((32, 32), (8, 64), (1, 256)),
    "cuda": per_preset(lambda p: (p.batch, p.image), where=lambda p: p.mixture),
    "quick": ((4, 32),),
    "tiny": ((2, 4),),
}


def _params(shape: Shape, random) -> torch.Tensor:
    b, h = shape
    params = random(b, 10 * MIXTURES, h, h)
    means, log_scales, _ = params[:, MIXTURES:].view(b, 3, 3 * MIXTURES, h, h).split(MIXTURES, dim=2)
    means *= 0.5  # means in range and scales as of a model that has learnt something
    log_scales -= 2.0
    return params


def _inputs(shape: Shape, random) -> Inputs:
    b, h = shape
    image = torch.round((0.25 * random(b, 3, h, h) + 0.5).clamp(0, 1) * LEVELS) / LEVELS
    return {"params": _params(shape, random), "x": image}


def _sample_inputs(shape: Shape, random) -> Inputs:
    return {"params": _params(shape, random), "seed": 23}


def _run(i: Inputs) -> torch.Tensor:
    return nf.mixture_logistic_log_prob(i["params"], i["x"], num_mixtures=MIXTURES)


def _sample(i: Inputs) -> torch.Tensor:
    return nf.mixture_logistic_sample(i["params"], num_mixtures=MIXTURES, seed=i["seed"])


def _mean(i: Inputs) -> torch.Tensor:
    return nf.mixture_logistic_mean(i["params"], num_mixtures=MIXTURES)


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    pixel = shape[0] * shape[1] ** 2 * itemsize
    return {"forward": Work(104 * pixel), "backward": Work(204 * pixel)}


def _one_way(shape: Shape, itemsize: int) -> dict[str, Work]:
    return {"forward": Work(103 * shape[0] * shape[1] ** 2 * itemsize)}


CASES = (
    Case(
        name="mixture_logistic_log_prob",
        op="mixture_logistic_log_prob",
        summary="log-probability of RGB pixels and its gradient",
        axes=("B", "H"),
        shapes=SHAPES,
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("params",),
        keep=("x",),
        tolerances={
            torch.float32: 1e-3
        },  # near-cancelling sigmoids: the specification's bound for the gradient
    ),
    Case(
        name="mixture_logistic_sample",
        op="mixture_logistic_sample",
        summary="sample RGB pixels",
        axes=("B", "H"),
        shapes=SHAPES,
        inputs=_sample_inputs,
        run=_sample,
        work=_one_way,
        tolerances={torch.float32: 1e-4},
        outliers=2e-4,
        # Measured: over 100 s for one shape and memory format, then still not done.
        uncompiled="the compiler inlines the integer arithmetic of the Philox reference and takes minutes",
    ),
    Case(
        name="mixture_logistic_mean",
        op="mixture_logistic_mean",
        summary="mean image of the mixture",
        axes=("B", "H"),
        shapes=SHAPES,
        inputs=lambda shape, random: {"params": _params(shape, random)},
        run=_mean,
        work=_one_way,
    ),
)
