"""depthwise_conv2d: fp64 truth tap by tap, what lies outside the image, statistics, and everything an op must
do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

import nvae_fast as nf

AFFINE = ("x", "weight", "scale", "shift")
PLAIN = ("x", "weight")

# kernel width, (B, C, H, W), options; "affine" stands for scale and shift
CASES = [
    (3, (2, 4, 8, 8), {}),
    (5, (2, 3, 7, 11), {}),
    (7, (1, 5, 9, 6), {}),
    (11, (1, 2, 13, 12), {}),
    (5, (2, 17, 4, 4), {"stride": 2}),
    (3, (1, 3, 7, 5), {"stride": 2}),
    (11, (1, 2, 9, 8), {"stride": 2}),
    (3, (2, 3, 6, 7), {"dilation": 2}),
    (5, (1, 3, 9, 9), {"dilation": 2, "stride": 2}),
    (5, (2, 3, 5, 4), {"upsample": 2}),
    (11, (1, 2, 3, 4), {"upsample": 2}),
    (5, (1, 2, 1, 1), {}),
    (11, (1, 2, 2, 3), {}),
    (7, (1, 2, 2, 3), {"dilation": 2, "stride": 2}),
    (5, (2, 3, 6, 5), {"affine": True, "activation": "swish", "stats": True}),
    (5, (2, 3, 6, 5), {"affine": True, "activation": "elu", "stride": 2, "stats": True}),
    (3, (2, 3, 3, 5), {"affine": True, "upsample": 2, "activation": "swish", "stats": True}),
    (5, (2, 3, 6, 5), {"affine": True, "dilation": 2}),
    (5, (2, 3, 6, 5), {"activation": "swish"}),
]
IDS = [f"k{k}-{'x'.join(map(str, size))}-{'-'.join(options)}" for k, size, options in CASES]


def inputs(kernel: int, size: tuple[int, ...], affine: bool) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    channels = size[1]
    shapes = {"x": size, "weight": (channels, 1, kernel, kernel), "scale": (channels,), "shift": (channels,)}
    return {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        for name in (AFFINE if affine else PLAIN)
    }


def on_load(x: torch.Tensor, scale: Any, shift: Any, activation: str | None, upsample: int) -> torch.Tensor:
    h = x if scale is None else x * scale[:, None, None] + shift[:, None, None]
    if activation == "swish":
        h = h * torch.sigmoid(h)
    elif activation == "elu":
        h = torch.where(h > 0, h, torch.exp(h.clamp_max(0)) - 1)
    return h.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3) if upsample > 1 else h


def formula(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: Any = None,
    shift: Any = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    activation: str | None = None,
    stats: bool = False,
) -> Any:
    """The sum over taps, written out."""
    h = on_load(x, scale, shift, activation, upsample)
    k, pad = weight.shape[-1], weight.shape[-1] // 2 * dilation
    height, width = (-(-n // stride) for n in h.shape[2:])
    h = F.pad(h, (pad, pad, pad, pad))
    y = 0
    for u in range(k):
        for v in range(k):
            rows = slice(u * dilation, u * dilation + (height - 1) * stride + 1, stride)
            columns = slice(v * dilation, v * dilation + (width - 1) * stride + 1, stride)
            y = y + weight[:, 0, u, v, None, None] * h[:, :, rows, columns]
    return (y, *statistics(y)) if stats else y


def statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wide = y if y.dtype == torch.float64 else y.float()
    mean = wide.mean((0, 2, 3))
    return mean, (wide - mean[:, None, None]).square().sum((0, 2, 3))


def eager(x: torch.Tensor, weight: torch.Tensor, scale: Any = None, shift: Any = None, **options: Any) -> Any:
    """The same with PyTorch's convolution."""
    stride, dilation = options.get("stride", 1), options.get("dilation", 1)
    h = on_load(x, scale, shift, options.get("activation"), options.get("upsample", 1))
    padding = weight.shape[-1] // 2 * dilation
    y = F.conv2d(h, weight, stride=stride, padding=padding, dilation=dilation, groups=weight.shape[0])
    return (y, *statistics(y)) if options.get("stats") else y


def op(x: Any, weight: Any, scale: Any = None, shift: Any = None, **options: Any) -> Any:
    out = nf.depthwise_conv2d(x, weight, scale=scale, shift=shift, **options)
    return (out[0], out[1].mean, out[1].m2) if options.get("stats") else out


def case(kernel: int, size: tuple[int, ...], options: dict) -> tuple[Tensors, dict]:
    rest = {key: value for key, value in options.items() if key != "affine"}
    return inputs(kernel, size, options.get("affine", False)), rest


