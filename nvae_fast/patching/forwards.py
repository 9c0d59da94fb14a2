"""The forwards that are bound to recognised parts. Each returns what the part's own forward would.

The part's own forward runs where the kernel does not accept an input (unbatched, another dtype than the weight), and where a
submodule that the kernel would not call has hooks: results and side effects never depend on the kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from nvae_fast import distributed
from nvae_fast.nn.batch_norm import batch_norm
from nvae_fast.nn.plain import has_hooks
from nvae_fast.ops import winograd
from nvae_fast.ops.depthwise_conv2d import depthwise_conv2d
from nvae_fast.ops.squeeze_excite import squeeze_excite
from nvae_fast.ops.weight_norm import weight_norm
from nvae_fast.patching.bound import FORWARDS, PARTS, original
from nvae_fast.patching.taps import live_taps

# The kinds of parts, as the report names them.
BATCH_NORM = "batch norm + swish"
BATCH_NORM_ONLY = "batch norm"
SEQUENTIAL = "batch norm + SiLU in a Sequential"
SQUEEZE_EXCITE = "squeeze and excitation"
DEPTHWISE = "depthwise convolution"
DEPTHWISE_PLAIN = "depthwise convolution that keeps its weight"
DEPTHWISE_NORM = "weight-normed depthwise convolution"
WEIGHT_NORM = "weight-normed convolution"


def watched(*modules: nn.Module) -> bool:
    """Return whether hooks, or forwards set on the instances, would be missed if these modules were not called."""
    return _has_any_global_hook() or any(has_hooks(m) or "forward" in m.__dict__ for m in modules)


def pair(value: Any) -> tuple[int, int] | None:
    """An int or a pair of ints as a pair."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    return None


# Batch norm


def is_map(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 4 and x.is_floating_point()


def normalising(norm: Any) -> str | None:
    """Return why ``norm`` is not a batch norm with affine map, running statistics and a momentum; None when it is."""
    names = ("weight", "bias", "running_mean", "running_var")
    missing = [n for n in names if not isinstance(getattr(norm, n, None), torch.Tensor)]
    if missing:
        return f"it has no {', '.join(missing)}"
    if not isinstance(getattr(norm, "eps", None), float) or norm.eps <= 0:
        return f"eps is {getattr(norm, 'eps', None)!r}"
    if not isinstance(getattr(norm, "momentum", None), (int, float)):
        return "momentum is None (cumulative average) or missing"
    if getattr(norm, "track_running_stats", True) is not True:
        return "track_running_stats was switched off"
    return None


def is_swish(module: Any) -> bool:
    """Return whether ``module`` is a swish by its type or name; its results are compared later."""
    stateless = not any((module._parameters, module._buffers, module._modules))
    return type(module) is nn.SiLU or (type(module).__name__ in ("Swish", "SiLU") and stateless)


def _batch_norm_swish(
    module: Any, x: torch.Tensor, *, activation: str | None, merged: bool, counts: bool
) -> torch.Tensor:
    several = merged and distributed.world_size(getattr(module, "process_group", None)) > 1
    inside = tuple(module.children())
    usable = is_map(x) and (x.numel() or several) and normalising(module) is None and not watched(*inside)
    if not usable:
        return original(module, x)
    return batch_norm(module, x, activation, merged=merged, counts=counts)


def is_plain_norm(module: Any) -> bool:
    """Return whether ``module`` is a batch norm of PyTorch's, which convert_sync_batchnorm may have exchanged."""
    return type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm)


def _sequential(module: Any, x: Any, *, pairs: dict[int, type]) -> Any:
    children: list[Any] = list(module._modules.values())
    skip_next = False
    for i, child in enumerate(children):
        if skip_next:
            skip_next = False
            continue
        after: Any = children[i + 1] if i + 1 < len(children) else None
        kind: Any = type(after)
        if i in pairs and is_plain_norm(child) and kind is pairs[i]:
            merged = type(child) is nn.SyncBatchNorm
            several = merged and distributed.world_size(child.process_group) > 1
            known = normalising(child) is None and not watched(child, after)
            if known and is_map(x) and (x.numel() or several):
                x = batch_norm(child, x, "swish", merged=merged, counts=child.num_batches_tracked is not None)
                skip_next = True
                continue
        x = child(x)
    return x


# Squeeze and excitation

