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
    BATCH_NORM_ONLY,
    SQUEEZE_EXCITE,
    is_plain_norm,
    is_swish,
    pair,
    read_gate,
    why_not_depthwise,
)

NORMS = (BATCH_NORM, BATCH_NORM_ONLY)


class Norm(NamedTuple):
    place: int  # in inside(cell)
    merged: bool  # statistics over the process group
    counts: bool  # num_batches_tracked


class Layout(NamedTuple):
    """The names of the children of a cell ``skip(x) + scale * [gate](branch(x))``."""

    skip: str
    branch: tuple[str, ...]  # one after another; of a ModuleList, its modules
    gate: str | None


class Plan(NamedTuple):
    """``early`` of the four batch norms see the map before it is upsampled (``stride`` -1)."""

    types: tuple[tuple[type, str | None], ...]  # of inside(cell), and which of our forwards each has
    norms: tuple[Norm, ...]
    convolutions: tuple[int, ...]  # expand, depthwise, project
    gate: tuple[int, ...]  # the two layers of the squeeze-and-excitation, or none
    facts: tuple[Any, ...]
    stride: int
    early: int
    layout: Layout = Layout("skip", ("_ops",), "se")
    scale: float = 0.1
    own: tuple[tuple[str, Any], ...] = ()  # numbers and strings among the attributes of the cell


_SKIP = ("skip", "shortcut", "identity")


def layout_of(cell: Any) -> Layout | str:
    """Return the children of ``cell`` by what they do, or why it is no residual cell."""
    children = [name for name, child in cell._modules.items() if child is not None]
    skips = [name for name in children if any(word in name.lower() for word in _SKIP)]
    if len(skips) != 1:
        return "it has no module whose name says skip or shortcut, or several"
    gates = []
    for name in children:
        bound = bound_forward(cell._modules[name])
        if name == "se" or (bound is not None and bound.kind == SQUEEZE_EXCITE):
            gates.append(name)
    if len(gates) > 1:
        return f"it has the gates {', '.join(gates)}"
    branch = tuple(name for name in children if name not in (*skips, *gates))
    if not branch:
        return "it has no modules beside its skip"
    used = gates and getattr(cell, "use_se", True)
    return Layout(skips[0], branch, gates[0] if used else None)


def own_facts(cell: Any) -> tuple[tuple[str, Any], ...]:
    """The numbers and strings among the attributes that the forward of ``cell`` may read."""
    code = getattr(type(cell).forward, "__code__", None)
    return tuple(
        (name, value)
        for name, value in cell.__dict__.items()
        if type(value) in (bool, int, float, str)
        and name != "training"
        and (code is None or name in code.co_names)
    )


def operations(cell: Any, layout: Layout) -> Iterator[Any]:
    """The modules of the branch that the forward of the cell calls, in order."""
    for name in layout.branch:
        child = cell._modules[name]
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


def inside(cell: Any, layout: Layout) -> list[Any]:
    """The modules that the whole cell does not call, in order; a module that is used twice comes twice."""
    found: list[Any] = []
    for name in layout.branch:
        if not isinstance(cell._modules[name], nn.ModuleList):
            found.append(cell._modules[name])
        _walk(cell._modules[name], found)
    if layout.gate is not None:
        found.append(cell._modules[layout.gate])
        _walk(cell._modules[layout.gate], found)
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


def same_type(module: Any, kind: type) -> bool:
    """Return whether ``module`` is of the type that was compared; convert_sync_batchnorm may have come between."""
    return type(module) is kind or (is_plain_norm(module) and kind in (nn.BatchNorm2d, nn.SyncBatchNorm))


def is_merged(module: Any, norm: Norm) -> bool:
    """Return whether ``module`` takes its statistics over the process group."""
    return type(module) is nn.SyncBatchNorm if is_plain_norm(module) else norm.merged


def read(cell: Any, layout: Layout) -> Plan | str:
    """Return the plan of ``cell``, or why it has none."""
    modules = inside(cell, layout)
    place = {id(module): i for i, module in enumerate(modules)}
    norms: list[Norm] = []
    convolutions: list[Any] = []
    order, early, upsampled = "", 0, False
    for leaf in (leaf for op in operations(cell, layout) for leaf in _leaves(op)):
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
    if layout.gate is not None:
        squeeze = cell._modules[layout.gate]
        bound = bound_forward(squeeze)
        if bound is None or bound.kind != SQUEEZE_EXCITE:
            return f"{layout.gate} is not replaced"
        layers = read_gate(squeeze)
        if isinstance(layers, str):
            return f"{layout.gate}: {layers}"
        used = (bound.settings.get("activation", "relu"), bound.settings.get("gate", "sigmoid"))
        if used != ("relu", "sigmoid"):
            return f"{layout.gate} has {used[0]} and {used[1]}, not relu and sigmoid"
        gate = tuple(i for i, m in enumerate(modules) if i > place[id(squeeze)] and "weight" in m._parameters)
    return Plan(
        tuple((type(m), forward_of(m)) for m in modules), tuple(norms), tuple(place[id(c)] for c in convolutions), gate,
        facts_of(convolutions), -1 if upsampled else stride, early, layout, own=own_facts(cell),
    )  # fmt: skip


def _leaves(module: nn.Module) -> Iterator[Any]:
    """The layers of ``module``, which may be one itself."""
    if type(module) is nn.Identity:
        return
    if not module._modules or forward_of(module) in NORMS:
        yield module
        return
    for child in module._modules.values():
        if child is not None:
            yield from _leaves(child)


def _norm_of(leaf: Any, place: int) -> tuple[Norm, str] | None:
    """The batch norm, and "S" or "B": with or without swish; None for another layer."""
    bound = bound_forward(leaf)
    if bound is not None and bound.kind in NORMS:
        known = bound.settings
        return Norm(place, known["merged"], known["counts"]), "B" if known["activation"] is None else "S"
    inherits = type(leaf).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    if bound is None and inherits and isinstance(leaf, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        counts = leaf.num_batches_tracked is not None
        return Norm(place, isinstance(leaf, nn.SyncBatchNorm), counts), "B"
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
