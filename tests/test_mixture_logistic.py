"""Mixture of discretised logistics: recorded numbers, tails and clamps, and the statistics of its samples."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from descriptions.mixture_logistic import M, formula, inputs, log_prob
from harness import (
    Record,
    assert_close,
)

import nvae_fast as nf
from nvae_fast.ops import mixture_logistic as operator

# Recorded numbers and probabilities


@pytest.mark.parametrize("bits", [8, 5])
def test_recorded(bits: int, route: str, memory_format: torch.memory_format, device: torch.device) -> None:
    record = Record("ops", f"mixture_logistic/{bits}bit/")
    params = record["param"].to(device, memory_format=memory_format).requires_grad_()
    x = record["x"].to(device, memory_format=memory_format)
    out = nf.mixture_logistic_log_prob(params, x, num_bits=bits)
    assert_close(out, record["log_prob"], 1e-4, "log_prob")
    (gradient,) = torch.autograd.grad(out, params, record["grad_log_prob"].to(device))
    assert_close(gradient, record["grad_param"], 1e-3, "grad_param")
    assert_close(nf.mixture_logistic_mean(params), record["mean"], 1e-5, "mean")


def test_more_accurate_than_the_difference_of_sigmoids(route: str) -> None:
    """Broad components: the two CDFs cancel, which costs the written-out form in fp32 a hundred times the
    error."""
    tensors = inputs((2, 16, 16), log_scale=2.0)
    truth = formula(**tensors)
    narrow = {name: t.float() for name, t in tensors.items()}
    assert_close(log_prob(**narrow), truth, 1e-6)
    assert (formula(**narrow) - truth).abs().max() > 1e-4


def test_probabilities_sum_to_one(route: str) -> None:
    """Over all 32^3 colours of 5 bits: the tails hold what lies beyond the grid, and colours feed each other
    rightly."""
    levels = torch.arange(32, dtype=torch.float64) / 31
    x = torch.cartesian_prod(levels, levels, levels)[:, :, None, None]
    params = inputs((1, 1, 1), log_scale=-1.5)["params"].expand(len(x), -1, -1, -1)
    total = log_prob(params, x, bits=5).exp().sum()
    assert abs(float(total) - 1) < 1e-6  # the density standing in for tiny differences is not exact


# Tails and clamps


def one_component(
    mean: float, log_scale: float, x: float, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """One component, alike in all colours and without coupling: params (1, 10, 1, 1) and a grey pixel."""
    params = torch.zeros(1, 10, 1, 1, dtype=dtype)
    colours = params[:, 1:].view(1, 3, 3)
    colours[:, :, 0], colours[:, :, 1] = mean, log_scale
    return params, torch.full((1, 3, 1, 1), x, dtype=dtype)


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("mean_of", [-1.5, -0.2, 0.9, 30.0, -30.0])
@pytest.mark.parametrize("log_scale", [-7.0, -3.0, 0.0, 5.0])
def test_tails(log_scale: float, mean_of: float, bits: int, route: str) -> None:
    """Pixel 0 holds everything below it and the top pixel everything above, in log space however far away."""
    half = 1 / (2**bits - 1)
    scale = math.exp(log_scale)
    for pixel, argument in ((0.0, (-1 + half - mean_of) / scale), (1.0, -(1 - half - mean_of) / scale)):
        params, x = one_component(mean_of, log_scale, pixel, torch.float32)
        params.requires_grad_()
        out = nf.mixture_logistic_log_prob(params, x, num_mixtures=1, num_bits=bits)
        expected = 3 * float(F.logsigmoid(torch.tensor(argument, dtype=torch.float64)))
        assert abs(float(out.detach()) - expected) <= 1e-4 * abs(expected) + 1e-30
        assert torch.isfinite(torch.autograd.grad(out.sum(), params)[0]).all()


def test_second_highest_level_of_8_bits_is_a_tail_too(route: str) -> None:
    """254 is 0.992 > 0.99 in [-1, 1]: specified so."""
    params, x = one_component(0.3, -2.0, 254 / 255)
    out = nf.mixture_logistic_log_prob(params, x, num_mixtures=1)
    argument = -(2 * 254 / 255 - 1 - 1 / 255 - 0.3) / math.exp(-2.0)
    assert_close(out, torch.full_like(out, 3 * math.log(1 / (1 + math.exp(-argument)))), 1e-12)


@pytest.mark.parametrize("raw", [-7.001, -9.0, -1e4])
@pytest.mark.parametrize("pixel", [0.0, 0.4, 1.0])
def test_log_scale_clamp(raw: float, pixel: float, route: str) -> None:
    """Below -7 the value stays that of -7 and the log-scale's gradient is exactly zero; just above it is
    not."""
    values, gradients = [], []
    for log_scale in (raw, -7.0, -6.999):
        params, x = one_component(0.15 - 0.3 * pixel, log_scale, pixel)
        params.requires_grad_()
        values.append(nf.mixture_logistic_log_prob(params, x, num_mixtures=1))
        gradients.append(torch.autograd.grad(values[-1].sum(), params)[0][:, 1:].view(3, 3))
    assert torch.equal(values[0], values[1])
    assert not gradients[0][:, 1].any()
    assert gradients[2][:, 1].all()
    assert gradients[0][:, 0].all(), "the mean still learns"


def test_fallback_to_the_density(route: str) -> None:
    """Where the difference of the CDFs is at most 1e-5, the density at the centre stands in: 20 scales from
    the mean."""
    params, x = one_component(-0.5, -3.0, 191 / 255)
    middle = (2 * 191 / 255 - 1 + 0.5) / math.exp(-3.0)
    log_density = middle + 3.0 - 2 * math.log1p(math.exp(middle)) - math.log(255 / 2)
    out = nf.mixture_logistic_log_prob(params, x, num_mixtures=1)
    assert_close(out, torch.full_like(out, 3 * log_density), 1e-9)


def test_extreme_parameters_stay_finite(route: str) -> None:
    values = (-1e4, -8.0, 0.0, 8.0, 1e4)
    grid = torch.tensor(list(itertools.product(values, values, values)))
    params = torch.zeros(len(grid), 10, 1, 1)
    params[:, 1:] = grid[:, None].expand(-1, 3, -1).reshape(-1, 9)[..., None, None]
    params.requires_grad_()
    for pixel in (0.0, 0.5, 1.0):
        out = nf.mixture_logistic_log_prob(params, torch.full((len(grid), 3, 1, 1), pixel), num_mixtures=1)
        assert torch.isfinite(out).all()
        assert torch.isfinite(torch.autograd.grad(out.sum(), params)[0]).all()


# Samples


def components(logits: list[float], means: list[float], log_scale: float, n: int) -> torch.Tensor:
    """(n, 10 M, 1, 1): uncoupled colours, the same means in each."""
    m = len(logits)
    params = torch.zeros(1, 10 * m, 1, 1)
    params[0, :m, 0, 0] = torch.tensor(logits)
    colours = params[:, m:].view(3, 3, m)
    colours[:, 0], colours[:, 1] = torch.tensor(means), log_scale
    return params.expand(n, -1, -1, -1)


def test_samples_follow_the_cdf(route: str, device: torch.device) -> None:
    """Frequencies of every colour below thresholds, clamped ends included, within four standard errors."""
    n = 40_000
    logits, means = [0.3, -0.8, 0.1], [-0.9, 0.2, 0.7]
    params = components(logits, means, -2.0, n).to(device)
    x = 2 * nf.mixture_logistic_sample(params, num_mixtures=3, seed=1)[..., 0, 0].double().cpu() - 1
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    weights = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    for threshold in (-0.999, -0.9, -0.5, 0.0, 0.25, 0.7, 0.9, 0.999):
        cdf = float(
            (
                weights
                * torch.sigmoid((threshold - torch.tensor(means, dtype=torch.float64)) / math.exp(-2.0))
            ).sum()
        )
        error = 4 * math.sqrt(cdf * (1 - cdf) / n)
        assert ((x <= threshold).double().mean(0) - cdf).abs().max() <= error, threshold


def test_samples_follow_the_log_probability(route: str) -> None:
    """Samples of coupled colours, put on the grid of 2 bits, occur as often as ``mixture_logistic_log_prob``
    says.

    (To put a continuous sample on the grid is to integrate the density over a pixel, which is what the
    discretised logistic does; the autoregression feeds on the continuous colour, so only the first colour is
    compared exactly and the couplings are kept small.)
    """
    n = 60_000
    params = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    colours = params[:, 1:].view(3, 3)
    colours[:, 0], colours[:, 1], colours[:, 2] = torch.tensor([0.1, -0.2, 0.3]), -1.0, 0.02
    x = nf.mixture_logistic_sample(params.expand(n, -1, -1, -1), num_mixtures=1, seed=2)
    index = (x * 3).round()[..., 0, 0]
    counts = torch.bincount(
        (index @ torch.tensor([16.0, 4.0, 1.0], dtype=torch.float64)).long(), minlength=64
    )
    grid = torch.cartesian_prod(*[torch.arange(4.0, dtype=torch.float64)] * 3)[:, :, None, None] / 3
    p = (
        nf.mixture_logistic_log_prob(params.expand(64, -1, -1, -1), grid, num_mixtures=1, num_bits=2)
        .exp()
        .flatten()
    )
    assert ((counts / n - p).abs() <= 4 * torch.sqrt(p * (1 - p) / n) + 0.01 * p).all()


def test_colours_feed_the_next(route: str, device: torch.device) -> None:
    """G - c0 R and B - c1 R - c2 G are logistic with the colour's own mean and scale, clamping far away."""
    n = 40_000
    c = torch.tensor([0.5, -0.3, 0.6])
    means, log_scales = torch.tensor([0.2, -0.1, 0.05]), torch.tensor([-4.0, -4.5, -5.0])
    params = torch.zeros(1, 10, 1, 1)
    params[0, 1:] = torch.stack((means, log_scales, torch.atanh(c)), dim=1).reshape(9, 1, 1)
    r, g, b = (
        (2 * nf.mixture_logistic_sample(params.expand(n, -1, -1, -1).to(device), num_mixtures=1, seed=3) - 1)
        .cpu()
        .unbind(1)
    )
    for colour, value in enumerate((r, g - c[0] * r, b - c[1] * r - c[2] * g)):
        u = torch.sigmoid((value.flatten() - means[colour]) / log_scales[colour].exp()).sort().values
        steps = torch.arange(1, n + 1) / n
        assert (u - steps).abs().max() < 1.95 / n**0.5, "Kolmogorov-Smirnov, one in a thousand"


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.5])
def test_temperature_multiplies_the_noise(temperature: float, route: str) -> None:
    params = components([0.0], [0.1], -4.0, 500)
    plain, warmed = (
        2 * nf.mixture_logistic_sample(params, num_mixtures=1, temperature=t, seed=4) - 1.1
        for t in (1.0, temperature)
    )
    assert_close(warmed, temperature * plain, 1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float, route: str) -> None:
    n = 40_000
    logits, means = [0.0, 1.0, -0.5], [-0.6, 0.0, 0.6]
    x = nf.mixture_logistic_sample(
        components(logits, means, -9.0, n), num_mixtures=3, temperature=temperature, seed=5
    )
    nearest = ((2 * x[:, 0, 0, 0] - 1)[:, None] - torch.tensor(means)).abs().argmin(1)
    expected = torch.softmax(torch.tensor(logits) / temperature, 0)
    assert ((nearest.bincount() / n - expected).abs() <= 4 * torch.sqrt(expected * (1 - expected) / n)).all()


