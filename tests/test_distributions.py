"""nvae_fast.distributions: the formulas in fp64, torch.distributions, gradients, and that nothing is computed or copied that
nobody asked for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Tensors, assert_accurate, assert_close, assert_compiles, assert_gradcheck, place, strided
from torch.utils._python_dispatch import TorchDispatchMode

import nvae_fast as nf
from nvae_fast.distributions import (
    Bernoulli,
    DiscMixLogistic,
    Normal,
    draw_gaussian,
    draw_gaussian_with_kl,
    gaussian_analytical_kl,
)

SIZE = (2, 3, 4, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
COPIES = ("cat", "copy", "clone", "contiguous")


class Operators(TorchDispatchMode):
    """The names of the operators that ran inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> list[str]:
        return [name.removeprefix("nvae_fast.") for name in self.names if name.startswith("nvae_fast.")]

    @property
    def copies(self) -> list[str]:
        return [name for name in self.names if any(copy in name for copy in COPIES)]


def inputs(size: tuple[int, int, int, int] = SIZE) -> Tensors:
    """Packed posterior and prior, samples and noise."""
    b, z, h, w = size
    generator = torch.Generator().manual_seed(6)

    def draw(channels: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn((b, channels, h, w), generator=generator, dtype=torch.float64)

    return {"posterior": draw(2 * z, 2.0), "prior": draw(2 * z, 1.5), "samples": draw(z), "noise": draw(z)}


def squashed(packed: torch.Tensor, temp: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    mu, log_sigma = packed.chunk(2, dim=1)
    return 5 * torch.tanh(mu / 5), temp * (torch.exp(5 * torch.tanh(log_sigma / 5)) + 0.01)


def kl_formula(posterior: torch.Tensor, prior: torch.Tensor, temps: tuple = (1.0, 1.0)) -> torch.Tensor:
    (mu, sigma), (mu_o, sigma_o) = squashed(posterior, temps[0]), squashed(prior, temps[1])
    ratio = sigma / sigma_o
    return 0.5 * (((mu - mu_o) / sigma_o).square() + ratio.square()) - 0.5 - ratio.log()


def log_p_formula(posterior: torch.Tensor, samples: torch.Tensor, temp: float = 1.0) -> torch.Tensor:
    mu, sigma = squashed(posterior, temp)
    return -0.5 * ((samples - mu) / sigma).square() - 0.5 * math.log(2 * math.pi) - sigma.log()


def made(packed: torch.Tensor, temp: float = 1.0, how: str = "halves") -> Normal:
    if how == "packed":
        return Normal.from_packed(packed, temp)
    mu, log_sigma = packed.chunk(2, dim=1)
    if how == "apart":
        mu, log_sigma = mu.clone(), log_sigma.clone()
    return Normal(mu, log_sigma, temp)


hows = pytest.mark.parametrize("how", ["halves", "packed", "apart"])


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


# Nothing that nobody asked for.


def test_construction_computes_nothing() -> None:
    t = inputs()
    halves = t["posterior"].chunk(2, dim=1)
    with Operators() as seen:
        Normal(*halves)
        Normal(halves[0].requires_grad_(), halves[1], 0.7)
        Normal.from_packed(t["prior"])
        DiscMixLogistic(torch.zeros(1, 20, 2, 2), 2)
        Bernoulli(t["samples"])
    assert set(seen.names) <= {"aten.zeros"}


def test_mu_alone_computes_no_sigma_and_each_once() -> None:
    normal = made(inputs()["posterior"])
    with Operators() as seen:
        _ = normal.mu
    assert not any("exp" in name for name in seen.names)
    assert sum("tanh" in name for name in seen.names) == 1
    with Operators() as seen:
        _ = normal.mu, normal.sigma, normal.sigma
    assert sum("tanh" in name for name in seen.names) == 1
    with Operators() as seen:
        _ = normal.mu, normal.sigma
    assert seen.names == []


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("how", ["halves", "packed"])
def test_one_kernel_and_no_copy(
    how: str, grad: bool, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nvae_fast import _backend

    every = {(op, device): "operator" for op in nf.backends() for device in _backend.DEVICES}
    monkeypatch.setattr(_backend, "_fused", every)
    t = place(inputs(), torch.float32, memory_format, torch.device("cpu"))
    calls: list[tuple[Callable[[Normal, Normal], Any], list[str]]] = [
        (lambda q, p: q.sample(), ["philox_normal", "normal_sample"]),
        (lambda q, p: q.rsample(), ["normal_sample"]),
        (lambda q, p: q.sample_given_eps(t["noise"]), ["normal_sample"]),
        (lambda q, p: q.kl_per_channel(p), ["residual_normal"]),
        (lambda q, p: q.sample_with_kl(p), ["residual_normal"]),
        (lambda q, p: q.log_p_per_channel(t["samples"]), ["normal_log_prob"]),
    ]
    for call, kernels in calls:
        posterior, prior = (t[name].clone().requires_grad_(grad) for name in ("posterior", "prior"))
        q, p = made(posterior, how=how), made(prior, how=how)
        with Operators() as seen:
            call(q, p)
        assert seen.ours == kernels
        assert seen.copies == []
        assert not any("tanh" in name or name.split(".")[-1] == "exp" for name in seen.names)
        assert q.packed.data_ptr() == posterior.data_ptr()


# Halves of one tensor.


def cut(packed: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    z = packed.shape[1] // 2
    wide = torch.cat((packed, packed), dim=1)
    return {
        "chunk": packed.chunk(2, dim=1),
        "slices": (packed[:, :z], packed[:, z:]),
        "inside a wider tensor": (wide[:, z : 2 * z], wide[:, 2 * z : 3 * z]),
        "every second row": (packed[:, :z, ::2], packed[:, z:, ::2]),
        "strided": strided(packed).chunk(2, dim=1),
    }


@pytest.mark.parametrize("name", list(cut(torch.zeros(1, 2, 1, 1))))
def test_halves_are_found(name: str, memory_format: torch.memory_format) -> None:
    mu, log_sigma = cut(inputs()["posterior"].contiguous(memory_format=memory_format))[name]
    with Operators() as seen:
        packed = Normal(mu, log_sigma).packed
    assert seen.copies == []
    assert torch.equal(packed, torch.cat((mu, log_sigma), dim=1))
    normal = Normal(mu, log_sigma)
    truth = kl_formula(torch.cat((mu, log_sigma), dim=1), torch.zeros_like(packed))
    assert_close(normal.kl_per_channel(), truth.sum((2, 3)), 1e-13)


def test_what_only_looks_like_halves_is_copied() -> None:
    x = inputs()["posterior"]
    mu, log_sigma = x.chunk(2, dim=1)
    pairs = {
        "swapped": (log_sigma, mu),
        "the same twice": (mu, mu),
        "overlapping": (x[:, 0:3], x[:, 2:5]),
        "a gap": (x[:, :2], x[:, 3:5]),
        "other strides": (mu, log_sigma.contiguous(memory_format=torch.channels_last)),
        "two tensors": (mu.clone(), log_sigma.clone()),
        "of different images": (x[:1, :3], x[1:, 3:]),
    }
    for name, (first, second) in pairs.items():
        assert torch.equal(Normal(first, second).packed, torch.cat((first, second), dim=1)), name


def test_gradients_of_the_halves_themselves() -> None:
    """Gradients and hooks of mu and log sigma are those of two separate tensors, also with other uses of them."""
    t = inputs()
    x = (1 * t["posterior"]).requires_grad_()
    mu, log_sigma = (1 * x).chunk(2, dim=1)
    seen: list[torch.Tensor] = []
    mu.register_hook(seen.append)
    loss = Normal(mu, log_sigma).kl_per_channel().sum() + (mu * log_sigma).sum()
    found = torch.autograd.grad(loss, (mu, log_sigma, x), retain_graph=True)
    apart = [h.detach().clone().requires_grad_() for h in (mu, log_sigma)]
    zeros = torch.zeros_like(x)
    truth = kl_formula(torch.cat(apart, dim=1), zeros).sum() + (apart[0] * apart[1]).sum()
    expected = torch.autograd.grad(truth, apart)
    for actual, value in zip(found, (*expected, torch.cat(expected, dim=1)), strict=True):
        assert_close(actual, value, 1e-13)
    assert_close(seen[0], expected[0], 1e-13)


@pytest.mark.parametrize("detached", [0, 1])
def test_a_detached_half_gets_no_gradient(detached: int) -> None:
    x = inputs()["posterior"].requires_grad_()
    halves = list(x.chunk(2, dim=1))
    halves[detached] = halves[detached].detach()
    (grad,) = torch.autograd.grad(Normal(*halves).kl_per_channel().sum(), x)
    parts = grad.chunk(2, dim=1)
    assert not parts[detached].any()
    assert parts[1 - detached].all()


# Values kept from one use to the next.


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["halves", "packed", "apart"])
def test_values_from_no_grad_do_not_lose_gradients(how: str, context: Callable[[], Any]) -> None:
    x = inputs()["posterior"].requires_grad_()
    normal = made(x, how=how)
    with context():
        _ = normal.mu, normal.sigma, normal.kl_per_channel(), normal.sample()
    loss = normal.mu.sum() + normal.sigma.sum() + normal.kl_per_channel().sum()
    (grad,) = torch.autograd.grad(loss, x)
    mu, sigma = squashed(x)
    truth = mu.sum() + sigma.sum() + kl_formula(x, torch.zeros_like(x)).sum()
    assert_close(grad, torch.autograd.grad(truth, x)[0], 1e-13)


@pytest.mark.parametrize("how", ["halves", "packed"])
def test_raw_tensors_changed_in_place(how: str) -> None:
    x = inputs()["posterior"]
    normal = made(x, how=how)
    kept = normal.mu.clone()
    x.add_(1.0)
    assert torch.equal(normal.mu, kept)
    for use in (lambda: normal.sigma, lambda: normal.sample(), lambda: normal.kl_per_channel()):
        with pytest.raises(
            RuntimeError, match=r"Normal: (mu|params) must stay as it was .* modified in place"
        ):
            use()


def test_inside_inference_mode() -> None:
    with torch.inference_mode():
        t = inputs()
        q, p = made(t["posterior"]), made(t["prior"])
        assert_close(q.kl_per_channel(p), kl_formula(t["posterior"], t["prior"]).sum((2, 3)), 1e-13)
        assert q.sample()[0].shape == SIZE


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
    found = theirs.log_prob(2 * x - 1)
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
    param, samples = param[:1, :, :2, :2], (1.8 * x[:1, :, :2, :2] - 0.9)

    def function(param: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return DiscMixLogistic(param, 3).log_prob(samples)

    assert_gradcheck(function, {"param": param, "samples": samples}, ("param", "samples"))
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
    """Over every value of the red pixel, the others given: probabilities of [-1, 1], not of [0, 1]."""
    levels = 2**5
    param = pixels()[0][:1, :10, :1, :1].expand(levels, 10, 1, 1) * 0.5
    red = torch.linspace(-1, 1, levels, dtype=torch.float64)
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
    assert_close(ours.mean(), theirs.mean, tolerance)
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


# Errors: class, argument, expected, got.

M = torch.zeros(SIZE)
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
        (lambda: DiscMixLogistic(M, 1.0), TypeError, r"DiscMixLogistic: num_mix must be an int, got float"),
        (lambda: DiscMixLogistic(M, 3, 17), ValueError, r"DiscMixLogistic: num_bits must be between 1 and 16, got 17"),
        (
            lambda: DiscMixLogistic(torch.zeros(2, 10, 4, 5), 1).log_prob(OTHER),
            ValueError,
            r"DiscMixLogistic.log_prob: samples must have shape \(2, 3, 4, 5\), got \(2, 3, 4, 6\)",
        ),
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
