"""The transforms of Winograd's algorithm for 3x3 convolutions, F(4x4, 3x3), as internal operators.

Lavin and Gray, arXiv 1509.09308. A tile of 4x4 outputs of a pair of channels takes 36 multiplications instead of 144. With d a
6x6 patch of the input, padded by one zero on every side, and g the 3x3 weight::

    winograd_tiles   B' d B of every patch                               winograd_tiles(gradient)   A y A' of every 4x4 tile
    winograd_map     A' m A + bias of every tile, put side by side       winograd_map(gradient)     B m B', overlaps added
    weights          G g G'                                              weight_gradient            G' u G

The convolution is a product over channels for each of the 36 points, its gradients are the adjoints. All of it is float32; the
maps are float32 or bfloat16. The error is four times that of the direct float32 sum, a thousandth of what rounding the result
to bfloat16 costs: only bfloat16 maps are convolved this way. A value that is not finite reaches every output of its tiles.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops._op import define_kernel

TILE, PATCH = 4, 6
SUM = 7  # the point of ``winograd_tiles(gradient)`` that holds the sum of a tile
B = (
    (4, 0, 0, 0, 0, 0),
    (0, -4, 4, -2, 2, 4),
    (-5, -4, -4, -1, -1, 0),
    (0, 1, -1, 2, -2, -5),
    (1, 1, 1, 1, 1, 0),
    (0, 0, 0, 0, 0, 1),
)
A = ((1, 0, 0, 0), (1, 1, 1, 1), (1, -1, 1, -1), (1, 2, 4, 8), (1, -2, 4, -8), (0, 0, 0, 1))
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


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


def _map(tiles: Tensor, bias: Tensor | None, like: Tensor, gradient: bool) -> Tensor:
    b, _, h, w = like.shape
    size = PATCH if gradient else TILE
    matrix = _both(B, tiles) if gradient else _both(A, tiles).t()
    patches = torch.einsum("pk,ktc->ctp", matrix, tiles)
    patches = patches.reshape(tiles.shape[2], b, h * w // TILE**2, size * size).permute(1, 0, 3, 2)
    y = F.fold(patches.flatten(1, 2), (h, w), size, padding=1 if gradient else 0, stride=TILE)
    y = y if bias is None else y + bias.float()[:, None, None]
    return y.to(like.dtype).contiguous(memory_format=torch.channels_last)


tiles = define_kernel(
    "winograd_tiles",
    _tiles,
    fake=lambda x, gradient: x.new_empty(
        x.shape[0] * x.shape[2] * x.shape[3] // TILE**2, PATCH**2, x.shape[1], dtype=torch.float32
    ),
)
map_of = define_kernel(
    "winograd_map",
    _map,
    fake=lambda tiles, bias, like, gradient: torch.empty(
        (like.shape[0], tiles.shape[2], *like.shape[2:]),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    ),
)


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
    """The convolution with transformed ``weights``, in the dtype of x and channels_last. Not differentiable."""
    made = torch.bmm(tiles(x, False).transpose(0, 1), weights.transpose(1, 2))
    return map_of(made, bias, x, False)
