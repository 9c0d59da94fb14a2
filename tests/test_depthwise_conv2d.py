"""depthwise_conv2d: padding, upsampling, and statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from descriptions.depthwise_conv2d import formula, inputs, on_load, op, statistics
from harness import (
    assert_close,
    place,
)

import nvae_fast as nf


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


def test_statistics_of_an_empty_batch(route: str) -> None:
    """Nothing has no spread: merging it with other counts must not give NaN."""
    tensors = {**inputs(5, (3, 4, 7, 5), affine=True), "x": torch.zeros(0, 4, 7, 5, dtype=torch.float64)}
    _y, found = nf.depthwise_conv2d(**tensors, stats=True)
    assert found.count == 0
    assert not found.mean.any()
    assert not found.m2.any()