@pytest.mark.parametrize("kernel, size, options", CASES, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype,
    kernel: int,
    size: tuple,
    options: dict,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    tensors, options = case(kernel, size, options)
    tensors = place(tensors, dtype, memory_format, device)
    assert_accurate(
        lambda **t: op(**t, **options),
        lambda **t: formula(**t, **options),
        tensors,
        tuple(tensors),
        eager=lambda **t: eager(**t, **options),
        vector_floor=torch.finfo(dtype).eps,
    )
    y = nf.depthwise_conv2d(**tensors, **{**options, "stats": False})
    assert y.dtype == dtype
    if y.shape[1] > 1 and y.shape[2] * y.shape[3] > 1:
        assert y.is_contiguous(memory_format=memory_format), "the memory format of x is kept"


@pytest.mark.parametrize("kernel, size, options", CASES, ids=IDS)
def test_float64(kernel: int, size: tuple, options: dict, route: str) -> None:
    tensors, options = case(kernel, size, options)
    actual, expected = op(**tensors, **options), formula(**tensors, **options)
    for a, e in zip(*((t if options.get("stats") else (t,)) for t in (actual, expected)), strict=True):
        assert_close(a, e, 1e-13)


@pytest.mark.parametrize("stride, dilation, upsample", [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
@pytest.mark.parametrize("activation", [None, "swish", "elu"])
def test_outside_the_image_is_exactly_zero(
    activation: str | None, stride: int, dilation: int, upsample: int, route: str, device: torch.device
) -> None:
    """With scale 0 and shift 3 every pixel is act(3), and a kernel of ones counts the taps inside: not one
    outside counts."""
    x = torch.randn(1, 1, 4, 6, device=device)
    y = nf.depthwise_conv2d(
        x,
        torch.ones(1, 1, 5, 5, device=device),
        stride=stride,
        dilation=dilation,
        upsample=upsample,
        scale=torch.zeros(1, device=device),
        shift=torch.full((1,), 3.0, device=device),
        activation=activation,
    )

    def inside(extent: int) -> torch.Tensor:
        taps = torch.arange(0, extent, stride)[:, None] + (torch.arange(5) - 2) * dilation
        return ((taps >= 0) & (taps < extent)).sum(1)

    counts = inside(4 * upsample)[:, None] * inside(6 * upsample)
    value = {None: 3.0, "swish": float(F.silu(torch.tensor(3.0))), "elu": 3.0}[activation]
    assert_close(y[0, 0], counts * value, 1e-6)


def test_upsampling_is_of_the_activated_input(route: str) -> None:
    tensors = inputs(5, (2, 3, 4, 5), affine=True)
    h = F.interpolate(on_load(tensors["x"], tensors["scale"], tensors["shift"], "swish", 1), scale_factor=2)
    expected = F.conv2d(h, tensors["weight"], padding=2, groups=3)
    assert_close(op(**tensors, upsample=2, activation="swish"), expected, 1e-13)


@pytest.mark.parametrize("offset", [0.0, 100.0, -100.0])
def test_statistics_far_from_zero(
    offset: float, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    """|mean| / std = 100: sums of squares without a shift would lose every digit of the variance."""
    x = torch.randn(3, 4, 16, 16, dtype=torch.float64)
    weight = torch.zeros(4, 1, 3, 3, dtype=torch.float64)
    weight[:, 0, 1, 1] = torch.tensor([1.0, -2.0, 0.5, 1e-3])
    tensors = place({"x": x + offset, "weight": weight}, torch.float32, memory_format, device)
    y, found = nf.depthwise_conv2d(**tensors, stats=True)
    assert found.count == y.shape[0] * y.shape[2] * y.shape[3] == 768
    mean, m2 = statistics(formula(**{name: t.double() for name, t in tensors.items()}))
    assert found.mean.dtype == found.m2.dtype == torch.float32
    assert_close(found.mean, mean, 1e-6 if offset else 1e-5, "mean")
    assert_close(found.m2, m2, 1e-5, "M2")
    (gradient,) = torch.autograd.grad(
        nf.depthwise_conv2d(tensors["x"].requires_grad_(), tensors["weight"], stats=True)[1].m2.sum(),
        tensors["x"],
    )
    wide = tensors["x"].detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(statistics(formula(wide, tensors["weight"].double()))[1].sum(), wide)
    assert_close(gradient, expected, 2e-5, "gradient of M2")


def test_half_precision_input_with_full_precision_weight(route: str) -> None:
    """What autocast makes: the output follows x, each gradient its own tensor."""
    tensors = {name: t.float() for name, t in inputs(5, (2, 3, 6, 5), affine=True).items()}
    tensors["x"] = tensors["x"].bfloat16()
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    y = op(**leaves, activation="swish")
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {name: t.grad.dtype for name, t in leaves.items()} == {
        name: t.dtype for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype: torch.dtype, route: str) -> None:
    tensors = {name: t.float() for name, t in inputs(5, (2, 3, 6, 5), affine=True).items()}
    tensors["x"] = tensors["x"].to(dtype)
    plain = op(**tensors, activation="swish")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = op(**tensors, activation="swish")
    assert under.dtype == plain.dtype == dtype
    assert torch.equal(under, plain)


OPTIONS = {"stride": 2, "activation": "swish", "stats": True}


@pytest.mark.parametrize("options", [OPTIONS, {"upsample": 2, "activation": "elu"}, {"dilation": 2}])
def test_gradcheck(options: dict, route: str) -> None:
    assert_gradcheck(lambda **t: op(**t, **options), inputs(3, (2, 2, 3, 4), affine=True), AFFINE)


@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(affine: bool, device: torch.device) -> None:
    t = place(inputs(3, (2, 2, 4, 3), affine=True), torch.float32, torch.channels_last, device)
    scale, shift, activation, wanted = (
        (t["scale"], t["shift"], "swish", (0, 1, 2, 3)) if affine else (None, None, None, (0, 1))
    )
    assert_opcheck(
        "depthwise_conv2d",
        t["x"],
        t["weight"],
        scale,
        shift,
        1,
        1,
        2,
        activation,
        affine,
        None,
        differentiable=wanted,
    )


def test_compiles(device: torch.device) -> None:
    tensors = place(inputs(3, (2, 2, 4, 3), affine=True), torch.float32, torch.contiguous_format, device)
    assert_compiles(lambda **t: op(**t, **OPTIONS), tensors, AFFINE)


def test_layouts_repeats_and_empty(route: str, device: torch.device) -> None:
    tensors = place(inputs(5, (3, 4, 7, 5), affine=True), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(lambda **t: op(**t, **OPTIONS), tensors, AFFINE)
    assert_repeatable(lambda **t: op(**t, **OPTIONS), tensors, AFFINE)
    empty = {**tensors, "x": tensors["x"][:0]}
    assert assert_empty_works(lambda **t: op(**t, stride=2), empty, AFFINE)["output 0"].shape == (0, 4, 4, 3)
    _y, found = nf.depthwise_conv2d(**empty, stats=True)
    assert found.count == 0
    assert not found.mean.any()
    assert not found.m2.any(), "nothing has no spread: merging it with other counts must not give NaN"


def test_no_double_backward() -> None:
    t = inputs(3, (1, 2, 4, 4), affine=False)
    leaf = t["x"].requires_grad_()
    y, _, _ = torch.ops.nvae_fast.depthwise_conv2d(leaf, t["weight"], None, None, 1, 1, 1, None, False, None)
    assert_no_double_backward("depthwise_conv2d", y, leaf)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_propagates(value: float, route: str) -> None:
    """Into the window around the bad pixel, and no further."""
    x = torch.randn(1, 2, 9, 9)
    x[0, 1, 4, 4] = value
    y = nf.depthwise_conv2d(x, torch.ones(2, 1, 3, 3))
    bad = torch.zeros(1, 2, 9, 9, dtype=torch.bool)
    bad[0, 1, 3:6, 3:6] = True
    assert torch.equal(~y.isfinite(), bad)


X, W = torch.zeros(2, 3, 8, 8), torch.zeros(3, 1, 5, 5)
ERRORS = [
    ({"x": 1}, TypeError, "x must be a torch.Tensor, got int"),
    ({"x": torch.zeros(3, 8, 8)}, ValueError, r"x must have shape \(B, C, H, W\), got \(3, 8, 8\)"),
    ({"weight": torch.zeros(3, 1, 4, 4)}, ValueError, "weight must have an odd kernel width, got 4"),
    (
        {"weight": torch.zeros(4, 1, 5, 5)},
        ValueError,
        r"weight must have shape \(3, 1, 5, 5\), got \(4, 1, 5, 5\)",
    ),
    (
        {"weight": torch.zeros(3, 1, 3, 5)},
        ValueError,
        r"weight must have shape \(3, 1, 5, 5\), got \(3, 1, 3, 5\)",
    ),
    ({"weight": torch.zeros(3, 1, 5, 5, device="meta")}, ValueError, "weight must be on cpu .*got meta"),
    ({"scale": torch.ones(3)}, ValueError, "scale and shift must be given together, got only scale"),
    ({"shift": torch.ones(3)}, ValueError, "scale and shift must be given together, got only shift"),
    (
        {"scale": torch.ones(2), "shift": torch.ones(3)},
        ValueError,
        r"scale must have shape \(3,\), got \(2,\)",
    ),
    ({"stride": 3}, ValueError, r"stride must be one of \[1, 2\], got 3"),
    ({"stride": 1.0}, TypeError, "stride must be an int, got 1.0"),
    ({"dilation": 2.0}, TypeError, "dilation must be an int, got 2.0"),
    ({"upsample": True}, TypeError, "upsample must be an int, got True"),
    ({"stats": "no"}, TypeError, "stats must be True or False, got 'no'"),
    ({"taps": 3}, TypeError, "taps must be None or a sequence of positions, got 3"),
    ({"dilation": 0}, ValueError, r"dilation must be one of \[1, 2\], got 0"),
    ({"upsample": 4}, ValueError, r"upsample must be one of \[1, 2\], got 4"),
    ({"upsample": 2, "stride": 2}, ValueError, "upsample=2 needs stride=1, got stride=2"),
    ({"activation": "relu"}, ValueError, r"activation must be one of \[None, 'swish', 'elu'\], got 'relu'"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^depthwise_conv2d: {message}"):
        op(**{"x": X, "weight": W, **bad})
