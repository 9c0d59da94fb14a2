"""squeeze_excite: fp64 truth at narrow and wide channel counts, and everything an op must do."""

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
)

import nvae_fast as nf

NAMES = ("x", "reduce_weight", "reduce_bias", "expand_weight", "expand_bias", "skip")
# Above 64 channels the hidden width C // 16 exceeds the minimum of 4.
SIZES = [(2, 4, 5, 7), (1, 1, 1, 1), (3, 17, 4, 4), (2, 96, 3, 5), (2, 200, 2, 2)]


def inputs(size: tuple[int, int, int, int] = (2, 6, 3, 5), skip: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(6)
    channels = size[1]
    hidden = max(channels // 16, 4)
    shapes = {
        "x": size,
        "reduce_weight": (hidden, channels),
        "reduce_bias": (hidden,),
        "expand_weight": (channels, hidden),
        "expand_bias": (channels,),
        "skip": size,
    }
    found = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    found["x"] += 0.5  # so that the pooled values are not all near 0
    if not skip:
        del found["skip"]
    return found


def formula(
    x: torch.Tensor,
    reduce_weight: torch.Tensor,
    reduce_bias: torch.Tensor,
    expand_weight: torch.Tensor,
    expand_bias: torch.Tensor,
    skip: Any = None,
    residual_scale: float = 1.0,
) -> torch.Tensor:
    hidden = torch.clamp_min(x.mean((2, 3)) @ reduce_weight.T + reduce_bias, 0)
    gate = torch.sigmoid(hidden @ expand_weight.T + expand_bias)[:, :, None, None]
    y = residual_scale * (gate * x)
    return y if skip is None else skip + y


def op(residual_scale: float = 1.0, **tensors: Any) -> torch.Tensor:
    skip = tensors.pop("skip", None)
    return nf.squeeze_excite(*tensors.values(), skip=skip, residual_scale=residual_scale)


def names(tensors: Tensors) -> tuple[str, ...]:
    return tuple(tensors)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("skip, residual_scale", [(True, 0.1), (False, 1.0), (False, 0.1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype,
    skip: bool,
    residual_scale: float,
    size: tuple,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    tensors = place(inputs(size, skip), dtype, memory_format, device)
    assert_accurate(
        lambda **t: op(residual_scale, **t),
        lambda **t: formula(**t, residual_scale=residual_scale),
        tensors,
        names(tensors),
        factor=2.5,
        vector_floor=4 * torch.finfo(dtype).eps,
    )
    y = op(**tensors)
    assert y.dtype == dtype
    if size[1] > 1:
        assert y.is_contiguous(memory_format=memory_format), "the memory format of x is kept"


@pytest.mark.parametrize("size", SIZES)
def test_float64(size: tuple, route: str) -> None:
    tensors = inputs(size)
    actual = evaluate(lambda **t: op(0.1, **t), tensors, NAMES)
    for name, expected in evaluate(lambda **t: formula(**t, residual_scale=0.1), tensors, NAMES).items():
        assert_close(actual[name], expected, 1e-12, name)


def test_saturated_gates(route: str) -> None:
    """Gates at exactly 0 and 1: x is dropped or kept whole, and no gradient is NaN."""
    tensors = {name: t.float() for name, t in inputs((2, 4, 3, 3), skip=False).items()}
    tensors["expand_bias"] = torch.tensor([-1e4, 1e4, -1e4, 1e4])
    found = evaluate(op, tensors, names(tensors))
    expected = tensors["x"] * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]
    assert torch.equal(found["output 0"], expected)
    assert all(torch.isfinite(t).all() for t in found.values())


def test_half_precision_input_with_full_precision_weights(route: str) -> None:
    tensors = {name: t.float() for name, t in inputs().items()}
    tensors["x"], tensors["skip"] = tensors["x"].bfloat16(), tensors["skip"].bfloat16()
    found = evaluate(op, tensors, NAMES)
    assert found["output 0"].dtype == torch.bfloat16
    assert {name: found[f"grad {name}"].dtype for name in NAMES} == {
        name: t.dtype for name, t in tensors.items()
    }


def test_gradcheck(route: str) -> None:
    assert_gradcheck(lambda **t: op(0.1, **t), inputs((2, 3, 2, 1)), NAMES)


@pytest.mark.parametrize("skip", [True, False])
def test_opcheck(skip: bool, device: torch.device) -> None:
    t = place(inputs((2, 3, 2, 2)), torch.float32, torch.channels_last, device)
    args = [*t.values(), 0.1]
    if not skip:
        args[5] = None
    assert_opcheck("squeeze_excite", *args, differentiable=range(6 if skip else 5))


def test_compiles(device: torch.device) -> None:
    assert_compiles(op, place(inputs((2, 3, 2, 2)), torch.float32, torch.contiguous_format, device), NAMES)


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs((3, 5, 7, 3)), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(op, tensors, NAMES)
    assert_repeatable(op, tensors, NAMES)
    empty = {**tensors, "x": tensors["x"][:0], "skip": tensors["skip"][:0]}
    assert assert_empty_works(op, empty, NAMES)["output 0"].shape == (0, 5, 7, 3)


def test_no_double_backward() -> None:
    t = inputs()
    leaf = t["x"].requires_grad_()
    y, _ = torch.ops.nvae_fast.squeeze_excite(*t.values(), 0.1)
    assert_no_double_backward("squeeze_excite", y, leaf)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_propagates(value: float, route: str) -> None:
    """Into the whole sample, whose pooling it enters, and into no other."""
    tensors = {name: t.float() for name, t in inputs().items()}
    tensors["x"][1, 2, 0, 0] = value
    actual, expected = op(**tensors), formula(**tensors)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert not actual[1].isfinite().all()
    assert actual[0].isfinite().all()


GOOD = inputs((2, 6, 3, 3))
ERRORS = [
    ({"x": 0}, TypeError, "x must be a torch.Tensor, got int"),
    ({"x": torch.zeros(2, 6)}, ValueError, r"x must have shape \(B, C, H, W\), got \(2, 6\)"),
    (
        {"reduce_weight": torch.zeros(4, 5)},
        ValueError,
        r"reduce_weight must have shape \(4, 6\), got \(4, 5\)",
    ),
    ({"reduce_weight": torch.tensor(0.0)}, ValueError, r"reduce_weight must have shape \(0, 6\), got \(\)"),
    ({"reduce_bias": torch.zeros(6)}, ValueError, r"reduce_bias must have shape \(4,\), got \(6,\)"),
    (
        {"expand_weight": torch.zeros(4, 6)},
        ValueError,
        r"expand_weight must have shape \(6, 4\), got \(4, 6\)",
    ),
    ({"expand_bias": torch.zeros(4)}, ValueError, r"expand_bias must have shape \(6,\), got \(4,\)"),
    ({"expand_bias": torch.zeros(6, device="meta")}, ValueError, "expand_bias must be on cpu .*got meta"),
    (
        {"skip": torch.zeros(2, 6, 3, 4)},
        ValueError,
        r"skip must have shape \(2, 6, 3, 3\), got \(2, 6, 3, 4\)",
    ),
    ({"residual_scale": None}, TypeError, "residual_scale must be a number, got None"),
    ({"residual_scale": "a"}, TypeError, "residual_scale must be a number, got 'a'"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^squeeze_excite: {message}"):
        op(**{**GOOD, **bad})
