"""The inverted residual cell in evaluation: batch norms with given statistics, folded where they are affine maps beside a 1x1
convolution; formulas in :mod:`nvae_fast.ops.inverted_residual_cell`, of which this is the other half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from nvae_fast.ops import _affine
from nvae_fast.ops._conv1x1 import PackedMatrix, conv1x1
from nvae_fast.ops._register import operator
from nvae_fast.ops.batch_norm_swish import batch_norm_swish
from nvae_fast.ops.depthwise_conv2d import depthwise_conv2d
from nvae_fast.ops.depthwise_conv2d import kernels as _depthwise_kernels
from nvae_fast.ops.inverted_residual_cell import CellParameters, check_cell, check_maps
from nvae_fast.ops.squeeze_excite import squeeze_excite


def _depthwise_affine(
    x: torch.Tensor,
    weight: torch.Tensor,
    out_scale: torch.Tensor,
    out_shift: torch.Tensor,
    stride: int,
    upsample: int,
    activation: str | None,
    out_activation: str | None,
) -> torch.Tensor:
    convolve = _depthwise_kernels(x.device)[0]
    y = convolve(x, weight, None, None, stride, 1, upsample, activation, False, None)[0]
    return _affine.forward(y, out_scale, out_shift, out_activation)


def _depthwise_affine_fake(
    x: torch.Tensor, weight: torch.Tensor, out_scale: torch.Tensor, out_shift: torch.Tensor, *form: Any
) -> torch.Tensor:
    stride, upsample, activation, _ = form
    return torch.ops.nvae_fast.depthwise_conv2d(
        x, weight, None, None, stride, 1, upsample, activation, False, None
    )[0]


# out_act(out_scale * conv(act(x)) + out_shift): where the statistics of the convolution are given, the batch norm behind it
# costs no pass of its own. Not differentiable; its arguments are trusted.
depthwise_affine = operator(
    "depthwise_conv2d_affine",
    "(Tensor x, Tensor weight, Tensor out_scale, Tensor out_shift, int stride, int upsample, str? activation,"
    " str? out_activation) -> Tensor",
    default=_depthwise_affine,
    fake=_depthwise_affine_fake,
)


class FoldedCell(NamedTuple):
    """A cell in evaluation: the first two batch norms in the expansion, the last and the residual scale (where no gate comes
    between) in the projection, the third as the affine map before its swish."""

    expand: torch.Tensor  # (E C_in, C_in)
    expand_bias: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    project: torch.Tensor  # (C_out, E C_in)
    project_bias: torch.Tensor


Running = Sequence[tuple[torch.Tensor, torch.Tensor]]


def fold(
    q: CellParameters, running: Running, *, eps: float = 1e-5, residual_scale: float = 0.1
) -> FoldedCell:
    """``running`` holds (mean, var) of the four batch norms in order. Differentiable."""
    expand, project = q.expand.flatten(1), q.project.flatten(1)
    scale0, shift0 = _affine_of(q.norm_weight, q.norm_bias, running[0], eps)
    scale1, shift1 = _affine_of(q.expand_norm_weight, q.expand_norm_bias, running[1], eps)
    scale2, shift2 = _affine_of(q.depthwise_norm_weight, q.depthwise_norm_bias, running[2], eps)
    scale3, shift3 = _affine_of(q.project_norm_weight, q.project_norm_bias, running[3], eps)
    if q.reduce_weight is None:
        scale3, shift3 = residual_scale * scale3, residual_scale * shift3
    return FoldedCell(
        scale1[:, None] * expand * scale0, scale1 * (expand @ shift0) + shift1, scale2, shift2,
        scale3[:, None] * project, shift3,
    )  # fmt: skip


def _affine_of(
    weight: torch.Tensor, bias: torch.Tensor, running: tuple[torch.Tensor, torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch norm with given statistics as ``scale * x + shift``."""
    scale = weight * torch.rsqrt(running[1].to(weight.dtype) + eps)
    return scale, bias - running[0].to(weight.dtype) * scale


class ReadyCell(NamedTuple):
    """A :class:`FoldedCell` to compute with: once, or (its matrices packed) again and again. Without gradients."""

    expand: Callable[[torch.Tensor], torch.Tensor]
    scale: torch.Tensor
    shift: torch.Tensor
    project: Callable[[torch.Tensor], torch.Tensor]

    def branch(self, x: torch.Tensor, depthwise: torch.Tensor, stride: int) -> torch.Tensor:
        """What the gate, or the sum with the skip, is given. x: in channels_last."""
        h = depthwise_affine(
            self.expand(x),
            depthwise,
            self.scale,
            self.shift,
            max(stride, 1),
            2 if stride == -1 else 1,
            "swish",
            "swish",
        )
        return self.project(h)


def ready(f: FoldedCell, *, again: bool) -> ReadyCell:
    """``again``: whether it will compute often enough for packing to pay."""
    if again:
        return ReadyCell(
            PackedMatrix(f.expand, f.expand_bias), f.scale, f.shift, PackedMatrix(f.project, f.project_bias)
        )
    return ReadyCell(
        partial(conv1x1, weight=f.expand, bias=f.expand_bias),
        f.scale,
        f.shift,
        partial(conv1x1, weight=f.project, bias=f.project_bias),
    )


def inverted_residual_cell_evaluation(
    x: torch.Tensor,
    skip: torch.Tensor,
    parameters: CellParameters,
    running: Running,
    *,
    stride: int = 1,
    eps: float = 1e-5,
    residual_scale: float = 0.1,
    folded: ReadyCell | None = None,
) -> torch.Tensor:
    """The cell with given statistics: ``running`` holds (mean, var) of the four batch norms in order.

    Arguments, result and errors as :func:`inverted_residual_cell`; made of differentiable ops, so any derivative exists
    that they have. ``folded``: what :func:`ready` gave, to compute without gradients.
    """
    q, upsample = parameters, 2 if stride == -1 else 1
    (check_cell if folded is None else check_maps)(x, skip, q, stride)
    xl = x.contiguous(memory_format=torch.channels_last)
    if folded is None:
        f = fold(q, running, eps=eps, residual_scale=residual_scale)
        d = depthwise_conv2d(
            conv1x1(xl, f.expand, f.expand_bias),
            q.depthwise,
            stride=max(stride, 1),
            upsample=upsample,
            activation="swish",
        )
        h = batch_norm_swish(d, q.depthwise_norm_weight, q.depthwise_norm_bias, *running[2], eps=eps).y
        s = conv1x1(h, f.project, f.project_bias)
    else:
        s = folded.branch(xl, q.depthwise, stride)
    if q.reduce_weight is None:
        return skip + s
    return squeeze_excite(
        s,
        *(q.reduce_weight, q.reduce_bias, q.gate_weight, q.gate_bias),  # type: ignore[arg-type]
        skip=skip,
        residual_scale=residual_scale,
    )
