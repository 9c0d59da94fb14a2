"""Batch norm with batch statistics, and swish. Bytes, in units of x: forward reads x twice (statistics first)
and writes y (3); backward reads x and dy twice (reductions first) and writes dx (5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nvae_fast as nf
from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset


def _inputs(shape: Shape, random) -> Inputs:
    b, c, h = shape
    return {"x": 0.5 + random(b, c, h, h), "weight": 1.0 + 0.3 * random(c), "bias": 0.3 * random(c)}


def _run(i: Inputs) -> torch.Tensor:
    return nf.batch_norm_swish(i["x"], i["weight"], i["bias"]).y


def _library(i: Inputs) -> torch.Tensor:
    return F.silu(F.batch_norm(i["x"], None, None, i["weight"], i["bias"], training=True, eps=1e-5))


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, c, h = shape
    unit = b * c * h * h * itemsize
    return {"forward": Work(3 * unit), "backward": Work(5 * unit)}


CASES = (
    Case(
        name="batch_norm_swish",
        op="batch_norm_swish",
        summary="batch norm with batch statistics, and swish",
        axes=("B", "C", "H"),
        shapes={
            "cpu": ((32, 768, 16), (8, 384, 32), (2, 180, 128)),
            "cuda": per_preset(lambda p: (p.batch, 6 * p.width, p.side)),
            "quick": ((8, 64, 16),),
            "tiny": ((2, 3, 4),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("x", "weight", "bias"),
        keep=("weight", "bias"),
        dtypes=NETWORK_DTYPES,
        library=Library("batch_norm, silu", _library),
    ),
)
