"""normal_log_prob: fp64 truth with PyTorch's own Normal, and everything an op must do."""

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
from torch.distributions import Normal

import nvae_fast as nf

NAMES = ("z", "params")


def inputs(size: tuple[int, int, int, int] = (2, 3, 4, 5)) -> Tensors:
    b, z, h, w = size
    generator = torch.Generator().manual_seed(3)
    return {
        "z": torch.randn((b, z, h, w), generator=generator, dtype=torch.float64),
        "params": torch.randn((b, 2 * z, h, w), generator=generator, dtype=torch.float64),
    }


def formula(z: torch.Tensor, params: torch.Tensor, floor: float = 0.01) -> torch.Tensor:
    raw_mu, raw_log_sigma = params.chunk(2, dim=1)
    sigma = torch.exp(5 * torch.tanh(raw_log_sigma / 5)) + floor
    return Normal(5 * torch.tanh(raw_mu / 5), sigma, validate_args=False).log_prob(z).sum((2, 3))


def op(z: Any, params: Any = None, **options: Any) -> torch.Tensor:
    return nf.normal_log_prob(z, params, **options)


@pytest.mark.parametrize("size", [(2, 3, 4, 4), (61, 1, 1, 1), (61, 5, 7, 11), (1, 2, 1, 13)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype, size: tuple, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    tensors = place(inputs(size), dtype, memory_format, device)
    assert_accurate(op, formula, tensors, NAMES)
    assert op(**tensors).dtype == torch.float32


def test_standard_prior_without_params(route: str) -> None:
    z = inputs()["z"]
    assert_close(op(z), formula(z, torch.zeros(2, 6, 4, 5, dtype=torch.float64)), 1e-14)
    assert_close(op(z, sigma_floor=0.0), Normal(0.0, 1.0).log_prob(z).sum((2, 3)), 1e-7)


def test_it_is_the_density_residual_normal_reports(route: str) -> None:
    tensors = inputs()
    out = nf.residual_normal(torch.zeros_like(tensors["params"]), tensors["params"], seed=5)
    assert_close(op(out.z, tensors["params"]), out.log_p, 1e-13)


def test_density_integrates_to_one(route: str) -> None:
    """A Riemann sum over a fine grid of z, for one sigma near the floor and one above."""
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)[:, None, None, None]
    for raw_log_sigma in (-1e4, -1.0):
        params = torch.tensor([0.7, raw_log_sigma], dtype=torch.float64)[None, :, None, None].expand(
            len(grid), 2, 1, 1
        )
        assert abs(float(op(grid, params).exp().sum()) * 1e-4 - 1) < 1e-6


def test_without_clamp(route: str) -> None:
    tensors = inputs()
    mu, log_sigma = tensors["params"].chunk(2, dim=1)
    expected = Normal(mu, log_sigma.exp() + 0.5).log_prob(tensors["z"]).sum((2, 3))
    assert_close(op(**tensors, clamp=None, sigma_floor=0.5), expected, 1e-13)


def test_gradcheck(route: str) -> None:
    assert_gradcheck(op, inputs((2, 2, 2, 1)), NAMES)
    assert_gradcheck(op, {"z": inputs((2, 2, 2, 1))["z"]}, ("z",))


@pytest.mark.parametrize("with_params", [True, False])
def test_opcheck(with_params: bool, device: torch.device) -> None:
    t = place(inputs((2, 1, 2, 2)), torch.float32, torch.channels_last, device)
    params = t["params"] if with_params else None
    assert_opcheck(
        "normal_log_prob", t["z"], params, 5.0, 0.01, differentiable=(0, 1) if with_params else (0,)
    )


def test_compiles(device: torch.device) -> None:
    assert_compiles(op, place(inputs((2, 1, 2, 2)), torch.float32, torch.contiguous_format, device), NAMES)


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs((3, 2, 5, 3)), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(op, tensors, NAMES)
    assert_repeatable(op, tensors, NAMES)
    empty = place(inputs((0, 2, 5, 3)), torch.float32, torch.contiguous_format, device)
    assert assert_empty_works(op, empty, NAMES)["output 0"].shape == (0, 2)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_z_and_params_of_different_dtypes(dtypes: tuple, memory_format: torch.memory_format) -> None:
    """As if both were float32. A gradient has the dtype of its argument and is rounded once."""
    z, params = (
        torch.randn(3, channels, 5, 7).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        for channels, dtype in zip((4, 8), dtypes, strict=True)
    )
    found, expected = nf.normal_log_prob(z, params), nf.normal_log_prob(z.float(), params.float())
    assert torch.equal(found, expected)
    gradients = torch.autograd.grad(found.sum(), (z, params))
    wanted = torch.autograd.grad(expected.sum(), (z, params))
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    assert [g.dtype for g in gradients] == list(dtypes)
    for needs in ((True, False), (False, True), (False, False)):
        args = (torch.ones(3, 4), z.detach(), params.detach(), 5.0, 0.01, *needs)
        torch.library.opcheck(torch.ops.nvae_fast.normal_log_prob_backward.default, args)
        assert [g.dtype for g in torch.ops.nvae_fast.normal_log_prob_backward(*args)] == list(dtypes)


def test_no_double_backward() -> None:
    tensors = inputs()
    leaf = tensors["z"].requires_grad_()
    out = torch.ops.nvae_fast.normal_log_prob(leaf, tensors["params"], 5.0, 0.01)
    assert_no_double_backward("normal_log_prob", out, leaf)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_propagates(value: float, route: str) -> None:
    tensors = {name: t.float() for name, t in inputs((2, 2, 3, 3)).items()}
    tensors["z"][1, 0, 2, 2] = value
    actual = op(**tensors)
    assert torch.equal(actual.isfinite(), formula(**tensors).isfinite())
    assert bool(actual[1, 0].isnan()) == (value != value)


Z = torch.zeros(1, 2, 3, 3)
ERRORS = [
    ({"z": [1.0]}, TypeError, "z must be a torch.Tensor, got list"),
    ({"z": torch.zeros(2, 3)}, ValueError, r"z must have shape \(B, C, H, W\), got \(2, 3\)"),
    (
        {"params": torch.zeros(1, 2, 3, 3)},
        ValueError,
        r"params must have shape \(1, 4, 3, 3\), got \(1, 2, 3, 3\)",
    ),
    (
        {"params": torch.zeros(1, 4, 3, 3).long()},
        TypeError,
        "params must have one of the dtypes .*got torch.int64",
    ),
    ({"params": torch.zeros(1, 4, 3, 3, device="meta")}, ValueError, "params must be on cpu .*got meta"),
    ({"clamp": 0}, ValueError, "clamp must be None or a finite number > 0, got 0"),
    ({"sigma_floor": -1.0}, ValueError, "sigma_floor must be a finite number >= 0, got -1.0"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^normal_log_prob: {message}"):
        op(**{"z": Z, **bad})
