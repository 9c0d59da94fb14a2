"""Depthwise 5x5 with batch norm's affine map and swish on load, as in the inverted residual cell. Bytes, in
units of x: forward reads x and writes y (2); backward reads x and dy and writes dx (3); the weights are
small. Operations: 2 K^2 an output element forward; twice that backward (data and weight gradient)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import nvae_fast as nf
from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset


def _inputs(shape: Shape, random) -> Inputs:
    b, c, h, k = shape
    return {
        "x": random(b, c, h, h),
        "weight": random(c, 1, k, k) / k,
        "scale": 1.0 + 0.3 * random(c),
        "shift": 0.3 * random(c),
    }


def _run(i: Inputs) -> torch.Tensor:
    return nf.depthwise_conv2d(i["x"], i["weight"], scale=i["scale"], shift=i["shift"], activation="swish")


def _library(i: Inputs) -> torch.Tensor:
    x, weight = i["x"], i["weight"]
    column = (slice(None), None, None)
    h = F.silu(torch.addcmul(i["shift"][column], x, i["scale"][column])).to(x.dtype)
    return F.conv2d(h, weight, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, c, h, k = shape
    elements = b * c * h * h
    flops = 2 * k * k * elements
    return {
        "forward": Work(2 * elements * itemsize, flops),
        "backward": Work(3 * elements * itemsize, 2 * flops),
    }


CASES = (
    Case(
        name="depthwise_conv2d",
        op="depthwise_conv2d",
        summary="depthwise 5x5 with normalisation and swish on load",
        axes=("B", "C", "H", "K"),
        shapes={
            "cpu": ((32, 768, 16, 5), (8, 384, 32, 5), (2, 180, 128, 5)),
            "cuda": per_preset(lambda p: (p.batch, 6 * p.width, p.side, 5)),
            "quick": ((4, 96, 16, 5),),
            "tiny": ((2, 3, 6, 5),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("x", "weight", "scale", "shift"),
        keep=("scale", "shift"),
        dtypes=NETWORK_DTYPES,
        cpu_dtypes=NETWORK_DTYPES,
        library=Library("conv2d with groups", _library),
    ),
)
