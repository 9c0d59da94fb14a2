"""Blocks of EfficientNets and MobileNets (MBConv, inverted bottleneck) in evaluation, in one call.

A block is a chain of convolutions, each followed by a batch norm and perhaps an activation, with other modules between
(squeeze-and-excitation, stochastic depth), and perhaps the sum with its input::

    y = [x +] norm3(W3 gate(act(norm2(W2 * act(norm1(W1 x))))))

With given statistics a batch norm is ``scale u + shift``: the scale goes into the weight of the convolution before it, the
shift becomes that convolution's bias, and the activation overwrites its output. So no map is read and written for a batch
norm, and none is allocated. Weights are folded in every call, so that changes of parameters count; :func:`nvae_fast.freeze`
folds once. In training mode, and where gradients are wanted, the block's own forward runs, with its parts accelerated.

MobileNetV2 (arXiv 1801.04381), section 3.3; EfficientNet (arXiv 1905.11946), section 4; V2 (arXiv 2104.00298), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from nvae_fast.nn.plain import has_hooks
from nvae_fast.ops.inverted_residual.eval import affine_of
from nvae_fast.patching.bound import FORWARDS, PARTS, original
from nvae_fast.patching.forwards import is_map, normalising
from nvae_fast.patching.plan import facts_of, forward_of, own_facts, same_type

MBCONV = "MBConv block in evaluation"

# Activations by the names of their classes, which libraries have of their own. Each overwrites its argument.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "SiLU": lambda x: F.silu(x, inplace=True),
    "Swish": lambda x: F.silu(x, inplace=True),
    "ReLU": lambda x: F.relu(x, inplace=True),
    "ReLU6": lambda x: F.relu6(x, inplace=True),
    "Hardswish": lambda x: F.hardswish(x, inplace=True),
    "HardSwish": lambda x: F.hardswish(x, inplace=True),
}
_NORM_AND_ACTIVATION = ("BatchNormAct2d", "SyncBatchNormAct")  # timm's: with children drop and act
_FUSED = ("EdgeResidual", "FusedMBConv")  # without a depthwise convolution
_OTHERS = 4  # modules between the convolutions that a block may have


class Step(NamedTuple):
    """A convolution with its batch norm and activation, or another module; numbers are places in :func:`inside`."""

    place: int
    norm: int | None = None  # None: the module is called as it is
    activation: str | None = None


class Chain(NamedTuple):
    """What a block computes. It holds places and types and no modules: it is valid for copies too."""

    types: tuple[tuple[type, str | None], ...]  # of inside(block), and which of our forwards each has
    steps: tuple[Step, ...]
    facts: tuple[Any, ...]  # of the convolutions
    residual: bool
    own: tuple[tuple[str, Any], ...]  # numbers and strings among the attributes of the block


def inside(block: nn.Module) -> list[Any]:
    """The modules of the block, those in Sequentials and in batch norms with an activation too."""
    found: list[Any] = []
    _collect(block, found)
    return found


def _collect(module: nn.Module, found: list[Any]) -> None:
    for child in module._modules.values():
        if child is not None:
            found.append(child)
            if _is_sequential(child) or _has_activation(child):
                _collect(child, found)


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


def _has_activation(module: nn.Module) -> bool:
    return type(module).__name__ in _NORM_AND_ACTIVATION and "act" in module._modules


def _is_norm(module: nn.Module) -> bool:
    inherits = type(module).forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward)
    return _has_activation(module) or (isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and inherits)


def activation_of(module: nn.Module) -> str | None:
    """The name of an activation in ACTIVATIONS, or None."""
    name = type(module).__name__
    stateless = not any((module._parameters, module._buffers, module._modules))
    return name if name in ACTIVATIONS and stateless else None


def read(block: nn.Module) -> Chain | str:
    """Return the chain that ``block`` seems to be, without the sum with its input, or why it is none."""
    modules = inside(block)
    steps: list[Step] = []
    within: set[int] = set()  # children of a batch norm with an activation
    for place, module in enumerate(modules):
        if place in within or type(module) is nn.Identity or _is_sequential(module):
            continue
        last = steps[-1] if steps else None
        activation = activation_of(module)
        if type(module) is nn.Conv2d:
            steps.append(Step(place))
        elif _is_norm(module):
            if last is None or last.norm is not None or not _is_plain(modules[last.place]):
                return f"{type(module).__name__} does not follow a convolution"
            if _has_activation(module):
                within |= {place + i for i in range(1, len(inside(module)) + 1)}
                act = module._modules["act"]
                activation = None if type(act) is nn.Identity else activation_of(act)
                if activation is None and type(act) is not nn.Identity:
                    return f"its activation is {type(act).__name__}"
            steps[-1] = last._replace(norm=place, activation=activation)
        elif (
            activation is not None and last is not None and last.norm is not None and last.activation is None
        ):
            steps[-1] = last._replace(activation=activation)
        else:
            steps.append(Step(place))
    convolutions = [modules[step.place] for step in steps if step.norm is not None]
    others = [modules[step.place] for step in steps if step.norm is None]
    if any(_is_plain(module) for module in others):
        return "a convolution has no batch norm"
    if len(convolutions) < 2 or len(others) > _OTHERS or steps[0].norm is None:
        return "it is no chain of convolutions with batch norms"
    types = tuple((type(m), forward_of(m)) for m in modules)
    return Chain(types, tuple(steps), facts_of(convolutions), False, own_facts(block))


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d


def fits(module: nn.Module) -> bool:
    """Return whether ``module`` looks like such a block."""
    if _is_sequential(module) or module._parameters or len(module._modules) > 16:
        return False
    fused = type(module).__name__ in _FUSED
    if not fused and not any(_is_depthwise(child) for child in inside(module)):
        return False
    return not isinstance(read(module), str)


def _is_depthwise(module: Any) -> bool:
    return type(module) is nn.Conv2d and 1 < module.groups == module.in_channels


# Running it


def obstacle(block: Any, modules: list[Any], chain: Chain) -> str | None:
    """Return why ``block`` cannot run in one call now; None when it can."""
    if _has_any_global_hook():
        return "a hook for all modules is set"
    if own_facts(block) != chain.own:
        return "its attributes are no longer those that were compared"
    if len(modules) != len(chain.types):
        return "its layers are no longer those that were compared"
    for module, (kind, forward) in zip(modules, chain.types, strict=True):
        if not same_type(module, kind) or forward_of(module) != forward:
            return "its layers are no longer those that were compared"
        if module.training or has_hooks(module):
            return f"{type(module).__name__} inside has hooks or is in training mode"
    if facts_of([modules[step.place] for step in chain.steps if step.norm is not None]) != chain.facts:
        return "a convolution is no longer the one that was compared"
    for step in chain.steps:
        if step.norm is not None:
            why = normalising(modules[step.norm])
            if why is not None:
                return f"a batch norm: {why}"
            if modules[step.norm].weight.dtype not in (torch.float32, torch.float64):
                return "a batch norm is in half precision"
    return None


def folded(conv: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of ``conv`` with the batch norm behind it."""
    scale, shift = affine_of(norm.weight, norm.bias, (norm.running_mean, norm.running_var), norm.eps)
    bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
    return conv.weight * scale.view(-1, 1, 1, 1), bias


