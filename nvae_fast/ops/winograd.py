"""3x3 convolutions by Winograd's algorithm F(4x4, 3x3) on a CPU, with its transforms as internal operators.

Lavin and Gray, arXiv 1509.09308. A tile of 4x4 outputs of a pair of channels takes 36 multiplications instead of 144. With d a
6x6 patch of the input, padded by one zero on every side, and g the 3x3 weight::

    winograd_tiles   B' d B of every patch                               winograd_tiles(gradient)   A y A' of every 4x4 tile
    winograd_map     A' m A + bias of every tile, put side by side       winograd_map(gradient)     B m B', overlaps added
    weights          G g G'                                              weight_gradient            G' u G

The convolution is a product over channels for each of the 36 points, its gradients are the adjoints. All of it is float32; the
maps are float32 or bfloat16.

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
# With fewer channels or tiles the transforms cost more than they save. The direct convolution of bfloat16 maps is slower.
_MIN_CHANNELS = {torch.float32: 24, torch.bfloat16: 16}
_MIN_TILES = 32
_MAX_BYTES = 10 * 2**20  # of the tiles of one float32 image: beyond that they leave the cache
_PART_BYTES = 4 * 2**20  # of the tiles that a thread has at a time
_PART_TILES = 128  # at least, for products that are not slow


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
    """The transform of both dimensions of a patch as one matrix."""
    one = like.new_tensor(matrix, dtype=torch.float32)
    return torch.kron(one, one)


def _tiles(x: Tensor, gradient: bool) -> Tensor:
    b, c, h, w = x.shape
    size = TILE if gradient else PATCH
    matrix = _both(A, x) if gradient else _both(B, x).t()
    patches = F.unfold(x.float(), size, padding=0 if gradient else 1, stride=TILE)
    patches = patches.view(b, c, size * size, h * w // TILE**2).permute(0, 3, 2, 1).flatten(0, 1)
    return matrix @ patches


def _map(tiles: Tensor, bias: Tensor | None, y: Tensor, gradient: bool) -> None:
    b, _, h, w = y.shape
    size = PATCH if gradient else TILE
    matrix = _both(B, tiles) if gradient else _both(A, tiles).t()
    patches = torch.einsum("pk,ktc->ctp", matrix, tiles)
    patches = patches.reshape(tiles.shape[2], b, h * w // TILE**2, size * size).permute(1, 0, 3, 2)
    made = F.fold(patches.flatten(1, 2), (h, w), size, padding=1 if gradient else 0, stride=TILE)
    y.copy_(made if bias is None else made + bias.float()[:, None, None])


tiles = define_kernel(
    "winograd_tiles",
    _tiles,
    fake=lambda x, gradient: x.new_empty(
        x.shape[0] * x.shape[2] * x.shape[3] // TILE**2, PATCH**2, x.shape[1], dtype=torch.float32
    ),
)
put_map = define_kernel("winograd_map", _map, fake=lambda *_: None, mutates=("y",))


@functools.cache
def _weight_transform() -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):
        g = torch.tensor(G, dtype=torch.float64)
        return torch.kron(g, g).float()


def transformed(weight: Tensor) -> Tensor:
    """``G g G'`` of every pair of channels of a float32 weight (C_out, C_in, 3, 3), as (36, C_out, C_in)."""
    c_out, c_in = weight.shape[:2]
    taps = weight.permute(2, 3, 0, 1).reshape(9, c_out * c_in)
    return (_weight_transform() @ taps).view(PATCH**2, c_out, c_in)


def weight_gradient(u: Tensor) -> Tensor:
    """``G' u G`` of (36, C_out, C_in), the adjoint of :func:`transformed`."""
    _, c_out, c_in = u.shape
    return (_weight_transform().t() @ u.view(PATCH**2, -1)).view(3, 3, c_out, c_in).permute(2, 3, 0, 1)


