"""The whole inverted residual cell in training: expansion 6, depthwise 5x5, squeeze-and-excitation, skip. Bytes, in units
of x, E the expansion, on the 4E + 6 schedule: forward writes and reads the expansion and the depthwise output (4 E), reads
x for statistics and product, and skip, and writes and reads the projection, and y (6); backward reads both expanded maps
and the gradient between them twice and writes two (8 E), and as much again of narrow maps. The 1x1 products and the
depthwise convolution count as operations."""

from __future__ import annotations

from functools import cache

import torch
from torch.func import functional_call

import nvae_fast as nf
from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Shape, Work
from benchmarks.sizes import per_preset

EXPANSION, KERNEL = 6, 5
ZERO = "ops.0.norm.bias"  # batch norm follows: its gradient is zero but for rounding


@cache
def _cell(channels: int) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nf.nn.InvertedResidualCell(channels, channels, EXPANSION, KERNEL, squeeze_excite=True).train()


_NAMES = tuple(name for name, _ in _cell(2).named_parameters())


def _inputs(shape: Shape, random) -> Inputs:
    b, c, h = shape
    cell = _cell(c)
    found: Inputs = {"x": random(b, c, h, h), "cell": cell}
    for name, value in cell.named_parameters():
        spread = 0.1 * random(*value.shape) if value.dim() == 1 else 0.0
        found[name] = value.detach() + spread
    return found


def _run(i: Inputs) -> torch.Tensor:
    cell = i["cell"].to(i["x"].device)
    return functional_call(cell, {name: i[name] for name in _NAMES}, (i["x"],))


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, c, h = shape
    pixels = b * h * h
    unit = pixels * c * itemsize
    flops = 2 * pixels * EXPANSION * c * (2 * c + KERNEL**2)
    return {
        "forward": Work((4 * EXPANSION + 6) * unit, flops),
        "backward": Work((8 * EXPANSION + 12) * unit, 2 * flops),
    }


CASES = (
    Case(
        name="inverted_residual_cell",
        op="inverted_residual_cell",
        summary="the whole inverted residual cell, training",
        axes=("B", "C", "H"),
        shapes={
            "cpu": ((32, 128, 16), (8, 64, 32), (2, 30, 128)),
            "cuda": per_preset(lambda p: (p.batch, p.width, p.side)),
            "quick": ((4, 16, 16),),
            "tiny": ((2, 3, 6),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("x", *(name for name in _NAMES if name != ZERO)),
        dtypes=NETWORK_DTYPES,
        # Nine operations one after the other: PyTorch's own composition loses 2.1e-5, and 0.03 in bfloat16.
        tolerances={torch.float32: 5e-5, torch.bfloat16: 6e-2},
    ),
)
