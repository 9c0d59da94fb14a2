"""The channel gate of :mod:`nvae_fast.nn`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nvae_fast.nn.plain import is_plain
from nvae_fast.nn.state import check_state
from nvae_fast.ops import _checks
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
        if self._is_plain():
            return squeeze_excite(
                x, self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias,
                skip=skip, residual_scale=residual_scale,
            )  # fmt: skip
        _checks.feature_map("SqueezeExcite", "x", x)
        dtype = next(self.reduce.parameters(), x).dtype
        pooled = x.mean((2, 3), dtype=_checks.accumulate_dtype(x.dtype)).to(dtype)
        y = x * torch.sigmoid(self.expand(torch.relu(self.reduce(pooled))))[:, :, None, None].to(x.dtype)
        y = y if residual_scale == 1.0 else residual_scale * y
        return y if skip is None else skip + y

    def _is_plain(self) -> bool:
        """Return whether both layers are plain linear layers, which the operator computes; else they compute themselves."""
        layers = (self.reduce, self.expand)
        return all(type(layer) is nn.Linear and layer.bias is not None for layer in layers) and is_plain(
            *layers
        )

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
