"""The parts of a model that are recognised by class name and attributes, and whether they may be replaced."""

from __future__ import annotations

import inspect
import re
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nvae_fast.nn.fused_cell import RESIDUAL_SCALE
from nvae_fast.patching import cells, forwards, mbconv
from nvae_fast.patching.bound import PARTS, BoundForward, bound_forward
from nvae_fast.patching.clone import clone
from nvae_fast.patching.plan import Layout, layout_of, read
from nvae_fast.patching.signature import signature
from nvae_fast.patching.verify import disagreement, undisturbed

Verdict = BoundForward | str | None  # its replacement; why it is left; not a recognised part


class Comparisons:
    """Verdicts about the parts of a model by their signatures: equal parts are compared once."""

    def __init__(self) -> None:
        self._found: dict[Any, Verdict] = {}

    def inspect(self, module: nn.Module, repair: bool = False) -> Verdict:
        """:func:`inspect_module`, or the same verdict as about an equal part."""
        if not _fitting(module):
            return None
        key = signature(module)
        if key not in self._found:
            self._found[key] = inspect_module(module, repair)
        known = self._found[key]
        if isinstance(known, BoundForward) and known.module is not module:
            return known.on(module)
        return known


def inspect_module(module: nn.Module, repair: bool = False) -> Verdict:
    """Decide about ``module``. Its children must come first: a residual cell depends on what its gate was found to be."""
    for _, judge in _fitting(module):
        foreign = [
            name
            for name, part in module.named_modules()
            if "forward" in part.__dict__ and bound_forward(part) is None
        ]
        if foreign:
            where = "it" if foreign == [""] else f"{foreign[0] or 'it'} inside"
            return f"the forward of the instance was replaced ({where})"
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if hasattr(tensor, "full_tensor"):
                return f"{name} is a DTensor, of which each process holds a part: call accelerate before fully_shard"
            if hasattr(tensor, "__tensor_flatten__"):
                return f"{name} is a {type(tensor).__name__}, not a plain tensor"
        more = _more_inputs(module)
        if more:
            return f"its forward takes {', '.join(more)} without defaults: the kernel has one input"
        # Reading a parametrised weight may change buffers: spectral norm takes a step of its power iteration.
        subject = clone(module, None) if _is_parametrized(module) else module
        found = judge(subject, repair)
        if isinstance(found, BoundForward):
            found.part = PARTS[found.kind](subject, found.settings)
            return found if subject is module else found.on(module)
        return found
    return None


def _fitting(module: nn.Module) -> list[Any]:
    """The first of the kinds that ``module`` looks like, in a list."""
    if _class(module).__module__.split(".")[0] == "nvae_fast" or isinstance(module, torch.jit.ScriptModule):
        return []
    subject = clone(module, None) if "parametrizations" in module._modules else module
    return [kind for kind in _KINDS if kind[0](subject)][:1]


def _is_parametrized(module: nn.Module) -> bool:
    return any("parametrizations" in part._modules for part in module.modules())


def _more_inputs(module: nn.Module) -> list[str]:
    """The parameters of the forward of ``module`` after the first that have no default."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return [p.name for p in named if p.default is p.empty]


def _class(module: nn.Module) -> type:
    """The class of ``module``, of which FSDP2's fully_shard makes a subclass."""
    ancestors = type(module).__mro__
    return ancestors[2] if ancestors[1].__name__ == "FSDPModule" else ancestors[0]


def _name(module: nn.Module) -> str:
    return _class(module).__name__


def _confirmed(module: nn.Module, kind: str, settings: dict[str, Any], *args: Any, **kwargs: Any) -> Verdict:
    bound = BoundForward(module, kind, settings)
    reason = disagreement(bound, *args, **kwargs)
    return bound if reason is None else reason


# Batch norm with an activation


def _fits_batch_norm(module: nn.Module) -> bool:
    name = _name(module)
    known = re.fullmatch(r"(Sync)?BatchNorm(2d)?_?(Swish|SiLU)", name) is not None
    return known or (name in _WITH_ACT and hasattr(module, "act"))


_WITH_ACT = ("BatchNormAct2d", "SyncBatchNormAct")  # timm's names


