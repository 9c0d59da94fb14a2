"""The normalising flow of :mod:`nvae_fast.nn`: causal convolutions over a latent group."""

from __future__ import annotations

import math

import torch
from torch import nn

from nvae_fast.nn.conv import WeightNormConv2d
from nvae_fast.nn.plain import is_plain
from nvae_fast.ops.depthwise_conv2d import depthwise_conv2d
from nvae_fast.ops.elu import elu

# Convolutions that compute with their normalized_weight() and nothing else; models/frozen.py adds its own.
WEIGHTED: set[type] = {WeightNormConv2d}


def causal_mask(
    out_channels: int, in_channels: int, kernel_size: int, *, strict: bool, mirrored: bool
) -> torch.Tensor:
    """Mask of a causal convolution in raster order: zeros and ones, (C_out, C_in, K, K), float32.

    Rows above and pixels to the left are visible; at the centre, output channel block i sees input blocks < i (strict)
    or <= i, where the narrower side has one channel per block. A depthwise kernel sees its own channel unless strict.
    NVAE (arXiv 2007.03898), section 3.2; the specification's section 5.

    Args:
        out_channels: C_out.
        in_channels: C_in; 1 with many outputs is depthwise.
        kernel_size: K, odd.
        strict: whether a block is hidden from itself.
        mirrored: flips both spatial directions.
    """
    mask = torch.zeros(out_channels, in_channels, kernel_size, kernel_size)
    c = kernel_size // 2
    mask[:, :, :c] = 1
    mask[:, :, c, :c] = 1
    if in_channels == 1 and out_channels > 1:
        mask[:, :, c, c] = 0 if strict else 1
    else:
        blocks = min(in_channels, out_channels)
        row = torch.arange(out_channels)[:, None] // (out_channels // blocks)
        column = torch.arange(in_channels)[None] // (in_channels // blocks)
        mask[:, :, c, c] = (column < row if strict else column <= row).float()
    return mask.flip(2, 3) if mirrored else mask


class AutoregressiveTransform(nn.Module):
    """``z - m(z)`` with a causal m: masked conv3x3 (strict) -> ELU -> masked depthwise 5x5 -> ELU -> ELU -> masked conv1x1.

    (B, Z, H, W) to the same shape. Its log-determinant is zero. NVAE (arXiv 2007.03898), section 3.2 and appendix A;
    specification section 5.

    Args:
        latent_channels: Z.
        mirrored: run through rows and columns from the other end.
    """

    EXPANSION = 6

    def __init__(self, latent_channels: int, *, mirrored: bool) -> None:
        super().__init__()
        z, hidden = latent_channels, latent_channels * self.EXPANSION
        with torch.device("cpu"):  # also in a model on the meta device, where masks have no values
            # With one latent channel the first mask is taken for depthwise, which gives the same: a hidden centre.
            first = causal_mask(hidden, z, 3, strict=True, mirrored=mirrored)
            spatial = causal_mask(hidden, 1, 5, strict=False, mirrored=mirrored)
            last = causal_mask(z, hidden, 1, strict=False, mirrored=mirrored)
        self.expand = WeightNormConv2d(z, hidden, 3, bias=False, mask=first)
        self.depthwise = WeightNormConv2d(hidden, hidden, 5, groups=hidden, bias=False, mask=spatial)
        self.project = WeightNormConv2d(hidden, z, 1, mask=last)
        # The taps that `spatial` leaves, the same for every channel: the others need not be multiplied.
        self.spatial_taps = tuple(range(12, 25)) if mirrored else tuple(range(13))
        with torch.no_grad():
            self.project.log_weight_norm.sub_(math.log(10.0))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h, conv = self.expand(z), self.depthwise
        if type(conv) in WEIGHTED and is_plain(conv):
            weight = conv.normalized_weight().to(h.dtype)
            h = depthwise_conv2d(h, weight, activation="elu", taps=self.spatial_taps)
        else:
            h = conv(elu(h))
        return z - self.project(elu(elu(h)))


class FlowCell(nn.Module):
    """Two autoregressive transforms, in raster order, then mirrored: ``z2 = z1 - m2(z1)``, ``z1 = z - m1(z)``.

    (B, Z, H, W) to the same shape; log-determinant zero. NVAE (arXiv 2007.03898), section 3.2.

    Args:
        latent_channels: Z.
    """

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.raster = AutoregressiveTransform(latent_channels, mirrored=False)
        self.mirrored = AutoregressiveTransform(latent_channels, mirrored=True)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.mirrored(self.raster(z))
