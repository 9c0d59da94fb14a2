"""State dicts as they come: with prefixes of wrappers, and with values that are no weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

# What wrappers put before the names of the modules inside: torch.compile, data parallelism, recomputation, FSDP.
_WRAPPERS = {"_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_OLD_FLAG = "spectral._extra_state"  # in files of version 0.1.0
_AVERAGED = "n_averaged"  # the count that torch.optim.swa_utils.AveragedModel adds


def plain_name(name: str) -> str:
    """``name`` without the parts that wrappers add, wherever they are."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_names(op: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state`` by plain names (see :func:`plain_name`), without the counter of an averaged model.

    Raises:
        TypeError: it is no mapping of names to tensors. ValueError: two names become one.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{op}: state_dict must be a mapping, got {type(state).__name__}")
    if any(not isinstance(key, str) for key in state):
        raise TypeError(f"{op}: the keys of state_dict must be strings")
    wrapped = any(plain_name(key) != key for key in state)
    plain: dict[str, Any] = {}
    for key, value in state.items():
        if wrapped and key == _AVERAGED:
            continue
        name = plain_name(key)
        if name in plain:
            raise ValueError(
                f"{op}: state_dict has {name} twice, with and without a wrapper's prefix ({key})"
            )
        plain[name] = value
    return plain


def unwrapped(
    op: str, module: torch.nn.Module, state_dict: Mapping[str, Any], strict: bool
) -> OrderedDict[str, Any]:
    """``state_dict`` under the names of ``module``, with its metadata, checked as a whole: PyTorch's own load_state_dict has
    written what fits by the time it raises for what does not.

    Raises:
        As plain_names and check_values. RuntimeError: shapes differ, or, with ``strict``, names are missing or surplus.
    """
    own = module.state_dict()
    names = {plain_name(name): name for name in own}
    state = OrderedDict((names.get(key, key), value) for key, value in plain_names(op, state_dict).items())
    check_values(op, {key: value for key, value in state.items() if key in own}, own)
    # Hooks may still rename and reshape what is there.
    if not any(part._load_state_dict_pre_hooks for part in module.modules()):
        missing = [key for key in own if key not in state] if strict else []
        surplus = [key for key in state if key not in own and not key.endswith(_OLD_FLAG)] if strict else []
        problems = misfits(missing, surplus, {key: (own[key], state[key]) for key in own if key in state})
        if problems:
            raise RuntimeError(f"{op}: state_dict does not fit this model; {problems}")
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def check_values(op: str, state: Mapping[str, Any], own: Mapping[str, torch.Tensor]) -> None:
    """The values of ``state`` can be copied into those of ``own`` without changing what they are.

    Raises:
        TypeError: one is no tensor, no dense one, has no memory of its own, or is not floating where it must be.
    """
    not_tensors = [key for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if not_tensors:
        raise TypeError(f"{op}: these entries are not tensors: {some(not_tensors)}")
    wrong = []
    for key, value in state.items():
        wanted = own.get(key)
        if value.layout is not torch.strided or value.is_quantized:
            wrong.append(f"{key} ({value.layout}, expected a dense tensor)")
        elif wanted is None:
            continue
        elif value.is_floating_point() != wanted.is_floating_point() or value.is_complex():
            kind = "a floating tensor" if wanted.is_floating_point() else str(wanted.dtype)
            wrong.append(f"{key} ({value.dtype}, expected {kind})")
    if wrong:
        raise TypeError(f"{op}: these entries have the wrong type: {some(wrong)}")


def misfits(
    missing: list[str], surplus: list[str], pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> str:
    """Names that are ``missing`` or ``surplus``, and those of ``pairs`` (expected, given) whose shapes differ, as a message;
    empty where there are none."""
    wrong = [
        f"{key} (expected {tuple(expected.shape)}, got {tuple(given.shape)})"
        for key, (expected, given) in pairs.items()
        if expected.shape != given.shape and not (expected.dim() == 0 and given.shape == (1,))
    ]
    found = {"missing keys": missing, "surplus keys": surplus, "shapes that differ": wrong}
    return "; ".join(f"{what}: {some(names)}" for what, names in found.items() if names)


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The first of ``tensors`` (name, value) that holds a NaN or an infinity, with which of them; None when all are finite."""
    named = [(name, value) for name, value in tensors if value.is_floating_point() and value.numel()]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for _, value in named:
        by_device.setdefault(value.device, []).append(value.detach())
    # NaN and infinity survive in the largest absolute value. One wait for each device.
    for values in by_device.values():
        peaks = torch._foreach_norm(values, torch.inf)
        if not bool(torch.isfinite(torch.stack([peak.double() for peak in peaks])).all()):
            break
    else:
        return None
    for name, value in named:
        if not bool(torch.isfinite(value).all()):
            return f"{name} holds {'NaN' if bool(value.isnan().any()) else 'an infinity'}"
    return None


def some(names: list[str], most: int = 10) -> str:
    """The first of ``names``, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
