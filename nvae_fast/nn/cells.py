"""The cells of :mod:`nvae_fast.nn` and their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvae_fast import distributed
from nvae_fast.nn.batch_norm import BatchNormSwish
from nvae_fast.nn.conv import PlainConv2d, WeightNormConv2d, odd_kernel, positive
from nvae_fast.nn.fused_cell import RESIDUAL_SCALE, fused_cell
from nvae_fast.nn.plain import is_plain
from nvae_fast.nn.squeeze_excite import SqueezeExcite
from nvae_fast.ops import _backend, _checks
from nvae_fast.ops.depthwise_conv2d import depthwise_conv2d
from nvae_fast.ops.elu import elu
from nvae_fast.ops.inverted_residual.train import NAME as CELL
from nvae_fast.ops.inverted_residual.train import CellParameters

STRIDES = (1, 2, -1)


def _check_stride(name: str, stride: int) -> None:
    if stride not in STRIDES:
        raise ValueError(f"{name}: stride must be 1, 2 or -1 (upsample by 2), got {stride!r}")


def _check_map(name: str, x: torch.Tensor, channels: int, weight: torch.Tensor) -> None:
    """Raise unless a convolution with ``weight`` behind a batch norm takes ``x``, before running statistics change."""
    _checks.tensor(name, "weight", weight)
    _checks.channels(name, "x", x, channels)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}: x must have the parameters' dtype {weight.dtype} (or use torch.autocast), got {x.dtype}"
        )


class ConvBlock(nn.Module):
    """``conv3x3([nearest x2](activation([BN](x))))`` with weight norm: the ops res_elu, res_bnelu, res_bnswish*.

    (B, C_in, H, W) to (B, C_out, H', W'), H' = H, H / 2 or 2 H for stride 1, 2, -1. NVAE (arXiv 2007.03898), appendix A.

    Args:
        in_channels, out_channels: C_in, C_out.
        stride: 1, 2 or -1 (upsample by 2).
        batch_norm: without it the activation is ELU and the convolution is initialised from the first batch.
        activation: after the batch norm, "swish" or "elu".
        dilation: of the convolution.

    Raises:
        ValueError: another stride.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        batch_norm: bool = True,
        activation: str = "swish",
        dilation: int = 1,
    ) -> None:
        super().__init__()
        _check_stride("ConvBlock", stride)
        self.norm = BatchNormSwish(in_channels, activation) if batch_norm else None
        self.upsample = stride == -1
        self.conv = WeightNormConv2d(
            in_channels, out_channels, 3, stride=abs(stride), dilation=dilation, data_init=not batch_norm
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_map("ConvBlock", x, self.conv.weight.shape[1], self.conv.weight)
        x = elu(x) if self.norm is None else self.norm(x)
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.upsample else x)