def _mbconv(module: Any, x: torch.Tensor, *, chain: Chain) -> torch.Tensor:
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not (is_map(x) and x.is_cpu):
        return original(module, x)
    if chain.residual and torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype:
        return original(module, x)  # the sum may be in place or not, which decides its dtype
    modules = inside(module)
    if module.training or obstacle(module, modules, chain) is not None:
        return original(module, x)
    y, fresh = x, False
    for step in chain.steps:
        layer = modules[step.place]
        if step.norm is None:
            called = layer(y)
            y, fresh = called, fresh and called is y
            continue
        weight, bias = folded(layer, modules[step.norm])
        y = layer._conv_forward(y, weight, bias)
        if step.activation is not None:
            y = ACTIVATIONS[step.activation](y)
        fresh = True
    if not chain.residual:
        return y
    return y.add_(x) if fresh else y + x


def _convolutions(block: nn.Module, chain: Chain) -> list[Any]:
    modules = inside(block)
    return [modules[step.place] for step in chain.steps if step.norm is not None]


def input_channels(block: nn.Module, chain: Chain) -> int:
    """The number of channels of the input of ``block``."""
    return int(_convolutions(block, chain)[0].in_channels)


def variants(block: nn.Module, chain: Chain) -> Iterator[Chain]:
    """``chain`` with the sum with the input where shapes allow it, and without."""
    convolutions = _convolutions(block, chain)
    if convolutions[0].in_channels == convolutions[-1].out_channels:
        yield chain._replace(residual=True)
    yield chain


def _part(module: Any, settings: dict[str, Any]) -> tuple[str, bool]:
    others = any(step.norm is None for step in settings["chain"].steps)
    return f"{MBCONV}, with others between" if others else MBCONV, True


FORWARDS[MBCONV] = _mbconv
PARTS[MBCONV] = _part
