"""channel_statistics: fp64 truth where means are far above the spread, and everything an op must do."""

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

from nvae_fast.ops.channel_statistics import channel_statistics

# One pixel, one channel, rows shorter and longer than a task, tails of vectors, more channels than a block.
SIZES = [(4, 6, 5, 7), (3, 17, 1, 1), (2, 1, 9, 9), (2, 3, 40, 57), (1, 33, 20, 15), (2, 1030, 2, 3)]


def inputs(size: tuple[int, int, int, int] = (4, 6, 5, 7), offset: float = 0.5) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    scale = 0.1 + torch.rand(size[1], generator=generator, dtype=torch.float64)[:, None, None]
    return {"x": (torch.randn(size, generator=generator, dtype=torch.float64) + offset) * scale}


def formula(x: torch.Tensor, per_sample: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    dims = (2, 3) if per_sample else (0, 2, 3)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    mean = wide.mean(dims)
    centred = wide - (mean[:, :, None, None] if per_sample else mean[:, None, None])
    return mean, centred.square().sum(dims)


def op(x: Any, per_sample: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return channel_statistics(x, per_sample)[:2]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype,
    per_sample: bool,
    size: tuple,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    tensors = place(inputs(size), dtype, memory_format, device)
    assert_accurate(
        lambda **t: op(**t, per_sample=per_sample),
        lambda **t: formula(**t, per_sample=per_sample),
        tensors,
        ("x",),
        factor=3,
    )
    found = channel_statistics(tensors["x"], per_sample)
    assert (found.mean.dtype, found.m2.dtype) == (torch.float32, torch.float32)
    assert found.count == size[2] * size[3] * (1 if per_sample else size[0])


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


@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(per_sample: bool, route: str) -> None:
    assert_gradcheck(lambda **t: op(**t, per_sample=per_sample), inputs((3, 2, 2, 2)), ("x",))


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output(which: int, route: str) -> None:
    leaf = inputs()["x"].requires_grad_()
    (actual,) = torch.autograd.grad(op(leaf)[which].sum(), leaf)
    (expected,) = torch.autograd.grad(formula(leaf)[which].sum(), leaf)
    assert ((actual - expected).abs() <= 1e-12).all()


@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(per_sample: bool, device: torch.device) -> None:
    x = place(inputs((3, 2, 2, 3)), torch.float32, torch.channels_last, device)["x"]
    assert_opcheck("channel_statistics", x, per_sample, differentiable=[0])


def test_compiles(device: torch.device) -> None:
    assert_compiles(op, place(inputs((3, 2, 2, 3)), torch.float32, torch.contiguous_format, device), ("x",))


@pytest.mark.parametrize("per_sample", [False, True])
def test_layouts_repeats_and_empty(per_sample: bool, route: str, device: torch.device) -> None:
    def run(x: torch.Tensor) -> Any:
        return op(x, per_sample)

    tensors = place(inputs(), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(run, tensors, ("x",))
    assert_repeatable(run, tensors, ("x",))
    found = assert_empty_works(run, {"x": tensors["x"][:0]}, ("x",))
    assert not found["output 0"].any()
    assert found["output 1"].shape == ((0, 6) if per_sample else (6,))
    assert not op(torch.zeros(2, 3, 0, 4), per_sample)[1].any(), "no pixels"


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


def test_no_double_backward() -> None:
    leaf = inputs()["x"].requires_grad_()
    assert_no_double_backward(
        "channel_statistics", torch.ops.nvae_fast.channel_statistics(leaf, False)[1], leaf
    )


def test_errors(route: str) -> None:
    with pytest.raises(TypeError, match=r"^channel_statistics: x must be a torch.Tensor, got list"):
        op([1.0])
    with pytest.raises(
        ValueError, match=r"^channel_statistics: x must have shape \(B, C, H, W\), got \(3,\)"
    ):
        op(torch.zeros(3))
    with pytest.raises(
        TypeError, match=r"^channel_statistics: x must have one of the dtypes .*got torch.int64"
    ):
        op(torch.zeros(1, 2, 3, 3, dtype=torch.int64))
