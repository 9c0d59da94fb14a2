"""Residual normal of one latent group. Bytes, in units of one (B, Z, H, W) tensor: forward reads posterior
and prior (2 + 2) and writes z (1); backward reads both again and dz (5) and writes both gradients (4)."""

from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

import nvae_fast as nf
from benchmarks.case import NETWORK_DTYPES, Case, Inputs, Library, Shape, Work, randn_like
from benchmarks.sizes import per_preset


def _inputs(shape: Shape, random) -> Inputs:
    b, z, h = shape
    return {"posterior": random(b, 2 * z, h, h), "prior": random(b, 2 * z, h, h), "seed": 21, "noise": None}


def _run(i: Inputs):
    seed = i["seed"] if i["noise"] is None else None
    return tuple(nf.residual_normal(i["posterior"], i["prior"], noise=i["noise"], seed=seed))


def _normal(packed: torch.Tensor) -> Normal:
    raw_mu, raw_log_sigma = packed.chunk(2, dim=1)
    sigma = torch.exp(5.0 * torch.tanh(raw_log_sigma / 5.0)) + 0.01
    return Normal(5.0 * torch.tanh(raw_mu / 5.0), sigma, validate_args=False)


def _library(i: Inputs):
    posterior, prior = i["posterior"].float(), i["prior"].float()
    q, p = _normal(posterior + prior), _normal(prior)
    z = q.loc + q.scale * (randn_like(q.scale) if i["noise"] is None else i["noise"])
    return (
        z.to(i["posterior"].dtype),
        kl_divergence(q, p).sum((2, 3)),
        q.log_prob(z).sum((2, 3)),
        p.log_prob(z).sum((2, 3)),
    )


def _work(shape: Shape, itemsize: int) -> dict[str, Work]:
    b, z, h = shape
    unit = b * z * h * h * itemsize
    return {"forward": Work(5 * unit), "backward": Work(9 * unit)}


CASES = (
    Case(
        name="residual_normal",
        op="residual_normal",
        summary="sample a latent group, its KL and log-densities",
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
        differentiable=("posterior", "prior"),
        dtypes=NETWORK_DTYPES,
        noise=lambda shape: (shape[0], shape[1], shape[2], shape[2]),
        library=Library("torch.distributions", _library),
    ),
)
