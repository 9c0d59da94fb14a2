"""The channel gate of :mod:`nvae_fast.nn`."""

from __future__ import annotations

import torch
from torch import nn

from nvae_fast.ops.squeeze_excite import squeeze_excite


class SqueezeExcite(nn.Module):
    """Channel gate: ``y = g x`` with ``g = sigmoid(expand(relu(reduce(mean_hw(x)))))``, max(C // 16, 4) hidden units.

    Called with x (B, C, H, W) and optionally skip (B, C, H, W) and residual_scale: ``y = skip + residual_scale * g x``.
    NVAE (arXiv 2007.03898), section 3.1.1; Hu et al., arXiv 1709.01507. The operation: :func:`nvae_fast.squeeze_excite`.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(
        self, x: torch.Tensor, skip: torch.Tensor | None = None, residual_scale: float = 1.0
    ) -> torch.Tensor:
        return squeeze_excite(
            x, self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias,
            skip=skip, residual_scale=residual_scale,
        )  # fmt: skip
