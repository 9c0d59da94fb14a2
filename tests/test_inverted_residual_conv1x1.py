"""1x1 convolutions: whichever routine their size gets them, the numbers are the convolution's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close

from nvae_fast.ops.inverted_residual.conv1x1 import PackedMatrix, conv1x1, weight_gradient

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = [  # B, C_in, H, C_out: on both sides of every limit
    (2, 32, 4, 96), (16, 32, 4, 16), (17, 32, 4, 16), (2, 96, 8, 32), (2, 16, 9, 48), (2, 30, 4, 16), (3, 16, 1, 20),
]  # fmt: skip


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolution_and_weight_gradient(
    size: tuple[int, int, int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    b, c_in, h, c_out = size
    torch.manual_seed(5)
    x = torch.randn(b, c_in, h, h).to(dtype).contiguous(memory_format=memory_format)
    grad = torch.randn(b, c_out, h, h).to(dtype).contiguous(memory_format=memory_format)
    weight, bias = torch.randn(c_out, c_in).to(dtype), torch.randn(c_out).to(dtype)
    for matrix in (weight, weight.t().contiguous().t()):
        expected = F.conv2d(x.double(), matrix.double()[:, :, None, None], bias.double())
        y = conv1x1(x, matrix, bias)
        assert y.dtype == dtype
        assert_close(y, expected, TOLERANCE[dtype])
        assert_close(
            conv1x1(x, matrix[:, :, None, None]), expected - bias.double()[:, None, None], TOLERANCE[dtype]
        )
    expected = torch.einsum("bohw,bchw->oc", grad.double(), x.double())[:, :, None, None]
    found = weight_gradient(grad, x)
    assert found.shape == expected.shape
    assert found.dtype in (dtype, torch.float32)  # not rounded where the arithmetic is float32
    assert_close(found, expected, TOLERANCE[dtype])


def test_an_empty_batch() -> None:
    x = torch.randn(0, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    y = conv1x1(x, torch.randn(32, 16))
    assert y.shape == (0, 32, 4, 4)
    assert not weight_gradient(torch.randn_like(y), x).any()


def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """In float64."""
    return F.conv2d(x.double(), weight.double()[:, :, None, None], bias.double())


@pytest.mark.parametrize("channels", [(3, 7), (32, 96)])
def test_packed_matrix_is_the_convolution(channels: tuple[int, int]) -> None:
    """Whatever batches follow one another; layouts kept are few."""
    torch.manual_seed(0)
    weight, bias = torch.randn(channels[1], channels[0]), torch.randn(channels[1])
    conv = PackedMatrix(weight, bias)
    with torch.no_grad():
        for b, h, w in ((2, 4, 4), (1, 4, 4), (2, 4, 4), (5, 1, 1), (1, 1, 3), (0, 4, 4), (2, 4, 4)):
            x = torch.randn(b, channels[0], h, w).contiguous(memory_format=torch.channels_last)
            y = conv(x)
            expected = convolution(x, weight, bias)
            assert y.shape == expected.shape
            assert b == 0 or y.is_contiguous(memory_format=torch.channels_last)
            assert_close(y, expected, 2e-6, f"{b}x{h}x{w}")
        assert len(conv._packed) <= 2
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            x = torch.randn(2, channels[0], 4, 4, dtype=dtype)
            assert conv(x).dtype == dtype
            assert_close(conv(x), convolution(x, weight, bias), max(TOLERANCE[dtype], 2e-6))
        x = torch.randn(2, channels[0], 4, 4)
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x)
            assert conv(x.double()).dtype == torch.float64
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, convolution(x, weight, bias), TOLERANCE[torch.bfloat16])
        assert len(conv._packed) <= 2
        with torch.inference_mode():
            assert conv(torch.randn(3, channels[0], 2, 2)).shape == (3, channels[1], 2, 2)
        assert conv(torch.randn(3, channels[0], 2, 2)).shape == (3, channels[1], 2, 2)
