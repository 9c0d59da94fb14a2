"""``NVAE.encode``, ``decode``, ``reconstruct``, temperatures of groups, and the way between two latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_freeze import FORMATS, MODELS, images, trained
from test_step import NoWaiting
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.models.latents import linear_temperatures
from nvae_fast.ops.philox import split_seed

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["default", "flows", "normal", "vanilla"]


def entering(model: nf.NVAE, call: Callable[[], Any]) -> list[torch.Tensor]:
    """z of every group as it enters the decoder while ``call`` runs."""
    found: list[torch.Tensor] = []
    parts = [p for p in model.decoder if isinstance(p, nf.nn.DecoderCombiner)] or [model.vanilla_stem]
    handles = [p.register_forward_pre_hook(lambda module, given: found.append(given[-1])) for p in parts]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("memory", FORMATS)
@pytest.mark.parametrize("frozen", [False, True])
def test_encode_then_decode_is_forward_bit_for_bit(name: str, memory: str, frozen: bool) -> None:
    model: Any = trained(**MODELS[name]).to(memory_format=FORMATS[memory])
    model = nf.freeze(model) if frozen else model
    x = images(model, 3)
    for seed in (7, torch.tensor(7), torch.tensor([4, 5, 6])):
        out, latents = model(x, seed=seed), model.encode(x, seed=seed)
        assert [tuple(z.shape) for z in latents] == [(3, *shape) for shape in model.config.z_shapes]
        assert equal(latents, out.z)
        assert torch.equal(model.decode(latents), out.logits)
        assert torch.equal(model.reconstruct(x, seed=seed), model.likelihood(out.logits).mean())
    noise = [torch.randn(3, *shape) for shape in model.config.z_shapes]
    assert torch.equal(model.decode(model.encode(x, noise=noise)), model(x, noise=noise).logits)
    assert torch.equal(
        model.reconstruct(x, noise=noise), model.likelihood(model(x, noise=noise).logits).mean()
    )
    assert model.encode(x[:0])[0].shape[0] == model.decode(model.encode(x[:0])).shape[0] == 0


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_enters_the_decoder(name: str) -> None:
    model = trained(**MODELS[name])
    x = images(model, 2)
    assert equal(entering(model, lambda: model(x, seed=3)), model.encode(x, seed=3))
    # The noise of a group is the stream of its sub-seed.
    streams = zip(split_seed(3, model.config.num_groups), model.config.z_shapes, strict=True)
    noise = [nf.philox_normal((2, *shape), seed) for seed, shape in streams]
    for z, expected in zip(model.encode(x, seed=3), model.encode(x, noise=noise), strict=True):
        torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)
    latents = [z + 1 for z in model.encode(x, seed=3)]
    assert equal(entering(model, lambda: model.decode(latents)), latents)
    assert not torch.equal(model.decode(latents), model(x, seed=3).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_means_of_the_posteriors(name: str) -> None:
    model = trained(**MODELS[name])
    x = images(model, 2)
    raw: list[torch.Tensor] = []
    handle = model.posterior[0].register_forward_hook(lambda module, given, result: raw.append(result))
    latents = model.encode(x, sample=False)
    handle.remove()
    z = 5 * torch.tanh(raw[0].chunk(2, dim=1)[0].double() / 5)
    for flow in model.flows[: model.config.num_nf]:
        z = flow(z.float())
    torch.testing.assert_close(latents[0], z.float(), rtol=1e-5, atol=1e-5)
    zeros = [torch.zeros(2, *shape) for shape in model.config.z_shapes]
    assert equal(latents, model(x, noise=zeros).z)
    assert equal(latents, model.encode(x, sample=False))
    assert torch.equal(model.reconstruct(x, sample=False), model.likelihood(model.decode(latents)).mean())


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("seed", [5, torch.tensor([5, 9])], ids=["one seed", "one per image"])
def test_groups_that_are_not_given_are_drawn_as_sample_draws_them(seed: Any, frozen: bool) -> None:
    model: Any = trained(num_groups_per_scale=4)
    model = nf.freeze(model) if frozen else model
    temperature = [0.9, 0.7, 0.5, 0.3]
    drawn = entering(model, lambda: model.sample(2, temperature, seed=seed))
    expected = model.sample(2, temperature, seed=seed)
    for given in (drawn[:1], drawn[:3], [None, drawn[1]], [drawn[0], None, None, drawn[3]]):
        assert torch.equal(model.decode(given, temperature, seed=seed), expected)
    assert not torch.equal(model.decode([drawn[0] + 1], temperature, seed=seed), expected)
    assert not torch.equal(model.decode(drawn[:1], temperature[::-1], seed=seed), expected)
    assert not torch.equal(model.decode(drawn[:1], seed=1), model.decode(drawn[:1], seed=2))


@torch.no_grad()
def test_temperatures_of_groups() -> None:
    model = trained(num_groups_per_scale=3)
    assert torch.equal(model.sample(2, [0.6] * 3, seed=1), model.sample(2, 0.6, seed=1))
    cold = entering(model, lambda: model.sample(2, [0.0, 1.0, 0.0], seed=1))
    assert torch.equal(cold[0], torch.zeros_like(cold[0]))  # the mean of the first prior
    warm = entering(model, lambda: model.sample(2, [0.0, 0.5, 0.0], seed=1))
    mean = entering(model, lambda: model.sample(2, 0.0, seed=1))
    torch.testing.assert_close(cold[1] - mean[1], 2 * (warm[1] - mean[1]), rtol=1e-4, atol=1e-5)
    assert linear_temperatures(0.6, 1.0, 3) == pytest.approx([0.6, 0.8, 1.0])
    assert linear_temperatures(0.6, 1.0, 1) == [0.6]
    numpy = pytest.importorskip("numpy")
    assert torch.equal(model.sample(2, numpy.float32(0.5), seed=1), model.sample(2, 0.5, seed=1))
    assert torch.equal(
        model.sample(2, numpy.array([1.0, 0.5, 0.25]), seed=1), model.sample(2, [1, 0.5, 0.25], seed=1)
    )
    before = [b.clone() for b in model.buffers()]
    model.readjust_batch_norm([0.6, 0.8, 1.0], passes=2, batch=4, seed=1)
    lists = [b.clone() for b in model.buffers()]
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    model.readjust_batch_norm(0.6, passes=2, batch=4, seed=1)
    assert not equal(lists, list(model.buffers()))


@torch.no_grad()
def test_the_default_generator_is_left_alone_where_nothing_is_drawn() -> None:
    model = trained()
    x = images(model, 2)
    before = torch.get_rng_state()
    model.decode(model.encode(x, sample=False))
    model.decode(model.encode(x, seed=1)[:1], seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    first = model.encode(x)
    torch.manual_seed(3)
    assert equal(first, model(x).z)


def test_derivatives_of_an_image_in_its_latents() -> None:
    model = trained(num_groups_per_scale=3).double()
    x = images(model, 2).double()
    latents = [z.detach().requires_grad_() for z in model.encode(x, seed=1)]
    weight = torch.randn(2, 1, 32, 32, dtype=torch.float64)

    def value(step: float) -> torch.Tensor:
        return (model.decode([z + step * torch.ones_like(z) for z in latents]) * weight).sum()

    found = sum(g.sum() for g in torch.autograd.grad(value(0.0), latents))
    expected = (value(1e-5) - value(-1e-5)) / 2e-5
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-8)
    # z of forward carries gradients into the encoder.
    model.encode(x, seed=1)[-1].sum().backward()
    assert model.stem.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
def test_under_autocast(frozen: bool) -> None:
    model: Any = nf.freeze(trained()) if frozen else trained()
    x = images(model, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = model.encode(x, seed=1)
        assert torch.equal(model.decode(latents), model(x, seed=1).logits)
    assert latents[0].dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"NVAE.decode: latents\[0\] must be torch.float32 like the model"):
        model.decode(latents)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"dataset": "photos", "num_nf": 1}])
def test_nothing_waits_for_the_device(changes: dict[str, Any], route: str) -> None:
    model: Any = nf.freeze(tiny_model(**changes))
    x = images(model, 2)
    seed = torch.tensor(3)
    model.decode(model.encode(x, seed=seed))
    with NoWaiting("cpu") as mode:
        latents = model.encode(x, seed=seed)
        halves = [[z[i : i + 1] for z in latents] for i in (0, 1)]
        model.decode([*nf.interpolate_latents(*halves, 0.3)[:1], None], [0.7, 0.9], seed=seed)
        model.encode(x, sample=False)
    assert mode.calls > 20


@pytest.mark.parametrize("frozen", [False, True])
def test_encode_and_decode_are_one_graph_each(frozen: bool) -> None:
    torch._dynamo.reset()
    model: Any = trained(image_size=16, use_se=True)
    model = nf.freeze(model) if frozen else model
    x = images(model, 2)
    encode, decode = (
        torch.compile(f, backend="eager", fullgraph=True, dynamic=False) for f in (model.encode, model.decode)
    )
    with torch.no_grad():
        latents = encode(x, seed=torch.tensor(1))
        for found, expected in zip(latents, model.encode(x, seed=1), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        found = decode([latents[0], None], [0.8, 0.6], seed=torch.tensor(2))
        torch.testing.assert_close(found, model.decode(latents[:1], [0.8, 0.6], seed=2), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decode(latents), model.decode(latents), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_wrong_arguments_are_named() -> None:
    model = tiny_model().eval()  # two groups of (2, 16, 16)
    x = torch.rand(2, 1, 32, 32)
    z = torch.zeros(2, 2, 16, 16)
    for error, message, call in [
        (ValueError, r"NVAE.encode: x must have shape \(B, 1, 32, 32\)", lambda: model.encode(x[0])),
        (ValueError, r"NVAE.encode: x must hold images in \[0, 1\], .* 255", lambda: model.encode(x * 255)),
        (ValueError, r"NVAE.reconstruct: x must hold images in \[0, 1\]", lambda: model.reconstruct(2 * x - 1)),
        (TypeError, "NVAE.encode: x must be a torch.Tensor, got numpy.ndarray", lambda: model.encode(x.numpy())),
        (ValueError, "NVAE.encode: noise must have one entry per group", lambda: model.encode(x, noise=[z])),
        (ValueError, "NVAE.encode: seed must be None where sample=False", lambda: model.encode(x, seed=1, sample=False)),
        (ValueError, "reconstruct: noise must be None where", lambda: model.reconstruct(x, [z, z], sample=False)),
        (TypeError, "NVAE.encode: sample must be True or False, got 1", lambda: model.encode(x, sample=1)),
        (TypeError, "NVAE.encode: seed must be an int", lambda: model.encode(x, seed=1.5)),
        (TypeError, "NVAE.decode: latents must be a sequence .* got Tensor", lambda: model.decode(z)),
        (ValueError, r"latents must have one entry per group \(2\), got 3", lambda: model.decode([z, z, z])),
        (ValueError, "NVAE.decode: latents must hold a tensor", lambda: model.decode([None])),
        (ValueError, "NVAE.decode: latents must hold a tensor", lambda: model.decode([])),
        (ValueError, r"latents\[1\] must have shape \(2, 2, 16, 16\)", lambda: model.decode([z, z[:1]])),
        (ValueError, r"latents\[0\] must have shape \(B, C, H, W\)", lambda: model.decode([z[0]])),
        (TypeError, r"latents\[0\] must have one of the dtypes", lambda: model.decode([z.int()])),
        (TypeError, r"latents\[1\] must be torch.float32 like", lambda: model.decode([z, z.double()])),
        (TypeError, r"latents\[0\] must be a torch.Tensor, got str", lambda: model.decode(["z"])),
        (ValueError, "NVAE.decode: seed must be one number or one", lambda: model.decode([z], seed=torch.arange(3))),
        (ValueError, r"decode: temperature must be one number or one per group \(2\), got 1 numbers",
         lambda: model.decode([z], [1.0])),
        (ValueError, r"NVAE.sample: temperature\[1\] must be a finite number >= 0, got -1",
         lambda: model.sample(1, [1.0, -1])),
        (ValueError, "NVAE.sample: temperature must be a finite number >= 0, got 'warm'",
         lambda: model.sample(1, "warm")),
        (ValueError, "readjust_batch_norm: temperature must be one number or one per group",
         lambda: model.readjust_batch_norm([1.0])),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    assert not model.training


# ------------------------------------------------------------------------------------------ between two latents


def test_the_arc_keeps_the_length_and_the_line_does_not() -> None:
    torch.manual_seed(0)
    a, b = ([torch.randn(3, 4, 8, 8), torch.randn(3, 4, 16, 16)] for _ in range(2))
    arc = nf.interpolate_latents(a, b, 0.5)
    line = nf.interpolate_latents(a, b, 0.5, mode="linear")
    for x, y, round_, straight in zip(a, b, arc, line, strict=True):
        length = (x.flatten(1).norm(dim=1) + y.flatten(1).norm(dim=1)) / 2
        torch.testing.assert_close(round_.flatten(1).norm(dim=1), length, rtol=0.02, atol=0)
        torch.testing.assert_close(straight.flatten(1).norm(dim=1), length * math.sqrt(0.5), rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_ways_against_their_formula(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    a, b = torch.randn(2, 3, 4, 4).to(dtype), torch.randn(2, 3, 4, 4).to(dtype)
    for fraction in (0, 0.25, 0.5, 1):
        (arc,) = nf.interpolate_latents([a], [b], fraction)
        (line,) = nf.interpolate_latents([a], [b], fraction, mode="linear")
        assert arc.dtype == line.dtype == dtype
        for i in range(2):
            x, y = a[i].double(), b[i].double()
            angle = math.acos(float((x * y).sum() / x.norm() / y.norm()))
            left, right = (math.sin(t * angle) / math.sin(angle) for t in (1 - fraction, fraction))
            torch.testing.assert_close(arc[i], (left * x + right * y).to(dtype))
            torch.testing.assert_close(line[i], ((1 - fraction) * x + fraction * y).to(dtype))
    for mode in ("spherical", "linear"):
        assert torch.equal(nf.interpolate_latents([a], [b], 0, mode=mode)[0], a)
        assert torch.equal(nf.interpolate_latents([a], [b], 1.0, mode=mode)[0], b)
    close = a + 1e-9 * torch.ones_like(a)
    for other in (a, 2 * a, -a, torch.zeros_like(a), close):
        (arc,) = nf.interpolate_latents([a], [other], 0.25)
        torch.testing.assert_close(arc, (0.75 * a.double() + 0.25 * other.double()).to(dtype))
    assert nf.interpolate_latents([a[:0]], [b[:0]], 0.5)[0].shape == a[:0].shape


def test_wrong_ways_are_named() -> None:
    z = torch.zeros(2, 3, 4, 4)
    for error, message, call in [
        (ValueError, "mode must be one of", lambda: nf.interpolate_latents([z], [z], 0.5, mode="cubic")),
        (ValueError, "fraction must be a number from 0 to 1, got 1.5", lambda: nf.interpolate_latents([z], [z], 1.5)),
        (ValueError, "fraction must be a number", lambda: nf.interpolate_latents([z], [z], torch.tensor(0.5))),
        (TypeError, "start must be a sequence", lambda: nf.interpolate_latents(z, [z], 0.5)),
        (ValueError, r"end must have as many groups as start \(1\), got 2", lambda: nf.interpolate_latents([z], [z, z], 0)),
        (ValueError, r"end\[0\] must have shape", lambda: nf.interpolate_latents([z], [z[:1]], 0)),
        (TypeError, r"end\[0\] must have start\[0\]'s dtype", lambda: nf.interpolate_latents([z], [z.double()], 0)),
    ]:  # fmt: skip
        with pytest.raises(error, match=f"interpolate_latents: .*{message}|{message}"):
            call()
