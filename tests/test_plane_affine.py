"""plane_affine and plane_dots: memory formats mixed, and the digits of the sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from descriptions.plane_affine import GIVEN, SIZES, dots_formula, formula, inputs, op
from harness import (
    DTYPES,
    Tensors,
    assert_accurate,
    assert_close,
    place,
    relative_error,
)

from nvae_fast.ops.plane_affine import plane_dots

FORMATS = (torch.contiguous_format, torch.channels_last)
PAIRS = list(itertools.product(FORMATS, FORMATS))
MIXED = [(a, b) for a, b in PAIRS if a != b]  # the others: tests/test_ops.py


def mixed(tensors: Tensors, formats: tuple[torch.memory_format, ...]) -> Tensors:
    placed = dict(tensors)
    for name, memory_format in zip("xy", formats, strict=True):
        if name in placed:
            placed[name] = placed[name].contiguous(memory_format=memory_format)
    return placed


@pytest.mark.parametrize("names", GIVEN)
@pytest.mark.parametrize("formats", MIXED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_formats(
    dtype: torch.dtype, formats: tuple, names: tuple, route: str, device: torch.device
) -> None:
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


def test_dots_of_no_pixels() -> None:
    assert not plane_dots(torch.zeros(2, 3, 0, 4), torch.zeros(2, 3, 0, 4))[1].any()
