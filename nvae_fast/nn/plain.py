"""Layers that compute what their class computes: only these may be replaced by an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

# Of parameters: torch.func.functional_call puts tensors in their place. Subclasses, such as the DTensor of FSDP2, need the
# code of their own library.
_PLAIN: tuple[type, ...] = (nn.Parameter, torch.Tensor, type(None))


def has_hooks(*modules: nn.Module) -> bool:
    """Return whether calling one of ``modules`` runs hooks registered on it."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            return True
    return False


def is_plain(*modules: Any) -> bool:
    """Return whether each of ``modules`` runs the forward of its class on parameters of its own, and nothing else.

    False with hooks (pruning and the older weight norm are hooks), with parametrisations, with another forward set on the
    instance, with a weight or bias that is no parameter, and with parameters of a subclass of torch.Tensor.
    """
    if _has_any_global_hook():
        return False
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "parametrizations" in module._modules
        ):
            return False
        own = module.__dict__
        if "forward" in own:
            return False
        if "_is_replica" not in own and (own.get("weight") is not None or own.get("bias") is not None):
            return False  # nn.DataParallel alone keeps the parameters of its replicas as attributes
        for parameter in module._parameters.values():
            if type(parameter) not in _PLAIN and hasattr(parameter, "__tensor_flatten__"):
                return False
    return True


def full(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or all of it where it is a DTensor, of which each process holds a part. Differentiable."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
