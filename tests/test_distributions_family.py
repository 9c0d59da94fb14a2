"""nvae_fast.distributions in code written for classes of those names: ranges, attributes, a training script."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Record, assert_close, assert_compiles
from normals import SIZE, inputs, made, squashed

import nvae_fast as nf
from nvae_fast.distributions import Bernoulli, DiscMixLogistic, Normal, NormalDecoder

# Ranges: which images each method takes, and what it says to others.

PARAM = torch.randn(2, 30, 4, 5, generator=torch.Generator().manual_seed(1))
UNIT = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
METHODS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "DiscMixLogistic.log_prob": DiscMixLogistic(PARAM, 3).log_prob,
    "NormalDecoder.log_prob": NormalDecoder(PARAM[:, :6]).log_prob,
    "Bernoulli.log_prob": Bernoulli(PARAM[:, :3]).log_prob,
}


@pytest.mark.parametrize("name", list(METHODS))
@pytest.mark.parametrize(
    "images, advice",
    [
        (2 * UNIT - 1, r"use \(samples \+ 1\) / 2"),
        (255 * UNIT, r"divide by 255 \(samples / 255\)"),
        (4 * UNIT - 2, "undo the normalisation"),
    ],
)
def test_log_prob_takes_images_from_0_to_1_alone(name: str, images: torch.Tensor, advice: str) -> None:
    assert torch.isfinite(METHODS[name](UNIT)).all()
    with pytest.raises(ValueError, match=rf"{name}: samples must hold images in \[0, 1\], got .*{advice}"):
        METHODS[name](images)


def test_log_p_takes_images_from_minus_1_to_1_alone() -> None:
    mixture = DiscMixLogistic(PARAM, 3)
    assert_close(mixture.log_p(2 * UNIT - 1), mixture.log_prob(UNIT), 1e-6)
    message = r"DiscMixLogistic.log_p: samples must hold images in \[-1, 1\], got .*use samples / 127\.5 - 1"
    with pytest.raises(ValueError, match=message):
        mixture.log_p(255 * UNIT)
    with pytest.raises(ValueError, match=r"DiscMixLogistic.log_p: samples must have shape \(2, 3, 4, 5\)"):
        mixture.log_p(UNIT[:1])


def test_range_checks_leave_compilers_and_transforms_alone() -> None:
    def function(param: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mixture = DiscMixLogistic(param, 3)
        normal = Normal(param[:, :3], param[:, 3:6])
        normal.sigma = normal.sigma * 0.5
        return (
            mixture.log_prob(x),
            mixture.log_p(2 * x - 1),
            NormalDecoder(param[:, :6]).log_prob(x),
            Bernoulli(param[:, :3]).log_prob(x),
            normal.log_p_per_channel(x),
        )

    tensors = {"param": PARAM.clone(), "x": UNIT.clone()}
    assert_compiles(function, tensors, ("param",))
    found = torch.func.vmap(function)(PARAM[:, None], UNIT[:, None])
    for actual, expected in zip(found, function(**tensors), strict=True):
        assert_close(actual.flatten(), expected.flatten(), 1e-5)


# Attributes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_parts_of_a_mixture(dtype: torch.dtype) -> None:
    """Against the recorded layout: the log-probability written out from the attributes is that of the kernel."""
    param, levels = PARAM.to(dtype), 255
    mixture = DiscMixLogistic(torch.cat((param[:, :15], param[:, 15:] * 5), dim=1), num_mix=3)
    assert mixture.logit_probs.shape == (2, 3, 4, 5)
    parts = mixture.logit_probs, mixture.means, mixture.log_scales, mixture.coeffs
    for part in parts:
        assert part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for part in parts[1:]:
        assert part.shape == (2, 3, 3, 4, 5)
    logits, means, log_scales, coeffs = (part.double() for part in parts)
    x = (UNIT.double() * levels).round() / levels
    red, green, _ = (2 * x - 1)[:, :, None].unbind(1)
    zero = torch.zeros_like(coeffs[:, 0])
    shift = torch.stack((zero, coeffs[:, 0] * red, coeffs[:, 1] * red + coeffs[:, 2] * green), dim=1)
    centred = (2 * x - 1)[:, :, None] - means - shift
    upper, lower = ((centred + sign / levels) / log_scales.exp() for sign in (1, -1))
    difference = torch.sigmoid(upper) - torch.sigmoid(lower)
    usual = (difference > 1e-5).all(2) & (x > 0.001) & (x < 0.99)
    usual = usual.all(1)
    log_p = torch.logsumexp(difference.log().sum(1) + F.log_softmax(logits, 1), 1)
    assert usual.any()
    assert_close(mixture.log_prob(x)[usual], log_p[usual], 1e-4)


def test_log_scales_are_clamped() -> None:
    assert DiscMixLogistic(torch.full((1, 10, 2, 2), -50.0), 1).log_scales.min() == -7


@pytest.mark.parametrize("how", ["halves", "packed"])
@pytest.mark.parametrize("change", ["set", "expanded", "scaled in place", "modified"])
def test_mu_and_sigma_may_be_set(how: str, change: str) -> None:
    """All methods then agree with the formulas; a prior so changed counts as well."""
    t = inputs()
    normal, prior = made(t["posterior"], how=how), made(t["prior"], how=how)
    mu, sigma = squashed(t["posterior"])
    if change == "set":
        mu, sigma = mu + 0.5, torch.full_like(sigma, 2.0)
        normal.mu, normal.sigma = mu, 2
    elif change == "expanded":
        sigma = torch.full_like(sigma, 0.5)
        normal.sigma = torch.tensor(0.25)
        normal.sigma *= 2
    elif change == "scaled in place":
        sigma = sigma * 0.5
        normal.sigma *= 0.5
    else:
        mu = mu + 1
        normal.mu.add_(1)
    theirs = torch.distributions.Normal(mu, sigma)
    other = torch.distributions.Normal(prior.mu, prior.sigma)
    kl = torch.distributions.kl_divergence(theirs, other)
    z, eps = normal.sample(seed=3)
    assert_close(z, mu + sigma * eps, 1e-14)
    assert_close(normal.rsample(seed=3), z, 1e-14)
    assert_close(normal.log_p(t["samples"]), theirs.log_prob(t["samples"]), 1e-13)
    assert_close(normal.log_p_per_channel(t["samples"]), theirs.log_prob(t["samples"]).sum((2, 3)), 1e-13)
    assert_close(normal.kl_per_channel(prior), kl.sum((2, 3)), 1e-13)
    found = normal.sample_with_kl(prior, seed=3)
    assert_close(found.z, z, 1e-14)
    assert_close(found.kl, kl.sum((2, 3)), 1e-13)
    back = torch.distributions.kl_divergence(other, theirs)
    assert_close(prior.kl_per_channel(normal), back.sum((2, 3)), 1e-13)
    assert normal.kl_per_channel().shape == SIZE[:2]
    with pytest.raises(RuntimeError, match=r"Normal.packed: mu or sigma was set"):
        _ = normal.packed


def test_gradients_reach_what_was_set() -> None:
    t = inputs()
    sigma = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    normal = made(t["posterior"].requires_grad_())
    normal.sigma = sigma
    grads = torch.autograd.grad(normal.kl_per_channel().sum(), (sigma, t["posterior"]))
    count = math.prod(SIZE)
    assert_close(grads[0], (0.7 / 1.01**2 - 1 / 0.7) * torch.tensor(count, dtype=torch.float64), 1e-12)
    assert grads[1].chunk(2, dim=1)[0].any()


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("mu", torch.zeros(2, 3, 4, 6), ValueError, r"Normal.mu: mu must expand to \(2, 3, 4, 5\), got \(2, 3, 4, 6\)"),
        ("mu", torch.zeros(SIZE).int(), TypeError, r"Normal.mu: mu must have one of the dtypes"),
        ("mu", math.nan, ValueError, r"Normal.mu: mu must be a finite number, got nan"),
        ("mu", True, TypeError, r"Normal.mu: mu must be a tensor or a number, got bool"),
        ("sigma", -1, ValueError, r"Normal.sigma: sigma must be a finite number >= 0, got -1"),
        ("sigma", "1", TypeError, r"Normal.sigma: sigma must be a tensor or a number, got str"),
        ("sigma", torch.ones(SIZE, device="meta"), ValueError, r"Normal.sigma: sigma must be on cpu"),
    ],
)  # fmt: skip
def test_what_mu_and_sigma_may_not_be(name: str, value: object, error: type[Exception], message: str) -> None:
    normal = made(inputs()["posterior"])
    before = normal.kl_per_channel()
    with pytest.raises(error, match=message):
        setattr(normal, name, value)
    assert torch.equal(normal.kl_per_channel(), before)


# Normal pixels.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normal_decoder(dtype: torch.dtype) -> None:
    param = PARAM[:, :6].to(dtype)
    decoder = NormalDecoder(param, num_bits=8)
    mu, sigma = squashed(param.double())
    theirs = torch.distributions.Normal(mu, sigma)
    assert_close(decoder.log_prob(UNIT), theirs.log_prob(2 * UNIT.double() - 1), 1e-5)
    assert_close(decoder.dist.mu, mu, 1e-6)
    assert_close(decoder.mean(), (mu / 2 + 0.5).clamp(0, 1), 1e-6)
    for t in (1.0, 0.6, 0.0):
        eps = decoder.dist.sample(seed=4)[1].double()
        image = decoder.sample(t, seed=4)
        assert image.dtype == dtype
        tolerance = {torch.bfloat16: 8e-3, torch.float32: 1e-6, torch.float64: 1e-6}[dtype]
        assert_close(image, ((mu + t * sigma * eps) / 2 + 0.5).clamp(0, 1), tolerance)
    decoder.dist.sigma = 0.0
    assert_close(decoder.sample(), decoder.mean(), tolerance)


# A training script in the family's style, on recorded numbers.


class Decoder:
    """The end of a model of the family: which distribution the raw output parametrises."""

    def __init__(self, dataset: str, num_mix: int, num_bits: int) -> None:
        self.dataset, self.num_mix, self.num_bits = dataset, num_mix, num_bits

    def decoder_output(self, logits: torch.Tensor) -> Bernoulli | DiscMixLogistic | NormalDecoder:
        if self.dataset in ("mnist", "omniglot"):
            return Bernoulli(logits=logits)
        if self.num_mix == 1:
            return NormalDecoder(logits, num_bits=self.num_bits)
        return DiscMixLogistic(logits, self.num_mix, num_bits=self.num_bits)


def reconstruction_loss(
    decoder: Bernoulli | DiscMixLogistic | NormalDecoder, x: torch.Tensor
) -> torch.Tensor:
    log_p = decoder.log_prob(x)
    return -torch.sum(log_p, dim=(1, 2) if isinstance(decoder, DiscMixLogistic) else (1, 2, 3))


@pytest.mark.parametrize("name", ["mnist_tiny", "cifar10_flow_tiny"])
def test_recorded_reconstruction_losses(name: str) -> None:
    record = Record(name)
    args, x, logits, recon = record.args, record["x"], record["eval/logits"], record["eval/recon"]
    model = Decoder(args["dataset"], args["num_mixture_dec"], args["num_x_bits"])
    output = model.decoder_output(logits)
    if isinstance(output, Bernoulli):  # recorded on the inner 28x28
        output, x = model.decoder_output(logits[:, :, 2:-2, 2:-2]), x[:, :, 2:-2, 2:-2]
    assert_close(reconstruction_loss(output, x), recon, 2e-6)
    for image in (output.mean if isinstance(output, Bernoulli) else output.mean(), output.sample(0.7)):
        assert image.shape == x.shape
        assert image.min() >= 0
        assert image.max() <= 1


@pytest.mark.parametrize("dataset, num_mix", [("mnist", 1), ("cifar10", 3), ("celeba_64", 1)])
def test_a_training_step_written_for_the_family(dataset: str, num_mix: int) -> None:
    """Prior and relative posterior, KL per group, likelihood, backward, a picture: on the formulas, gradients too."""
    torch.manual_seed(0)
    channels = 1 if dataset == "mnist" else 3
    x = (torch.rand(2, channels, 8, 8, dtype=torch.float64) * 255).round() / 255
    x = x.round() if dataset == "mnist" else x
    head = channels if dataset == "mnist" else 10 * num_mix if num_mix > 1 else 6
    weight = torch.randn(head, 4, 1, 1, dtype=torch.float64) * 0.3
    features = torch.randn(2, 8, 8, 8, dtype=torch.float64)

    def step(family: bool) -> list[torch.Tensor]:
        leaf = features.clone().requires_grad_()
        mu, log_sigma = torch.chunk(leaf, 2, dim=1)
        delta_mu, delta_sigma = torch.chunk(0.3 * leaf.flip(1), 2, dim=1)
        eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if family:
            prior = Normal(mu, log_sigma)
            posterior = Normal(mu + delta_mu, log_sigma + delta_sigma)
            z = posterior.sample_given_eps(eps)
            log_q = torch.sum(posterior.log_p(z), dim=(1, 2, 3))
            kl = torch.sum(posterior.kl(prior), dim=(1, 2, 3))
        else:
            params = torch.cat((mu, log_sigma), 1), torch.cat((mu + delta_mu, log_sigma + delta_sigma), 1)
            theirs, relative = (torch.distributions.Normal(*squashed(p)) for p in params)
            z = relative.loc + relative.scale * eps
            log_q = relative.log_prob(z).sum((1, 2, 3))
            kl = torch.distributions.kl_divergence(relative, theirs).sum((1, 2, 3))
        logits = F.conv2d(z, weight)
        if family:
            output = Decoder(dataset, num_mix, 8).decoder_output(logits)
            recon = reconstruction_loss(output, x)
            output.sample(1.0)
        elif dataset == "mnist":
            recon = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum((1, 2, 3))
        elif num_mix == 1:
            recon = -torch.distributions.Normal(*squashed(logits)).log_prob(2 * x - 1).sum((1, 2, 3))
        else:
            with nf.use_backend("reference"):
                recon = -nf.mixture_logistic_log_prob(logits, x, num_mixtures=num_mix).sum((1, 2))
        loss = torch.mean(recon + kl)
        return [loss, log_q, *torch.autograd.grad(loss, leaf)]

    for actual, expected in zip(step(True), step(False), strict=True):
        assert_close(actual, expected, 1e-10)