# The activations of a gate by the names of their classes (some libraries have their own).
_HIDDEN = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}
_GATES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid"}
ACTIVATIONS = (("relu", "sigmoid"), ("silu", "sigmoid"), ("relu", "hardsigmoid"), ("silu", "hardsigmoid"))


class Gate(NamedTuple):
    """Weights and biases of the two layers of a squeeze-and-excitation, and its activations (None: not modules)."""

    reduce_weight: torch.Tensor
    reduce_bias: torch.Tensor | None
    expand_weight: torch.Tensor
    expand_bias: torch.Tensor | None
    activation: str | None
    gate: str | None


def read_gate(module: nn.Module) -> Gate | str:
    """Return the layers of a squeeze-and-excitation, or as a string why there are none.

    The modules must be two of Linear or 1x1 convolution, in the order of their construction, with or without modules for the
    mean over pixels, the activation (ReLU or SiLU) and the gate (Sigmoid or Hardsigmoid).
    """
    wanted = "the kernel has Linear, ReLU or SiLU, Linear, Sigmoid or Hardsigmoid"
    dense: list[Any] = []
    activation = gate = None
    for name, part in module.named_modules():
        if part is not module and watched(part):
            return f"{name} inside has hooks or a forward of its own"
        if (part._modules and name) or part is module or type(part) is nn.Identity:
            continue
        kind = type(part).__name__
        if type(part) is nn.Linear or _is_pointwise(part):
            dense.append(part)
        elif kind in _HIDDEN and activation is None:
            activation = _HIDDEN[kind]
        elif kind in _GATES and gate is None:
            gate = _GATES[kind]
        elif type(part) is not nn.AdaptiveAvgPool2d:
            return f"{kind} inside: {wanted}"
    if len(dense) != 2:
        found = ", ".join(type(part).__name__ for part in module.modules() if not part._modules)
        return f"its layers are {found}: {wanted}"
    first, second = dense
    return Gate(first.weight.flatten(1), first.bias, second.weight.flatten(1), second.bias, activation, gate)


def _is_pointwise(conv: Any) -> bool:
    plain = type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and conv.groups == 1
    return plain and conv.stride == (1, 1) and conv.padding in ((0, 0), "same", "valid")


def gate_of(module: Any, activation: str, gate: str) -> Gate | None:
    """The layers of ``module`` while they are as they were compared."""
    found = read_gate(module)
    if isinstance(found, str) or (found.activation or activation, found.gate or gate) != (activation, gate):
        return None
    return found


def _squeeze_excite(
    module: nn.Module, x: torch.Tensor, *, activation: str = "relu", gate: str = "sigmoid"
) -> torch.Tensor:
    layers = gate_of(module, activation, gate) if is_map(x) else None
    if layers is None:
        return original(module, x)
    return squeeze_excite(x, *layers[:4], activation=activation, gate=gate)


# Convolutions


def is_depthwise(conv: Any, weight: torch.Tensor) -> bool:
    """Return whether ``conv`` is a depthwise convolution that depthwise_conv2d computes."""
    return conv.groups == weight.shape[0] and weight.shape[1] == 1 and why_not_depthwise(conv, weight) is None


def why_not_depthwise(conv: Any, weight: torch.Tensor) -> str | None:
    """Return why depthwise_conv2d cannot compute ``conv``, which has one channel per group; None when it can."""
    kernel, stride, dilation = tuple(weight.shape[2:]), pair(conv.stride), pair(conv.dilation)
    if len(kernel) != 2 or kernel[0] != kernel[1] or kernel[0] % 2 == 0:
        return f"kernel size {kernel} is not odd and square"
    if stride not in ((1, 1), (2, 2)) or dilation not in ((1, 1), (2, 2)):
        return f"stride {conv.stride} or dilation {conv.dilation} is neither 1 nor 2"
    same = kernel[0] // 2 * dilation[0]
    if not (pair(conv.padding) == (same, same) or (conv.padding == "same" and stride == (1, 1))):
        return f'padding {conv.padding} is not "same"'
    if getattr(conv, "padding_mode", "zeros") != "zeros":
        return f"padding mode {conv.padding_mode!r} is not zeros"
    return None


