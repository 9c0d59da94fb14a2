"""The eleven published cell architectures as data (specification section 3).

An architecture names, for each of the four places of the network, the ops that a cell there chains. The stride and the
change of width happen in the first op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import nn

from nvae_fast.nn import ConvBlock, InvertedResidual, ResidualCell

OpFactory = Callable[[int, int, int], nn.Module]


def _inverted(expansion: int, kernel_size: int, groups: int) -> OpFactory:
    return partial(InvertedResidual, expansion=expansion, kernel_size=kernel_size, groups=groups)


OPS: Mapping[str, OpFactory] = {
    "res_elu": partial(ConvBlock, batch_norm=False, activation="elu"),
    "res_bnelu": partial(ConvBlock, activation="elu"),
    "res_bnswish": ConvBlock,
    "res_bnswish5": partial(ConvBlock, dilation=2),
    "mconv_e6k5g0": _inverted(6, 5, 0),
    "mconv_e3k5g0": _inverted(3, 5, 0),
    "mconv_e3k5g8": _inverted(3, 5, 8),
    "mconv_e6k11g0": _inverted(6, 11, 0),
}


class Architecture(NamedTuple):
    """Ops of the cells in the encoder tower, decoder tower, pre- and post-processing."""

    encoder: tuple[str, ...]
    decoder: tuple[str, ...]
    preprocess: tuple[str, ...]
    postprocess: tuple[str, ...]


_E6, _E3, _G8, _K11 = ("mconv_e6k5g0",), ("mconv_e3k5g0",), ("mconv_e3k5g8",), ("mconv_e6k11g0",)
_RES = ("res_bnswish", "res_bnswish")


def _dilated(*ops: str) -> Architecture:
    return Architecture(ops, _E6, ops, _E3)


ARCHITECTURES: Mapping[str, Architecture] = {
    "res_mbconv": Architecture(_RES, _E6, _RES, _E3),
    "mbconv_sep": Architecture(_E6, _E6, _E3, _E3),
    "mbconv_sep11": Architecture(_K11, _K11, _E3, _E3),
    "mbconv_res": Architecture(_E6, _RES, _E3, _RES),
    "mbconv_den": Architecture(_E6, _E6, _G8, _G8),
    "res_elu": Architecture(*[("res_elu", "res_elu")] * 4),
    "res_bnelu": Architecture(*[("res_bnelu", "res_bnelu")] * 4),
    "res_bnswish": Architecture(*[_RES] * 4),
    "res53_mbconv": _dilated("res_bnswish5", "res_bnswish"),
    "res35_mbconv": _dilated("res_bnswish", "res_bnswish5"),
    "res55_mbconv": _dilated("res_bnswish5", "res_bnswish5"),
}


def make_cell(
    op_names: tuple[str, ...], in_channels: int, out_channels: int, stride: int, squeeze_excite: bool
) -> ResidualCell:
    """A residual cell that chains the named ops."""
    ops = [
        OPS[name](in_channels if i == 0 else out_channels, out_channels, stride if i == 0 else 1)
        for i, name in enumerate(op_names)
    ]
    return ResidualCell(in_channels, out_channels, stride, ops, squeeze_excite=squeeze_excite)
