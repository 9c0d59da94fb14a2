"""Residual cells of models built elsewhere: the sum at their end and, for cells like NVAE's, the whole cell in one call.

Every call checks what may change between calls: hooks, modes of batch norms, layers, inputs. Where the one call would not give
the results of the parts, the cell runs part by part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook

from nvae_fast import distributed
from nvae_fast.nn.fused_cell import RESIDUAL_SCALE, fused_cell
from nvae_fast.nn.plain import has_hooks
from nvae_fast.ops.inverted_residual.train import CellParameters, available
from nvae_fast.ops.squeeze_excite import squeeze_excite
from nvae_fast.patching.bound import FORWARDS, PARTS, bound_forward, original
from nvae_fast.patching.forwards import SQUEEZE_EXCITE, gate_of, gate_part, is_map, normalising
from nvae_fast.patching.plan import (
    Layout,
    Plan,
    facts_of,
    forward_of,
    inside,
    is_merged,
    operations,
    own_facts,
    same_type,
    waits_for_data,
)

RESIDUAL_CELL = "residual cell"
WHOLE_CELL = "whole inverted residual cell"
_USUAL = Layout("skip", ("_ops",), "se")


def _layout(cell: Any, known: Layout) -> Layout:
    """``known``, without the gate that ``cell`` does not use now."""
    return known._replace(gate=None) if not getattr(cell, "use_se", True) else known


def _residual_cell(module: Any, x: torch.Tensor, *, layout: Layout = _USUAL) -> torch.Tensor:
    return _by_parts(module, x, None, _layout(module, layout), RESIDUAL_SCALE)


def _by_parts(
    module: Any, x: torch.Tensor, skip: torch.Tensor | None, layout: Layout, scale: float
) -> torch.Tensor:
    """``skip``: its value if it has been computed."""
    s = x
    for operation in operations(module, layout):
        s = operation(s)
    if layout.gate is not None:
        gate = module._modules[layout.gate]
        bound = bound_forward(gate)
        if bound is not None and bound.kind == SQUEEZE_EXCITE and not has_hooks(gate) and is_map(s):
            layers = gate_of(gate, **bound.settings)
            if layers is not None:
                skip = module._modules[layout.skip](x) if skip is None else skip
                if skip.shape == s.shape:
                    return squeeze_excite(s, *layers[:4], skip=skip, residual_scale=scale, **bound.settings)
        s = gate(s)
    if skip is None:
        skip = module._modules[layout.skip](x)
    return torch.add(skip, s, alpha=scale)


def _whole_cell(
    module: Any, x: torch.Tensor, *, plan: Plan, sets: tuple[tuple[str, ...], ...], strict: bool = False
) -> torch.Tensor:
    """``sets``: attributes in which the three convolutions leave their weight. ``strict``: raise, do not run the parts."""
    layout = _layout(module, plan.layout)
    if plan.own and own_facts(module) != plan.own:
        return original(module, x)
    modules = inside(module, layout)
    skip: Any = None
    why = _obstacle(module, modules, plan)
    if why is None:
        skip = module._modules[layout.skip](x)
        if not _takes(modules, plan, x, skip, strict):
            why = "the kernels do not accept its tensors"
    if why is not None:
        if strict:
            raise RuntimeError(why)
        return _by_parts(module, x, skip, layout, plan.scale)
    for place, names in zip(plan.convolutions, sets, strict=True):
        for name in names:
            setattr(modules[place], name, modules[place].weight)
    return _together(modules, plan, x, skip)


# Whether it may run


def obstacle(cell: Any, plan: Plan) -> str | None:
    """Return why ``cell``, once compared, cannot run in one call now; None when it can."""
    if plan.own and own_facts(cell) != plan.own:
        return "its attributes are no longer those that were compared"
    return _obstacle(cell, inside(cell, _layout(cell, plan.layout)), plan)


def _obstacle(cell: Any, modules: list[Any], plan: Plan) -> str | None:
    if _has_any_global_hook():
        return "a hook for all modules is set"
    if len(modules) != len(plan.types):
        return "its layers are no longer those that were compared"
    for i, (kind, forward) in enumerate(plan.types):
        module = modules[i]
        if not same_type(module, kind) or forward_of(module) != forward:
            return "its layers are no longer those that were compared"
        if has_hooks(module):
            name = next((name for name, m in cell.named_modules() if m is module), "")
            return f"{name or 'a module'} inside has hooks, which would not be called"
    convolutions = [modules[place] for place in plan.convolutions]
    if any(waits_for_data(conv) for conv in convolutions):
        return "a convolution waits for data-dependent initialisation"
    if facts_of(convolutions) != plan.facts:
        return "a convolution is no longer the one that was compared"
    norms = [modules[norm.place] for norm in plan.norms]
    for norm in norms:
        if _unlike_others(norm):
            return f"a batch norm: {normalising(norm)}"
        if norm.training is not norms[0].training or norm.eps != norms[0].eps:
            return "its batch norms are not all in one mode (train or eval) or have not one eps"
    if norms[0].training and len(_groups(modules, plan)) > 1:
        return "its batch norms do not take statistics over the same processes"
    return None


def _unlike_others(norm: Any) -> bool:
    """``normalising(norm) is not None``, faster."""
    parameters, buffers = norm._parameters, norm._buffers
    usual = (
        parameters.get("weight") is not None
        and parameters.get("bias") is not None
        and buffers.get("running_mean") is not None
        and buffers.get("running_var") is not None
        and norm.momentum is not None
        and norm.eps > 0
        and getattr(norm, "track_running_stats", True)
    )
    return not usual and normalising(norm) is not None


def _groups(modules: list[Any], plan: Plan) -> list[Any]:
    """The different groups of processes whose statistics batch norms merge; SINGLE_PROCESS for this process."""
    if distributed.world_size() == 1:
        return [None]
    found: list[Any] = []
    for norm in plan.norms:
        module = modules[norm.place]
        group = (
            getattr(module, "process_group", None) if is_merged(module, norm) else distributed.SINGLE_PROCESS
        )
        if distributed.world_size(group) == 1:
            group = distributed.SINGLE_PROCESS
        elif group is None:
            group = torch.distributed.group.WORLD
        if not any(group is other for other in found):
            found.append(group)
    return found


def _takes(modules: list[Any], plan: Plan, x: Any, skip: Any, strict: bool) -> bool:
    """Return whether the kernels accept these tensors and give the results of the parts."""
    if not is_map(x) or not (strict or available(x.device)):
        return False
    affine = [modules[norm.place].weight for norm in plan.norms]
    weights = [modules[place].weight for place in (*plan.convolutions, *plan.gate)]
    (b, c, h, w), stride = x.shape, plan.stride
    h_out, w_out = (
        (2 * h, 2 * w) if stride == -1 else ((h + stride - 1) // stride, (w + stride - 1) // stride)
    )
    if c != affine[0].shape[0] or skip.shape != (b, affine[3].shape[0], h_out, w_out):
        return False
    dtype = x.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        if any(t.dtype == torch.float64 for t in weights):
            return False
    elif any(t.dtype != dtype for t in weights):
        return False
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if any(t.dtype not in (wide, x.dtype) for t in affine):
        return False
    if any(t.device != x.device for t in (skip, *weights, *affine)):
        return False
    if skip.dtype != dtype and torch.promote_types(skip.dtype, dtype) != skip.dtype:
        return False
    # With statistics over several processes each of them must decide alike, also one that has no data.
    alone = distributed.world_size(_groups(modules, plan)[0]) == 1
    return not alone or (b * h * w > 1 and b * h_out * w_out > 1)


# Running it


def _together(modules: list[Any], plan: Plan, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    n0, n1, n2, n3 = norms = [modules[norm.place] for norm in plan.norms]
    expand, depthwise, project = (modules[place].weight for place in plan.convolutions)
    gate = gate_layers(modules, plan)
    parameters = CellParameters(
        n0.weight, n0.bias, expand, n1.weight, n1.bias, depthwise, n2.weight, n2.bias, project, n3.weight, n3.bias, *gate
    )  # fmt: skip
    return fused_cell(
        x, skip, parameters, norms, stride=plan.stride, group=_groups(modules, plan)[0] if n0.training else None,
        early=plan.early, counted=[norm.counts for norm in plan.norms], residual_scale=plan.scale,
    )  # fmt: skip


def gate_layers(modules: list[Any], plan: Plan) -> list[torch.Tensor]:
    """Weights and biases of the two layers of the gate, if there is one."""
    return [t for place in plan.gate for t in _layer(modules[place])]


def _layer(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a layer of the gate; zeros where it has no bias."""
    weight, bias = layer.weight.flatten(1), layer.bias
    return weight, weight.new_zeros(weight.shape[0]) if bias is None else bias


FORWARDS.update({RESIDUAL_CELL: _residual_cell, WHOLE_CELL: _whole_cell})


def _residual_part(module: Any, settings: dict[str, Any]) -> tuple[str, bool]:
    gate = module._modules.get(settings.get("layout", _USUAL).gate or "")
    bound = None if gate is None or not getattr(module, "use_se", True) else bound_forward(gate)
    return RESIDUAL_CELL if bound is None else f"{RESIDUAL_CELL}, {gate_part(bound.settings)}", False


def _whole_part(module: Any, settings: dict[str, Any]) -> tuple[str, bool]:
    return f"{WHOLE_CELL}, stride {settings['plan'].stride}", True


PARTS.update({RESIDUAL_CELL: _residual_part, WHOLE_CELL: _whole_part})
