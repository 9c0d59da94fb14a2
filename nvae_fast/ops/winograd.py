"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3) on a CPU, as internal operators.

Lavin and Gray, arXiv 1509.09308. A tile of 4x4 outputs of a pair of channels takes 36 multiplications instead of 144. With d a
6x6 patch of the input, padded by one zero on every side, and g the 3x3 weight, a tile of the result is::

    A' (sum over channels of (G g G') * (B' d B)) A + bias

The sum is a product of matrices for each of the 36 points. Gradients are the adjoints, with A y A' of every tile of the
gradient. All of it is float32; the maps are float32 or bfloat16. Products of bfloat16 numbers at twice the rate of float32 ones
(AVX512_BF16) save less than this does, those of AMX more.

The matrices belong to the points 0, 5/8, -5/8, 3/2, -3/2 and infinity. The usual ones, 0, 1, -1, 2, -2 and infinity, lose twice
as many digits: the error is 1.8 times that of the direct float32 sum, with them 4 times (docs/benchmarks.md). A value that is
not finite reaches every output of its tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import _backend, _extension
from nvae_fast.ops._op import define_kernel

TILE, PATCH = 4, 6
# The points, besides their negatives, 0 and infinity. csrc/cpu/winograd.vec.cpp has the same.
_P, _Q = 5 / 8, 3 / 2
# With fewer channels or tiles the transforms cost more than they save. With more where PyTorch multiplies the matrices, except
# of bfloat16 maps, whose direct convolution is slower there.
_MIN_CHANNELS, _MIN_CHANNELS_LIBRARY = 16, 24
# Of contiguous float32 maps, which are converted to channels_last and back.
_MIN_CHANNELS_CONVERTED = 64
_MIN_TILES = 32
# Of float32 maps where the weight is transformed already and the products are not PyTorch's.
_MIN_TILES_TRANSFORMED = 8
_MAX_BYTES = 10 * 2**20  # of the tiles of one float32 image: beyond that they leave the cache


def _matrices() -> tuple[tuple[tuple[float, ...], ...], ...]:
    """A (6, 4), B (6, 6) and G (6, 3): Lavin and Gray, section 4, for these points."""
    p, q = _P**2, _Q**2
    at_p, at_q = 2 * p * (p - q), 2 * q * (q - p)  # products of the differences to the other points
    a = tuple((1.0, x, x * x, x**3) for x in (0.0, _P, -_P, _Q, -_Q))
    b = (
        (p * q, 0.0, 0.0, 0.0, 0.0, 0.0),
        (0.0, -_P * q, _P * q, -_Q * p, _Q * p, p * q),
        (-p - q, -q, -q, -p, -p, 0.0),
        (0.0, _P, -_P, _Q, -_Q, -p - q),
        (1.0, 1.0, 1.0, 1.0, 1.0, 0.0),
        (0.0, 0.0, 0.0, 0.0, 0.0, 1.0),
    )
    g = (
        (1 / (p * q), 0.0, 0.0),
        (1 / at_p, _P / at_p, p / at_p),
        (1 / at_p, -_P / at_p, p / at_p),
        (1 / at_q, _Q / at_q, q / at_q),
        (1 / at_q, -_Q / at_q, q / at_q),
        (0.0, 0.0, 1.0),
    )
    return (*a, (0.0, 0.0, 0.0, 1.0)), b, g


A, B, G = _matrices()


def _both(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    """The transform of both dimensions of a patch as one float32 matrix."""
    one = torch.tensor(matrix, dtype=torch.float64, device=like.device)
    return torch.kron(one, one).float()


def _tiles(x: Tensor, gradient: bool = False) -> Tensor:
    """B' d B of every patch, or A y A' of every tile of a gradient, as (36, tiles, C)."""
    b, c, h, w = x.shape
    size = TILE if gradient else PATCH
    matrix = _both(A, x) if gradient else _both(B, x).t()
    patches = F.unfold(x.float(), size, padding=0 if gradient else 1, stride=TILE)
    patches = patches.view(b, c, size * size, h * w // TILE**2).permute(2, 0, 3, 1).flatten(1, 2)
    return torch.einsum("pk,ktc->ptc", matrix, patches)


def _map(products: Tensor, like: Tensor, gradient: bool = False) -> Tensor:
    """A' m A of every tile of (36, tiles, C), put side by side; with gradient B m B', overlaps added."""
    b, _, h, w = like.shape
    size = PATCH if gradient else TILE
    matrix = _both(B, like) if gradient else _both(A, like).t()
    patches = torch.einsum("pk,ktc->ctp", matrix, products)
    patches = patches.reshape(products.shape[2], b, h * w // TILE**2, size * size).permute(1, 0, 3, 2)
    return F.fold(patches.flatten(1, 2), (h, w), size, padding=1 if gradient else 0, stride=TILE)


def _weights(weight: Tensor) -> Tensor:
    """G g G' of every pair of channels of a weight (C_out, C_in, 3, 3), as float32 (36, C_out, C_in)."""
    return torch.einsum("pk,ock->poc", _both(G, weight), weight.float().flatten(2))


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    last = x.is_contiguous(memory_format=torch.channels_last)
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution in the dtype and memory format of x; weight: (C_out, C_in, 3, 3), or transformed already."""
    points = weight if weight.dim() == 3 else _weights(weight)
    y = _map(torch.bmm(_tiles(x), points.transpose(1, 2)), x)
    y = y if bias is None else y + bias.float()[:, None, None]
    return _in_format_of(x, y.to(x.dtype))


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x in its dtype, of weight and bias in float32; empty where they are not wanted."""
    made, nothing = _tiles(grad, gradient=True), x.new_empty(0, dtype=torch.float32)
    to_x = to_weight = nothing
    if need_x:
        to_x = _in_format_of(x, _map(torch.bmm(made, _weights(weight)), x, gradient=True).to(x.dtype))
    if need_weight:
        points = torch.bmm(made.transpose(1, 2), _tiles(x))
        to_weight = torch.einsum("pk,poc->ock", _both(G, weight), points).view(weight.shape)
    return to_x, to_weight, grad.sum((0, 2, 3), dtype=torch.float32) if need_bias else nothing.clone()


def _fake_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = x.new_empty(0, dtype=torch.float32)
    return (
        torch.empty_like(x) if need_x else nothing,
        torch.empty_like(weight, dtype=torch.float32) if need_weight else nothing.clone(),
        x.new_empty(weight.shape[0], dtype=torch.float32) if need_bias else nothing.clone(),
    )


weights = define_kernel(
    "winograd_weights",
    _weights,
    fake=lambda weight: weight.new_empty(PATCH**2, *weight.shape[:2], dtype=torch.float32),
)
convolve = define_kernel(
    "winograd_conv2d",
    _conv2d,
    fake=lambda x, weight, bias: _in_format_of(
        x, x.new_empty(x.shape[0], weight.shape[1 if weight.dim() == 3 else 0], *x.shape[2:])
    ),
)
_backward = define_kernel("winograd_conv2d_backward", _gradients, fake=_fake_gradients)


def fits(x: Tensor, weight: Tensor, geometry: tuple[int, int, int, int], *, tiles: int = _MIN_TILES) -> bool:
    """Return whether the convolution is 3x3 and large enough to pay for the transforms.

    geometry: stride, padding, dilation and groups; tiles: the least number of them.
    """
    return (
        weight.shape[2:] == (3, 3)
        and geometry == (1, 1, 1, 1)
        and min(weight.shape[:2]) >= _least_channels(map_dtype(x, weight) or x.dtype)
        and x.shape[2] % TILE == x.shape[3] % TILE == 0
        and x.shape[0] * x.shape[2] * x.shape[3] >= tiles * TILE**2
    )


@functools.cache
def _library_products() -> bool:
    """Return whether PyTorch multiplies the matrices."""
    return bool(_extension.info().get("fast_library_products", False))


def _least_channels(dtype: torch.dtype) -> int:
    return _MIN_CHANNELS_LIBRARY if _library_products() and dtype != torch.bfloat16 else _MIN_CHANNELS


@functools.cache
def _fast(dtype: torch.dtype | None) -> bool:
    """Return whether the transforms have vector instructions, and no faster ones are there for the direct sum."""
    info = _extension.info()
    if dtype == torch.bfloat16 and info.get("amx", True):
        return False
    return info.get("cpu_capability") in ("avx2", "avx512")


def map_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the dtype of maps in a convolution on the CPU, that of autocast where it is on. None: the dtypes do not fit."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        return torch.get_autocast_dtype("cpu")
    return x.dtype if x.dtype == weight.dtype else None


def computes(
    x: Tensor, weight: Tensor, geometry: tuple[int, int, int, int], *, transformed: bool = False
) -> bool:
    """Return whether the convolution of a map is computed here: on a CPU with vector instructions, in channels_last.

    Contiguous float32 maps of many channels are converted where the products are not PyTorch's. Maps are float32, or bfloat16
    where there is no AMX. Processors with slow bfloat16 products compute more maps than these:
    :mod:`nvae_fast.ops.wide_conv2d`. transformed: whether the weight need not be transformed any more.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    dtype = map_dtype(x, weight)
    few = transformed and dtype == torch.float32 and not _library_products()
    return (
        dtype in (torch.float32, torch.bfloat16)
        and x.device.type == "cpu"
        and fits(x, weight, geometry, tiles=_MIN_TILES_TRANSFORMED if few else _MIN_TILES)
        and 9 * x.shape[2] * x.shape[3] * max(weight.shape[:2]) <= _MAX_BYTES
        and not _backend.forced_reference()
        and not _backend.transforms_active()
        and (x.is_contiguous(memory_format=torch.channels_last) or _pays_converted(x, weight, dtype))
        and _fast(dtype)
    )


def _pays_converted(x: Tensor, weight: Tensor, dtype: torch.dtype | None) -> bool:
    enough = min(weight.shape[:2]) >= _MIN_CHANNELS_CONVERTED
    return dtype == torch.float32 and enough and x.is_contiguous() and not _library_products()


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution with padding 1, where :func:`fits`, in :func:`map_dtype` and the memory format of x.

    x: (B, C, H, W), float32 or bfloat16; weight: (C_out, C, 3, 3); bias: (C_out) or None. Their gradients are in their dtypes.
    """
    y: Tensor = _Conv2d.apply(x.to(map_dtype(x, weight) or x.dtype), weight, bias)
    return y


def conv2d_of_transformed(x: Tensor, weight: Tensor, points: Tensor, bias: Tensor | None) -> Tensor:
    """Return :func:`conv2d` with the transform ``points`` of ``weight``. Not differentiable."""
    y: Tensor = convolve(x.to(map_dtype(x, weight) or x.dtype), points, bias)
    return y


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        last = x.contiguous(memory_format=torch.channels_last)  # once for both passes
        ctx.save_for_backward(last, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.contiguous = last is not x
        return _in_format_of(x, convolve(last, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):
            # PyTorch's operators compute what is differentiated again (create_graph) or batched (is_grads_batched).
            again = torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)
            if again or not any(needs[:2]):
                found = torch.ops.aten.convolution_backward(
                    grad.float(), x.float(), weight.float(), [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, (0, 0), 1,
                    needs,
                )  # fmt: skip
            else:
                found = _backward(grad, x, weight, *needs)
        if ctx.contiguous and needs[0]:
            found = found[0].contiguous(), *found[1:]
        dtypes = x.dtype, weight.dtype, ctx.bias_dtype
        return tuple(
            made.to(dtype) if need else None for made, dtype, need in zip(found, dtypes, needs, strict=True)
        )