class InvertedResidual(nn.Module):
    """``BN(conv1x1(BN_swish(conv KxK(BN_swish(conv1x1(BN([nearest x2](x))))))))``; depthwise when groups is 0.

    (B, C_in, H, W) to (B, C_out, H', W'), H' = H, H / 2 or 2 H for stride 1, 2, -1. NVAE (arXiv 2007.03898), section 3.1.1,
    figure 3a; the fused form is that of :class:`InvertedResidualCell`.

    Args:
        in_channels, out_channels: C_in, C_out.
        stride: 1, 2 or -1 (upsample by 2).
        expansion: E, hidden channels are E * C_in.
        kernel_size: K, odd.
        groups: of the KxK convolution; 0 means depthwise.

    Raises:
        ValueError: another stride, a kernel size that is no odd int, an expansion that is no int >= 1, or groups that do not
            divide the hidden channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        expansion: int,
        kernel_size: int,
        groups: int = 0,
    ) -> None:
        super().__init__()
        _check_stride("InvertedResidual", stride)
        kernel_size = odd_kernel("InvertedResidual", kernel_size)
        expansion = positive("InvertedResidual", "expansion", expansion)
        hidden = in_channels * expansion
        if groups and hidden % groups:
            raise ValueError(
                f"InvertedResidual: groups={groups} must divide in_channels * expansion = {hidden}"
            )
        self.upsample = stride == -1
        self.norm = BatchNormSwish(in_channels, None)
        self.expand = PlainConv2d(in_channels, hidden, 1)
        self.expand_norm = BatchNormSwish(hidden)
        self.depthwise = PlainConv2d(hidden, hidden, kernel_size, stride=abs(stride), groups=groups or hidden)
        self.depthwise_norm = BatchNormSwish(hidden)
        self.project = PlainConv2d(hidden, out_channels, 1)
        self.project_norm = BatchNormSwish(out_channels, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_map("InvertedResidual", x, self.expand.in_channels, self.expand.weight)
        self._check_count(x)
        if self.upsample:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        h, conv = self.expand_norm(self.expand(self.norm(x))), self.depthwise
        if conv.groups == conv.in_channels and type(conv) is PlainConv2d and is_plain(conv):
            h = depthwise_conv2d(h, conv.weight, stride=conv.stride[0])
        else:
            h = conv(h)
        return self.project_norm(self.project(self.depthwise_norm(h)))

    def _check_count(self, x: torch.Tensor) -> None:
        """Raise for a batch that has one value per channel behind the stride, before the first batch norms count it."""
        b, _, h, w = x.shape
        stride, norm = self.depthwise.stride[0], self.depthwise_norm
        if stride == 1 or b * -(-h // stride) * -(-w // stride) != 1 or not norm.training:
            return
        if distributed.world_size(norm.process_group) == 1:
            raise ValueError(
                f"InvertedResidual: expected more than one value per channel behind stride {stride} to take statistics of, "
                f"got x {tuple(x.shape)}"
            )

    @property
    def norms(self) -> tuple[BatchNormSwish, BatchNormSwish, BatchNormSwish, BatchNormSwish]:
        """The four batch norms in order."""
        return self.norm, self.expand_norm, self.depthwise_norm, self.project_norm

    def is_fusable(self, se: SqueezeExcite | None) -> bool:
        """Return whether the fused operator computes this module followed by the gate ``se`` (or None).

        It does if the KxK convolution is depthwise, the batch norms are alike and in one mode, and every part is of its
        original type and plain: without hooks, pruning or parametrisations.
        """
        n0, n1, n2, n3 = norms = self.norms
        types = [
            InvertedResidual,
            *[BatchNormSwish] * 4,
            *[PlainConv2d] * 3,
            SqueezeExcite,
            nn.Linear,
            nn.Linear,
        ]
        parts: tuple[Any, ...] = (self, *norms, self.expand, self.depthwise, self.project)
        if se is not None:
            parts += se, se.reduce, se.expand
        if list(map(type, parts)) != types[: len(parts)] or not is_plain(*parts):
            return False
        mode = n0.training, n0.eps, n0.process_group
        for norm in norms:
            if norm.running_mean is None or (norm.training, norm.eps, norm.process_group) != mode:
                return False
        return (
            self.depthwise.groups == self.depthwise.in_channels
            and (n0.activation, n1.activation, n2.activation, n3.activation) == (None, "swish", "swish", None)
            and (se is None or (se.reduce.bias is not None and se.expand.bias is not None))
        )

    def cell_parameters(self, se: SqueezeExcite | None) -> CellParameters:
        """Return the parameters as the fused operator takes them, with those of the gate ``se`` (or None)."""
        return CellParameters(
            self.norm.weight, self.norm.bias,
            self.expand.weight, self.expand_norm.weight, self.expand_norm.bias,
            self.depthwise.weight, self.depthwise_norm.weight, self.depthwise_norm.bias,
            self.project.weight, self.project_norm.weight, self.project_norm.bias,
            *(() if se is None else (se.reduce.weight, se.reduce.bias, se.expand.weight, se.expand.bias)),
        )  # fmt: skip

    def running_statistics(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return (mean, var) of the four batch norms in order."""
        return [(norm.running_mean, norm.running_var) for norm in self.norms]

    def residual(self, x: torch.Tensor, skip: torch.Tensor, se: SqueezeExcite | None) -> torch.Tensor:
        """``skip + 0.1 * [se](self(x))`` in one operator, or layer by layer where :meth:`is_fusable` or the device says so.

        ``x`` is (B, C_in, H, W), ``skip`` (B, C_out, H', W'), ``se`` a :class:`SqueezeExcite` or None.
        """
        # In training the operator computes with the number of values, which an exported program must leave open.
        exported = self.norm.training and torch.compiler.is_exporting()
        if self.is_fusable(se) and _backend.fused(CELL, x.device) and not exported:
            parameters, stride = self.cell_parameters(se), -1 if self.upsample else self.depthwise.stride[0]
            return fused_cell(x, skip, parameters, self.norms, stride=stride, group=self.norm.process_group)
        s = self(x)
        return skip + RESIDUAL_SCALE * s if se is None else se(s, skip, RESIDUAL_SCALE)


