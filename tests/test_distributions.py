"""nvae_fast.distributions: the formulas in fp64, torch.distributions, gradients, sampling; dtypes and sizes; errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_accurate, assert_close, assert_compiles, assert_gradcheck, place
from normals import DTYPES, SIZE, hows, inputs, kl_formula, log_p_formula, made, squashed

import nvae_fast as nf
from nvae_fast.distributions import (
    Bernoulli,
    DiscMixLogistic,
    Normal,
    NormalDecoder,
    draw_gaussian,
    draw_gaussian_with_kl,
    gaussian_analytical_kl,
)

# Values and gradients.


@hows
@pytest.mark.parametrize("temp", [1.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_values_and_gradients(
    dtype: torch.dtype, temp: float, how: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    given = place(inputs(), dtype, memory_format, device)
    pair = {name: given[name] for name in ("posterior", "prior")}

    def function(posterior: torch.Tensor, prior: torch.Tensor, samples: Any) -> tuple[torch.Tensor, ...]:
        normal = made(posterior, temp, how)
        return normal.mu, normal.sigma, normal.kl(made(prior, 1.0, how)), normal.log_p(samples)

    def formula(posterior: torch.Tensor, prior: torch.Tensor, samples: Any) -> tuple[torch.Tensor, ...]:
        if posterior.dtype in (torch.bfloat16, torch.float16):
            posterior, prior, samples = posterior.float(), prior.float(), samples.float()
        kl, log_p = kl_formula(posterior, prior, (temp, 1.0)), log_p_formula(posterior, samples, temp)
        return *squashed(posterior, temp), kl, log_p

    tensors = {**pair, "samples": given["samples"]}
    assert_accurate(function, formula, tensors, ("posterior", "prior", "samples"))
    for value in function(**tensors):
        assert value.shape == SIZE
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@hows
@pytest.mark.parametrize("temps", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.6)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_pixels(
    dtype: torch.dtype, temps: tuple, how: str, route: str, memory_format: torch.memory_format
) -> None:
    """kl_per_channel, log_p_per_channel and sample_with_kl against the formulas, with gradients."""
    given = place(inputs((3, 4, 5, 6)), dtype, memory_format, torch.device("cpu"))

    def function(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, p = made(t["posterior"], temps[0], how), made(t["prior"], temps[1], how)
        found = q.sample_with_kl(p, noise=t["noise"])
        return q.kl_per_channel(p), q.log_p_per_channel(t["samples"]), *found

    def formula(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtype = t["posterior"].dtype
        t = {name: value.to(torch.promote_types(dtype, torch.float32)) for name, value in t.items()}
        mu, sigma = squashed(t["posterior"], temps[0])
        z = mu + sigma * t["noise"]
        kl = kl_formula(t["posterior"], t["prior"], temps).sum((2, 3))
        log_p = log_p_formula(t["posterior"], t["samples"], temps[0]).sum((2, 3))
        log_q_z = log_p_formula(t["posterior"], z, temps[0]).sum((2, 3))
        log_p_z = log_p_formula(t["prior"], z, temps[1]).sum((2, 3))
        return kl, log_p, z.to(dtype), kl, log_q_z, log_p_z

    differentiable = ("posterior", "prior", "samples", "noise")
    assert_accurate(function, formula, given, differentiable, factor=3.0)
    assert function(**given)[2].dtype == dtype


def test_against_torch_distributions() -> None:
    t = inputs()
    q, p = made(t["posterior"]), made(t["prior"])
    theirs = [torch.distributions.Normal(n.mu, n.sigma) for n in (q, p)]
    assert_close(q.kl(p), torch.distributions.kl_divergence(*theirs), 1e-13)
    assert_close(q.log_p(t["samples"]), theirs[0].log_prob(t["samples"]), 1e-13)


def test_first_groups_prior() -> None:
    """None is a prior of raw zeros: mu 0, sigma 1.01."""
    t = inputs()
    q, zeros = made(t["posterior"]), torch.zeros(SIZE, dtype=torch.float64)
    first = Normal(zeros, zeros)
    assert (first.mu == 0).all()
    assert_close(first.sigma, torch.full_like(zeros, 1.01), 1e-15)
    assert_close(q.kl_per_channel(), q.kl(first).sum((2, 3)), 1e-13)
    for temp in (1.0, 0.5):
        q = made(t["posterior"], temp)
        for found, expected in zip(q.sample_with_kl(seed=3), q.sample_with_kl(first, seed=3), strict=True):
            assert_close(found, expected, 1e-13)


def test_gradcheck() -> None:
    t = inputs((1, 2, 2, 1))

    def function(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, p = made(t["posterior"]), made(t["prior"])
        return q.kl_per_channel(p), q.kl(p), q.sample_given_eps(t["noise"]), q.log_p_per_channel(t["samples"])

    assert_gradcheck(function, t, tuple(t))


# Sampling.


@pytest.mark.parametrize("temp", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sample_is_made_of_its_eps(
    dtype: torch.dtype, temp: float, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    packed = place(inputs(), dtype, memory_format, device)["posterior"]
    normal = made(packed, temp)
    z, eps = normal.sample()
    assert z.dtype == dtype
    assert z.is_contiguous(memory_format=memory_format)
    truth_mu, truth_sigma = squashed(packed.double(), temp)
    truth = truth_mu + truth_sigma * eps.double()
    assert_close(z, truth, {torch.bfloat16: 4e-3, torch.float32: 5e-7, torch.float64: 1e-14}[dtype])
    assert torch.equal(z, normal.sample_given_eps(eps))
    again, other_eps = normal.sample()
    assert not torch.equal(eps, other_eps)
    assert temp == 0 or not torch.equal(z, again)


def test_one_seed_one_sample(route: str) -> None:
    """sample, rsample, sample_with_kl and the op itself draw the same z; torch.manual_seed governs the rest."""
    packed = inputs()["posterior"].float()
    normal, seed = made(packed), torch.tensor(11)
    z = nf.normal_sample(packed, seed=11)
    for same in (normal.sample(11)[0], normal.rsample(11), normal.sample_with_kl(seed=11).z):
        assert_close(same, z, 1e-6)
    warm = made(packed, 0.7)
    assert_close(warm.sample_with_kl(seed=seed).z, warm.rsample(seed), 1e-6)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(normal.sample()[0])
    assert torch.equal(*draws)


def test_kl_leaves_the_generator_alone() -> None:
    normal, before = made(inputs()["posterior"]), torch.get_rng_state()
    normal.kl_per_channel()
    assert torch.equal(before, torch.get_rng_state())


# Dtypes, sizes, compilers.


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)))
def test_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], route: str) -> None:
    """The kernels read one dtype: what comes in two is widened, and z keeps the posterior's."""
    t = inputs()
    posterior, prior = t["posterior"].to(dtypes[0]), t["prior"].to(dtypes[1])
    samples = t["samples"].to(dtypes[1])
    q, p = made(posterior), made(prior)
    truth = kl_formula(posterior.double(), prior.double())
    assert_close(q.kl(p), truth, 3e-6)
    found = q.sample_with_kl(p, noise=t["noise"])
    assert found.z.dtype == dtypes[0]
    for kl in (q.kl_per_channel(p), found.kl):
        assert_close(kl, truth.sum((2, 3)), 3e-6)
    assert_close(
        q.log_p_per_channel(samples), log_p_formula(posterior.double(), samples.double()).sum((2, 3)), 3e-6
    )


