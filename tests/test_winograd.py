"""3x3 convolutions by Winograd's algorithm: numbers, gradients, and where it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import foreign_model as foreign
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nvae_fast as nf
from nvae_fast.nn.conv import WeightNormConv2d
from nvae_fast.ops import wide_conv2d, winograd

pytestmark = pytest.mark.usefixtures("one_thread")
LAST = torch.channels_last
SAME = (1, 1, 1, 1)  # stride, padding, dilation, groups
FAST: Any = winograd._fast.__wrapped__  # type: ignore[attr-defined]  # of functools.cache


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the tests run with another capability, or on another processor."""
    monkeypatch.setattr(winograd, "_fast", lambda dtype: True)
    monkeypatch.setattr(winograd, "_library_products", lambda: False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that were called."""
    found: list[str] = []
    for name in ("convolve", "_backward", "weights"):
        operator = getattr(winograd, name)
        monkeypatch.setattr(
            winograd, name, lambda *args, name=name, operator=operator: found.append(name) or operator(*args)
        )
    return found


def operands(
    channels: int = 32, c_out: int = 40, height: int = 16, width: int = 12
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(7)
    x = torch.randn(4, channels, height, width).contiguous(memory_format=LAST)
    weight = torch.randn(c_out, channels, 3, 3) / (9 * channels) ** 0.5
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(c_out).requires_grad_()


def direct(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("channels", "c_out"), [(24, 24), (64, 128), (256, 33)])
def test_values_and_gradients_lose_little_more_than_those_of_pytorch(channels: int, c_out: int) -> None:
    """At most 2.5 times the error of the direct sum in float32 (measured: 1.7 to 2.4). A weight gradient, which is a sum over
    few pixels here, has 6 units in the last place, and the direct one 1.3."""
    inputs = operands(channels, c_out)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = direct(*doubles)
    grad = torch.randn(expected.shape).contiguous(memory_format=LAST)
    truth = expected, *torch.autograd.grad(expected, doubles, grad.double())

    def errors(function: Callable[..., Tensor]) -> list[float]:
        y = function(*inputs)
        assert y.is_contiguous(memory_format=LAST)
        made = y, *torch.autograd.grad(y, inputs, grad)
        return [error(a, e) for a, e in zip(made, truth, strict=True)]

    for found, of_pytorch in zip(errors(winograd.conv2d), errors(direct), strict=True):
        assert found < max(2.5 * of_pytorch, 8 * torch.finfo(torch.float32).eps)


def test_gradients_that_are_not_wanted_are_not_computed(calls: list[str]) -> None:
    x, weight, bias = operands()
    for wanted, made in ((x, ["_backward"]), (weight, ["_backward"]), (bias, [])):
        y = winograd.conv2d(*(t if t is wanted else t.detach() for t in (x, weight, bias)))
        calls.clear()
        (found,) = torch.autograd.grad(y.sum(), wanted)
        assert found.shape == wanted.shape
        assert calls == made


def test_without_bias() -> None:
    x, weight, _ = operands()
    y = winograd.conv2d(x, weight, None)
    torch.testing.assert_close(y, direct(x, weight, None), rtol=1e-4, atol=1e-5)
    y.sum().backward()


def test_second_derivatives() -> None:
    def penalty(convolve: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(convolve(x, *rest).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), rest[0])[0]

    inputs = operands()
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    assert error(penalty(winograd.conv2d, *inputs), penalty(direct, *doubles)) < 1e-5


def test_batched_gradients() -> None:
    inputs = operands()
    y = winograd.conv2d(*inputs)
    grads = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        for found, expected in zip(
            batched, torch.autograd.grad(y, inputs, grad, retain_graph=True), strict=True
        ):
            assert error(found[i], expected.double()) < 1e-5


def test_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = (t.detach() for t in operands())
    assert winograd.computes(x, weight, SAME)
    assert winograd.computes(x.bfloat16(), weight.bfloat16(), SAME)
    refused = {
        "NCHW": (x.contiguous(), weight, SAME),
        "float64": (x.double(), weight.double(), SAME),
        "float16": (x.half(), weight.half(), SAME),
        "two dtypes": (x, weight.double(), SAME),
        "a wider weight": (x.bfloat16(), weight, SAME),
        "stride": (x, weight, (2, 1, 1, 1)),
        "padding": (x, weight, (1, 0, 1, 1)),
        "dilation": (x, weight, (1, 1, 2, 1)),
        "groups": (x, weight, (1, 1, 1, 2)),
        "5x5": (x, torch.zeros(40, 32, 5, 5), SAME),
        "few channels": (x[:, :15].contiguous(memory_format=LAST), weight[:, :15], SAME),
        "few results": (x, weight[:15], SAME),
        "height": (x[:, :, :14], weight, SAME),
        "few tiles": (x[:1], weight, SAME),
        "nothing": (x[:0], weight, SAME),
        "meta": (x.to("meta"), weight.to("meta"), SAME),
    }
    for name, given in refused.items():
        assert not winograd.computes(*given), name
    with torch.autocast("cpu", torch.bfloat16):
        assert winograd.computes(x, weight, SAME)
        assert winograd.computes(x.bfloat16(), weight, SAME)
        assert not winograd.computes(x.double(), weight.double(), SAME)
    with torch.autocast("cpu", torch.float16):
        assert not winograd.computes(x, weight, SAME)
    with nf.use_backend("reference"):
        assert not winograd.computes(x, weight, SAME)
    monkeypatch.setattr(winograd, "_fast", lambda dtype: False)
    assert not winograd.computes(x, weight, SAME)


@pytest.mark.parametrize("of_library", [False, True])
def test_contiguous_maps_of_many_channels(of_library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are converted where that pays, and stay contiguous."""
    monkeypatch.setattr(winograd, "_library_products", lambda: of_library)
    wide = [t.detach().contiguous() for t in operands(64, 64)]
    assert winograd.computes(*wide[:2], SAME) is not of_library
    assert not winograd.computes(*(t.detach().contiguous() for t in operands(64, 40)[:2]), SAME)
    assert not winograd.computes(wide[0].bfloat16(), wide[1].bfloat16(), SAME)
    assert not winograd.computes(wide[0].transpose(2, 3), wide[1], SAME)
    inputs = [t.requires_grad_() for t in wide]
    y, expected = winograd.conv2d(*inputs), direct(*(t.double() for t in inputs))
    assert y.is_contiguous()
    grad = torch.randn(y.shape)
    made = torch.autograd.grad(y, inputs, grad)
    for a, e in zip(
        (y, *made), (expected, *torch.autograd.grad(expected, inputs, grad.double())), strict=True
    ):
        assert a.is_contiguous()
        assert error(a, e.double()) < 3e-6


@pytest.mark.parametrize(
    ("facts", "single", "half"),
    [
        ({"cpu_capability": "avx2", "amx": False}, True, True),
        ({"cpu_capability": "avx512", "amx": True}, True, False),
        ({"cpu_capability": "baseline", "amx": False}, False, False),
        ({}, False, False),
    ],
)
def test_processors(facts: dict[str, Any], single: bool, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """AMX multiplies bfloat16 numbers faster than the transforms save products."""
    monkeypatch.setattr(winograd._extension, "info", lambda: facts)
    assert FAST(torch.float32) == single
    assert FAST(torch.bfloat16) == half


@pytest.mark.parametrize("library", [False, True])
def test_least_sizes(library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "_library_products", lambda: library)
    x, weight = torch.zeros(8, 16, 4, 4).contiguous(memory_format=LAST), torch.zeros(16, 16, 3, 3)
    many = torch.zeros(32, 16, 4, 4).contiguous(memory_format=LAST)
    assert not winograd.computes(x, weight, SAME)
    assert winograd.computes(x, weight, SAME, transformed=True) != library
    assert not winograd.computes(x[:7], weight, SAME, transformed=True)
    assert winograd.computes(many, weight, SAME) != library
    assert winograd.computes(many.bfloat16(), weight.bfloat16(), SAME)
    assert not winograd.computes(x.bfloat16(), weight.bfloat16(), SAME, transformed=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_autocast(frozen: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 map becomes a bfloat16 one, as in PyTorch's convolution, whose error is larger."""
    torch.manual_seed(8)
    monkeypatch.setattr(wide_conv2d, "fast_bfloat16", lambda: True)
    conv: Any = WeightNormConv2d(32, 40, 3)
    x = operands()[0].detach()
    expected = conv.double()(x.double()).detach()
    conv = nf.freeze(conv.float()) if frozen else conv.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x)
        assert calls == (["weights", "convolve"] if frozen else ["convolve"])
        monkeypatch.setattr(winograd, "_fast", lambda dtype: False)
        of_pytorch = conv(x)
    assert y.dtype == of_pytorch.dtype == torch.bfloat16
    assert y.stride() == of_pytorch.stride()
    assert error(y.detach(), expected) < error(of_pytorch.detach(), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_modules(frozen: bool, calls: list[str]) -> None:
    torch.manual_seed(8)
    conv: Any = WeightNormConv2d(32, 40, 3)
    conv = nf.freeze(conv) if frozen else conv
    x, _, _ = operands()
    x = x.detach()
    y = conv(x)
    assert calls == (["weights", "convolve"] if frozen else ["convolve"])
    calls.clear()
    with nf.use_backend("reference"):
        expected = conv(x)
    assert not calls
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert y.stride() == expected.stride()


def test_functional_transforms_use_pytorch(calls: list[str]) -> None:
    conv, (x, _, _) = WeightNormConv2d(32, 40, 3), operands()
    x = x.detach()
    torch.func.jvp(conv, (x,), (torch.ones_like(x),))
    torch.func.vmap(conv)(torch.stack((x, x)))
    torch.func.grad(lambda x: conv(x).sum())(x)
    assert not calls


@pytest.mark.parametrize("frozen", [False, True])
def test_models_built_elsewhere(frozen: bool, calls: list[str]) -> None:
    torch.manual_seed(9)
    conv, (x, _, _) = foreign.Conv2D(32, 40, 3, padding=1, weight_norm=True), operands()
    x = x.detach()
    own = conv(x)
    model: Any = nf.accelerate(nn.Sequential(conv))
    assert nf.acceleration_report(model).replaced
    model = nf.freeze(model) if frozen else model
    calls.clear()
    y = model(x)
    assert calls == (["weights", "convolve"] if frozen else ["convolve"])
    torch.testing.assert_close(y, own, rtol=1e-4, atol=1e-5)


# The kernels, and the formulas, which are written with matrices.

SIZES = [(2, 37, 8, 12), (1, 64, 4, 4), (2, 130, 4, 8), (3, 1, 16, 4), (0, 5, 4, 4), (40, 17, 8, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [LAST, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize("size", SIZES)
def test_kernels(size: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = torch.randn(size).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(21, size[1], 3, 3) / (9 * size[1]) ** 0.5, torch.randn(21)
    close = dict(rtol=1e-5, atol=2e-5) if dtype == torch.float32 else dict(rtol=8e-3, atol=8e-3)
    made = winograd.weights(weight)
    torch.testing.assert_close(made, winograd._weights(weight), rtol=1e-5, atol=1e-6)
    columns = made.transpose(1, 2).contiguous().transpose(1, 2)
    apart = made.repeat_interleave(2, dim=2)[:, :, ::2]
    for given, added in ((weight, bias), (weight, None), (made, bias), (columns, bias), (apart, bias)):
        y, expected = winograd.convolve(x, given, added), winograd._conv2d(x, given, added)
        assert y.dtype == dtype
        last = x.is_contiguous(memory_format=LAST)  # one channel: it is in both
        assert y.numel() == 0 or y.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
        torch.testing.assert_close(y, expected, **close)
    torch.testing.assert_close(y.float(), direct(x.float(), weight, bias), rtol=1e-2, atol=2e-2)
    grad = torch.randn(y.shape).to(dtype)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, True, True)):
        found = winograd._backward(grad, x, weight, *needs)
        expected = winograd._gradients(grad, x, weight, *needs)
        for a, e, tolerance in zip(found, expected, (close, None, None), strict=True):
            scale = max(1.0, e.abs().max().item()) if e.numel() else 1.0
            torch.testing.assert_close(a, e, **(tolerance or dict(rtol=1e-5, atol=1e-5 * scale)))


def test_weights_of_any_layout_and_dtype() -> None:
    torch.manual_seed(5)
    weight = torch.randn(19, 35, 3, 3)
    expected = winograd._weights(weight)
    wide = torch.randn(19, 35, 3, 6)
    wide[..., ::2] = weight
    for given in (
        weight.contiguous(memory_format=LAST),
        weight.transpose(0, 1).contiguous().transpose(0, 1),
        weight.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., ::2],
        weight.double(),
    ):
        torch.testing.assert_close(winograd.weights(given), expected, rtol=1e-5, atol=1e-6)
    x, grad = torch.randn(2, 35, 8, 8), torch.randn(2, 19, 8, 8)
    torch.testing.assert_close(
        winograd._backward(grad, x, weight.contiguous(memory_format=LAST), False, True, False)[1],
        winograd._backward(grad, x, weight, False, True, False)[1],
    )


def test_the_matrices_are_exact() -> None:
    """F(4x4, 3x3) of one tile in float64."""
    a, b, g = (torch.tensor(m, dtype=torch.float64) for m in (winograd.A, winograd.B, winograd.G))
    d, w = torch.randn(6, 6, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    y = a.t() @ ((g @ w @ g.t()) * (b.t() @ d @ b)) @ a
    torch.testing.assert_close(y, F.conv2d(d[None, None], w[None, None])[0, 0], rtol=1e-12, atol=1e-12)


def test_what_the_kernels_refuse() -> None:
    ops, x = torch.ops.nvae_fast, torch.zeros(2, 3, 4, 8)
    weight, grad, needs = torch.zeros(5, 3, 3, 3), torch.zeros(2, 5, 4, 8), (True, True, True)
    for call, message in (
        (lambda: ops.winograd_conv2d(x[0], weight, None), r"x must have shape \(B, C, H, W\)"),
        (
            lambda: ops.winograd_conv2d(x[..., :7], weight, None),
            "x must have a height and a width that are multiples of 4",
        ),
        (lambda: ops.winograd_conv2d(x.double(), weight, None), "x must be float32 or bfloat16, got Double"),
        (lambda: ops.winograd_conv2d(x[:, :0], weight, None), "x must have channels"),
        (
            lambda: ops.winograd_conv2d(x, weight[..., :2], None),
            r"winograd_conv2d: weight must have shape \(C_out, C_in, 3, 3\)",
        ),
        (lambda: ops.winograd_conv2d(x, weight[:, :2], None), r"weight must have shape \(36, 5, 3\)"),
        (lambda: ops.winograd_conv2d(x, weight, torch.zeros(2)), r"bias must have shape \(5,\)"),
        (lambda: ops.winograd_conv2d(x, torch.zeros(36, 5, 3).double(), None), "must be float32, got Double"),
        (lambda: ops.winograd_weights(weight.int()), "weight"),
        (
            lambda: ops.winograd_conv2d_backward(grad[:1], x, weight, *needs),
            r"grad must have shape \(2, 5, 4, 8\)",
        ),
        (
            lambda: ops.winograd_conv2d_backward(grad, x, weight[:, :2], *needs),
            r"weight must have shape \(5, 3, 3, 3\)",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
