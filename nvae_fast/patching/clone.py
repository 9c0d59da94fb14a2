"""Copies of a part for comparisons, which leave the part unchanged."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from nvae_fast.patching.bound import OURS, bound_forward

Place = tuple[torch.dtype | None, torch.device | None]


def clone(
    module: nn.Module, dtype: torch.dtype | None = torch.float32, device: torch.device | None = None
) -> nn.Module:
    """Return a copy of ``module`` with its own parameters and buffers, without hooks.

    They are in ``dtype`` and on ``device`` (None: their own). Forwards of ours are bound to the copy. copy.deepcopy would
    refuse tensors with a graph that forward left in the module (a normalised weight), and copy hooks.
    """
    return _module(module, {}, (dtype, device))


def _module(module: nn.Module, memo: dict[int, Any], place: Place) -> nn.Module:
    new = object.__new__(type(module))
    memo[id(module)] = new
    for name, value in module.__dict__.items():
        if bound_forward(module) is not None and name in OURS:
            continue
        is_hooks = "_hooks" in name and isinstance(value, dict)
        new.__dict__[name] = type(value)() if is_hooks else _value(value, memo, place)
    bound = bound_forward(module)
    if bound is not None:
        bound.installed_on(new)
    return new


def _value(value: Any, memo: dict[int, Any], place: Place) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    new = value
    if isinstance(value, nn.Module):
        return _module(value, memo, place)
    if isinstance(value, torch.Tensor):
        new = value.detach().clone(memory_format=torch.contiguous_format)
        floating = new.is_floating_point() and place[0] is not None
        new = new.to(place[1], place[0] if floating else new.dtype)
        if isinstance(value, nn.Parameter):
            new = nn.Parameter(new, requires_grad=value.requires_grad)
    elif isinstance(value, dict):
        new = memo[id(value)] = type(value)() if type(value) is not dict else {}
        new.update({k: _value(v, memo, place) for k, v in value.items()})
    elif type(value) in (list, tuple, set):
        new = type(value)(_value(v, memo, place) for v in value)
    elif isinstance(value, MethodType):
        new = MethodType(value.__func__, _value(value.__self__, memo, place))
    memo[id(value)] = new
    return new


@torch.no_grad()
def perturb(module: nn.Module, generator: torch.Generator) -> None:
    """Add noise to every parameter and running statistic: initial values of 0 and 1 would hide differences."""
    for parameter in module.parameters():
        parameter.add_(_noise(parameter, generator), alpha=0.1)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.add_(_noise(buffer, generator), alpha=0.3)
        elif name.endswith("running_var"):
            buffer.mul_(torch.exp(0.3 * _noise(buffer, generator)))


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)
