"""plane_affine and plane_dots: fp64 truth, memory formats mixed, and everything an op must do."""

from __future__ import annotations

import itertools
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
    relative_error,
)

from nvae_fast.ops.plane_affine import plane_affine, plane_dots

FORMATS = (torch.contiguous_format, torch.channels_last)
PAIRS = list(itertools.product(FORMATS, FORMATS))
EVERY = ("x", "a", "y", "b", "c")
# One pixel, one channel, tiles with and without tails, rows longer than a task, more channels than a block.
SIZES = [(2, 6, 5, 7), (3, 17, 1, 1), (2, 1, 5, 5), (2, 32, 8, 8), (1, 20, 40, 57), (2, 1030, 2, 3)]


def inputs(size: tuple[int, int, int, int] = (2, 6, 5, 7), names: tuple[str, ...] = EVERY) -> Tensors:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    every = {n: normal(*size) if n in "xy" else normal(*size[:2]) for n in EVERY}
    return {n: every[n] for n in names}


def formula(x: Any, a: Any, y: Any = None, b: Any = None, c: Any = None) -> torch.Tensor:
    out = a[:, :, None, None] * x
    if y is not None:
        out = out + (y if b is None else b[:, :, None, None] * y)
    return out if c is None else out + c[:, :, None, None]