def _convolve(
    conv: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, taps: list[int] | None = None
) -> torch.Tensor:
    if is_map(x) and x.shape[1] == conv.groups and is_depthwise(conv, weight):
        h, w = x, weight
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            h, w = x.to(dtype), weight.to(dtype)
        if h.dtype == w.dtype and h.device == w.device:
            (stride, _), (dilation, _) = pair(conv.stride) or (0, 0), pair(conv.dilation) or (0, 0)
            y = depthwise_conv2d(h, w, stride=stride, dilation=dilation, taps=taps)
            return y if bias is None else y + bias.to(y.dtype).view(-1, 1, 1)
    steps = pair(conv.stride) or (1, 1)
    pointwise = weight.shape[2:] == (1, 1) and pair(conv.padding) == (0, 0)
    if pointwise and steps != (1, 1) and x.device.type == "cpu" and x.dim() == 4:
        # oneDNN's weight gradient of a strided 1x1 convolution in channels_last writes out of bounds (its issue 6035).
        return F.conv2d(x[:, :, :: steps[0], :: steps[1]], weight, bias, groups=conv.groups)
    if is_map(x) and winograd.computes(x, weight, geometry_of(conv)):
        return winograd.conv2d(x, weight, bias)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def geometry_of(conv: Any) -> tuple[int, int, int, int]:
    """Return stride, padding, dilation and groups, as ints where both directions have the same; else zeros."""
    pairs = [pair(value) or (0, 0) for value in (conv.stride, conv.padding, conv.dilation)]
    stride, padding, dilation = (first if first == second else 0 for first, second in pairs)
    return stride, padding, dilation, conv.groups


def _depthwise(module: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    return _convolve(module, x, module.weight, module.bias)


def _norm_convolution(module: Any, x: torch.Tensor, *, sets: tuple[str, ...]) -> torch.Tensor:
    """``sets``: attributes in which the part's own forward leaves the weight that it used."""
    if getattr(module, "data_init", False) and not getattr(module, "init_done", True):
        return original(module, x)
    weight, log_norm, taps = module.weight, getattr(module, "log_weight_norm", None), None
    if log_norm is not None:
        mask = getattr(module, "mask", None)
        if isinstance(mask, torch.Tensor):
            taps = live_taps(mask, weight)
            mask = mask.to(weight.dtype).expand_as(weight)
        else:
            mask = None
        weight = weight_norm(weight, log_norm, mask)
    for name in sets:
        setattr(module, name, weight)
    return _convolve(module, x, weight, module.bias, taps)


FORWARDS.update({
    BATCH_NORM: _batch_norm_swish,
    BATCH_NORM_ONLY: _batch_norm_swish,
    SEQUENTIAL: _sequential,
    SQUEEZE_EXCITE: _squeeze_excite,
    DEPTHWISE: _depthwise,
    DEPTHWISE_PLAIN: _norm_convolution,
    DEPTHWISE_NORM: _norm_convolution,
    WEIGHT_NORM: _norm_convolution,
})  # fmt: skip


# Names in the table of measurements.


def _norm_part(module: Any, settings: dict[str, Any]) -> tuple[str, bool]:
    if settings["activation"] is None:
        return BATCH_NORM_ONLY, True
    act = getattr(module, "act", None)
    return SEQUENTIAL if isinstance(act, nn.Module) and is_swish(act) else BATCH_NORM, True


def gate_part(settings: dict[str, Any]) -> str:
    return f"{SQUEEZE_EXCITE}: {settings.get('activation', 'relu')}, {settings.get('gate', 'sigmoid')}"


def _convolution_part(module: Any, settings: dict[str, Any]) -> tuple[str, bool]:
    size, stride = module.weight.shape[2], (pair(module.stride) or (1, 1))[0]
    if not is_depthwise(module, module.weight):
        # Of a strided 1x1 convolution PyTorch's own may crash: see _convolve.
        return "" if size == 1 and stride != 1 else f"{WEIGHT_NORM} {size}x{size}", False
    masked = "masked " if isinstance(getattr(module, "mask", None), torch.Tensor) else ""
    normed = " with weight norm" if getattr(module, "log_weight_norm", None) is not None else ""
    dilated = "" if pair(module.dilation) == (1, 1) else ", dilated"
    return f"{masked}depthwise {size}x{size}, stride {stride}{dilated}{normed}", False


PARTS.update({
    BATCH_NORM: _norm_part,
    BATCH_NORM_ONLY: _norm_part,
    SEQUENTIAL: lambda module, settings: (SEQUENTIAL, True),
    SQUEEZE_EXCITE: lambda module, settings: (gate_part(settings), False),
    DEPTHWISE: _convolution_part,
    DEPTHWISE_PLAIN: _convolution_part,
    DEPTHWISE_NORM: _convolution_part,
    WEIGHT_NORM: _convolution_part,
})  # fmt: skip
