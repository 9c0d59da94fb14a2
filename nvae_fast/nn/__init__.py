"""Modules of NVAE: they own parameters and call the ops. Everything here works in both memory formats.

The cells follow NVAE (arXiv 2007.03898), section 3.1 and appendix A; ``stride`` is 1, 2 (downsample) or -1 (upsample by 2).
"""

from nvae_fast.nn.batch_norm import BatchNormSwish, set_process_group
from nvae_fast.nn.cells import (
    ConvBlock,
    DecoderCombiner,
    EncoderCombiner,
    InvertedResidual,
    InvertedResidualCell,
    ResidualCell,
    SkipDown,
    SkipUp,
)
from nvae_fast.nn.conv import PlainConv2d, WeightNormConv2d
from nvae_fast.nn.flow import AutoregressiveTransform, FlowCell, causal_mask
from nvae_fast.nn.squeeze_excite import SqueezeExcite

__all__ = [
    "AutoregressiveTransform",
    "BatchNormSwish",
    "ConvBlock",
    "DecoderCombiner",
    "EncoderCombiner",
    "FlowCell",
    "InvertedResidual",
    "InvertedResidualCell",
    "PlainConv2d",
    "ResidualCell",
    "SkipDown",
    "SkipUp",
    "SqueezeExcite",
    "WeightNormConv2d",
    "causal_mask",
    "set_process_group",
]
