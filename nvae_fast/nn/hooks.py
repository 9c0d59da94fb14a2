"""Hooks on modules: where there are any, a module computes itself."""

from __future__ import annotations

from torch import nn


def has_hooks(*modules: nn.Module) -> bool:
    """Whether calling one of ``modules`` runs hooks of its own."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return False
