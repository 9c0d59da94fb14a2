"""weight_norm: fp64 truth, masks, channels that are all zero, and everything an op must do."""

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
    evaluate,
    place,
    relative_error,
)

import nvae_fast as nf

NAMES = ("weight", "log_weight_norm")
SIZES = [(4, 3, 3, 3), (1, 1, 1, 1), (7, 5, 1, 1), (17, 1, 5, 5), (3, 130, 3, 3)]


def inputs(size: tuple[int, int, int, int] = (4, 3, 3, 3), masked: bool = False) -> Tensors:
    generator = torch.Generator().manual_seed(7)
    found = {
        "weight": torch.randn(size, generator=generator, dtype=torch.float64),
        "log_weight_norm": 0.5 * torch.randn((size[0], 1, 1, 1), generator=generator, dtype=torch.float64),
    }
    if masked:
        found["mask"] = (torch.rand(size, generator=generator) < 0.6).double()
        found["mask"].view(size[0], -1)[:, 0] = 1
    return found


def formula(
    weight: torch.Tensor, log_weight_norm: torch.Tensor, mask: Any = None, eps: float = 1e-5
) -> torch.Tensor:
    masked = weight if mask is None else weight * mask
    return torch.exp(log_weight_norm) * masked / (masked.square().sum((1, 2, 3), keepdim=True).sqrt() + eps)


def op(weight: Any, log_weight_norm: Any, mask: Any = None, **options: Any) -> torch.Tensor:
    return nf.weight_norm(weight, log_weight_norm, mask, **options)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype,
    size: tuple,
    masked: bool,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    tensors = place(inputs(size, masked), dtype, memory_format, device)
    assert_accurate(op, formula, tensors, NAMES, factor=2.5)
    out = op(**tensors)
    assert out.dtype == dtype
    truth = formula(**{name: t.double() for name, t in tensors.items()})
    assert_close(
        out, truth, 1.05 * relative_error(truth.to(dtype), truth) + 5e-7, "computed in fp32, rounded once"
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_float64(size: tuple, masked: bool, route: str) -> None:
    tensors = inputs(size, masked)
    actual = evaluate(op, tensors, NAMES)
    for name, expected in evaluate(formula, tensors, NAMES).items():
        assert_close(actual[name], expected, 1e-10, name)  # a 1x1x1 weight's gradient cancels to eps


def test_norm_of_each_output_channel(route: str) -> None:
    tensors = inputs()
    norms = op(**tensors, eps=0.0).square().sum((1, 2, 3)).sqrt()
    assert_close(norms, tensors["log_weight_norm"].exp().flatten(), 1e-13)


def test_channel_of_zeros(route: str) -> None:
    """Its normalised weight is zero, its gradient the finite one of ``w / eps``."""
    tensors = inputs()
    tensors["weight"][1] = 0
    found = evaluate(op, tensors, NAMES)
    assert not found["output 0"][1].any()
    assert found["grad log_weight_norm"][1] == 0
    upstream = evaluate(lambda w: w, {"w": tensors["weight"]}, ("w",))[
        "grad w"
    ]  # evaluate's gradient of an output
    assert_close(found["grad weight"][1], upstream[1] * tensors["log_weight_norm"][1].exp() / 1e-5, 1e-13)


def test_masked_taps_get_no_weight_and_no_gradient(route: str) -> None:
    tensors = inputs(masked=True)
    found = evaluate(op, tensors, NAMES)
    dead = tensors["mask"] == 0
    assert dead.any()
    assert not found["output 0"][dead].any()
    assert not found["grad weight"][dead].any()
    changed = {
        **tensors,
        "weight": torch.where(dead, torch.full_like(tensors["weight"], 9.0), tensors["weight"]),
    }
    assert torch.equal(op(**changed), found["output 0"]), "the norm is that of the masked weight"


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(masked: bool, route: str) -> None:
    assert_gradcheck(op, inputs((3, 2, 3, 1), masked), NAMES)


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked: bool, device: torch.device) -> None:
    t = place(inputs((3, 2, 3, 3), masked), torch.float32, torch.channels_last, device)
    assert_opcheck(
        "weight_norm", t["weight"], t["log_weight_norm"], t.get("mask"), 1e-5, differentiable=(0, 1)
    )


def test_compiles(device: torch.device) -> None:
    assert_compiles(op, place(inputs(masked=True), torch.float32, torch.contiguous_format, device), NAMES)


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs((5, 3, 5, 5), masked=True), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(op, tensors, NAMES)
    assert_repeatable(op, tensors, NAMES)
    empty = {name: t[:0] for name, t in tensors.items()}
    assert assert_empty_works(op, empty, NAMES)["output 0"].shape == (0, 3, 5, 5)


def test_no_double_backward() -> None:
    t = inputs()
    leaf = t["weight"].requires_grad_()
    out = torch.ops.nvae_fast.weight_norm(leaf, t["log_weight_norm"], None, 1e-5)
    assert_no_double_backward("weight_norm", out, leaf)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_propagates(value: float, route: str) -> None:
    tensors = inputs()
    tensors["weight"][2, 1, 0, 0] = value
    actual = op(**tensors)
    assert torch.equal(actual.isnan(), formula(**tensors).isnan())
    assert actual[2].isnan().any()
    assert actual[[0, 1, 3]].isfinite().all()


W, N = torch.ones(4, 3, 3, 3), torch.zeros(4, 1, 1, 1)
ERRORS = [
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"weight": torch.ones(4, 3)}, ValueError, r"weight must have shape \(C_out, C_in, K, K\), got \(4, 3\)"),
    (
        {"log_weight_norm": torch.zeros(4)},
        ValueError,
        r"log_weight_norm must have shape \(4, 1, 1, 1\), got \(4,\)",
    ),
    ({"log_weight_norm": N.to("meta")}, ValueError, "log_weight_norm must be on cpu .*got meta"),
    (
        {"mask": torch.ones(4, 3, 3, 1)},
        ValueError,
        r"mask must have shape \(4, 3, 3, 3\), got \(4, 3, 3, 1\)",
    ),
    ({"mask": W.bool()}, TypeError, "mask must have one of the dtypes .*got torch.bool"),
    ({"eps": "small"}, ValueError, "eps must be >= 0, got 'small'"),
    ({"eps": -1e-5}, ValueError, "eps must be >= 0, got -1e-05"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^weight_norm: {message}"):
        op(**{"weight": W, "log_weight_norm": N, **bad})
