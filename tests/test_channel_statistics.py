"""channel_statistics: means far above the spread, values that are not finite, constants."""

from __future__ import annotations

import pytest
import torch
from descriptions.channel_statistics import SIZES, formula, inputs, op
from harness import (
    assert_close,
    place,
)

from nvae_fast.ops.channel_statistics import channel_statistics


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_float64(size: tuple, per_sample: bool, route: str, memory_format: torch.memory_format) -> None:
    x = inputs(size, offset=100.0)["x"].contiguous(memory_format=memory_format)
    for a, e in zip(op(x, per_sample), formula(x, per_sample), strict=True):
        assert_close(a, e, 1e-12)


@pytest.mark.parametrize("ratio", [100.0, 1e4])
@pytest.mark.parametrize("per_sample", [False, True])
def test_mean_far_from_zero(
    per_sample: bool, ratio: float, memory_format: torch.memory_format, device: torch.device
) -> None:
    """Every channel to 1e-5, whatever its spread: what sums of squares would lose altogether."""
    tensors = place(inputs((3, 5, 33, 70), ratio), torch.float32, memory_format, device)
    actual = op(**tensors, per_sample=per_sample)
    truth = formula(tensors["x"].double(), per_sample)
    for a, e in zip(actual, truth, strict=True):
        assert ((a - e).abs() <= 1e-5 * e.abs()).all(), float(((a - e) / e).abs().max())


def test_a_first_value_that_stands_out(memory_format: torch.memory_format) -> None:
    """Deviations are taken from a value near the first ones; it need not be near the mean."""
    x = torch.randn(2, 3, 40, 60, dtype=torch.float64)
    x[0, :, :2] = 1000.0
    x = x.float().contiguous(memory_format=memory_format)
    for a, e in zip(op(x), formula(x.double()), strict=True):
        assert ((a - e).abs() <= 1e-5 * e.abs()).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 45])
def test_non_finite(
    at: int, value: float, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    """The mean is that of such values (PyTorch's var_mean has NaN), the spread NaN, and no other channel knows."""
    x = place(inputs((2, 3, 7, 7)), torch.float32, memory_format, device)["x"]
    x[1, 1, at // 7, at % 7] = value
    mean, m2 = op(x)
    expected = x.mean((0, 2, 3))
    if route == "reference":
        mean[1] = expected[1] if not mean[1].isfinite() else 0
    torch.testing.assert_close(mean, expected, equal_nan=True)
    assert m2.isnan().tolist() == [False, True, False]


def test_spread_of_constants_is_zero(memory_format: torch.memory_format) -> None:
    mean, m2 = op(torch.full((3, 2, 11, 13), 1e6 / 3).contiguous(memory_format=memory_format))
    assert_close(mean, torch.full((2,), 1e6 / 3), 1e-7)
    assert not m2.any()


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output(which: int, route: str) -> None:
    leaf = inputs()["x"].requires_grad_()
    (actual,) = torch.autograd.grad(op(leaf)[which].sum(), leaf)
    (expected,) = torch.autograd.grad(formula(leaf)[which].sum(), leaf)
    assert ((actual - expected).abs() <= 1e-12).all()


def test_threads_change_nothing(memory_format: torch.memory_format) -> None:
    x = torch.randn(8, 24, 32, 32).contiguous(memory_format=memory_format)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(op(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("per_sample", [False, True])
def test_counts(per_sample: bool, route: str) -> None:
    x = torch.zeros(2, 3, 5, 4)
    assert channel_statistics(x, per_sample).count == (20 if per_sample else 40)
    assert not op(x[:, :, :0], per_sample)[1].any(), "no pixels"
    assert not op(x[:0], per_sample)[0].any(), "no samples"
