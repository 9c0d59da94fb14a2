"""Weight normalisation of all convolutions of a model at once. Bytes, in units of all weights: forward reads and writes
them (2); backward reads weights and gradients and writes the gradients (3). There are LAYERS
layers, a third each C -> C with kernel K, C -> C with kernel 1, C -> 40 with kernel K."""

from __future__ import annotations

from typing import Any

import torch

import nvae_fast as nf
from benchmarks.case import Case, Inputs, Shape, Work
from benchmarks.sizes import per_preset

LAYERS = 150


def _sizes(shape: Shape) -> list[tuple[int, int, int, int]]:
    c, k = shape
    kinds = ((c, c, k, k), (c, c, 1, 1), (40, c, k, k))
    return [kinds[i % 3] for i in range(LAYERS)]


def _inputs(shape: Shape, random: Any) -> Inputs:
    found: Inputs = {}
    for i, size in enumerate(_sizes(shape)):
        found[f"weight {i}"] = random(*size) / (size[1] * size[2] * size[3]) ** 0.5
        found[f"log_weight_norm {i}"] = 0.3 * random(size[0], 1, 1, 1)
    return found


def _run(i: Inputs) -> tuple[torch.Tensor, ...]:
    weights = [i[f"weight {n}"] for n in range(LAYERS)]
    return tuple(nf.weight_norm_many(weights, [i[f"log_weight_norm {n}"] for n in range(LAYERS)]))


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    unit = itemsize * sum(a * b * c * d for a, b, c, d in _sizes(shape))
    return {"forward": Work(2 * unit), "backward": Work(3 * unit)}


CASES = (
    Case(
        name="weight_norm_many",
        op="weight_norm_many",
        summary="weight normalisation of all convolutions of a model in one call",
        axes=("C", "K"),
        shapes={
            "cpu": ((64, 3), (128, 3)),
            "cuda": per_preset(lambda p: (p.width, 3)),
            "quick": ((32, 3),),
            "tiny": ((3, 3),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=tuple(f"{name} {i}" for name in ("weight", "log_weight_norm") for i in range(LAYERS)),
        memory_formats=("contiguous",),
    ),
)
