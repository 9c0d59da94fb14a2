"""Weight normalisation of one convolution. Bytes, in units of the weight: forward reads and writes it (2);
backward reads weight and gradient and writes the gradient (3)."""

from __future__ import annotations

import torch

import nvae_fast as nf
from benchmarks.case import Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset


def _inputs(shape: Shape, random) -> Inputs:
    c_out, c_in, k = shape
    return {
        "weight": random(c_out, c_in, k, k) / (c_in * k * k) ** 0.5,
        "log_weight_norm": 0.3 * random(c_out, 1, 1, 1),
    }


def _run(i: Inputs) -> torch.Tensor:
    return nf.weight_norm(i["weight"], i["log_weight_norm"])


def _library(i: Inputs) -> torch.Tensor:
    return torch._weight_norm(i["weight"], torch.exp(i["log_weight_norm"]), 0)


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    c_out, c_in, k = shape
    unit = c_out * c_in * k * k * itemsize
    return {"forward": Work(2 * unit), "backward": Work(3 * unit)}


CASES = (
    Case(
        name="weight_norm",
        op="weight_norm",
        summary="weight normalisation of one convolution",
        axes=("Out", "In", "K"),
        shapes={
            "cpu": ((128, 128, 3), (256, 256, 3), (40, 128, 3)),
            "cuda": per_preset(lambda p: (p.width, p.width, 3)),
            "quick": ((64, 64, 3),),
            "tiny": ((4, 3, 3),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("weight", "log_weight_norm"),
        memory_formats=("contiguous",),
        library=Library("torch._weight_norm", _library, tolerance=2e-4, note="adds no epsilon to the norm"),
    ),
)