def dots_formula(x: torch.Tensor, y: torch.Tensor, pivot: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    return x.sum((2, 3)), (x * (y if pivot is None else y - pivot[:, None, None])).sum((2, 3))


def op(x: Any, a: Any, y: Any = None, b: Any = None, c: Any = None) -> torch.Tensor:
    return plane_affine(x, a, y, b, c)


def mixed(tensors: Tensors, formats: tuple[torch.memory_format, ...]) -> Tensors:
    placed = dict(tensors)
    for name, memory_format in zip("xy", formats, strict=True):
        if name in placed:
            placed[name] = placed[name].contiguous(memory_format=memory_format)
    return placed


@pytest.mark.parametrize("names", [EVERY, ("x", "a"), ("x", "a", "y"), ("x", "a", "c"), ("x", "a", "y", "c")])
@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(dtype: torch.dtype, formats: tuple, names: tuple, route: str, device: torch.device) -> None:
    """Values and every gradient, the two maps in any pair of memory formats."""
    for size in SIZES:
        tensors = mixed(place(inputs(size, names), dtype, torch.contiguous_format, device), formats)
        assert_accurate(op, formula, tensors, names, factor=3)
        out = op(**tensors)
        like = tensors["y" if "y" in names else "x"]
        assert (out.dtype, out.stride()) == (like.dtype, torch.empty_like(like).stride()) or 1 in size


@pytest.mark.parametrize("formats", PAIRS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dots(dtype: torch.dtype, formats: tuple, device: torch.device) -> None:
    for size in SIZES:
        tensors = mixed(place(inputs(size), dtype, torch.contiguous_format, device), formats)
        for pivot in (None, tensors["a"][0].float()):
            actual = plane_dots(tensors["x"], tensors["y"], pivot)
            wide = [None if t is None else t.double() for t in (tensors["x"], tensors["y"], pivot)]
            magnitude = dots_formula(*(None if t is None else t.abs() for t in wide))
            if pivot is not None:
                magnitude = dots_formula(wide[0].abs(), wide[1].abs(), -wide[2].abs())
            for a, e, m in zip(actual, dots_formula(*wide), magnitude, strict=True):
                assert a.dtype == torch.float32
                assert ((a - e).abs() <= 1e-6 * m).all()


@pytest.mark.parametrize("formats", PAIRS)
def test_float64(formats: tuple, route: str) -> None:
    for size in SIZES:
        t = mixed(inputs(size), formats)
        assert_close(op(**t), formula(**t), 1e-14)
        for a, e in zip(
            plane_dots(t["x"], t["y"], t["a"][0]), dots_formula(t["x"], t["y"], t["a"][0]), strict=True
        ):
            assert_close(a, e, 1e-13)


@pytest.mark.parametrize("formats", PAIRS)
def test_coefficients_for_all_samples(formats: tuple, route: str) -> None:
    """(1, C), with gradients of that shape."""
    t = mixed(inputs((3, 5, 4, 6)), formats)
    for name in "abc":
        t[name] = t[name][:1].clone()
    leaves = {n: v.requires_grad_() for n, v in t.items()}
    upstream = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    actual, expected = (
        torch.autograd.grad(f(**leaves), list(leaves.values()), upstream) for f in (op, formula)
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert_close(a, e, 1e-13)


def test_pivot_keeps_digits(memory_format: torch.memory_format) -> None:
    """sum x (y - mean) where |mean| / std = 1e4."""
    x, y = torch.randn(2, 2, 3, 31, 33).unbind()
    y = (y.double() + 1e4).float().contiguous(memory_format=memory_format)
    pivot = y.double().mean((0, 2, 3)).float()
    actual = plane_dots(x, y, pivot)[1]
    expected = dots_formula(x.double(), y.double(), pivot.double())[1]
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("formats", PAIRS)
def test_non_finite_propagates(formats: tuple, route: str) -> None:
    t = mixed({n: v.float() for n, v in inputs((2, 17, 5, 5)).items()}, formats)
    t["x"][1, 3, 2, 2] = float("nan")
    t["y"][0, 16, 4, 4] = float("inf")
    assert torch.equal(op(**t).isfinite(), formula(**t).isfinite())
    assert torch.equal(plane_dots(t["x"], t["y"])[1].isfinite(), dots_formula(t["x"], t["y"])[1].isfinite())


def test_dtypes_of_maps_may_differ(route: str) -> None:
    t = {n: v.float() for n, v in inputs().items()}
    t["x"] = t["x"].bfloat16()
    out = op(**t)
    assert out.dtype == torch.float32
    assert_close(out, formula(**{n: v.double() for n, v in t.items()}), 1e-6)
    leaves = {n: v.requires_grad_() for n, v in t.items()}
    op(**leaves).sum().backward()
    assert {n: v.grad.dtype for n, v in leaves.items()} == {n: v.dtype for n, v in t.items()}


def test_gradcheck(route: str) -> None:
    assert_gradcheck(op, inputs((2, 3, 2, 2)), EVERY)


@pytest.mark.parametrize("names", [EVERY, ("x", "a"), ("x", "a", "y")])
def test_opcheck(names: tuple, device: torch.device) -> None:
    t = place(inputs((2, 3, 2, 2)), torch.float32, torch.channels_last, device)
    args = [t[n] if n in names else None for n in EVERY]
    assert_opcheck("plane_affine", *args, differentiable=[EVERY.index(n) for n in names])
    assert_opcheck("plane_dots", t["x"], t["y"], t["a"][0])
    assert_opcheck("plane_dots", t["x"], t["y"], None)


def test_compiles(device: torch.device) -> None:
    assert_compiles(op, place(inputs((2, 3, 2, 2)), torch.float32, torch.contiguous_format, device), EVERY)


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs(), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(op, tensors, EVERY)
    assert_repeatable(op, tensors, EVERY)
    for _ in range(2):
        first, second = (plane_dots(tensors["x"], tensors["y"]) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found = assert_empty_works(op, {n: t[:0] for n, t in tensors.items()}, EVERY)
    assert found["output 0"].shape == (0, 6, 5, 7)
    assert plane_dots(tensors["x"][:0], tensors["y"][:0])[0].shape == (0, 6)
    assert not plane_dots(tensors["x"][:, :, :0], tensors["y"][:, :, :0])[1].any()


def test_no_double_backward() -> None:
    t = inputs()
    leaf = t["x"].requires_grad_()
    assert_no_double_backward("plane_affine", torch.ops.nvae_fast.plane_affine(*t.values()), leaf)


X, K = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3)
ERRORS = [
    ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
    ({"x": X[0]}, ValueError, r"x must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ({"y": X[:1]}, ValueError, r"y must have shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    ({"y": X.to("meta")}, ValueError, "y must be on cpu .*got meta"),
    ({"a": None}, TypeError, "a must be a torch.Tensor, got NoneType"),
    ({"a": K[0]}, ValueError, r"a must have shape \(2, 3\) or \(1, 3\), got \(3,\)"),
    ({"c": K[:, :2]}, ValueError, r"c must have shape \(2, 3\) or \(1, 3\), got \(2, 2\)"),
    ({"b": K.to("meta")}, ValueError, "b must be on cpu .*got meta"),
    ({"y": None}, ValueError, r"b must be None without y, got a tensor of shape \(2, 3\)"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^plane_affine: {message}"):
        op(**{"x": X, "a": K, "y": X, "b": K, "c": K, **bad})


def test_errors_of_dots() -> None:
    with pytest.raises(ValueError, match=r"^plane_dots: y must have shape \(2, 3, 4, 4\), got \(2, 3, 4\)"):
        plane_dots(X, X[..., 0])
    with pytest.raises(ValueError, match=r"^plane_dots: pivot must have shape \(3,\), got \(2, 3\)"):
        plane_dots(X, X, K)