class SkipDown(nn.Module):
    """Stride-2 skip: swish, then four 1x1 convolutions, each on one of the four pixel phases, concatenated.

    (B, C_in, H, W) to (B, C_out, H / 2, W / 2): ``y = concat_p conv_p(swish(x)[:, :, p_i::2, p_j::2])``. NVAE (arXiv
    2007.03898), appendix A (factorised reduction).

    Args:
        in_channels, out_channels: C_in, C_out.

    Raises:
        ValueError: H or W is odd, or x has other channels; at construction, fewer than four output channels.

    Taking the phase first and convolving with stride 1 equals a stride-2 convolution of the shifted input. oneDNN's weight
    gradient of a strided 1x1 convolution in channels_last writes out of bounds below 16 channels (oneDNN issue 6035).
    """

    SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        if out_channels < 4:
            raise ValueError(
                f"SkipDown: out_channels must be at least 4, one for each of its convolutions, got {out_channels}"
            )
        quarter = out_channels // 4
        widths = (quarter, quarter, quarter, out_channels - 3 * quarter)
        self.convs = nn.ModuleList(WeightNormConv2d(in_channels, width, 1) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: Any = self.convs[0]
        _checks.channels("SkipDown", "x", x, first.weight.shape[1])
        if x.shape[-2] % 2 or x.shape[-1] % 2:
            raise ValueError(f"SkipDown: x must have an even height and width, got {tuple(x.shape)}")
        x = F.silu(x)
        phases = (x[:, :, i::2, j::2] for i, j in self.SHIFTS)
        return torch.cat([conv(phase) for conv, phase in zip(self.convs, phases, strict=True)], dim=1)


class SkipUp(nn.Module):
    """Upsampling skip: ``y = conv1x1(bilinear x2(x))``, corners aligned, with weight norm, without bias.

    (B, C_in, H, W) to (B, C_out, 2 H, 2 W). NVAE (arXiv 2007.03898), appendix A.

    Args:
        in_channels, out_channels: C_in, C_out.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _checks.channels("SkipUp", "x", x, self.conv.weight.shape[1])
        return self.conv(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class ResidualCell(nn.Module):
    """``skip(x) + 0.1 * s`` with ``s = [squeeze-excite](ops(x))``.

    (B, C_in, H, W) to (B, C_out, H', W'), H' = H, H / 2 or 2 H for stride 1, 2, -1; the skip is the identity,
    :class:`SkipDown` or :class:`SkipUp`. NVAE (arXiv 2007.03898), section 3.1.1 and appendix A.

    Args:
        in_channels, out_channels: C_in, C_out; equal when stride is 1.
        stride: 1, 2 or -1 (upsample by 2).
        ops: modules applied in turn, of which the first carries the stride.
        squeeze_excite: gate s by a :class:`SqueezeExcite`.

    Raises:
        ValueError: another stride, or channels that differ at stride 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        ops: Sequence[nn.Module],
        *,
        squeeze_excite: bool,
    ) -> None:
        super().__init__()
        _check_stride("ResidualCell", stride)
        if stride == 1 and in_channels != out_channels:
            raise ValueError(
                f"ResidualCell: stride 1 keeps the width, got {in_channels} -> {out_channels} channels"
            )
        self.ops = nn.ModuleList(ops)
        self.se = SqueezeExcite(out_channels) if squeeze_excite else None
        if stride == 1:
            self.skip: nn.Module = nn.Identity()
        else:
            self.skip = (SkipDown if stride == 2 else SkipUp)(in_channels, out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = self.skip(x)
        if len(self.ops) == 1 and isinstance(self.ops[0], InvertedResidual):
            return self.ops[0].residual(x, skip, self.se)
        s = x
        for op in self.ops:
            s = op(s)
        return skip + RESIDUAL_SCALE * s if self.se is None else self.se(s, skip, RESIDUAL_SCALE)


class InvertedResidualCell(ResidualCell):
    """The whole inverted residual cell: ``skip(x) + 0.1 * [squeeze-excite](s)`` with s of :class:`InvertedResidual`.

    (B, C_in, H, W) to (B, C_out, H', W'), H' = H, H / 2 or 2 H for stride 1, 2, -1. The skip is the identity,
    :class:`SkipDown` or :class:`SkipUp`. On devices with kernels the whole cell is one operator, forward and backward, with
    the results of the layers one by one. NVAE (arXiv 2007.03898), section 3.1.1 and appendix A.

    Args:
        C_in, C_out: channels; equal when stride is 1.
        expansion: E, hidden channels are E * C_in.
        kernel_size: K, odd.
        stride: 1, 2 or -1 (upsample by 2).
        groups: of the KxK convolution; 0 means depthwise.
        squeeze_excite: gate the result.

    Raises:
        ValueError: another stride, channels that differ at stride 1, a kernel size that is no odd int, an expansion that is no
            int >= 1, or groups that do not divide the hidden channels.
    """

    def __init__(
        self,
        C_in: int,
        C_out: int,
        expansion: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 0,
        squeeze_excite: bool = False,
    ) -> None:
        op = InvertedResidual(
            C_in, C_out, stride, expansion=expansion, kernel_size=kernel_size, groups=groups
        )
        super().__init__(C_in, C_out, stride, [op], squeeze_excite=squeeze_excite)


class EncoderCombiner(nn.Module):
    """``y = bottom_up + conv1x1(top_down)``: joins the two towers before a posterior head.

    Called with bottom_up (B, C, H, W) and top_down (B, C', H, W); gives (B, C, H, W). NVAE (arXiv 2007.03898), figure 2.

    Args:
        top_down_channels, bottom_up_channels: C', C.
    """

    def __init__(self, top_down_channels: int, bottom_up_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(top_down_channels, bottom_up_channels, 1)

    def forward(self, bottom_up: torch.Tensor, top_down: torch.Tensor) -> torch.Tensor:
        return bottom_up + self.conv(top_down)


class DecoderCombiner(nn.Module):
    """``y = conv1x1(concat(s, z))``: joins a latent variable to the top-down tower.

    Called with s (B, C, H, W) and z (B, Z, H, W), taken in the dtype of s; gives (B, C_out, H, W). NVAE (arXiv 2007.03898),
    figure 2.

    Args:
        channels, latent_channels, out_channels: C, Z, C_out.

    Raises:
        TypeError, ValueError: on the call, s or z is no floating map of its shape.
    """

    def __init__(self, channels: int, latent_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = WeightNormConv2d(channels + latent_channels, out_channels, 1)
        self.latent_channels = latent_channels

    def forward(self, s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        _checks.channels("DecoderCombiner", "s", s, self.conv.weight.shape[1] - self.latent_channels)
        _checks.shape("DecoderCombiner", "z", z, (s.shape[0], self.latent_channels, *s.shape[2:]), like=s)
        return self.conv(torch.cat([s, z.to(s.dtype)], dim=1))
