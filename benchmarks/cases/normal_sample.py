"""Sampling a prior with a temperature. Bytes, in units of one (B, Z, H, W) tensor: forward reads the
parameters (2) and writes z (1); backward reads parameters and dz (3) and writes the gradient (2)."""

from __future__ import annotations

import torch

import nvae_fast as nf
from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work, randn_like
from benchmarks.sizes import per_preset

TEMPERATURE = 0.7


def _inputs(shape: Shape, random) -> Inputs:
    b, z, h = shape
    return {"params": random(b, 2 * z, h, h), "seed": 22, "noise": None}


def _run(i: Inputs) -> torch.Tensor:
    seed = i["seed"] if i["noise"] is None else None
    return nf.normal_sample(i["params"], temperature=TEMPERATURE, noise=i["noise"], seed=seed)


def _library(i: Inputs) -> torch.Tensor:
    raw_mu, raw_log_sigma = i["params"].float().chunk(2, dim=1)
    sigma = torch.exp(5.0 * torch.tanh(raw_log_sigma / 5.0)) + 0.01
    noise = randn_like(sigma) if i["noise"] is None else i["noise"]
    return torch.addcmul(5.0 * torch.tanh(raw_mu / 5.0), sigma, noise, value=TEMPERATURE).to(
        i["params"].dtype
    )


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, z, h = shape
    unit = b * z * h * h * itemsize
    return {"forward": Work(3 * unit), "backward": Work(5 * unit)}


CASES = (
    Case(
        name="normal_sample",
        op="normal_sample",
        summary="sample a prior at a temperature (generation)",
        axes=("B", "Z", "H"),
        shapes={
            "cpu": ((32, 20, 16), (200, 20, 8), (4, 20, 128)),
            "cuda": per_preset(lambda p: (p.batch, p.latent, p.side)),
            "quick": ((8, 20, 16),),
            "tiny": ((2, 3, 4),),
        },
        inputs=_inputs,
        run=_run,
        work=_work,
        differentiable=("params",),
        dtypes=NETWORK_DTYPES,
        noise=lambda shape: (shape[0], shape[1], shape[2], shape[2]),
        library=Library("torch.randn and pointwise ops", _library),
    ),
)
