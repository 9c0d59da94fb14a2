"""Philox normals against ``torch.randn``. Bytes: the output is written, nothing is read."""

from __future__ import annotations

import torch

import nvae_fast as nf
from benchmarks.case import Case, Inputs, Library, Shape, Work, randn_like
from benchmarks.sizes import per_preset

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def _inputs(shape: Shape, random) -> Inputs:
    b, z, h = shape
    return {"like": random(b, z, h, h), "seed": 20}


def _format(like: torch.Tensor) -> torch.memory_format:
    return torch.contiguous_format if like.is_contiguous() else torch.channels_last


def _run(i: Inputs) -> torch.Tensor:
    like = i["like"]
    return nf.philox_normal(
        like.shape, i["seed"], dtype=like.dtype, device=like.device, memory_format=_format(like)
    )


def _randn(i: Inputs) -> torch.Tensor:
    return randn_like(i["like"])


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, z, h = shape
    return {"forward": Work(b * z * h * h * itemsize)}


CASES = (
    Case(
        name="philox",
        op="philox",
        summary="standard normal draws from the counter-based generator",
        axes=("B", "Z", "H"),
        shapes={
            "cpu": ((32, 20, 16), (200, 20, 8), (4, 20, 128)),
            "cuda": per_preset(lambda p: (p.batch, p.latent, p.side)),
            "quick": ((8, 20, 16),),
            "tiny": ((4, 6, 12),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        uncompiled="the compiler inlines the integer arithmetic of the reference and takes minutes",
        library=Library("torch.randn", _randn, moments=True, note="another generator: other numbers"),
    ),
)
