"""normal_sample: fp64 truth, temperature, the statistics of its draws, and everything an op must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    DTYPES,
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
)

import nvae_fast as nf

NAMES = ("params", "noise")


def inputs(size: tuple[int, int, int, int] = (2, 3, 4, 5)) -> Tensors:
    b, z, h, w = size
    generator = torch.Generator().manual_seed(2)
    return {
        "params": 2 * torch.randn((b, 2 * z, h, w), generator=generator, dtype=torch.float64),
        "noise": torch.randn((b, z, h, w), generator=generator, dtype=torch.float64),
    }


def formula(params: torch.Tensor, noise: torch.Tensor, temperature: float = 0.7) -> torch.Tensor:
    raw_mu, raw_log_sigma = params.chunk(2, dim=1)
    sigma = temperature * (torch.exp(5 * torch.tanh(raw_log_sigma / 5)) + 0.01)
    return 5 * torch.tanh(raw_mu / 5) + sigma * noise


def op(params: Any, noise: Any = None, **options: Any) -> torch.Tensor:
    return nf.normal_sample(params, noise=noise, **{"temperature": 0.7, **options})


@pytest.mark.parametrize("size", [(2, 3, 4, 4), (1, 1, 1, 1), (3, 5, 7, 11)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype, size: tuple, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    tensors = place(inputs(size), dtype, memory_format, device)
    assert_accurate(op, formula, tensors, NAMES)
    assert op(**tensors).dtype == dtype


@pytest.mark.parametrize("temperature", [0.0, 0.4, 1.0, 1.3])
def test_temperature_multiplies_sigma(temperature: float, route: str) -> None:
    tensors = inputs()
    assert_close(op(**tensors, temperature=temperature), formula(**tensors, temperature=temperature), 1e-13)


def test_without_clamp_and_floor(route: str) -> None:
    tensors = inputs()
    mu, log_sigma = tensors["params"].chunk(2, dim=1)
    z = op(**tensors, temperature=1.0, clamp=None, sigma_floor=0)
    assert_close(z, mu + log_sigma.exp() * tensors["noise"], 1e-13)


def test_statistics_of_the_draws(route: str, device: torch.device) -> None:
    """Mean and standard deviation over many draws, within four standard errors."""
    n = 40_000
    params = inputs((1, 4, 1, 1))["params"].to(device)
    z = nf.normal_sample(params.expand(n, -1, -1, -1), temperature=0.7, seed=3)[..., 0, 0].double()
    raw_mu, raw_log_sigma = params[0, :, 0, 0].chunk(2)
    mu, sigma = 5 * torch.tanh(raw_mu / 5), 0.7 * (torch.exp(5 * torch.tanh(raw_log_sigma / 5)) + 0.01)
    assert ((z.mean(0) - mu).abs() <= 4 * sigma / n**0.5).all()
    assert ((z.std(0) - sigma).abs() <= 4 * sigma / (2 * n) ** 0.5).all()


def test_one_seed_one_z(route: str, device: torch.device) -> None:
    params = place(inputs((3, 3, 5, 7)), torch.float32, torch.contiguous_format, device)["params"]
    z = op(params, seed=42)
    noise = nf.philox_normal((3, 3, 5, 7), 42, device=device)
    assert_close(z, op(params, noise), 1e-6, "the noise is the Philox stream of the seed")
    assert_close(op(params.contiguous(memory_format=torch.channels_last), seed=42), z, 1e-6, "channels_last")
    assert_close(op(params[:2], seed=42), z[:2], 1e-6, "a prefix of the batch")
    assert torch.equal(op(params, seed=torch.tensor(42, device=device)), z)
    torch.manual_seed(1)
    first, second = op(params), op(params)
    torch.manual_seed(1)
    assert torch.equal(op(params), first)
    assert not torch.equal(first, second)


def test_gradcheck(route: str) -> None:
    assert_gradcheck(op, inputs((2, 2, 2, 1)), NAMES)


@pytest.mark.parametrize("given", ["noise", "seed"])
def test_opcheck(given: str, device: torch.device) -> None:
    t = place(inputs((2, 1, 2, 2)), torch.float32, torch.channels_last, device)
    noise, seed = (t["noise"], None) if given == "noise" else (None, torch.tensor(3, device=device))
    assert_opcheck("normal_sample", t["params"], noise, seed, 0.7, 5.0, 0.01, differentiable=(0,))


def test_compiles(device: torch.device) -> None:
    tensors = place(inputs((2, 1, 2, 2)), torch.float32, torch.contiguous_format, device)
    assert_compiles(op, tensors, NAMES)


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs((3, 2, 5, 3)), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(op, tensors, NAMES)
    assert_repeatable(lambda params: op(params, seed=1), {"params": tensors["params"]}, ("params",))
    empty = place(inputs((0, 2, 5, 3)), torch.float32, torch.contiguous_format, device)
    assert assert_empty_works(op, empty, NAMES)["output 0"].shape == (0, 2, 5, 3)


def test_no_double_backward() -> None:
    params = inputs()["params"].requires_grad_()
    z = torch.ops.nvae_fast.normal_sample(params, None, torch.tensor(1), 1.0, 5.0, 0.01)
    assert_no_double_backward("normal_sample", z, params)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_propagates(value: float, route: str) -> None:
    tensors = {name: t.float() for name, t in inputs((2, 2, 3, 3)).items()}
    tensors["params"][1, 0, 2, 2] = value
    assert torch.equal(torch.isnan(op(**tensors)), torch.isnan(formula(**tensors)))


PARAMS, NOISE = torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, 2)
ERRORS = [
    ({"params": None}, TypeError, "params must be a torch.Tensor, got NoneType"),
    (
        {"params": torch.zeros(1, 3, 2, 2)},
        ValueError,
        "params must have an even number of channels 2Z .*got 3",
    ),
    ({"params": torch.zeros(4, 2, 2)}, ValueError, r"params must have shape \(B, C, H, W\), got \(4, 2, 2\)"),
    ({"noise": PARAMS}, ValueError, r"noise must have shape \(1, 2, 2, 2\), got \(1, 4, 2, 2\)"),
    ({"noise": NOISE, "seed": 1}, ValueError, "give either noise or seed, not both"),
    ({"seed": "1"}, TypeError, "seed must be an int or a 0-d int64 tensor, got str"),
    ({"temperature": -0.1}, ValueError, "temperature must be a finite number >= 0, got -0.1"),
    ({"temperature": float("inf")}, ValueError, "temperature must be a finite number >= 0, got inf"),
    ({"clamp": -5.0}, ValueError, "clamp must be None or a finite number > 0, got -5.0"),
    ({"sigma_floor": float("inf")}, ValueError, "sigma_floor must be a finite number >= 0, got inf"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^normal_sample: {message}"):
        nf.normal_sample(**{"params": PARAMS, **bad})
