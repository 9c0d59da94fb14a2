"""The inverted residual cell in evaluation: batch norms with given statistics, folded where they are affine maps beside a 1x1
convolution; formulas in :mod:`nvae_fast.ops.inverted_residual.train`, of which this is the other half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nvae_fast.ops import affine_activation
from nvae_fast.ops._op import define_kernel
from nvae_fast.ops.batch_norm_swish import batch_norm_swish
from nvae_fast.ops.depthwise_conv2d import depthwise_conv2d
from nvae_fast.ops.depthwise_conv2d import kernels as _depthwise_kernels
from nvae_fast.ops.inverted_residual.conv1x1 import conv1x1
from nvae_fast.ops.inverted_residual.train import CellParameters, check_cell
from nvae_fast.ops.squeeze_excite import squeeze_excite


def _depthwise_affine(
    x: Tensor, weight: Tensor, out_scale: Tensor, out_shift: Tensor, stride: int, upsample: int,
    activation: str | None, out_activation: str | None,
) -> Tensor:  # fmt: skip
    convolve = _depthwise_kernels(x.device)[0]
    y = convolve(x, weight, None, None, stride, 1, upsample, activation, False, None)[0]
    return affine_activation.forward(y, out_scale, out_shift, out_activation)


# out_act(out_scale * conv(act(x)) + out_shift): where the statistics of the convolution are given, the batch norm behind it
# costs no pass of its own. Not differentiable; its arguments are trusted.
depthwise_affine = define_kernel(
    "depthwise_conv2d_affine",
    _depthwise_affine,
    fake=lambda x, weight, scale, shift, stride, upsample, *_: torch.ops.nvae_fast.depthwise_conv2d(
        x, weight, None, None, stride, 1, upsample, None, False, None
    )[0],
)


class FoldedCell(NamedTuple):
    """A cell in evaluation: the first two batch norms in the expansion, the last and the residual scale (where no gate comes
    between) in the projection, the third as the affine map before its swish."""

    expand: Tensor  # (E C_in, C_in)
    expand_bias: Tensor
    scale: Tensor
    shift: Tensor
    project: Tensor  # (C_out, E C_in)
    project_bias: Tensor


Running = Sequence[tuple[Tensor, Tensor]]


def fold(
    q: CellParameters, running: Running, *, eps: float = 1e-5, residual_scale: float = 0.1
) -> FoldedCell:
    """``running`` holds (mean, var) of the four batch norms in order. Differentiable."""
    expand, project = q.expand.flatten(1), q.project.flatten(1)
    scale0, shift0 = affine_of(q.norm_weight, q.norm_bias, running[0], eps)
    scale1, shift1 = affine_of(q.expand_norm_weight, q.expand_norm_bias, running[1], eps)
    scale2, shift2 = affine_of(q.depthwise_norm_weight, q.depthwise_norm_bias, running[2], eps)
    scale3, shift3 = affine_of(q.project_norm_weight, q.project_norm_bias, running[3], eps)
    if q.reduce_weight is None:
        scale3, shift3 = residual_scale * scale3, residual_scale * shift3
    return FoldedCell(
        scale1[:, None] * expand * scale0, scale1 * (expand @ shift0) + shift1, scale2, shift2,
        scale3[:, None] * project, shift3,
    )  # fmt: skip


def affine_of(
    weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """A batch norm with given statistics as ``scale * x + shift``."""
    scale = weight * torch.rsqrt(running[1].to(weight.dtype) + eps)
    return scale, bias - running[0].to(weight.dtype) * scale


Product = Callable[[Tensor], Tensor]


def residual_branch(
    x: Tensor,
    expand: Product,
    depthwise: Tensor,
    scale: Tensor,
    shift: Tensor,
    project: Product,
    stride: int,
) -> Tensor:
    """What is given to the gate, or added to the skip, by the kernels and without gradients; arguments are trusted.

    expand, project: the 1x1 convolutions of a :class:`FoldedCell`; scale, shift: the affine map between them.
    """
    h = expand(x.contiguous(memory_format=torch.channels_last))
    upsample = 2 if stride == -1 else 1
    return project(depthwise_affine(h, depthwise, scale, shift, max(stride, 1), upsample, "swish", "swish"))


def inverted_residual_cell_evaluation(
    x: Tensor,
    skip: Tensor,
    parameters: CellParameters,
    running: Running,
    *,
    stride: int = 1,
    eps: float = 1e-5,
    residual_scale: float = 0.1,
) -> Tensor:
    """The cell with given statistics: ``running`` holds (mean, var) of the four batch norms in order.

    Arguments, result and errors as :func:`inverted_residual_cell`; made of differentiable ops, so any derivative exists
    that they have.
    """
    q = parameters
    check_cell(x, skip, q, stride)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        f = fold(q, running, eps=eps, residual_scale=residual_scale)
        d = depthwise_conv2d(
            conv1x1(x.contiguous(memory_format=torch.channels_last), f.expand, f.expand_bias),
            q.depthwise,
            stride=max(stride, 1),
            upsample=2 if stride == -1 else 1,
            activation="swish",
        )
        h = batch_norm_swish(d, q.depthwise_norm_weight, q.depthwise_norm_bias, *running[2], eps=eps).y
        s = conv1x1(h, f.project, f.project_bias)
    else:
        with torch.autocast(x.device.type, enabled=False):
            f = fold(q, running, eps=eps, residual_scale=residual_scale)
        expand = partial(conv1x1, weight=f.expand, bias=f.expand_bias)
        project = partial(conv1x1, weight=f.project, bias=f.project_bias)
        s = residual_branch(x, expand, q.depthwise, f.scale, f.shift, project, stride)
    if q.reduce_weight is None:
        return skip + s
    return squeeze_excite(
        s,
        *q.gate,
        skip=skip,
        residual_scale=residual_scale,
    )
