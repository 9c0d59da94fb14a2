"""Mean and spread of channels. Bytes, in units of x: forward reads x (1); backward reads x and writes dx (2)."""

from __future__ import annotations

import torch

from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset
from nvae_fast.ops.channel_statistics import channel_statistics


def _inputs(shape: Shape, random) -> Inputs:
    b, c, h = shape
    return {"x": 0.5 + random(b, c, h, h)}


def _run(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    mean, m2, _ = channel_statistics(i["x"])
    return mean, m2


def _library(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    wide = i["x"].float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return mean, var * (wide.numel() // wide.shape[1])


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, c, h = shape
    unit = b * c * h * h * itemsize
    return {"forward": Work(unit), "backward": Work(2 * unit)}


CASES = (
    Case(
        name="channel_statistics",
        op="channel_statistics",
        summary="mean and spread of the channels of a map",
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
        differentiable=("x",),
        dtypes=NETWORK_DTYPES,
        library=Library("var_mean", _library),
    ),
)
