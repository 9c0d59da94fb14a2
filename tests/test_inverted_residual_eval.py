"""What evaluation alone is made of: the depthwise convolution with an affine map behind it, folded cells."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close

import nvae_fast as nf
from nvae_fast.ops.inverted_residual.eval import depthwise_affine

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", [(1, 1), (2, 1), (1, 2)], ids=["plain", "stride", "upsample"])
def test_depthwise_with_an_affine_map_behind(
    form: tuple[int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 37, 6, 9).to(dtype).contiguous(memory_format=memory_format)
    weight, scale, shift = torch.randn(37, 1, 5, 5) / 5, torch.randn(37), torch.randn(37)
    wide = torch.float64
    if dtype == torch.float64:
        weight, scale, shift = weight.to(wide), scale.to(wide), shift.to(wide)
    for first in (None, "swish", "elu"):
        for last in (None, "swish", "elu"):
            y = depthwise_affine(x, weight, scale, shift, *form, first, last)
            h = _activate(x.to(wide), first)
            h = F.interpolate(h, scale_factor=2.0, mode="nearest") if form[1] == 2 else h
            d = F.conv2d(h, weight.to(wide), stride=form[0], padding=2, groups=37)
            expected = _activate(d * scale.to(wide)[:, None, None] + shift.to(wide)[:, None, None], last)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=memory_format)
            assert_close(y, expected, TOLERANCE[dtype], f"{first} and {last}")


def _activate(x: torch.Tensor, name: str | None) -> torch.Tensor:
    return F.silu(x) if name == "swish" else F.elu(x) if name == "elu" else x


def test_borders_and_non_finite_pixels_stay_where_they_are() -> None:
    x = torch.zeros(1, 16, 9, 9)
    x[0, 0, 4, 4] = float("nan")
    weight, one, zero = torch.ones(16, 1, 5, 5), torch.ones(16), torch.zeros(16)
    y = depthwise_affine(x, weight, one, zero, 1, 1, None, "swish")
    assert y[0, 0].isnan().sum() == 25
    assert not y[0, 1:].isnan().any()


def test_an_evaluated_cell_follows_its_weights() -> None:
    torch.manual_seed(1)
    cell = nf.nn.InvertedResidualCell(8, 8, 6, 5).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        before = cell(x)
        for parameter in cell.parameters():
            parameter.mul_(1.5)
        after = cell(x)
        with nf.use_backend("reference"):
            expected = cell(x)
    assert not torch.allclose(before, after)
    assert_close(after, expected, 2e-6)


def test_writes_that_move_no_version_counter_are_seen() -> None:
    torch.manual_seed(2)
    model = torch.nn.Sequential(nf.nn.InvertedResidualCell(8, 8, 6, 5)).eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        before = model(x)
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        after = model(x)
        with nf.use_backend("reference"):
            expected = model(x)
    assert not torch.allclose(before, after)
    assert_close(after, expected, 2e-6)


@pytest.mark.parametrize("change", ["hook", "gate's hook", "part", "gate", "mode", "eps", "parameter"])
def test_an_evaluated_cell_follows_its_parts(change: str) -> None:
    """What is put in, or switched over, counts from the next call on."""
    torch.manual_seed(4)
    cell = nf.nn.InvertedResidualCell(8, 8, 6, 5, squeeze_excite=True).eval()
    x = torch.randn(2, 8, 6, 6)
    inner, seen = cell.ops[0], []

    def doubled(module: torch.nn.Module, args: object, result: torch.Tensor) -> torch.Tensor:
        seen.append(module)
        return 2 * result

    with torch.no_grad():
        for _ in range(2):
            before = cell(x)
        if change == "hook":
            inner.expand.register_forward_hook(doubled)
        elif change == "gate's hook":
            cell.se.register_forward_hook(doubled)
        elif change == "part":
            inner.project = nf.nn.PlainConv2d(48, 8, 1)
        elif change == "gate":
            cell.se = nf.nn.SqueezeExcite(8)
        elif change == "mode":
            inner.expand_norm.train()
        elif change == "eps":
            for norm in (inner.norm, inner.expand_norm, inner.depthwise_norm, inner.project_norm):
                norm.eps = 0.5
        else:
            inner.expand_norm.bias = torch.nn.Parameter(torch.ones(48))
        after = cell(x)
        with nf.use_backend("reference"):
            expected = cell(x)
    assert not torch.allclose(before, after)
    assert_close(after, expected, 1e-5)
    assert bool(seen) == ("hook" in change)


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients", "without"])
@pytest.mark.parametrize(
    "x, skip, error, message",
    [
        (torch.ones(2, 16, 4, 4), torch.ones(2, 8, 4, 4), ValueError, "16"),
        (torch.ones(8, 4, 4), torch.ones(8, 4, 4), ValueError, "x must"),
        (torch.ones(2, 8, 4, 4, dtype=torch.int64), torch.ones(2, 8, 4, 4), TypeError, "x must"),
        (torch.ones(2, 8, 4, 4), torch.ones(2, 8, 1, 4), ValueError, "skip must"),
    ],
    ids=["channels", "dimensions", "dtype", "skip"],
)
def test_errors(
    x: torch.Tensor, skip: torch.Tensor, error: type[Exception], message: str, grad: bool
) -> None:
    """The same with gradients and without: nothing is broadcast, no library speaks for the cell."""
    cell = nf.nn.InvertedResidualCell(8, 8, 6, 5).ops[0].eval()
    with torch.set_grad_enabled(grad), pytest.raises(error, match=f"inverted_residual_cell: .*{message}"):
        cell.residual(x, skip, None)
