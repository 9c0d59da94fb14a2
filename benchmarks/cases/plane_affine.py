"""skip + a x + c with a coefficient a plane, as at the end of a cell. Bytes, in units of x: forward reads x and the skip
and writes the sum (3); backward reads the gradient and x for the sums and the gradient again, and writes dx (4; the skip's
gradient is the sum's)."""

from __future__ import annotations

import torch

from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset
from nvae_fast.ops.plane_affine import plane_affine


def _inputs(shape: Shape, random) -> Inputs:
    b, c, h = shape
    return {
        "x": random(b, c, h, h),
        "skip": random(b, c, h, h),
        "a": 0.1 * random(b, c),
        "c": 0.1 * random(b, c),
    }


def _run(i: Inputs) -> torch.Tensor:
    return plane_affine(i["x"], i["a"], i["skip"], None, i["c"])


def _library(i: Inputs) -> torch.Tensor:
    a, c = (i[name].to(i["x"].dtype)[:, :, None, None] for name in "ac")
    return torch.addcmul(i["skip"] + c, i["x"], a)


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, c, h = shape
    unit = b * c * h * h * itemsize
    return {"forward": Work(3 * unit), "backward": Work(4 * unit)}


CASES = (
    Case(
        name="plane_affine",
        op="plane_affine",
        summary="the sum that ends a cell: skip + a x + c, a coefficient a plane",
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
        differentiable=("x", "skip", "a", "c"),
        keep=("a", "c"),
        dtypes=NETWORK_DTYPES,
        library=Library("add, addcmul", _library),
    ),
)
