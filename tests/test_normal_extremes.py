"""The operators of normal distributions in extreme cases: huge raw values, sigma at its floor, infinities and NaN, index
widths, any width."""

from __future__ import annotations

import math

import pytest
import torch

import nvae_fast as nf

SPECIAL = (0.0, 1e-30, -1e-30, 4.999, 5.0, 5.001, -5.0, 30.0, -30.0, 1e4, -1e4, math.inf, -math.inf, math.nan)


def grid(
    memory_format: torch.memory_format, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every pair of special values as (raw mu, raw log sigma) of the posterior against a few of the prior, and noise."""
    values = torch.tensor(SPECIAL)
    mu, log_sigma = (t.reshape(-1) for t in torch.meshgrid(values, values, indexing="ij"))
    posterior = torch.stack([mu, log_sigma]).reshape(1, 2, len(SPECIAL), len(SPECIAL))
    posterior = posterior.expand(4, -1, -1, -1)
    prior = torch.tensor([[0.0, 0.0], [1e4, -1e4], [-3.0, 30.0], [0.5, 1e-30]])[:, :, None, None].expand_as(
        posterior
    )
    noise = torch.tensor([-6.5, 0.0, 1e-3, 1.0])[:, None, None, None].expand(4, 1, *posterior.shape[2:])
    return tuple(t.clone().to(device, memory_format=memory_format) for t in (posterior, prior, noise))


def same_where_finite(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The same elements are NaN, the same infinite with the same sign, and the others agree."""
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places"
    infinite = expected.isinf()
    assert torch.equal(actual.isinf(), infinite), f"{what}: infinite in other places"
    assert torch.equal(actual[infinite], expected[infinite])
    finite = expected.isfinite()
    torch.testing.assert_close(
        actual[finite], expected[finite], rtol=2e-5, atol=2e-5, msg=lambda m: f"{what}: {m}"
    )


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("clamp, floor", [(5.0, 0.01), (5.0, 0.0), (2.0, 1e-30), (40.0, 0.01)])
def test_extreme_raw_values_behave_as_the_reference(
    residual: bool, clamp: float, floor: float, memory_format: torch.memory_format, device: torch.device
) -> None:
    posterior, prior, noise = grid(memory_format, device)
    # One pixel a map: the sums are then the elements, and a NaN does not hide its neighbours.
    split = [t.permute(0, 2, 3, 1).reshape(-1, t.shape[1], 1, 1) for t in (posterior, prior, noise)]
    for given in ((posterior, prior, noise), split):
        outputs = {}
        for backend in ("auto", "reference"):
            inputs = [t.clone().requires_grad_() for t in given]
            with nf.use_backend(backend):
                out = nf.residual_normal(
                    inputs[0], inputs[1], noise=inputs[2], residual=residual, clamp=clamp, sigma_floor=floor
                )
                grads = torch.autograd.grad(out.z.nansum() + out.kl.nansum(), inputs[:2])
            outputs[backend] = [*out, *grads]
        names = ("z", "kl", "log_q", "log_p")
        for name, actual, expected in zip(names, outputs["auto"], outputs["reference"], strict=False):
            if (
                clamp == 40.0 and name != "z"
            ):  # exp(40) squared: both lose digits, the finite ones are judged elsewhere
                assert torch.equal(actual.isnan(), expected.isnan()), name
            else:
                same_where_finite(actual, expected, name)
        # Gradients: NaN where the reference has NaN, and equal where the pixel itself is finite.
        ordinary = torch.stack([t.isfinite().all(1) for t in outputs["reference"][:1]]).all(0)
        for actual, expected in zip(outputs["auto"][4:], outputs["reference"][4:], strict=True):
            mask = (ordinary & given[0].isfinite().all(1))[:, None].expand_as(expected)
            if clamp <= 5.0:
                same_where_finite(actual[mask], expected[mask], "gradient")


def test_gradients_vanish_where_the_clamp_is_flat(
    memory_format: torch.memory_format, device: torch.device
) -> None:
    raw = torch.tensor([1e4, -1e4, 300.0, -300.0]).repeat(1, 2, 1, 1).to(device, memory_format=memory_format)
    posterior = raw.requires_grad_()
    out = nf.residual_normal(posterior, noise=torch.ones(1, 1, 1, 4, device=device))
    (out.z.sum() + out.kl.sum() + out.log_q.sum() + out.log_p.sum()).backward()
    assert not posterior.grad.any()
    assert torch.isfinite(out.z).all()
    assert torch.isfinite(out.kl).all()


@pytest.mark.parametrize("fill", [math.nan, math.inf])
def test_one_bad_pixel_stays_in_its_row(
    fill: float, memory_format: torch.memory_format, device: torch.device
) -> None:
    posterior = torch.randn(2, 6, 5, 5, device=device).to(memory_format=memory_format)
    noise = torch.randn(2, 3, 5, 5, device=device).to(memory_format=memory_format)
    clean = nf.residual_normal(posterior, noise=noise)
    noise[1, 2, 3, 4] = fill
    out = nf.residual_normal(posterior, noise=noise)
    touched = torch.zeros(2, 3, dtype=torch.bool, device=device)
    touched[1, 2] = True
    assert not torch.isfinite(out.log_q[touched]).any()
    for name in ("kl", "log_q", "log_p"):
        torch.testing.assert_close(getattr(out, name)[~touched], getattr(clean, name)[~touched])


@pytest.mark.parametrize("shape", [(1, 2, 1024, 1024), (65537, 2, 1, 1), (65537, 2, 2, 1)])
def test_index_widths(shape: tuple, memory_format: torch.memory_format, device: torch.device) -> None:
    b, packed, h, w = shape
    posterior = torch.randn(shape, device=device).to(memory_format=memory_format)
    out = nf.residual_normal(posterior, seed=3)
    noise = nf.philox_normal((b, packed // 2, h, w), 3, device=device)
    mu, log_sigma = (5 * torch.tanh(t.double() / 5) for t in posterior.chunk(2, dim=1))
    z = mu + (log_sigma.exp() + 0.01) * noise.double()
    torch.testing.assert_close(out.z.double(), z, rtol=2e-6, atol=2e-6)
    with nf.use_backend("reference"):
        expected = nf.residual_normal(posterior.double(), noise=noise.double())
    for name in ("kl", "log_q", "log_p"):
        torch.testing.assert_close(getattr(out, name).double(), getattr(expected, name), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("latent", [1, 2, 3, 7, 8, 15, 16, 17, 20, 31, 33, 64, 100, 130])
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_any_width_in_any_layout(latent: int, side: int, device: torch.device) -> None:
    posterior, prior = (torch.randn(2, 2 * latent, side, side, device=device) for _ in range(2))
    noise = nf.philox_normal((2, latent, side, side), 9, device=device)
    expected = nf.residual_normal(posterior.double(), prior.double(), noise=noise.double())
    for layout in (torch.contiguous_format, torch.channels_last):
        out = nf.residual_normal(posterior.to(memory_format=layout), prior.to(memory_format=layout), seed=9)
        for actual, truth in zip(out, expected, strict=True):
            torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=1e-5)


def test_layouts_may_differ_and_strides_are_free(device: torch.device) -> None:
    wide = torch.randn(2, 12, 6, 7, device=device)
    posterior, prior = wide[:, 2:8], torch.randn(2, 6, 7, 6, device=device).transpose(2, 3)
    noise = torch.randn(2, 3, 6, 7, device=device).to(memory_format=torch.channels_last)
    expected = nf.residual_normal(posterior.contiguous(), prior.contiguous(), noise=noise.contiguous())
    for q in (posterior, posterior.to(memory_format=torch.channels_last), wide.flip(3).flip(3)[:, 2:8]):
        for actual, truth in zip(nf.residual_normal(q, prior, noise=noise), expected, strict=True):
            torch.testing.assert_close(actual, truth, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("clamp", [1e-30, 1e-3, 2.0**-7, 2.0**7, 129.0, 1e3, 1e6, 1e20])
def test_accuracy_at_any_clamp(
    clamp: float, memory_format: torch.memory_format, device: torch.device
) -> None:
    """Powers of the clamp leave float32; what is computed with them does not."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(2, 6, 5, 16, generator=generator, dtype=torch.float64)
    raw[:, :3] *= clamp
    raw[:, 3:] *= min(clamp, 1.0)
    noise = torch.randn(2, 3, 5, 16, generator=generator)
    results = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        packed = raw.float().to(device, dtype).contiguous(memory_format=memory_format).requires_grad_()
        eps = noise.to(device, dtype)
        with nf.use_backend(backend):
            z, _, log_q, _ = nf.residual_normal(packed, noise=eps, clamp=clamp)
            drawn = nf.normal_sample(packed, noise=eps, clamp=clamp)
            (grad,) = torch.autograd.grad((z + drawn).sum(), packed)
        size = max(clamp, 1.0)
        results.append([z / size, drawn / size, log_q, grad])
    for name, actual, expected in zip(("z", "sample", "log_q", "gradient"), *results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(
    "outputs", [("z",), ("kl",), ("log_q",), ("log_p",), ("z", "kl"), ("kl", "log_q", "log_p")]
)
def test_nan_reaches_the_gradients_that_pytorch_gives_it(
    outputs: tuple[str, ...], residual: bool, memory_format: torch.memory_format, device: torch.device
) -> None:
    """One NaN among mu and log sigma of posterior and prior and the noise: gradients that do not depend on it are numbers."""
    for bad in range(5):
        given = [torch.full((1, 2, 1, 5), 0.3), torch.full((1, 2, 1, 5), -0.2), torch.full((1, 1, 1, 5), 0.7)]
        given[bad // 2][0, bad % 2, 0, 2] = math.nan
        leaves = [t.to(device, memory_format=memory_format).requires_grad_() for t in given]
        found = {}
        for backend in ("auto", "reference"):
            with nf.use_backend(backend):
                out = nf.residual_normal(leaves[0], leaves[1], noise=leaves[2], residual=residual)
                loss = sum(getattr(out, name).sum() for name in outputs)
                found[backend] = torch.autograd.grad(loss, leaves, allow_unused=True)
        for name, actual, expected in zip(("posterior", "prior", "noise"), *found.values(), strict=True):
            expected = torch.zeros(()) if expected is None else expected
            actual = torch.zeros_like(expected) if actual is None else actual
            assert not (actual.isnan() & ~expected.isnan()).any(), f"{name}, NaN number {bad}"
            torch.testing.assert_close(actual[~actual.isnan()], expected.expand_as(actual)[~actual.isnan()])