@pytest.mark.parametrize("size", [(0, 3, 4, 4), (1, 1, 1, 1), (3, 5, 7, 11), (2, 1, 3, 1)])
def test_sizes(size: tuple, route: str) -> None:
    t = inputs(size)
    q, p = made(t["posterior"]), made(t["prior"])
    z, eps = q.sample()
    assert z.shape == eps.shape == q.shape == size
    truth = kl_formula(t["posterior"], t["prior"])
    for kl in (q.kl_per_channel(p), q.kl(p).sum((2, 3)), q.sample_with_kl(p).kl):
        assert_close(kl, truth.sum((2, 3)), 1e-12)


def test_compiles() -> None:
    def function(**t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, p = made(t["posterior"]), made(t["prior"], 0.7)
        return q.kl(p), q.sample_given_eps(t["noise"]), q.kl_per_channel(), p.log_p(t["samples"])

    assert_compiles(
        function, place(inputs(), torch.float32, torch.contiguous_format, torch.device("cpu")), ("posterior",)
    )


# Errors: class, argument, expected, got.

M = torch.zeros(SIZE)
RGB = torch.zeros(2, 10, 4, 5)
OTHER = torch.zeros(2, 3, 4, 6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Normal(M[0], M[0]), ValueError, r"Normal: mu must have shape \(B, C, H, W\), got \(3, 4, 5\)"),
        (lambda: Normal(M, OTHER), ValueError, r"Normal: log_sigma must have shape \(2, 3, 4, 5\), got \(2, 3, 4, 6\)"),
        (lambda: Normal(M.long(), M), TypeError, r"Normal: mu must have one of the dtypes .* got torch.int64"),
        (lambda: Normal(M, M.double()), TypeError, r"Normal: log_sigma must have mu's dtype torch.float32, got torch.float64"),
        (lambda: Normal(1.0, M), TypeError, r"Normal: mu must be a torch.Tensor, got float"),
        (lambda: Normal(M, M, temp=-1.0), ValueError, r"Normal: temperature must be .* >= 0, got -1"),
        (lambda: Normal(M, M.to("meta")), ValueError, r"Normal: log_sigma must be on cpu .* got meta"),
        (lambda: Normal.from_packed(M), ValueError, r"Normal.from_packed: params must have an even number .* got 3"),
        (lambda: Normal(M, M).sample_given_eps(OTHER), ValueError, r"Normal.sample_given_eps: eps must have shape"),
        (lambda: Normal(M, M).log_p(OTHER), ValueError, r"Normal.log_p: samples must have shape"),
        (lambda: Normal(M, M).log_p_per_channel(M.int()), TypeError, r"Normal.log_p_per_channel: samples must have one"),
        (lambda: Normal(M, M).kl(M), TypeError, r"Normal.kl: normal_dist must be a Normal, got Tensor"),
        (lambda: Normal(M, M).kl(None), TypeError, r"Normal.kl: normal_dist must be a Normal, got NoneType"),
        (lambda: Normal(M, M).kl(Normal(OTHER, OTHER)), ValueError, r"Normal.kl: normal_dist must have shape"),
        (lambda: Normal(M, M).kl_per_channel(Normal(OTHER, OTHER)), ValueError, r"kl_per_channel: prior must have shape"),
        (lambda: Normal(M, M).sample_with_kl(seed=1, noise=M), ValueError, r"Normal.sample_with_kl: give either noise or seed"),
        (lambda: Normal(M, M).sample(seed=1.5), TypeError, r"Normal.sample: seed must be an int .* got float"),
        (lambda: DiscMixLogistic(M), ValueError, r"DiscMixLogistic: param must have 10 \* num_mix = 100 channels, got"),
        (lambda: DiscMixLogistic(M, 0), ValueError, r"DiscMixLogistic: num_mix must be >= 1, got 0"),
        (lambda: DiscMixLogistic(M, 1.0), TypeError, r"DiscMixLogistic: num_mix must be an int, got 1.0"),
        (lambda: DiscMixLogistic(M, 3, 17), ValueError, r"DiscMixLogistic: num_bits must be between 1 and 16, got 17"),
        (
            lambda: DiscMixLogistic(torch.zeros(2, 10, 4, 5), 1).log_prob(OTHER),
            ValueError,
            r"DiscMixLogistic.log_prob: samples must have shape \(2, 3, 4, 5\), got \(2, 3, 4, 6\)",
        ),
        (lambda: DiscMixLogistic(RGB, 1).sample(0), ValueError, r"DiscMixLogistic.sample: t must be .* > 0, got 0"),
        (lambda: DiscMixLogistic(RGB, 1).sample(temp=-1), ValueError, r"DiscMixLogistic.sample: temp must be .* > 0, got -1"),
        (lambda: NormalDecoder(M), ValueError, r"NormalDecoder: param must have an even number of channels .* got 3"),
        (lambda: NormalDecoder(RGB, 0), ValueError, r"NormalDecoder: num_bits must be between 1 and 16, got 0"),
        (lambda: NormalDecoder(RGB).log_prob(M), ValueError, r"NormalDecoder.log_prob: samples must have shape \(2, 5, 4, 5\)"),
        (lambda: NormalDecoder(RGB).sample(-1.0), ValueError, r"NormalDecoder.sample: t must be .* >= 0, got -1"),
        (lambda: NormalDecoder(RGB).sample(seed=0.5), TypeError, r"NormalDecoder.sample: seed must be an int .* got float"),
        (lambda: Bernoulli(M).sample(0.0), ValueError, r"Bernoulli.sample: t must be .* > 0, got 0"),
        (lambda: Bernoulli(M[0]), ValueError, r"Bernoulli: logits must have shape"),
        (lambda: Bernoulli(M, 0.0), ValueError, r"Bernoulli: temperature must be .* > 0, got 0"),
        (lambda: Bernoulli(M).log_prob(OTHER), ValueError, r"Bernoulli.log_prob: samples must have shape"),
        (lambda: draw_gaussian(M, OTHER), ValueError, r"draw_gaussian: log_sigma must have shape"),
        (lambda: draw_gaussian(M, M, 1, M), ValueError, r"draw_gaussian: give either noise or seed, not both"),
        (lambda: draw_gaussian(M, M, noise=OTHER), ValueError, r"draw_gaussian: noise must have shape"),
        (lambda: gaussian_analytical_kl(M, OTHER, M, OTHER), ValueError, r"gaussian_analytical_kl: mu2 must have shape"),
        (lambda: gaussian_analytical_kl(M, M, M, OTHER), ValueError, r"gaussian_analytical_kl: logsigma2 must have shape"),
        (lambda: draw_gaussian_with_kl(M, M, OTHER, M), ValueError, r"draw_gaussian_with_kl: logsigma1 must have shape"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