def _definition(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Batch norm with swish, composed of functions of PyTorch."""
    if module.training:
        module.num_batches_tracked.add_(1)
    args = (module.running_mean, module.running_var, module.weight, module.bias, module.training)
    return F.silu(F.batch_norm(x, *args, module.momentum, module.eps))


def _judge_batch_norm(module: Any, repair: bool) -> Verdict:
    reason = forwards.normalising(module)
    if reason is not None:
        return reason
    activation: str | None = "swish"
    if _name(module) in _WITH_ACT:
        act = module.act
        if not (forwards.is_swish(act) or type(act) is nn.Identity):
            return f"its activation is {_name(act)}, not SiLU"
        activation = None if type(act) is nn.Identity else "swish"
    kind = forwards.BATCH_NORM if activation else forwards.BATCH_NORM_ONLY
    channels = [module.weight.numel()]
    settings = {"activation": activation, "merged": _name(module).startswith("Sync"), "counts": True}
    found = _confirmed(module, kind, settings, channels)
    if isinstance(found, str) and "num_batches_tracked" in found:  # some do not count
        other = _confirmed(module, kind, {**settings, "counts": False}, channels)
        found = other if isinstance(other, BoundForward) else found
    if isinstance(found, str) and found.startswith("its own forward raises") and activation == "swish":
        if repair:
            return _confirmed(module, kind, settings, channels, _definition)
        found += "; accelerate(model, repair=True) replaces it by what its name says"
    return found


def _fits_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and bool(_pairs(module))


def _pairs(module: nn.Module) -> dict[int, type]:
    """The position of each batch norm that a swish follows -> the type of the swish."""
    children = list(module._modules.values())
    return {
        i: type(after)
        for i, (norm, after) in enumerate(pairwise(children))
        if isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
        and after is not None
        and forwards.is_swish(after)
    }


def _judge_sequential(module: Any, repair: bool) -> Verdict:
    pairs, reason = {}, "no pair fits"
    children = list(module._modules.values())
    for i, kind in _pairs(module).items():
        norm, after = children[i], children[i + 1]
        if not forwards.is_plain_norm(norm):
            reason = f"{_name(norm)} is neither BatchNorm2d nor SyncBatchNorm itself"
            continue
        why = forwards.normalising(norm)
        if why is None:
            settings: dict[str, Any] = {"pairs": {0: kind}}
            only = BoundForward(nn.Sequential(norm, after), forwards.SEQUENTIAL, settings)
            why = disagreement(only, [norm.num_features])
        if why is None:
            pairs[i] = kind
        else:
            reason = f"batch norm {i}: {why}"
    return BoundForward(module, forwards.SEQUENTIAL, {"pairs": pairs}) if pairs else reason


def _fits_attribute_pair(module: nn.Module) -> bool:
    parts = module._modules
    return any(
        isinstance(parts.get(f"bn{i}"), nn.BatchNorm2d) and isinstance(parts.get(f"act{i}"), nn.SiLU)
        for i in ("", 1, 2, 3)
    )


def _judge_attribute_pair(module: nn.Module, repair: bool) -> Verdict:
    return "batch norm and SiLU are attributes: whether its forward does anything between them is unknown"


# Squeeze and excitation, residual cells


def _fits_gate(module: nn.Module) -> bool:
    name = _name(module)
    return name in ("SE", "SEBlock", "SELayer", "SEModule") or name.startswith("SqueezeExcit")


def _judge_gate(module: Any, repair: bool) -> Verdict:
    layers = forwards.read_gate(module)
    if isinstance(layers, str):
        return layers
    first: Verdict = None
    for activation, gate in forwards.ACTIVATIONS:
        if layers.activation in (None, activation) and layers.gate in (None, gate):
            settings = {"activation": activation, "gate": gate}
            found = _confirmed(module, forwards.SQUEEZE_EXCITE, settings, [layers.reduce_weight.shape[1]])
            if isinstance(found, BoundForward):
                return found
            first = first or found
    return first


def _fits_cell(module: nn.Module) -> bool:
    if _is_cell(module):
        return True
    layout = layout_of(module)
    return not isinstance(layout, str) and not isinstance(read(module, layout), str)


def _is_cell(module: Any) -> bool:
    """Return whether ``module`` has the attributes of NVAE's cells, of which the residual sum is replaced at least."""
    has_operations = isinstance(module._modules.get("_ops"), nn.ModuleList)
    return has_operations and all(hasattr(module, name) for name in ("skip", "_num_nodes", "use_se"))


def _judge_cell(module: Any, repair: bool) -> Verdict:
    layout = layout_of(module)
    if isinstance(layout, str):
        return layout
    if _is_cell(module):
        if not isinstance(module.skip, nn.Module) or module._num_nodes != len(module._ops):
            return "skip is not a module, or _num_nodes is not the number of _ops"
        if module.use_se and layout.gate is None:
            return "use_se is set and there is no module se"
    channels = _input_channels(module)
    whole = _judge_whole_cell(module, layout, channels)
    if isinstance(whole, BoundForward) or not _is_cell(module):
        return whole
    found = _confirmed(module, cells.RESIDUAL_CELL, {"layout": layout}, channels, gradients=False)
    if isinstance(found, BoundForward) and any(getattr(m, "groups", 1) > 1 for m in module._ops.modules()):
        found.note = f"part by part: {whole}"
    return found


def _judge_whole_cell(module: Any, layout: Layout, channels: list[int]) -> BoundForward | str:
    plan = read(module, layout)
    if isinstance(plan, str):
        return plan
    inside = cells.inside(module, layout)
    convolutions = [inside[place] for place in plan.convolutions]
    sets = tuple(_left_weights(conv, conv.weight.shape[1] * conv.groups) for conv in convolutions)
    first = None
    for scale in (RESIDUAL_SCALE, 1.0):
        settings = {"plan": plan._replace(scale=scale), "sets": sets}
        strict = BoundForward(module, cells.WHOLE_CELL, {**settings, "strict": True})
        why = disagreement(strict, channels, exact=True)
        if why is None:
            return BoundForward(module, cells.WHOLE_CELL, settings, constants=strict.constants)
        first = first or why
        if not why.startswith("the output would differ"):
            break
    return first or ""


def _input_channels(module: nn.Module) -> list[int]:
    """The numbers of input channels of the parts of ``module``, in the order of their construction, each once."""
    found: dict[int, None] = {}
    for part in module.modules():
        weight = part._parameters.get("weight")
        if weight is not None and weight.dim() == 4:
            found[weight.shape[1] * getattr(part, "groups", 1)] = None
        elif weight is not None and weight.dim() == 1:
            found[weight.shape[0]] = None
    return list(found)


# Convolutions


def _is_convolution(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    names = ("bias", "stride", "padding", "dilation", "groups")
    return isinstance(weight, torch.Tensor) and weight.dim() == 4 and all(hasattr(module, n) for n in names)


def _fits_norm_convolution(module: nn.Module) -> bool:
    cls = type(module)
    if cls.forward is nn.Conv2d.forward or "conv" not in cls.__name__.lower() or not _is_convolution(module):
        return False
    return hasattr(module, "log_weight_norm") or cls.__name__ == "Conv2D"


def _judge_norm_convolution(module: Any, repair: bool) -> Verdict:
    weight, log_norm = module.weight, getattr(module, "log_weight_norm", None)
    if log_norm is not None:
        if not any("normalize" in name and "weight" in name for name in dir(type(module))):
            return "it has log_weight_norm and no method that normalises the weight"
        if tuple(log_norm.shape) != (weight.shape[0], 1, 1, 1):
            return f"log_weight_norm has shape {tuple(log_norm.shape)}, not ({weight.shape[0]}, 1, 1, 1)"
    elif module.groups != weight.shape[0] or weight.shape[1] != 1:
        return "a plain convolution: PyTorch's own is used"
    elif not forwards.is_depthwise(module, weight):
        return forwards.why_not_depthwise(module, weight)
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding mode {module.padding_mode!r} is not zeros"
    channels = weight.shape[1] * module.groups
    settings = {"sets": _left_weights(module, channels)}
    kind = forwards.DEPTHWISE_NORM if forwards.is_depthwise(module, weight) else forwards.WEIGHT_NORM
    return _confirmed(
        module, kind if log_norm is not None else forwards.DEPTHWISE_PLAIN, settings, [channels]
    )


def _left_weights(module: nn.Module, channels: int) -> tuple[str, ...]:
    """The names of the attributes in which the own forward of ``module`` leaves the weight that it used."""
    device = module.weight.device
    if not isinstance(device, torch.device) or device.type == "meta":
        return ()
    with undisturbed(device), torch.no_grad():
        copy: Any = clone(module).eval()
        if hasattr(copy, "init_done"):
            copy.init_done = True
        before = {**copy.__dict__, **copy._parameters, **copy._buffers}
        try:
            type(copy).forward(copy, torch.zeros(1, channels, 8, 6, device=device))
        except Exception:
            return ()  # the comparison reports it
        after = {**copy.__dict__, **copy._parameters, **copy._buffers}
        return tuple(
            name
            for name, value in after.items()
            if isinstance(value, torch.Tensor)
            and value.shape == copy.weight.shape
            and (name not in before or before[name] is not value)
        )


def _fits_depthwise(module: nn.Module) -> bool:
    cls = type(module)
    if not isinstance(module, nn.Conv2d) or cls.forward is not nn.Conv2d.forward:
        return False
    return module.groups == module.in_channels == module.out_channels and module.groups > 1


def _judge_depthwise(module: Any, repair: bool) -> Verdict:
    if type(module)._conv_forward is not nn.Conv2d._conv_forward:
        return "its class overrides Conv2d._conv_forward"
    if not isinstance(module.weight, torch.Tensor) or isinstance(
        module.weight, nn.parameter.UninitializedParameter
    ):
        return "its weight is not initialised"
    reason = forwards.why_not_depthwise(module, module.weight)
    if reason is not None:
        return reason
    return _confirmed(module, forwards.DEPTHWISE, {}, [module.in_channels])


def _judge_mbconv(module: Any, repair: bool) -> Verdict:
    chain = mbconv.read(module)
    if isinstance(chain, str):
        return chain
    channels = [mbconv.input_channels(module, chain)]
    found: Verdict = None
    for variant in mbconv.variants(module, chain):
        found = _confirmed(module, mbconv.MBCONV, {"chain": variant}, channels, gradients=False, exact=True)
        if isinstance(found, BoundForward):
            break
    return found


_KINDS = (
    (_fits_batch_norm, _judge_batch_norm),
    (_fits_sequential, _judge_sequential),
    (mbconv.fits, _judge_mbconv),
    (_fits_attribute_pair, _judge_attribute_pair),
    (_fits_gate, _judge_gate),
    (_fits_cell, _judge_cell),
    (_fits_norm_convolution, _judge_norm_convolution),
    (_fits_depthwise, _judge_depthwise),
)
