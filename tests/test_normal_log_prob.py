"""normal_log_prob: a density, and the one that residual_normal reports."""

from __future__ import annotations

import pytest
import torch
from descriptions.normal_log_prob import formula, inputs, op
from harness import (
    assert_close,
)
from torch.distributions import Normal

import nvae_fast as nf


def test_standard_prior_without_params(route: str) -> None:
    z = inputs()["z"]
    assert_close(op(z), formula(z, torch.zeros(2, 6, 4, 5, dtype=torch.float64)), 1e-14)
    assert_close(op(z, sigma_floor=0.0), Normal(0.0, 1.0).log_prob(z).sum((2, 3)), 1e-7)


def test_it_is_the_density_residual_normal_reports(route: str) -> None:
    tensors = inputs()
    out = nf.residual_normal(torch.zeros_like(tensors["params"]), tensors["params"], seed=5)
    assert_close(op(out.z, tensors["params"]), out.log_p, 1e-13)


def test_density_integrates_to_one(route: str) -> None:
    """A Riemann sum over a fine grid of z, for one sigma near the floor and one above."""
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)[:, None, None, None]
    for raw_log_sigma in (-1e4, -1.0):
        params = torch.tensor([0.7, raw_log_sigma], dtype=torch.float64)[None, :, None, None].expand(
            len(grid), 2, 1, 1
        )
        assert abs(float(op(grid, params).exp().sum()) * 1e-4 - 1) < 1e-6


def test_without_clamp(route: str) -> None:
    tensors = inputs()
    mu, log_sigma = tensors["params"].chunk(2, dim=1)
    expected = Normal(mu, log_sigma.exp() + 0.5).log_prob(tensors["z"]).sum((2, 3))
    assert_close(op(**tensors, clamp=None, sigma_floor=0.5), expected, 1e-13)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_z_and_params_of_different_dtypes(dtypes: tuple, memory_format: torch.memory_format) -> None:
    """As if both were float32. A gradient has the dtype of its argument and is rounded once."""
    z, params = (
        torch.randn(3, channels, 5, 7).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        for channels, dtype in zip((4, 8), dtypes, strict=True)
    )
    found, expected = nf.normal_log_prob(z, params), nf.normal_log_prob(z.float(), params.float())
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found.sum(), (z, params))
    wanted = torch.autograd.grad(expected.sum(), (z, params))
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    assert [g.dtype for g in gradients] == list(dtypes)
    for needs in ((True, False), (False, True), (False, False)):
        args = (torch.ones(3, 4), z.detach(), params.detach(), 5.0, 0.01, *needs)
        torch.library.opcheck(torch.ops.nvae_fast.normal_log_prob_backward.default, args)
        assert [g.dtype for g in torch.ops.nvae_fast.normal_log_prob_backward(*args)] == list(dtypes)
