"""Log-density of a squashed normal (the flow path). Bytes, in units of one (B, Z, H, W) tensor: forward reads
z and the parameters (3); backward reads them again (3) and writes their gradients (3)."""

from __future__ import annotations

import torch
from torch.distributions import Normal

import nvae_fast as nf
from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work
from benchmarks.sizes import per_preset


def _inputs(shape: Shape, random) -> Inputs:
    b, z, h = shape
    return {"z": random(b, z, h, h), "params": random(b, 2 * z, h, h)}


def _run(i: Inputs) -> torch.Tensor:
    return nf.normal_log_prob(i["z"], i["params"])


def _library(i: Inputs) -> torch.Tensor:
    raw_mu, raw_log_sigma = i["params"].float().chunk(2, dim=1)
    sigma = torch.exp(5.0 * torch.tanh(raw_log_sigma / 5.0)) + 0.01
    normal = Normal(5.0 * torch.tanh(raw_mu / 5.0), sigma, validate_args=False)
    return normal.log_prob(i["z"].float()).sum((2, 3))


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, z, h = shape
    unit = b * z * h * h * itemsize
    return {"forward": Work(3 * unit), "backward": Work(6 * unit)}


CASES = (
    Case(
        name="normal_log_prob",
        op="normal_log_prob",
        summary="log-density of a latent group under its prior (flow path)",
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
        differentiable=("z", "params"),
        dtypes=NETWORK_DTYPES,
        library=Library("torch.distributions", _library),
    ),
)