def test_one_component_for_all_colours(route: str) -> None:
    x = (
        2 * nf.mixture_logistic_sample(components([0.0, 0.0], [-0.5, 0.5], -9.0, 200), num_mixtures=2, seed=6)
        - 1
    )
    assert_close(x.sign()[:, 1:], x.sign()[:, :1].expand(-1, 2, -1, -1), 0.0)
    assert 50 < (x[:, 0] > 0).sum() < 150


def test_uniform_draws_are_strictly_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest and the highest word: neither logarithm of the logistic noise may be infinite."""
    monkeypatch.setattr(
        operator, "philox_words", lambda seed, n: torch.tensor([[0, 2**32 - 1, 0, 2**32 - 1]])
    )
    for dtype in (torch.float32, torch.float64):
        u = operator.uniform(torch.tensor(0), (4,), dtype)
        assert float(u.min()) > 0
        assert float(u.max()) < 1
        assert float(u.min()) == 1 - float(u.max())


def test_the_image_gets_no_gradient(route: str) -> None:
    """x is data: the same on every backend."""
    tensors = inputs()
    x = tensors["x"].requires_grad_()
    out = log_prob(tensors["params"].requires_grad_(), x)
    assert torch.autograd.grad(out.sum(), x, allow_unused=True)[0] is None


def test_samples_are_pixels_without_a_gradient(route: str) -> None:
    x = nf.mixture_logistic_sample(inputs((3, 5, 7))["params"].requires_grad_(), num_mixtures=M, seed=42)
    assert x.shape == (3, 3, 5, 7)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert not x.requires_grad