def convolve(x: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution with transformed ``weights``, in the dtype and memory format of x. Not differentiable."""
    shape = x.shape[0], weights.shape[1], *x.shape[2:]
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    size = _images(x, weights)
    for images, results in zip(x.split(size), y.split(size), strict=True):
        put_map(
            torch.bmm(tiles(images, False).transpose(0, 1), weights.transpose(1, 2)), bias, results, False
        )
    return _in_format_of(x, y)


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()


def _bytes(x: Tensor, channels: int) -> int:
    """Bytes of the tiles of one image, for the wider of two maps."""
    return 4 * PATCH**2 * (x.shape[2] * x.shape[3] // TILE**2) * channels


def _images(x: Tensor, weights: Tensor) -> int:
    """Return how many images to compute at a time, so that their tiles stay in the cache."""
    per_image = x.shape[2] * x.shape[3] // TILE**2
    most = _PART_BYTES * torch.get_num_threads() // _bytes(x, max(weights.shape[1:]))
    most = max(most, -(-_PART_TILES // per_image), 1)
    parts = -(-x.shape[0] // most)
    return -(-x.shape[0] // max(parts, 1)) or 1


def fits(x: Tensor, weight: Tensor, geometry: tuple[int, int, int, int]) -> bool:
    """Return whether the convolution is 3x3 and large enough to pay for the transforms.

    geometry: stride, padding, dilation and groups.
    """
    return (
        weight.shape[2:] == (3, 3)
        and geometry == (1, 1, 1, 1)
        and min(weight.shape[:2]) >= _MIN_CHANNELS[x.dtype]
        and x.shape[2] % TILE == x.shape[3] % TILE == 0
        and x.shape[0] * x.shape[2] * x.shape[3] >= _MIN_TILES * TILE**2
    )


@functools.cache
def _fast() -> bool:
    """Return whether the transforms have vector instructions."""
    return _extension.info().get("cpu_capability") in ("avx2", "avx512")


def computes(x: Tensor, weight: Tensor, geometry: tuple[int, int, int, int]) -> bool:
    """Return whether the convolution of a float32 map is computed here: in channels_last, on a CPU with vector instructions."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and fits(x, weight, geometry)
        and _bytes(x, max(weight.shape[:2])) <= _MAX_BYTES
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and not _backend.forced_reference()
        and not _backend.transforms_active()
        and x.is_contiguous(memory_format=torch.channels_last)
        and _fast()
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the convolution with padding 1 in the dtype and memory format of x, where :func:`fits`. Differentiable.

    x: (B, C, H, W), float32 or bfloat16; weight: (C_out, C, 3, 3); bias: (C_out) or None. Their gradients are in their dtypes.
    """
    y: Tensor = _Conv2d.apply(x, weight, bias)
    return y


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return convolve(x, transformed(weight.float()), None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        with torch.autocast("cpu", enabled=False):
            # PyTorch's operators compute what is differentiated again (create_graph) or batched (is_grads_batched).
            if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
                to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
                    grad.float(), x.float(), weight.float(), [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, (0, 0), 1,
                    (need_x, need_weight, need_bias),
                )  # fmt: skip
            else:
                to_x, to_weight = _gradients(grad, x, weight.float(), need_x, need_weight)
                if need_bias:
                    to_bias = grad.sum((0, 2, 3), dtype=torch.float32)
        return (
            None if to_x is None else to_x.to(x.dtype),
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(ctx.bias_dtype),
        )


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (need_x or need_weight):
        return None, None
    weights = transformed(weight)
    to_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else None
    total = torch.zeros_like(weights) if need_weight else None
    size = _images(x, weights)
    for i in range(0, x.shape[0], size):
        made = tiles(grad[i : i + size], True)
        if to_x is not None:
            put_map(torch.bmm(made.transpose(0, 1), weights), None, to_x[i : i + size], True)
        if total is not None:
            total.baddbmm_(
                made.permute(1, 2, 0), tiles(x[i : i + size], False).transpose(0, 1), beta=float(i > 0)
            )
    return (
        None if to_x is None else _in_format_of(x, to_x),
        None if total is None else weight_gradient(total),
    )
