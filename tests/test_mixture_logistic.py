"""Mixture of discretised logistics: recorded numbers, fp64 truth, tails and clamps, and the statistics of its
samples."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    Record,
    Tensors,
    assert_accurate,
    assert_close,
    assert_compiles,
    assert_empty_works,
    assert_gradcheck,
    assert_indifferent_to_layout,
    assert_no_double_backward,
    assert_opcheck,
    assert_repeatable,
    place,
    strided,
)

import nvae_fast as nf
from nvae_fast.ops import mixture_logistic as operator

M = 3


def inputs(size: tuple[int, int, int] = (2, 4, 5), bits: int = 8, log_scale: float = -2.5) -> Tensors:
    """Means near the pixels, scales around ``exp(log_scale)``, pixels on the grid with some at both ends."""
    b, h, w = size
    generator = torch.Generator().manual_seed(8)
    params = torch.randn((b, 10 * M, h, w), generator=generator, dtype=torch.float64)
    params[:, M:].view(b, 3, 3, M, h, w)[:, :, 1] += log_scale
    params[:, M:].view(b, 3, 3, M, h, w)[:, :, 0] *= 0.5
    x = torch.randint(0, 2**bits, (b, 3, h, w), generator=generator).double() / (2**bits - 1)
    if x.numel() > 12:
        x.view(-1)[:12:2], x.view(-1)[1:12:2] = 0.0, 1.0
    return {"params": params, "x": x}


def parts(params: torch.Tensor, m: int = M) -> tuple[torch.Tensor, ...]:
    b, _, h, w = params.shape
    means, log_scales, coefficients = params[:, m:].reshape(b, 3, 3, m, h, w).unbind(2)
    return params[:, :m], means, log_scales.clamp(min=-7.0), torch.tanh(coefficients)


def formula(params: torch.Tensor, x: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Specification section 6 to the letter, one component after the other."""
    logits, means, log_scales, c = parts(params)
    levels = 2**bits - 1
    r, g, b = (2 * x - 1).detach().unbind(1)
    joint = []
    for m in range(M):
        shift = (0 * r, c[:, 0, m] * r, c[:, 1, m] * r + c[:, 2, m] * g)
        total = F.log_softmax(logits, dim=1)[:, m]
        for colour, value in enumerate((r, g, b)):
            centred = value - means[:, colour, m] - shift[colour]
            log_scale = log_scales[:, colour, m]
            upper = torch.exp(-log_scale) * (centred + 1 / levels)
            lower = torch.exp(-log_scale) * (centred - 1 / levels)
            middle = torch.exp(-log_scale) * centred
            difference = torch.sigmoid(upper) - torch.sigmoid(lower)
            density = middle - log_scale - 2 * F.softplus(middle) - math.log(levels / 2)
            inner = torch.where(difference > 1e-5, torch.log(difference.clamp(min=1e-10)), density)
            inner = torch.where(value > 0.99, -F.softplus(lower), inner)
            total = total + torch.where(value < -0.999, upper - F.softplus(upper), inner)
        joint.append(total)
    return torch.logsumexp(torch.stack(joint), dim=0)


def log_prob(params: Any, x: Any, bits: int = 8) -> torch.Tensor:
    return nf.mixture_logistic_log_prob(params, x, num_mixtures=M, num_bits=bits)


def mean_formula(params: torch.Tensor) -> torch.Tensor:
    logits, means, _, c = parts(params)
    weights = torch.softmax(logits, dim=1)[:, None]
    means, c = (means * weights).sum(2), (c * weights).sum(2)
    r = means[:, 0].clamp(-1, 1)
    g = (means[:, 1] + c[:, 0] * r).clamp(-1, 1)
    b = (means[:, 2] + c[:, 1] * r + c[:, 2] * g).clamp(-1, 1)
    return (torch.stack((r, g, b), dim=1) + 1) / 2


def mean(params: Any) -> torch.Tensor:
    return nf.mixture_logistic_mean(params, num_mixtures=M)


# Recorded numbers and truth


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


