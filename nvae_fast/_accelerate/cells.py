"""Residual cells of foreign models: the sum at their end, and where all layers are as in NVAE the whole cell in one call.

A whole cell is ``skip(x) + 0.1 * [se](s)`` with s made by BN, 1x1, BN + swish, depthwise KxK, BN + swish, 1x1, BN, and somewhere
before the depthwise convolution perhaps nearest upsampling by 2. Layers are found by walking through the containers; that these
do nothing else shows in the comparison. What may change from call to call is looked at in every call: the cell then runs part by
part, as it does for inputs that the kernels do not take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from nvae_fast import _distributed
from nvae_fast._accelerate.bound import FORWARDS, bound_forward
from nvae_fast._accelerate.forwards import (
    BATCH_NORM,
    SQUEEZE_EXCITE,
    is_map,
    is_swish,
    normalising,
    pair,
    read_gate,
    why_not_depthwise,
)
from nvae_fast.nn import RESIDUAL_SCALE, _has_hooks
from nvae_fast.ops import _folded_cell as folded_cell
from nvae_fast.ops import inverted_residual_cell as fused_cell
from nvae_fast.ops.squeeze_excite import squeeze_excite

RESIDUAL_CELL = "residual cell"
WHOLE_CELL = "whole inverted residual cell"
Types = tuple[tuple[type, str | None], ...]


class Norm(NamedTuple):
    module: Any
    swish: bool
    merged: bool  # statistics over the process group
    counts: bool  # num_batches_tracked


class Layers(NamedTuple):
    """The layers of a whole cell; ``early`` of the four batch norms see the map before it is upsampled."""

    norms: tuple[Norm, ...]
    expand: Any
    depthwise: Any
    project: Any
    stride: int
    early: int
    gate: tuple[torch.Tensor, ...]


# Reading a cell


def _walk(module: nn.Module) -> Iterator[nn.Module]:
    """Every module inside, in order; one that stands there twice comes twice."""
    for child in module._modules.values():
        if child is not None:
            yield child
            yield from _walk(child)


def _inside(cell: Any) -> list[nn.Module]:
    """The modules that the whole cell passes by."""
    return [*_walk(cell._ops), *((cell.se, *_walk(cell.se)) if cell.use_se else ())]


def types_inside(cell: Any) -> Types:
    """What stands inside and which of our forwards it has: as long as this stays, the cell is the one that was compared."""
    return tuple((type(m), _forward_of(m)) for m in _inside(cell))


def _forward_of(module: nn.Module) -> str | None:
    bound = bound_forward(module)
    return bound.kind if bound is not None else "its own" if "forward" in module.__dict__ else None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    for child in module._modules.values():
        if child is None or type(child) is nn.Identity:
            continue
        bound = bound_forward(child)
        if child._modules and (bound is None or bound.kind != BATCH_NORM):
            yield from _leaves(child)
        else:
            yield child


def _norm_of(leaf: nn.Module) -> Norm | None:
    bound = bound_forward(leaf)
    if bound is not None and bound.kind == BATCH_NORM:
        known = bound.settings
        return Norm(leaf, known["activation"] is not None, known["merged"], known["counts"])
    if bound is None and type(leaf) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return Norm(leaf, False, type(leaf) is nn.SyncBatchNorm, leaf.num_batches_tracked is not None)
    return None


def read(cell: Any) -> Layers | str:
    """The layers of ``cell``, or why it is not a whole cell."""
    norms: list[Norm] = []
    convolutions: list[Any] = []
    order, early, upsampled = "", 0, False
    for leaf in _leaves(cell._ops):
        norm = _norm_of(leaf)
        if norm is not None:
            norms.append(norm)
            order += "S" if norm.swish else "B"
        elif is_swish(leaf) and order[-1:] == "B":
            norms[-1] = norms[-1]._replace(swish=True)
            order = order[:-1] + "S"
        elif _is_convolution(leaf):
            convolutions.append(leaf)
            order += "c"
        elif _doubles(leaf) and not upsampled and len(convolutions) < 2:
            early, upsampled = len(norms), True
        else:
            return f"{type(leaf).__name__} is not a layer of the whole cell"
    if order != "BcScScB":
        return f"its layers are not BN, 1x1, BN + swish, depthwise, BN + swish, 1x1, BN (B, S, c: {order or 'none'})"
    expand, depthwise, project = convolutions
    for conv in convolutions:
        why = _why_not_plain(conv, pointwise=conv is not depthwise)
        if why is not None:
            return why
    if len({id(norm.module) for norm in norms}) < 4:
        return "a batch norm stands in it twice"
    gate: tuple[torch.Tensor, ...] | str = ()
    if cell.use_se:
        bound = bound_forward(cell.se)
        known = bound is not None and bound.kind == SQUEEZE_EXCITE
        gate = read_gate(cell.se) if known else "se is not replaced"
    if isinstance(gate, str):
        return gate
    stride = (pair(depthwise.stride) or (0, 0))[0]
    if upsampled and stride != 1:
        return f"it upsamples and has stride {stride}"
    return Layers(tuple(norms), expand, depthwise, project, -1 if upsampled else stride, early, gate)


def _is_convolution(module: Any) -> bool:
    names = ("weight", "bias", "stride", "padding", "dilation", "groups")
    return not module._modules and all(hasattr(module, n) for n in names) and module.weight.dim() == 4


def _doubles(module: Any) -> bool:
    """Nearest upsampling by 2."""
    known = isinstance(module, nn.Upsample) and module.mode == "nearest" and module.size is None
    return known and module.scale_factor in (2, (2, 2))


def _why_not_plain(conv: Any, *, pointwise: bool) -> str | None:
    """What the whole cell cannot do of one of its convolutions."""
    name, kernel = type(conv).__name__, tuple(conv.weight.shape[2:])
    if conv.bias is not None:
        return f"{name} has a bias before a batch norm"
    if getattr(conv, "log_weight_norm", None) is not None:
        return f"{name} has weight norm"
    if getattr(conv, "data_init", False) and not getattr(conv, "init_done", True):
        return f"{name} waits for data to initialise with"
    if pointwise:
        plain = kernel == (1, 1) and pair(conv.stride) == (1, 1) and conv.groups == 1
        at_rest = plain and (pair(conv.padding) == (0, 0) or conv.padding in ("same", "valid"))
        return None if at_rest else f"{name} with kernel {kernel} is not a plain 1x1 convolution"
    if conv.groups != conv.weight.shape[0] or conv.weight.shape[1] != 1:
        return f"{name} with {conv.groups} groups is not depthwise"
    if pair(conv.dilation) != (1, 1):
        return f"{name} is dilated"
    return why_not_depthwise(conv, conv.weight)


def obstacle(cell: Any, layers: Layers, types: Types) -> str | None:
    """What keeps the whole cell, once compared, from running in one call now."""
    if types_inside(cell) != types:
        return "its layers are no longer those that were compared"
    if _has_any_global_hook():
        return "a hook for all modules is set"
    watched = next((m for m in _inside(cell) if _has_hooks(m)), None)
    if watched is not None:
        name = next((name for name, m in cell.named_modules() if m is watched), "")
        return f"hooks wait on {name or 'a module'} inside, which would not be called"
    norms = layers.norms
    why = next((w for norm in norms if (w := normalising(norm.module)) is not None), None)
    if why is not None:
        return f"a batch norm: {why}"
    if len({(norm.module.training, norm.module.eps) for norm in norms}) > 1:
        return "its batch norms are not all in one mode (train or eval) or have not one eps"
    if norms[0].module.training and len(_groups(norms)) > 1:
        return "its batch norms do not take statistics over the same processes"
    return None


def _groups(norms: tuple[Norm, ...]) -> list[Any]:
    """The different groups of processes over which batch norms take statistics; ALONE where that is this one."""
    if _distributed.world_size() == 1:
        return [None]
    found: list[Any] = []
    for norm in norms:
        group = getattr(norm.module, "process_group", None) if norm.merged else _distributed.ALONE
        if _distributed.world_size(group) == 1:
            group = _distributed.ALONE
        elif group is None:
            group = torch.distributed.group.WORLD
        if not any(group is other for other in found):
            found.append(group)
    return found


# Running it


def _residual_cell(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _by_parts(module, x, module.skip(x))


def _by_parts(module: Any, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    s = x
    for i in range(module._num_nodes):
        s = module._ops[i](s)
    if module.use_se:
        se = module.se
        bound = bound_forward(se)
        known = bound is not None and bound.kind == SQUEEZE_EXCITE and not _has_hooks(se)
        layers = read_gate(se) if known and is_map(s) and skip.shape == s.shape else ""
        if not isinstance(layers, str):
            return squeeze_excite(s, *layers, skip=skip, residual_scale=RESIDUAL_SCALE)
        s = se(s)
    return torch.add(skip, s, alpha=RESIDUAL_SCALE)


def _whole_cell(
    module: Any, x: torch.Tensor, *, types: Types, sets: tuple[tuple[str, ...], ...], strict: bool = False
) -> torch.Tensor:
    """``sets``: attributes in which the three convolutions leave their weight. ``strict``: raise rather than go by parts."""
    skip = module.skip(x)
    layers = read(module)
    why = layers if isinstance(layers, str) else obstacle(module, layers, types)
    if why is not None or isinstance(layers, str) or not _takes(layers, x, skip, strict):
        if strict:
            raise RuntimeError(why or "the kernels do not take its tensors")
        return _by_parts(module, x, skip)
    for conv, names in zip((layers.expand, layers.depthwise, layers.project), sets, strict=True):
        for name in names:
            setattr(conv, name, conv.weight)
    return _together(layers, x, skip)


def _takes(layers: Layers, x: torch.Tensor, skip: torch.Tensor, strict: bool) -> bool:
    """Whether the kernels take these tensors and would give back what the parts give."""
    if not is_map(x) or not (strict or fused_cell.available(x.device.type)):
        return False
    norms, stride = [norm.module for norm in layers.norms], layers.stride
    weights = [layers.expand.weight, layers.depthwise.weight, layers.project.weight, *layers.gate]
    affine = [norm.weight for norm in norms]
    b, c, h, w = x.shape
    h, w = (2 * h, 2 * w) if stride == -1 else ((h + stride - 1) // stride, (w + stride - 1) // stride)
    if c != affine[0].numel() or skip.shape != (b, affine[3].numel(), h, w):
        return False
    if any(t.device != x.device for t in (skip, *weights, *affine)):
        return False
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        alike = all(t.dtype != torch.float64 for t in weights)
    else:
        alike = all(t.dtype == dtype for t in weights)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not alike or any(t.dtype not in (wide, x.dtype) for t in affine):
        return False
    if torch.promote_types(skip.dtype, dtype) != skip.dtype:
        return False
    # With statistics over several processes each of them must come to the same answer, also one that has no data.
    alone = _distributed.world_size(_groups(layers.norms)[0]) == 1
    return not alone or (b * h * w > 1 and b * x.shape[2] * x.shape[3] > 1)


def _together(layers: Layers, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    n0, n1, n2, n3 = norms = [norm.module for norm in layers.norms]
    parameters = fused_cell.CellParameters(
        n0.weight, n0.bias, layers.expand.weight, n1.weight, n1.bias, layers.depthwise.weight, n2.weight, n2.bias,
        layers.project.weight, n3.weight, n3.bias, *layers.gate,
    )  # fmt: skip
    if not n0.training:
        # Folded anew at every call: code of that age writes to `parameter.data`, which counts no versions.
        running = [(norm.running_mean, norm.running_var) for norm in norms]
        return folded_cell.inverted_residual_cell_evaluation(
            x, skip, parameters, running, stride=layers.stride, eps=n0.eps, residual_scale=RESIDUAL_SCALE
        )
    y, seen = fused_cell.inverted_residual_cell(
        x, skip, parameters, stride=layers.stride, eps=n0.eps, residual_scale=RESIDUAL_SCALE,
        group=_groups(layers.norms)[0],
    )  # fmt: skip
    _update(layers, seen)
    return y


@torch.no_grad()
def _update(layers: Layers, seen: tuple[fused_cell.BatchStatistics, ...]) -> None:
    """Running statistics as PyTorch's: the variance unbiased by the number of pixels that the batch norm would have seen."""
    news: list[list[torch.Tensor]] = []
    for i, (norm, s) in enumerate(zip(layers.norms, seen, strict=True)):
        count = s.count / 4 if layers.stride == -1 and i < layers.early else s.count
        mean, var = norm.module.running_mean, norm.module.running_var
        news.append([s.mean.to(mean.dtype), (s.var * (count / (count - 1))).to(var.dtype)])
    modules = [norm.module for norm in layers.norms]
    if len({module.momentum for module in modules}) == 1:  # a few calls for all of them
        olds = [t for module in modules for t in (module.running_mean, module.running_var)]
        torch._foreach_lerp_(olds, [t for new in news for t in new], modules[0].momentum)
    else:
        for module, new in zip(modules, news, strict=True):
            torch._foreach_lerp_([module.running_mean, module.running_var], new, module.momentum)
    counted = [norm.module.num_batches_tracked for norm in layers.norms if norm.counts]
    if counted:
        torch._foreach_add_(counted, 1)


FORWARDS.update({RESIDUAL_CELL: _residual_cell, WHOLE_CELL: _whole_cell})
