"""1x1 convolutions, which are matrix products over pixels, by the library routine that is fastest for their size."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import wide_conv2d

# oneDNN's convolution brings its weights into a layout of its own in every call, which is slow for few pixels, and its weight
# gradient is slow at small maps; the matrix product is slow where a number of channels is not a multiple of its tile. Measured
# in float32 and bfloat16 from 64 to 1536 channels: docs/benchmarks.md.
_FEW_PIXELS = {torch.float32: 256, torch.bfloat16: 2048}  # of a batch
_SMALL_MAP = 64  # pixels of an image
_TILE = 16


def as_matrix(t: Tensor) -> Tensor:
    """(B, C, H, W) in channels_last as the matrix (B H W, C) it is in memory."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _as_matrices(x: Tensor, channels: int) -> bool:
    return (
        not torch.compiler.is_exporting()  # an exported program is for any number of images
        and x.device.type == "cpu"
        and x.dtype in _FEW_PIXELS
        and x.shape[1] % _TILE == channels % _TILE == 0
        # Dynamo does not know the strides of tensors in the backward pass of an autograd.Function. Asked for them, it gives up
        # the trace inside the autocast context without leaving it, so that autocast is off for what follows, and starts
        # another in which saved tensors are copied to NCHW. The product is right for either layout.
        and (torch.compiler.is_compiling() or x.is_contiguous(memory_format=torch.channels_last))
    )


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """1x1 convolution with a (C_out, C_in) matrix or a (C_out, C_in, 1, 1) weight, in the dtype of x."""
    b, _, h, w = x.shape
    if x.dtype == torch.bfloat16 and wide_conv2d.computes(x.dtype, x.device):
        return wide_conv2d.conv2d(x, weight.reshape(*weight.shape[:2], 1, 1), bias)
    if _as_matrices(x, weight.shape[0]) and 0 < b * h * w <= _FEW_PIXELS[x.dtype]:
        y = F.linear(
            x.permute(0, 2, 3, 1), weight.flatten(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
        return y.permute(0, 3, 1, 2)
    if weight.dim() == 2:
        weight = weight.reshape(*weight.shape, 1, 1)
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad' x over pixels, (C_out, C_in, 1, 1): the weight gradient of a 1x1 convolution. In the dtype of x, or wider."""
    c_out, c_in = grad.shape[1], x.shape[1]
    if grad.dtype == x.dtype == torch.bfloat16 and wide_conv2d.computes(x.dtype, x.device):
        return wide_conv2d.transposed_product(as_matrix(grad), as_matrix(x)).view(c_out, c_in, 1, 1)
    if grad.dtype == x.dtype and _as_matrices(x, c_out) and 0 < x.shape[2] * x.shape[3] <= _SMALL_MAP:
        rows, columns = as_matrix(grad), as_matrix(x)
        product = rows.t() @ columns if c_out >= c_in else (columns.t() @ rows).t()  # the longer side first
        return product.reshape(c_out, c_in, 1, 1)
    weight = x.new_empty(c_out, c_in, 1, 1)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False)
    )[1]


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Return whether oneDNN multiplies bfloat16 numbers here, and faster than float32 ones."""
    return wide_conv2d.fast_bfloat16() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedMatrix:
    """A 1x1 convolution whose (C_out, C_in) matrix is kept in oneDNN's own layout, which depends on the number of pixels.

    The convolution would bring it there in every call: at 4x4 maps that costs a third of its time. Under autocast, and for
    bfloat16 maps, it is kept in bfloat16 where the processor multiplies such numbers; the bias is not rounded.
    """

    _KEPT = 2  # layouts: one for whole batches, one for the last of a set

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        routines = ("_linear_pointwise", "_reorder_linear_weight")
        self._packs = (
            weight.device.type == "cpu"
            and weight.dtype == torch.float32
            and all(hasattr(torch.ops.mkldnn, name) for name in routines)
        )
        self._packed: dict[tuple[int, torch.dtype], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled("cpu") and dtype != torch.float64:
            dtype = torch.get_autocast_dtype("cpu")
        if (
            not self._packs
            or x.numel() == 0
            or torch.compiler.is_compiling()
            or not torch._C._get_mkldnn_enabled()
            or not (dtype == torch.float32 or (dtype == torch.bfloat16 and _multiplies_bfloat16()))
        ):
            if self._packs and x.numel() and wide_conv2d.convolves(x, self.weight):
                with torch.autocast("cpu", enabled=False):
                    return self(x.float()).bfloat16()
            return conv1x1(x, self.weight, self.bias)
        b, c, h, w = x.shape
        pixels = b * h * w
        packed = self._packed.get((pixels, dtype))
        if packed is None:
            with torch.inference_mode(False), torch.no_grad():
                weight = self.weight.to(dtype).contiguous()
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, pixels)
            # A new dictionary: other threads may be reading this one.
            self._packed = dict([*self._packed.items(), ((pixels, dtype), packed)][-self._KEPT :])
        rows = x.to(dtype).permute(0, 2, 3, 1).reshape(pixels, c)
        y = torch.ops.mkldnn._linear_pointwise(rows, packed, self.bias, "none", [], "")
        return y.view(b, h, w, -1).permute(0, 3, 1, 2)
