"""nvae_fast.distributions: mixtures of logistics, Bernoulli pixels, the plain Gaussian pair."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from harness import assert_accurate, assert_close, assert_gradcheck, place
from normals import DTYPES, inputs

import nvae_fast as nf
from nvae_fast.distributions import (
    Bernoulli,
    DiscMixLogistic,
    draw_gaussian,
    draw_gaussian_with_kl,
    gaussian_analytical_kl,
)

# The other classes.


def pixels(bits: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    param = torch.randn((2, 30, 4, 5), generator=generator, dtype=torch.float64)
    x = torch.randint(0, 2**bits, (2, 3, 4, 5), generator=generator).double() / (2**bits - 1)
    return param, x


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixture_of_logistics(dtype: torch.dtype, bits: int, route: str) -> None:
    param, x = pixels(bits)
    param = param.to(dtype).requires_grad_()
    theirs = DiscMixLogistic(param, num_mix=3, num_bits=bits)
    found = theirs.log_prob(x)
    assert_close(theirs.log_p(2 * x - 1), found, 1e-12 if dtype == torch.float64 else 1e-5)
    wide = param.detach().double().requires_grad_()
    with nf.use_backend("reference"):
        expected = nf.mixture_logistic_log_prob(wide, x, num_mixtures=3, num_bits=bits)
    assert found.shape == (2, 4, 5)
    assert_close(found, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    (grad,), (truth,) = torch.autograd.grad(found.sum(), param), torch.autograd.grad(expected.sum(), wide)
    assert_close(grad, truth, {torch.bfloat16: 4e-3, torch.float32: 1e-5, torch.float64: 1e-10}[dtype])
    image = theirs.sample(0.8, seed=2)
    assert torch.equal(image, nf.mixture_logistic_sample(param, num_mixtures=3, temperature=0.8, seed=2))
    assert image.min() >= 0
    assert image.max() <= 1
    assert_close(theirs.mean(), nf.mixture_logistic_mean(param, num_mixtures=3), 1e-12)


def test_mixture_gradient_of_the_pixels(route: str) -> None:
    """Against finite differences, away from the edges of the case distinction; values are those of data."""
    param, x = pixels()
    param, samples = param[:1, :, :2, :2], 0.9 * x[:1, :, :2, :2] + 0.05

    def function(param: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return DiscMixLogistic(param, 3).log_prob(samples)

    assert_gradcheck(function, {"param": param, "samples": samples}, ("param", "samples"))
    assert_gradcheck(
        lambda param, samples: DiscMixLogistic(param, 3).log_p(samples),
        {"param": param, "samples": 2 * samples - 1},
        ("param", "samples"),
    )
    leaf = samples.clone().requires_grad_()
    assert_close(function(param, leaf), function(param, samples), 1e-13)
    half = param.bfloat16().requires_grad_()
    found = torch.autograd.grad(function(half, leaf).sum(), (half, leaf))
    wide = param.bfloat16().double().requires_grad_()
    for actual, truth in zip(
        found, torch.autograd.grad(function(wide, leaf).sum(), (wide, leaf)), strict=True
    ):
        assert_close(actual, truth, 4e-3 if actual.dtype == torch.bfloat16 else 1e-5)


def test_mixture_sums_to_one() -> None:
    """Over every value of the three colours of a pixel."""
    levels = 2**5
    param = pixels()[0][:1, :10, :1, :1].expand(levels, 10, 1, 1) * 0.5
    red = torch.linspace(0, 1, levels, dtype=torch.float64)
    samples = torch.zeros(levels, 3, 1, 1, dtype=torch.float64)
    total = 0.0
    for green, blue in itertools.product(red, red):
        samples[:, 0, 0, 0], samples[:, 1], samples[:, 2] = red, green, blue
        total += float(DiscMixLogistic(param, 1, 5).log_prob(samples).exp().sum())
    assert abs(total - 1) < 1e-6


@pytest.mark.parametrize("temp", [1.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bernoulli(dtype: torch.dtype, temp: float) -> None:
    t = inputs()
    logits, x = t["posterior"].to(dtype), (t["prior"] > 0).to(dtype)
    ours = Bernoulli(logits, temp)
    theirs = torch.distributions.Bernoulli(logits=logits.double() / temp)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert_close(ours.log_prob(x), theirs.log_prob(x.double()), tolerance)
    assert_close(ours.mean, theirs.mean, tolerance)
    n = 4000
    draws = Bernoulli(logits[:1, :1, :1].expand(n, -1, -1, -1), temp).sample(seed=1).double()
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    p = theirs.mean[:1, :1, :1]
    assert ((draws.mean(0) - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


# The plain Gaussian pair.


@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_gaussians(dtype: torch.dtype, route: str, memory_format: torch.memory_format) -> None:
    t = place(inputs((3, 4, 5, 6)), dtype, memory_format, torch.device("cpu"))

    def function(posterior: torch.Tensor, prior: torch.Tensor, noise: torch.Tensor) -> Any:
        (mu1, ls1), (mu2, ls2) = posterior.chunk(2, dim=1), prior.chunk(2, dim=1)
        found = draw_gaussian_with_kl(mu1, mu2, ls1, ls2, noise=noise)
        return draw_gaussian(mu1, ls1, noise=noise), gaussian_analytical_kl(mu1, mu2, ls1, ls2), *found[:2]

    def formula(posterior: torch.Tensor, prior: torch.Tensor, noise: torch.Tensor) -> Any:
        dtype, wide = posterior.dtype, torch.promote_types(posterior.dtype, torch.float32)
        posterior, prior, noise = posterior.to(wide), prior.to(wide), noise.to(wide)
        (mu1, ls1), (mu2, ls2) = posterior.chunk(2, dim=1), prior.chunk(2, dim=1)
        z = (mu1 + ls1.exp() * noise).to(dtype)
        kl = -0.5 + ls2 - ls1 + 0.5 * (ls1.exp() ** 2 + (mu1 - mu2) ** 2) / ls2.exp() ** 2
        return z, kl, z, kl.sum((2, 3))

    tensors = {name: t[name] for name in ("posterior", "prior", "noise")}
    assert_accurate(function, formula, tensors, tuple(tensors), factor=3.0)


def test_plain_gaussians_against_torch_distributions() -> None:
    t = inputs()
    (mu1, ls1), (mu2, ls2) = t["posterior"].chunk(2, dim=1), t["prior"].chunk(2, dim=1)
    first, second = (torch.distributions.Normal(m, s.exp()) for m, s in ((mu1, ls1), (mu2, ls2)))
    kl = torch.distributions.kl_divergence(first, second)
    assert_close(gaussian_analytical_kl(mu1, mu2, ls1, ls2), kl, 1e-13)
    found = draw_gaussian_with_kl(mu1, mu2, ls1, ls2, seed=9)
    assert_close(found.kl, kl.sum((2, 3)), 1e-13)
    assert_close(found.z, draw_gaussian(mu1, ls1, seed=9), 1e-14)
    assert_close(found.log_q, first.log_prob(found.z).sum((2, 3)), 1e-12)
    assert_close(found.log_p, second.log_prob(found.z).sum((2, 3)), 1e-12)
