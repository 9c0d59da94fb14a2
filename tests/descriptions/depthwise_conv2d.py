"""depthwise_conv2d: one filter for each channel, of an input that is normalised and activated on load."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import Tensors

import nvae_fast as nf
from descriptions import INPUT, Description, Sample, sample

AFFINE = ("x", "weight", "scale", "shift")
PLAIN = ("x", "weight")

# kernel width, (B, C, H, W), options; "affine" is for scale and shift
CASES: list[tuple[int, tuple[int, int, int, int], dict[str, Any]]] = [
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


def of(kernel: int, size: tuple[int, ...], affine: bool = False, **options: Any) -> Sample:
    label = f"k{kernel}-{'x'.join(map(str, size))}-{'affine-' * affine}{'-'.join(options)}"
    return sample(label, inputs(kernel, size, affine), **options)


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
ALL_ON = {"stride": 2, "activation": "swish", "stats": True}

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(6)
    FILTER = torch.randn(4, 1, 3, 3, dtype=torch.float64)
    SCALE = torch.rand(4, dtype=torch.float64) + 0.5
    SHIFT = torch.randn(4, dtype=torch.float64)

DESCRIPTIONS = [
    Description(
        "depthwise_conv2d",
        op,
        formula,
        samples=[of(kernel, size, **options) for kernel, size, options in CASES],
        small=[
            of(3, (2, 2, 3, 4), True, **ALL_ON),
            of(3, (2, 2, 3, 4), True, upsample=2, activation="elu"),
            of(3, (2, 2, 3, 4), True, dilation=2),
            of(3, (2, 2, 4, 3), False, upsample=2),
            of(3, (2, 2, 4, 3), True, upsample=2, activation="swish", stats=True),
        ],
        layouts=[of(5, (3, 4, 7, 5), True, **ALL_ON), of(5, (3, 4, 7, 5), True, stride=2)],
        differentiable=AFFINE,
        batched=("x",),
        results=(INPUT, torch.float32, torch.float32),
        eager=eager,
        vector_floor=1,
        errors=ERRORS,
        good={"x": X, "weight": W},
        poison={"x": (1, 2, 2, 2)},
        single=(
            lambda x: nf.depthwise_conv2d(x, FILTER, scale=SCALE, shift=SHIFT, activation="swish"),
            (4, 3, 5),
        ),
    ),
]
