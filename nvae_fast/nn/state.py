"""Checks of a state dict before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nvae_fast.ops._checks import FLOATING


def check_state(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Raise unless the values of floating parameters and buffers of ``module`` in ``state_dict`` are floating.

    PyTorch converts them without a message, and drops the imaginary part of complex numbers. ``prefix``: of the keys.

    Raises:
        TypeError: a tensor has a dtype that is not floating.
    """
    for name, own in (*module.named_parameters(), *module.named_buffers()):
        value = state_dict.get(prefix + name)
        if isinstance(value, torch.Tensor) and own.dtype in FLOATING and value.dtype not in FLOATING:
            raise TypeError(
                f"{type(module).__name__}.load_state_dict: {prefix}{name} must have one of the dtypes "
                f"{[str(dtype) for dtype in FLOATING]}, got {value.dtype}"
            )
