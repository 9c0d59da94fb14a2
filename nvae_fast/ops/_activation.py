"""The activations that may be fused into a normalisation or a convolution's load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = (None, "swish", "elu")


def activate(x: Tensor, activation: str | None) -> Tensor:
    """``"swish"``: ``x * sigmoid(x)``; ``"elu"``: ``x if x > 0 else exp(x) - 1``; None: ``x``."""
    if activation == "swish":
        return F.silu(x)
    return F.elu(x) if activation == "elu" else x


def activation_derivative(u: Tensor, activation: str | None) -> Tensor:
    """The derivative of :func:`activate`."""
    if activation == "swish":
        s = torch.sigmoid(u)
        return s * (1 + u * (1 - s))
    return u.clamp_max(0).exp() if activation == "elu" else torch.ones_like(u)
