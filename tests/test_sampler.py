"""Sampling as one unit: no waiting, captures that follow the weights, the images that `NVAE.sample` gives."""

from __future__ import annotations

import pytest
import torch
from harness import assert_close
from test_step import WARM_UP, Again, NoWaiting
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.training import Sampler

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = [{}, {"dataset": "photos", "num_nf": 1}, {"dataset": "photos", "num_mixture_dec": 1}]


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("pixels", ["sample", "mean", "logits"])
def test_images_are_those_of_the_model(changes, pixels):
    model = tiny_model(**changes).train()
    images = Sampler(model, temperature=0.7, pixels=pixels)(3, seed=5, pixel_seed=6)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = nf.freeze(model).sample(3, 0.7, seed=5)
        assert_close(logits, model.sample(3, 0.7, seed=5), 2e-5)
        likelihood = model.likelihood(logits)
    expected = {
        "logits": lambda: logits,
        "mean": likelihood.mean,
        "sample": lambda: likelihood.sample(temperature=0.7, seed=6),
    }[pixels]()
    assert torch.equal(images, expected)
    assert not images.requires_grad


def test_statistics_stay_and_seeds_matter():
    model = tiny_model().train()
    before = [b.clone() for b in model.buffers()]
    sampler = Sampler(model, pixels="mean")
    one, two, again = (sampler(2, seed=seed) for seed in (1, 2, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("autocast", [None, "bf16"])
@pytest.mark.parametrize("changes", MODELS)
def test_sampling_never_waits_for_the_device(changes, autocast, route):
    sampler = Sampler(tiny_model(**changes).eval(), temperature=0.8, autocast=autocast)
    sampler(2, seed=1)
    with torch.no_grad(), NoWaiting("cpu") as mode:
        images = sampler.body(2)
    assert mode.calls > 20
    assert torch.isfinite(images).all()
    assert images.dtype == torch.float32


def test_sampling_stays_on_its_device():
    sampler = Sampler(tiny_model(dataset="photos", num_nf=1).eval(), recorder=Again())
    sampler.model.to("meta")
    sampler._latent.seed, sampler._pixel.seed = (torch.empty((), dtype=torch.int64, device="meta"),) * 2
    with torch.no_grad(), NoWaiting("meta"):
        logits = sampler.model.sample(2, 0.8, seed=sampler._latent.seed)
        assert sampler.model.likelihood(logits).sample(seed=sampler._pixel.seed).shape == (2, 3, 32, 32)


def test_captures_follow_the_batch_size():
    sampler = Sampler(tiny_model().eval(), pixels="mean", recorder=Again())
    first = sampler(2, seed=1)
    for _ in range(WARM_UP + 1):
        assert torch.equal(sampler(2, seed=1), first)
    assert sampler._replay.captures == 1
    kept = sampler(2, seed=2)
    copy = kept.clone()
    sampler(2, seed=3)
    assert torch.equal(kept, copy), "images are the caller's, the next replay does not touch them"
    for _ in range(WARM_UP + 1):
        assert sampler(3, seed=1).shape[0] == 3
    assert sampler._replay.captures == 2


def test_a_sampler_keeps_the_weights_it_was_made_with():
    model = tiny_model().train()
    sampler = Sampler(model, pixels="mean")
    first = sampler(2, seed=1)
    with torch.no_grad():
        model.image_head.bias.add_(1.0)
    model(torch.rand(4, 1, 32, 32))  # moves running statistics
    assert torch.equal(sampler(2, seed=1), first)
    assert not torch.equal(Sampler(model, pixels="mean")(2, seed=1), first)
    assert model.training


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("recorder", [None, Again])
def test_an_image_has_noise_of_its_own(changes, recorder):
    """Whatever batch it is in, captured or not; a batch of one stream comes out as before in between."""
    sampler = Sampler(tiny_model(**changes).eval(), recorder=recorder() if recorder else None)
    whole = sampler(5, seed=3, first=10)
    before = sampler(2, seed=3)
    for _ in range(WARM_UP + 1):
        for first in (10, 13):
            found = sampler(2, seed=3, first=first)
            torch.testing.assert_close(found, whole[first - 10 : first - 8], rtol=1e-4, atol=1e-4)
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(sampler(2, seed=3), before)


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="pixels must be one of sample, mean, logits, got 'dots'"):
        Sampler(tiny_model(), pixels="dots")
    with pytest.raises(ValueError, match="autocast must be None, 'bf16' or 'fp16', got 'fp8'"):
        Sampler(tiny_model(), autocast="fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", MODELS)
def test_a_replay_draws_what_the_model_draws(changes):
    model = tiny_model(**changes).cuda().eval()
    sampler = Sampler(model, temperature=0.7, pixels="logits")
    for seed in range(WARM_UP + 3):
        images = sampler(3, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(images, model.sample(3, 0.7, seed=seed), rtol=1e-4, atol=1e-4)
    assert sampler._replay.captures == 1
