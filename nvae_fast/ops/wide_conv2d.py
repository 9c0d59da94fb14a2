"""Convolutions of bfloat16 maps in float32 arithmetic, for processors on which it is faster than bfloat16 arithmetic.

A product of two bfloat16 numbers is exact in float32, so that only the order of the additions differs. An Intel processor
without AMX multiplies bfloat16 numbers at half the rate of float32 ones (one ``vdpbf16ps`` in two cycles, two ``vfmadd`` in
each; docs/benchmarks.md), and one without AVX512_BF16 emulates them. Maps stay bfloat16 in memory and in autograd's graph:

- 1x1 convolutions convert some pixels at a time, in memory that stays in the cache.
- 3x3 convolutions use Winograd's algorithm (:mod:`nvae_fast.ops.winograd`), whose transforms read and write bfloat16.
- Others, among them 1x1 convolutions of NCHW maps, convert the map.

Weights are used in the dtype of the parameters, without a rounding, and so are their gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import _backend, _extension, winograd

_BYTES = 2**20  # of the float32 copies that a thread works on at a time: half of its second-level cache


@functools.cache
def fast_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 numbers faster than float32 ones. True without the extension."""
    return bool(_extension.info().get("fast_bfloat16", True))


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether convolutions of maps in ``dtype`` are computed here."""
    return (
        dtype == torch.bfloat16
        and device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not _backend.forced_reference()
        and not _backend.transforms_active()
        and not fast_bfloat16()
    )


def convolves(x: Tensor, weight: Tensor) -> bool:
    """Return whether the convolution of ``x`` with ``weight``, under autocast in its dtype, is computed here."""
    if x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return x.dtype != torch.float64 and computes(torch.get_autocast_dtype("cpu"), x.device)
    return x.dtype == weight.dtype and computes(x.dtype, x.device)


def _parts(t: Tensor, size: int) -> tuple[Tensor, ...]:
    return t.split(size) if t.shape[0] > size else (t,)


def _size(rows: int, columns: int) -> int:
    """Return the number of rows to convert at a time: ``_BYTES`` for each thread, a multiple of 16 unless it is all."""
    size = max(_BYTES // (4 * columns), 64) * torch.get_num_threads()
    return min(-(-size // 16) * 16, rows)


def product(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x matrix + bias`` of a bfloat16 (N, K) and a float32 (K, M), as a bfloat16 (N, M). Not differentiable."""
    n, (k, m) = x.shape[0], matrix.shape
    y, size = x.new_empty(n, m), _size(n, k + m)
    wide, made = matrix.new_empty(size, k), matrix.new_empty(size, m)
    for rows, out in zip(_parts(x, size), _parts(y, size), strict=True):
        if rows.shape[0] < size:
            wide, made = wide[: rows.shape[0]], made[: rows.shape[0]]
        wide.copy_(rows)
        if bias is None:
            torch.mm(wide, matrix, out=made)
        else:
            torch.addmm(bias, wide, matrix, out=made)
        out.copy_(made)
    return y


def transposed_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a' b`` of a bfloat16 (N, K) and (N, M), as a float32 (K, M). Not differentiable."""
    n, k, m = *a.shape, b.shape[1]
    size = _size(n, k + m)
    total = a.new_zeros(k, m, dtype=torch.float32)
    left, right = total.new_empty(size, k), total.new_empty(size, m)
    for rows, others in zip(_parts(a, size), _parts(b, size), strict=True):
        if rows.shape[0] < size:
            left, right = left[: rows.shape[0]], right[: rows.shape[0]]
        left.copy_(rows)
        right.copy_(others)
        total.addmm_(left.t(), right)
    return total


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0, dilation: int = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """Return the convolution as a bfloat16 map; the arguments are those of torch.nn.functional.conv2d. Differentiable."""
    with torch.autocast("cpu", enabled=False):
        x = x.bfloat16()
        if winograd.fits(x, weight, (stride, padding, dilation, groups)):
            return winograd.conv2d(x, weight, bias)
        y: Tensor = _Conv2d.apply(x, weight, bias, stride, padding, dilation, groups)
        return y


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int,
        groups: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.geometry = stride, padding, dilation, groups
        wide = weight.float()
        bias = None if bias is None else bias.float()
        if _is_product(x, weight, ctx.geometry):
            b, _, h, w = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(b * h * w, -1)
            return product(rows, wide.flatten(1).t(), bias).view(b, h, w, -1).permute(0, 3, 1, 2)
        return F.conv2d(x.float(), wide, bias, stride, padding, dilation, groups).bfloat16()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        to_x = to_weight = to_bias = None
        with torch.autocast("cpu", enabled=False):
            # PyTorch's operators compute what is differentiated again (create_graph) or batched (is_grads_batched).
            own = not torch.is_grad_enabled() and not torch._C._functorch.is_legacy_batchedtensor(grad)
            if own and _is_product(x, weight, ctx.geometry):
                b, c, h, w = x.shape
                rows = grad.permute(0, 2, 3, 1).reshape(b * h * w, -1)
                if need_x:
                    matrix = weight.float().flatten(1)
                    to_x = product(rows, matrix).view(b, h, w, c).permute(0, 3, 1, 2)
                if need_weight:
                    to_weight = transposed_product(rows, x.permute(0, 2, 3, 1).reshape(-1, c)).view(
                        weight.shape
                    )
                if need_bias:
                    to_bias = rows.sum(0, dtype=torch.float32)
            else:
                to_x, to_weight, to_bias = torch.ops.aten.convolution_backward(
                    grad.float(), x.float(), weight.float(), [weight.shape[0]], *([n] * 2 for n in ctx.geometry[:3]),
                    False, (0, 0), ctx.geometry[3], (need_x, need_weight, need_bias),
                )  # fmt: skip
        return (
            None if to_x is None else to_x.to(x.dtype),
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(ctx.bias_dtype),
            None, None, None, None,
        )  # fmt: skip


def geometry_of(conv: Any) -> tuple[int, int, int, int]:
    """Return stride, padding, dilation and groups of a module that has them as ints."""
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _is_product(x: Tensor, weight: Tensor, geometry: tuple[int, int, int, int]) -> bool:
    return (
        x.dtype == torch.bfloat16
        and weight.shape[2:] == (1, 1)
        and geometry == (1, 0, 1, 1)
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
    )
