"""batch_norm_swish: given and batch statistics, means far from zero, small and large variances."""

from __future__ import annotations

import pytest
import torch
from descriptions.batch_norm_swish import formula, inputs, op
from harness import (
    assert_close,
    place,
)

import nvae_fast as nf


def test_given_statistics_of_the_batch_give_the_same(route: str) -> None:
    """Gradients too: through the given mean and variance they add up to those of batch normalisation."""
    tensors = inputs()
    leaves = [t.requires_grad_() for t in tensors.values()]
    mean = tensors["x"].mean((0, 2, 3))
    var = tensors["x"].var((0, 2, 3), correction=0)
    upstream = torch.randn(4, 6, 5, 7, dtype=torch.float64)
    results = [
        torch.autograd.grad(nf.batch_norm_swish(*leaves, *statistics).y, leaves, upstream, retain_graph=True)
        for statistics in ((), (mean, var))
    ]
    for a, e in zip(*results, strict=True):
        assert_close(a, e, 1e-11)


@pytest.mark.parametrize("offset", [0.0, 150.0])
def test_mean_far_from_zero(
    offset: float, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    """|mean| / std = 100 in fp32: as near as the input's own rounding lets it be."""
    tensors = place(inputs((4, 5, 16, 16), offset=offset), torch.float32, memory_format, device)
    out = nf.batch_norm_swish(**tensors)
    y, mean, var = formula(**{name: t.double() for name, t in tensors.items()})
    assert_close(out.mean, mean, 2e-6, "mean")
    assert_close(out.var, var, 2e-6, "var")
    assert_close(out.y, y, 2e-7 * max(offset, 2), "y")


def test_small_and_large_variance(route: str) -> None:
    """Below eps and far above it the biased variance comes back right."""
    x = torch.randn(8, 4, 16, 16, dtype=torch.float64) * torch.tensor([1e-4, 1e-2, 1.0, 1e4])[:, None, None]
    out = nf.batch_norm_swish(x.float(), torch.ones(4), torch.zeros(4), activation=None)
    expected = x.float().double().var((0, 2, 3), correction=0)
    assert ((out.var - expected).abs() <= 1e-5 * expected + 2e-12).all()
    constant = nf.batch_norm_swish(
        torch.full((2, 1, 4, 4), 3.0), torch.ones(1), torch.full((1,), 0.25), activation=None
    )
    assert_close(constant.y, torch.full((2, 1, 4, 4), 0.25), 1e-3)
    assert float(constant.var) < 1e-10


def test_eps_is_used(route: str) -> None:
    tensors = inputs()
    assert_close(op(**tensors, eps=0.3)[0], formula(**tensors, eps=0.3)[0], 1e-13)