@pytest.mark.parametrize("bits", [8, 5])
@pytest.mark.parametrize("size", [(2, 4, 5), (1, 7, 1), (3, 1, 1), (1, 11, 13)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype,
    size: tuple,
    bits: int,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    tensors = place(inputs(size, bits), dtype, memory_format, device)
    assert_accurate(
        lambda **t: log_prob(**t, bits=bits), lambda **t: formula(**t, bits=bits), tensors, ("params",)
    )
    assert log_prob(**tensors).dtype == torch.float32
    assert_accurate(mean, mean_formula, {"params": tensors["params"]}, ("params",), factor=2.5)
    assert mean(tensors["params"]).dtype == dtype


def test_more_accurate_than_the_difference_of_sigmoids(route: str) -> None:
    """Broad components: the two CDFs cancel, which costs the written-out form in fp32 a hundred times the
    error."""
    tensors = inputs((2, 16, 16), log_scale=2.0)
    truth = formula(**tensors)
    narrow = {name: t.float() for name, t in tensors.items()}
    assert_close(log_prob(**narrow), truth, 1e-6)
    assert (formula(**narrow) - truth).abs().max() > 1e-4


def test_float64(route: str) -> None:
    for bits in (8, 5):
        tensors = inputs(bits=bits)
        assert_close(log_prob(**tensors, bits=bits), formula(**tensors, bits=bits), 1e-10)
    assert_close(mean(tensors["params"]), mean_formula(tensors["params"]), 1e-13)


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


def test_one_seed_one_sample(route: str, device: torch.device) -> None:
    params = place(inputs((3, 5, 7)), torch.float32, torch.contiguous_format, device)["params"]

    def sample(p: torch.Tensor, seed: Any = 42) -> torch.Tensor:
        return nf.mixture_logistic_sample(p, num_mixtures=M, seed=seed)

    x = sample(params)
    assert x.shape == (3, 3, 5, 7)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert torch.equal(sample(params), x)
    assert torch.equal(sample(params, torch.tensor(42, device=device)), x)
    assert_close(sample(params.contiguous(memory_format=torch.channels_last)), x, 1e-6, "channels_last")
    assert_close(sample(strided(params)), x, 1e-6, "strided")
    assert_close(sample(params[:2]), x[:2], 1e-6, "a prefix of the batch")
    assert not torch.equal(sample(params, 43), x)
    torch.manual_seed(1)
    first = sample(params, None)
    torch.manual_seed(1)
    assert torch.equal(sample(params, None), first)
    assert not torch.equal(sample(params, None), first)
    assert sample(params[:0]).shape == (0, 3, 5, 7)
    assert not sample(params.clone().requires_grad_()).requires_grad


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


# What every op must do


def test_gradcheck(route: str) -> None:
    tensors = inputs((2, 2, 1), log_scale=-0.5)
    assert_gradcheck(log_prob, tensors, ("params",))
    assert_gradcheck(mean, {"params": 0.3 * tensors["params"]}, ("params",))


def test_opcheck(device: torch.device) -> None:
    t = place(inputs((2, 1, 2)), torch.float32, torch.channels_last, device)
    assert_opcheck("mixture_logistic_log_prob", t["params"], t["x"], M, 8, differentiable=(0,))
    assert_opcheck("mixture_logistic_sample", t["params"], torch.tensor(3, device=device), M, 0.8)
    assert_opcheck("mixture_logistic_mean", t["params"], M, differentiable=(0,))


def test_compiles(device: torch.device) -> None:
    tensors = place(inputs((2, 1, 2)), torch.float32, torch.contiguous_format, device)

    def everything(params: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return log_prob(params, x), mean(params), nf.mixture_logistic_sample(params, num_mixtures=M, seed=1)

    assert_compiles(everything, tensors, ("params",))


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs((3, 5, 2)), torch.float32, torch.contiguous_format, device)
    only = {"params": tensors["params"]}
    for function, given in ((log_prob, tensors), (mean, only)):
        assert_indifferent_to_layout(function, given, ("params",))
        assert_repeatable(function, given, ("params",))
    empty = {name: t[:0] for name, t in tensors.items()}
    assert assert_empty_works(log_prob, empty, ("params",))["output 0"].shape == (0, 5, 2)
    assert assert_empty_works(mean, {"params": empty["params"]}, ("params",))["output 0"].shape == (
        0,
        3,
        5,
        2,
    )


def test_the_image_gets_no_gradient(route: str) -> None:
    """x is data: the same on every backend."""
    tensors = inputs()
    x = tensors["x"].requires_grad_()
    out = log_prob(tensors["params"].requires_grad_(), x)
    assert torch.autograd.grad(out.sum(), x, allow_unused=True)[0] is None


def test_no_double_backward() -> None:
    tensors = inputs()
    leaf = tensors["params"].requires_grad_()
    out = torch.ops.nvae_fast.mixture_logistic_log_prob(leaf, tensors["x"], M, 8)
    assert_no_double_backward("mixture_logistic_log_prob", out, leaf)
    assert_no_double_backward(
        "mixture_logistic_mean", torch.ops.nvae_fast.mixture_logistic_mean(leaf, M), leaf
    )


@pytest.mark.parametrize("which", ["params", "x"])
def test_nan_propagates(which: str, route: str) -> None:
    """To its own pixel and no other."""
    tensors = {name: t.float() for name, t in inputs().items()}
    tensors[which][1, :, 2, 3] = float("nan")
    bad = torch.zeros(2, 4, 5, dtype=torch.bool)
    bad[1, 2, 3] = True
    assert torch.equal(log_prob(**tensors).isnan(), bad)
    if which == "params":
        assert torch.equal(mean(tensors["params"]).isnan().all(1), bad)
        sampled = nf.mixture_logistic_sample(tensors["params"], num_mixtures=M, seed=1)
        assert torch.equal(sampled.isnan().any(1), bad)


P, X = torch.zeros(2, 30, 4, 4), torch.zeros(2, 3, 4, 4)
ERRORS = [
    ("log_prob", {"params": 0}, TypeError, "params must be a torch.Tensor, got int"),
    (
        "log_prob",
        {"params": P[:, :29]},
        ValueError,
        r"params must have 10 \* num_mixtures = 30 .*got shape \(2, 29, 4, 4\)",
    ),
    ("log_prob", {"params": P[0]}, ValueError, r"params must have shape \(B, C, H, W\), got \(30, 4, 4\)"),
    ("log_prob", {"x": X[:1]}, ValueError, r"x must have shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    ("log_prob", {"x": X.byte()}, TypeError, "x must have one of the dtypes .*got torch.uint8"),
    ("log_prob", {"x": X.to("meta")}, ValueError, "x must be on cpu .*got meta"),
    ("log_prob", {"num_mixtures": 0}, ValueError, "num_mixtures must be >= 1, got 0"),
    ("log_prob", {"num_bits": 0}, ValueError, "num_bits must be between 1 and 16, got 0"),
    ("log_prob", {"num_bits": 8.0}, TypeError, "num_bits must be an int, got 8.0"),
    ("log_prob", {"num_mixtures": "3"}, TypeError, "num_mixtures must be an int, got '3'"),
    ("sample", {"num_mixtures": None}, TypeError, "num_mixtures must be an int, got None"),
    ("mean", {"num_mixtures": 3.0}, TypeError, "num_mixtures must be an int, got 3.0"),
    ("log_prob", {"num_bits": 17}, ValueError, "num_bits must be between 1 and 16, got 17"),
    (
        "sample",
        {"params": P[:, :20]},
        ValueError,
        r"params must have 10 \* num_mixtures = 30 .*got shape \(2, 20, 4, 4\)",
    ),
    ("sample", {"temperature": 0.0}, ValueError, "temperature must be a finite number > 0, got 0.0"),
    ("sample", {"seed": 0.5}, TypeError, "seed must be an int or a 0-d int64 tensor, got float"),
    ("mean", {"params": P.long()}, TypeError, "params must have one of the dtypes .*got torch.int64"),
    (
        "mean",
        {"num_mixtures": 2},
        ValueError,
        r"params must have 10 \* num_mixtures = 20 .*got shape \(2, 30, 4, 4\)",
    ),
]


@pytest.mark.parametrize("name, bad, kind, message", ERRORS)
def test_errors(name: str, bad: dict, kind: type, message: str, route: str) -> None:
    arguments = {"params": P, "num_mixtures": 3, **({"x": X} if name == "log_prob" else {}), **bad}
    positional = [arguments.pop(key) for key in ("params", "x") if key in arguments]
    with pytest.raises(kind, match=f"^mixture_logistic_{name}: {message}"):
        getattr(nf, f"mixture_logistic_{name}")(*positional, **arguments)
