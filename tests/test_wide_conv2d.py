"""Convolutions of bfloat16 maps by float32 arithmetic, and by Winograd's algorithm: the convolution's numbers and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close
from torch import Tensor

import nvae_fast as nf
from nvae_fast.nn.conv import WeightNormConv2d
from nvae_fast.ops import wide_conv2d, winograd

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = torch.channels_last
ROUNDING = 4e-3  # half a unit in the last place of bfloat16, relative: of a whole map 2e-3
GEOMETRIES = {  # size of x, C_out, K, stride, padding, dilation, groups; bias
    "winograd": ((4, 24, 12, 16), 20, 3, 1, 1, 1, 1),
    "few tiles": ((1, 16, 8, 8), 16, 3, 1, 1, 1, 1),
    "odd height": ((4, 16, 14, 16), 16, 3, 1, 1, 1, 1),
    "few channels": ((4, 3, 16, 16), 16, 3, 1, 1, 1, 1),
    "1x1": ((3, 40, 9, 7), 24, 1, 1, 0, 1, 1),
    "strided 1x1": ((2, 8, 6, 6), 8, 1, 2, 0, 1, 1),
    "strided": ((2, 32, 16, 16), 16, 3, 2, 1, 1, 1),
    "dilated": ((2, 32, 16, 16), 16, 3, 1, 2, 2, 1),
    "groups": ((2, 32, 16, 16), 32, 3, 1, 1, 1, 4),
    "empty": ((0, 32, 16, 16), 32, 3, 1, 1, 1, 1),
}


@pytest.fixture(autouse=True)
def slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide_conv2d, "fast_bfloat16", lambda: False)


def operands(
    size: tuple[int, ...], c_out: int, k: int, groups: int, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(size).bfloat16().contiguous(memory_format=memory_format)
    weight = torch.randn(c_out, size[1] // groups, k, k) / (size[1] * k * k / groups) ** 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(c_out).requires_grad_()


@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_values_and_gradients(name: str, memory_format: torch.memory_format) -> None:
    size, c_out, k, *geometry = GEOMETRIES[name]
    inputs = operands(size, c_out, k, geometry[3], memory_format)
    y = wide_conv2d.conv2d(*inputs, *geometry)
    assert y.dtype == torch.bfloat16
    assert y.numel() == 0 or y.is_contiguous(memory_format=memory_format)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.conv2d(*doubles, *geometry)
    assert_close(y, expected, ROUNDING)
    grad = torch.randn(expected.shape).bfloat16()
    found = torch.autograd.grad(y, inputs, grad)
    for a, e, t in zip(found, torch.autograd.grad(expected, doubles, grad.double()), inputs, strict=True):
        assert a.dtype == t.dtype
        # The gradients of float32 parameters are not rounded to bfloat16.
        assert_close(a, e, ROUNDING if t is inputs[0] else 1e-5)


@pytest.mark.parametrize("rows", [64, 128, 150, 0])
def test_products_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole parts, a shorter last one, and none."""
    monkeypatch.setattr(wide_conv2d, "_BYTES", 1)  # 64 rows a part
    torch.manual_seed(6)
    a, b, matrix, bias = torch.randn(rows, 5), torch.randn(rows, 7), torch.randn(5, 7), torch.randn(7)
    a, b = a.bfloat16(), b.bfloat16()
    for added in (None, bias):
        expected = a.double() @ matrix.double() + (0 if added is None else added.double())
        assert_close(wide_conv2d.product(a, matrix, added), expected, ROUNDING)
    assert_close(wide_conv2d.transposed_product(a, b), a.double().t() @ b.double(), 1e-6)


@pytest.mark.parametrize(("channels", "side"), [(16, 16), (48, 12)])
def test_winograd_runs_where_it_should(channels: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("convolve", "_backward"):
        operator = getattr(winograd, name)
        monkeypatch.setattr(
            winograd, name, lambda *args, name=name, operator=operator: calls.append(name) or operator(*args)
        )
    x, weight, bias = operands((4, channels, side, side), channels, 3, 1, LAST)
    y = wide_conv2d.conv2d(x, weight, bias, 1, 1)
    torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert calls == ["convolve", "_backward"]


def test_second_derivatives() -> None:
    inputs = operands((4, 16, 16, 16), 16, 3, 1, LAST)

    def penalty(convolve: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(convolve(x, *rest, 1, 1).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), rest[0])[0]

    doubles = [t.detach().double().requires_grad_() for t in inputs]
    assert_close(penalty(wide_conv2d.conv2d, *inputs), penalty(F.conv2d, *doubles), 2e-2)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_batched_gradients(kernel_size: int) -> None:
    inputs = operands((4, 16, 16, 16), 16, kernel_size, 1, LAST)
    y = wide_conv2d.conv2d(*inputs, 1, kernel_size // 2)
    grads = torch.randn(3, *y.shape).bfloat16()
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for found, expected in zip(
            batched, torch.autograd.grad(y, inputs, grad, retain_graph=True), strict=True
        ):
            assert_close(found[i], expected.double(), ROUNDING if found.dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_nothing_is_kept_in_float32_but_parameters(kernel_size: int) -> None:
    kept: list[Tensor] = []
    conv = WeightNormConv2d(32, 32, kernel_size)
    x = torch.randn(4, 32, 16, 16).contiguous(memory_format=LAST).requires_grad_()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
    assert y.dtype == torch.bfloat16
    assert [t.dtype for t in kept if t.shape == x.shape] == [torch.bfloat16]


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_modules(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers as PyTorch's own autocast, up to bfloat16's rounding."""
    conv: Any = WeightNormConv2d(32, 48, 3)
    conv = nf.freeze(conv) if frozen else conv.eval()
    x = torch.randn(4, 32, 16, 16).contiguous(memory_format=LAST)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        monkeypatch.setattr(wide_conv2d, "fast_bfloat16", lambda: True)
        monkeypatch.setattr(winograd, "_fast", lambda dtype: False)
        expected = conv(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert y.stride() == expected.stride()
    assert not torch.equal(y, expected)
    assert_close(y, expected.double(), 2 * ROUNDING)


def test_only_bfloat16_on_a_slow_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, cpu = torch.zeros(4, 4, 3, 3), torch.device("cpu")
    x = torch.zeros(1, 4, 4, 4)
    assert wide_conv2d.convolves(x.bfloat16(), weight.bfloat16())
    for a, b in (
        (x, weight),
        (x.half(), weight.half()),
        (x.bfloat16(), weight),
        (x.double(), weight.double()),
    ):
        assert not wide_conv2d.convolves(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert wide_conv2d.convolves(x, weight)
        assert not wide_conv2d.convolves(x.double(), weight.double())
    with torch.autocast("cpu", torch.float16):
        assert not wide_conv2d.convolves(x, weight)
    assert not wide_conv2d.computes(torch.bfloat16, torch.device("cuda"))
    with nf.use_backend("reference"):
        assert not wide_conv2d.computes(torch.bfloat16, cpu)
    assert torch.func.vmap(lambda t: t * wide_conv2d.computes(torch.bfloat16, cpu))(torch.ones(1)).item() == 0
    monkeypatch.setattr(wide_conv2d, "fast_bfloat16", lambda: True)
    assert not wide_conv2d.computes(torch.bfloat16, cpu)
