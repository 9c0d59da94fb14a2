"""What a comparison of a part depends on: parts with equal signatures are compared once."""

from __future__ import annotations

from collections.abc import Hashable
from types import MethodType
from typing import Any

import torch
from torch import nn

from nvae_fast.patching.bound import bound_forward

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
_LARGE = 1 << 24  # elements of a buffer whose values are not read


def signature(module: nn.Module) -> Hashable:
    """Return what decides whether a forward of ours computes that of ``module``, apart from the values of its parameters.

    Classes and their forwards, attributes, shapes and dtypes of parameters and buffers, the values of buffers that are no
    running statistics (masks), hooks, forwards of the instances, and which modules are shared. Other objects count by
    identity: signatures are compared while the model is alive.
    """
    return _module(module, {})


def _module(module: nn.Module, seen: dict[int, int]) -> Hashable:
    if id(module) in seen:
        return "shared", seen[id(module)]
    seen[id(module)] = len(seen)
    cls, bound = type(module), bound_forward(module)
    ours = None if bound is None else repr((bound.kind, bound.settings, bound.constants))
    found: list[Any] = [cls, id(cls.forward), ours]
    for name, value in module.__dict__.items():
        if name == "_parameters":
            found += [(key, _tensor(p), seen.setdefault(id(p), len(seen))) for key, p in value.items()]
        elif name == "_buffers":
            found += [(key, _tensor(b), key in _STATISTICS or _values(b)) for key, b in value.items()]
        elif name == "_modules":
            found += [(key, None if m is None else _module(m, seen)) for key, m in value.items()]
        elif "_hooks" in name:
            found.append((name, bool(value)))
        elif bound is None or name not in ("forward", "_replicate_for_data_parallel"):
            found.append((name, _value(value, seen)))
    return tuple(found)


def _tensor(t: torch.Tensor | None) -> Hashable:
    return t if t is None else (type(t), t.shape, t.dtype, t.device, t.requires_grad)


def _values(buffer: torch.Tensor | None) -> Hashable:
    if buffer is None:
        return None
    if type(buffer) is not torch.Tensor or buffer.is_meta or buffer.numel() > _LARGE:
        return id(buffer)
    flat = buffer.detach().reshape(-1).contiguous().cpu()
    return flat.view(torch.uint8).numpy().tobytes()


def _value(value: Any, seen: dict[int, int]) -> Hashable:
    if isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if isinstance(value, nn.Module):
        return _module(value, seen)
    if isinstance(value, dict):
        return type(value), tuple((_value(k, seen), _value(v, seen)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value), tuple(_value(v, seen) for v in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(_value(v, seen) for v in value)
    if isinstance(value, MethodType):
        return id(value.__func__), _value(value.__self__, seen)
    return id(value)
