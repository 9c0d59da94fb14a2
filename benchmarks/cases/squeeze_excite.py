"""Squeeze-and-excitation with the residual sum that ends a cell. Bytes, in units of x: forward reads x to
pool it, then x and the skip, and writes y (4); backward reads x and dy for the gate's gradient, then dy, and
writes dx (4; the skip's gradient is dy itself)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nvae_fast as nf
from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset

SCALE = 0.1
PARAMETERS = ("reduce_weight", "reduce_bias", "expand_weight", "expand_bias")


def _inputs(shape: Shape, random) -> Inputs:
    b, c, h = shape
    hidden = max(c // 16, 4)
    return {
        "x": 0.5 + random(b, c, h, h),
        "skip": random(b, c, h, h),
        "reduce_weight": random(hidden, c) / c**0.5,
        "reduce_bias": 0.1 * random(hidden),
        "expand_weight": random(c, hidden) / hidden**0.5,
        "expand_bias": 0.1 * random(c),
    }


def _run(i: Inputs) -> torch.Tensor:
    return nf.squeeze_excite(i["x"], *(i[name] for name in PARAMETERS), skip=i["skip"], residual_scale=SCALE)


def _library(i: Inputs) -> torch.Tensor:
    x = i["x"]
    pooled = F.adaptive_avg_pool2d(x, 1).flatten(1).float()
    hidden = F.relu(F.linear(pooled, i["reduce_weight"], i["reduce_bias"]))
    gate = torch.sigmoid(F.linear(hidden, i["expand_weight"], i["expand_bias"])).to(x.dtype)[:, :, None, None]
    return torch.addcmul(i["skip"], x, gate, value=SCALE)


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, c, h = shape
    unit = b * c * h * h * itemsize
    return {"forward": Work(4 * unit), "backward": Work(4 * unit)}


CASES = (
    Case(
        name="squeeze_excite",
        op="squeeze_excite",
        summary="squeeze-and-excitation and the residual sum of a cell",
        axes=("B", "C", "H"),
        shapes={
            "cpu": ((32, 128, 16), (200, 128, 8), (4, 60, 128)),
            "cuda": per_preset(lambda p: (p.batch, p.width, p.side)),
            "quick": ((8, 64, 16),),
            "tiny": ((2, 16, 4),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("x", "skip", *PARAMETERS),
        keep=PARAMETERS,
        dtypes=NETWORK_DTYPES,
        library=Library("adaptive_avg_pool2d, linear, addcmul", _library),
    ),
)
