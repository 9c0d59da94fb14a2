"""Which layer of a residual cell built elsewhere is which, for cells like NVAE's inverted residual.

A whole cell is ``skip(x) + 0.1 * [se](s)`` with s made by BN, 1x1, BN + swish, depthwise KxK, BN + swish, 1x1, BN, and perhaps
nearest upsampling by 2 somewhere before the depthwise convolution. Layers are found by walking through the containers; the
comparison shows whether these do anything else. A plan holds positions and types and no modules: it is valid for copies too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from nvae_fast.patching.bound import bound_forward
from nvae_fast.patching.forwards import (
    BATCH_NORM,
    SQUEEZE_EXCITE,
    is_swish,
    pair,
    read_gate,
    why_not_depthwise,
)


class Norm(NamedTuple):
    place: int  # in inside(cell)
    merged: bool  # statistics over the process group
    counts: bool  # num_batches_tracked


class Plan(NamedTuple):
    """``early`` of the four batch norms see the map before it is upsampled (``stride`` -1)."""

    types: tuple[tuple[type, str | None], ...]  # of inside(cell), and which of our forwards each has
    norms: tuple[Norm, ...]
    convolutions: tuple[int, ...]  # expand, depthwise, project
    gate: tuple[int, ...]  # the two layers of the squeeze-and-excitation, or none
    facts: tuple[Any, ...]
    stride: int
    early: int


def inside(cell: Any) -> list[Any]:
    """The modules that the whole cell does not call, in order; a module that is used twice comes twice."""
    found: list[Any] = []
    _walk(cell._ops, found)
    if cell.use_se:
        found.append(cell.se)
        _walk(cell.se, found)
    return found


def _walk(module: nn.Module, found: list[Any]) -> None:
    for child in module._modules.values():
        if child is not None:
            found.append(child)
            if child._modules:
                _walk(child, found)


def forward_of(module: nn.Module) -> str | None:
    """The kind of our forward on ``module``; None where it has the forward of its class."""
    if "forward" not in module.__dict__:
        return None
    bound = bound_forward(module)
    return "its own" if bound is None else bound.kind


def facts_of(convolutions: list[Any]) -> tuple[Any, ...]:
    """The properties of the convolutions on which the plan depends, in a form that is quickly compared."""
    return tuple(
        (
            c.bias is None, c.stride, c.padding, c.dilation, c.groups, c.weight.shape,
            getattr(c, "log_weight_norm", None) is None,
        )
        for c in convolutions
    )  # fmt: skip


def waits_for_data(conv: Any) -> bool:
    """Return whether the next training batch will initialise ``conv``."""
    return bool(getattr(conv, "data_init", False)) and not getattr(conv, "init_done", True)


def read(cell: Any) -> Plan | str:
    """Return the plan of ``cell``, or why it has none."""
    modules = inside(cell)
    place = {id(module): i for i, module in enumerate(modules)}
    norms: list[Norm] = []
    convolutions: list[Any] = []
    order, early, upsampled = "", 0, False
    for leaf in _leaves(cell._ops):
        norm = _norm_of(leaf, place[id(leaf)])
        if norm is not None:
            norms.append(norm[0])
            order += norm[1]
        elif is_swish(leaf) and order[-1:] == "B":
            order = order[:-1] + "S"
        elif _is_convolution(leaf):
            convolutions.append(leaf)
            order += "c"
        elif _doubles(leaf) and not upsampled and len(convolutions) < 2:
            early, upsampled = len(norms), True
        else:
            return f"{type(leaf).__name__} is not a layer of the whole cell"
    if order != "BcScScB":
        names = {"B": "BN", "S": "BN + swish", "c": "convolution"}
        return f"its layers are {', '.join(names[o] for o in order)}, not BN, 1x1, BN + swish, depthwise, BN + swish, 1x1, BN"
    for i, conv in enumerate(convolutions):
        why = _why_not_plain(conv, pointwise=i != 1)
        if why is not None:
            return why
    if len({norm.place for norm in norms}) < 4:
        return "one of its batch norms is used twice"
    stride = (pair(convolutions[1].stride) or (0, 0))[0]
    if upsampled and stride != 1:
        return f"it upsamples and has stride {stride}"
    gate: tuple[int, ...] = ()
    if cell.use_se:
        bound = bound_forward(cell.se)
        if bound is None or bound.kind != SQUEEZE_EXCITE:
            return "se is not replaced"
        layers = read_gate(cell.se)
        if isinstance(layers, str):
            return f"se: {layers}"
        gate = tuple(i for i, m in enumerate(modules) if i > place[id(cell.se)] and "weight" in m._parameters)
    return Plan(
        tuple((type(m), forward_of(m)) for m in modules), tuple(norms), tuple(place[id(c)] for c in convolutions), gate,
        facts_of(convolutions), -1 if upsampled else stride, early,
    )  # fmt: skip


def _leaves(module: nn.Module) -> Iterator[Any]:
    for child in module._modules.values():
        if child is None or type(child) is nn.Identity:
            continue
        if child._modules and forward_of(child) != BATCH_NORM:
            yield from _leaves(child)
        else:
            yield child


def _norm_of(leaf: Any, place: int) -> tuple[Norm, str] | None:
    """The batch norm, and "S" or "B": with or without swish; None for another layer."""
    bound = bound_forward(leaf)
    if bound is not None and bound.kind == BATCH_NORM:
        known = bound.settings
        return Norm(place, known["merged"], known["counts"]), "B" if known["activation"] is None else "S"
    if bound is None and type(leaf) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        counts = leaf.num_batches_tracked is not None
        return Norm(place, type(leaf) is nn.SyncBatchNorm, counts), "B"
    return None


def _is_convolution(module: Any) -> bool:
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    return not module._modules and all(hasattr(module, n) for n in names) and module.weight.dim() == 4


def _doubles(module: Any) -> bool:
    """Return whether ``module`` is nearest upsampling by 2."""
    known = isinstance(module, nn.Upsample) and module.mode == "nearest" and module.size is None
    return known and module.scale_factor in (2, (2, 2))


def _why_not_plain(conv: Any, *, pointwise: bool) -> str | None:
    """Return why the whole cell cannot compute one of its convolutions; None when it can."""
    name, kernel = type(conv).__name__, tuple(conv.weight.shape[2:])
    if conv.bias is not None:
        return f"{name} has a bias before a batch norm"
    if getattr(conv, "log_weight_norm", None) is not None:
        return f"{name} has weight norm"
    if pointwise:
        plain = kernel == (1, 1) and pair(conv.stride) == (1, 1) and conv.groups == 1
        at_rest = plain and (pair(conv.padding) == (0, 0) or conv.padding in ("same", "valid"))
        return None if at_rest else f"{name} with kernel {kernel} is not a plain 1x1 convolution"
    if conv.groups != conv.weight.shape[0] or conv.weight.shape[1] != 1:
        return f"{name} with {conv.groups} groups is not depthwise"
    if pair(conv.dilation) != (1, 1):
        return f"{name} is dilated"
    return why_not_depthwise(conv, conv.weight)
