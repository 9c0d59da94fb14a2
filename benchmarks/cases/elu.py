"""Exponential linear unit. Bytes, in units of x: forward reads x and writes y (2); backward reads x, dy and writes dx (3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset
from nvae_fast.ops.elu import elu


def _inputs(shape: Shape, random) -> Inputs:
    b, c, h = shape
    return {"x": random(b, c, h, h)}


def _run(i: Inputs) -> torch.Tensor:
    return elu(i["x"])


def _library(i: Inputs) -> torch.Tensor:
    return F.elu(i["x"])


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, c, h = shape
    unit = b * c * h * h * itemsize
    return {"forward": Work(2 * unit), "backward": Work(3 * unit)}


CASES = (
    Case(
        name="elu",
        op="elu",
        summary="exponential linear unit",
        axes=("B", "C", "H"),
        shapes={
            "cpu": ((32, 128, 16), (200, 128, 8), (4, 60, 128)),
            "cuda": per_preset(lambda p: (p.batch, p.width, p.side)),
            "quick": ((8, 64, 16),),
            "tiny": ((2, 3, 4),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("x",),
        dtypes=NETWORK_DTYPES,
        library=Library("F.elu", _library),
    ),
)
