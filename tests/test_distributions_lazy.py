"""nvae_fast.distributions computes and copies nothing that nobody asked for, and what it keeps is true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import assert_close, place, strided
from internals import use_operators
from normals import SIZE, Operators, inputs, kl_formula, made, squashed

from nvae_fast.distributions import (
    Bernoulli,
    DiscMixLogistic,
    Normal,
)

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
    use_operators(monkeypatch)
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
