"""``freeze``: an inference-only copy of a module, with everything precomputed that depends on parameters alone.

Weight normalisation is applied, batch norms with their running statistics are folded into their neighbours, an inverted
residual cell is one call, and matrices are packed for oneDNN. A frozen part keeps its values in buffers and shares no tensor
with the module that it was made from.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from nvae_fast.nn.batch_norm import BatchNormSwish
from nvae_fast.nn.cells import InvertedResidual, InvertedResidualCell, ResidualCell
from nvae_fast.nn.conv import WeightNormConv2d, convolution
from nvae_fast.nn.flow import WEIGHTED
from nvae_fast.nn.fused_cell import RESIDUAL_SCALE
from nvae_fast.nn.plain import is_plain
from nvae_fast.ops import _backend, _checks, wide_conv2d, winograd
from nvae_fast.ops import affine_activation as affine
from nvae_fast.ops._op import DEFINITIONS
from nvae_fast.ops.depthwise_conv2d import depthwise_conv2d
from nvae_fast.ops.inverted_residual.conv1x1 import PackedMatrix
from nvae_fast.ops.inverted_residual.eval import Running, affine_of, depthwise_affine, fold
from nvae_fast.ops.inverted_residual.train import CellParameters
from nvae_fast.ops.squeeze_excite import squeeze_excite, without_grad

_MARK = "_nvae_fast_frozen"


def freeze(module: nn.Module) -> nn.Module:
    """Return an inference-only copy of ``module``.

    In every part built from :mod:`nvae_fast.nn`, and in those that :func:`accelerate` has replaced, the weight
    ``w = exp(log_weight_norm) weight / (||weight|| + 1e-5)`` is applied, batch norms become ``scale x + shift`` with
    ``scale = weight / sqrt(running_var + eps)``, in cells folded into the convolutions beside them, and an inverted residual
    cell is one call. Everything else is copied. Outputs equal those of ``module.eval()`` up to rounding, in the same shapes
    and dtypes.

    The copy has no parameters, only buffers; ``train()``, ``load_state_dict()`` and inputs that require gradients raise
    RuntimeError. It can be copied, pickled, moved to another device or dtype, compiled and captured in a CUDA graph. Later
    changes of ``module`` do not reach it: freeze again. Parts with hooks (pruning), parametrisations or another forward are
    copied as they are.

    NVAE (arXiv 2007.03898), section 3.1.1.

    Args:
        module: a :class:`NVAE`, or any torch.nn.Module with such parts. It is not changed.

    Raises:
        TypeError: ``module`` is no torch.nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"freeze: module must be a torch.nn.Module, got {type(module).__name__}")
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    twin = copy.deepcopy(module, _memo(module))
    with contextlib.ExitStack() as stack:
        for context in (torch.inference_mode(False), torch.no_grad()):
            stack.enter_context(context)
        for device in _backend.DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
        frozen = _converted(twin, {})
    frozen.__dict__[_MARK] = True
    return frozen


def _memo(module: nn.Module) -> dict[int, Any]:
    """Return the copies that deepcopy shall use.

    Tensors are cloned without gradients, also results with a graph that a part keeps (torch.nn.utils.prune), which PyTorch
    refuses to copy. Process groups cannot be copied, and inference needs none.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        group = getattr(part, "process_group", None)
        if group is not None:
            memo[id(group)] = group
        for value in (*part._parameters.values(), *part._buffers.values(), *part.__dict__.values()):
            if isinstance(value, torch.Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    return memo


def is_frozen(module: nn.Module) -> bool:
    """Return whether ``module`` was returned by :func:`freeze`, or is a copy of such a module."""
    return bool(module.__dict__.get(_MARK, False))


def refuse(what: str) -> NoReturn:
    """Raise for something that a frozen module cannot do."""
    raise RuntimeError(
        f"{what}: the module is frozen, an inference-only copy; use the module that nvae_fast.freeze was given"
    )


class FrozenModule(nn.Module):
    """The base of frozen parts: constant buffers, and values derived from them that are dropped when the buffers move."""

    NAME = ""  # in messages

    def __init__(self) -> None:
        super().__init__()
        self._derived: dict[Any, Any] = {}
        super().train(False)

    def train(self, mode: bool = True) -> FrozenModule:
        """Raise RuntimeError for ``mode`` True."""
        if mode:
            refuse("train")
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._derived = {}
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        refuse("load_state_dict")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}

    def _keep(self, **tensors: torch.Tensor | None) -> None:
        for name, value in tensors.items():
            self.register_buffer(name, None if value is None else value.detach().clone())

    def _check(self, x: torch.Tensor, channels: int) -> None:
        _checks.channels(self.NAME, "x", x, channels)
        if x.requires_grad and torch.is_grad_enabled():
            refuse(f"{self.NAME}: x requires gradients")


class FrozenConv2d(FrozenModule):
    """A :class:`nvae_fast.nn.WeightNormConv2d` with its normalised weight: ``y = w x + bias``."""

    NAME = "WeightNormConv2d"
    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, conv: WeightNormConv2d) -> None:
        super().__init__()
        weight = conv.own_weight()
        self.stride, self.padding, self.dilation, self.groups = (
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        self.is_matrix = weight.shape[2:] == (1, 1) and conv.groups == conv.stride == 1
        self._keep(weight=weight, bias=conv.bias)

    def normalized_weight(self) -> torch.Tensor:
        """The weight (C_out, C_in / groups, K, K)."""
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x, self.weight.shape[1] * self.groups)
        if self.is_matrix and x.is_contiguous(memory_format=torch.channels_last):
            return self._matrix()(x)
        geometry = wide_conv2d.geometry_of(self)
        if wide_conv2d.convolves(x, self.weight):
            x = x.bfloat16()
            if winograd.fits(x, self.weight, geometry):
                with torch.autocast("cpu", enabled=False):
                    return winograd.convolve(x, self._transformed(), self.bias)
        elif winograd.computes(x, self.weight, geometry, transformed=True):
            return winograd.conv2d_of_transformed(x, self.weight, self._transformed(), self.bias)
        return convolution(x, self._weight_for(x), self.bias, self)

    def _matrix(self) -> PackedMatrix:
        found: PackedMatrix | None = self._derived.get("matrix")
        if found is None:
            found = PackedMatrix(self.weight.flatten(1), self.bias)
            if not torch.compiler.is_compiling():
                self._derived["matrix"] = found
        return found

    def _transformed(self) -> torch.Tensor:
        """The weight as Winograd's algorithm takes it, neighbouring results of a point side by side."""
        found: torch.Tensor | None = self._derived.get("winograd")
        if found is None:
            with torch.inference_mode(False):
                found = winograd.weights(self.weight).transpose(1, 2).contiguous().transpose(1, 2)
                self._derived["winograd"] = found
        return found

    def _weight_for(self, x: torch.Tensor) -> torch.Tensor:
        """The weight, under autocast in the dtype that it computes in: it would be converted in every call."""
        kind = x.device.type
        if (
            kind not in _backend.DEVICES
            or not torch.is_autocast_enabled(kind)
            or torch.compiler.is_compiling()
        ):
            return self.weight
        dtype = torch.get_autocast_dtype(kind)
        if self.weight.dtype in (dtype, torch.float64) or wide_conv2d.computes(dtype, x.device):
            return self.weight
        found: torch.Tensor | None = self._derived.get(dtype)
        if found is None:
            with torch.inference_mode(False):
                found = self._derived[dtype] = self.weight.to(dtype)
        return found

    def extra_repr(self) -> str:
        c_out, c_in, k, _ = self.weight.shape
        return f"{c_in * self.groups}, {c_out}, {k}, stride={self.stride}, dilation={self.dilation}, groups={self.groups}"


class FrozenBatchNorm(FrozenModule):
    """A :class:`nvae_fast.nn.BatchNormSwish` with its running statistics: ``y = act(scale x + shift)``."""

    NAME = "BatchNormSwish"
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, norm: Any, activation: str | None) -> None:
        super().__init__()
        self.activation = activation
        scale, shift = affine_of(norm.weight, norm.bias, (norm.running_mean, norm.running_var), norm.eps)
        self._keep(scale=scale, shift=shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self._check(x, self.scale.shape[0])
        return affine_activation(x, self.scale, self.shift, self.activation)

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}, activation={self.activation!r}"


def affine_activation(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: str | None
) -> torch.Tensor:
    """``act(scale x + shift)`` in the dtype of x."""
    operator = DEFINITIONS["affine_activation"].formula if _backend.forced_reference() else affine.forward
    y: torch.Tensor = operator(x, scale, shift, activation)
    return y


class FrozenResidualCell(FrozenModule):
    """An inverted residual cell (:class:`nvae_fast.nn.InvertedResidualCell`) with given statistics.

    ``y = skip(x) + 0.1 gate (W3 swish(scale depthwise(swish(W1 x + b1)) + shift) + b3)``, with the first two batch norms in W1,
    the third in scale and shift, and the last in W3.
    """

    NAME = "inverted_residual_cell"
    GATE = ("reduce_weight", "reduce_bias", "gate_weight", "gate_bias")
    expand: torch.Tensor
    expand_bias: torch.Tensor
    depthwise: torch.Tensor
    scale: torch.Tensor
    shift: torch.Tensor
    project: torch.Tensor
    project_bias: torch.Tensor
    residual_scale = RESIDUAL_SCALE

    def __init__(
        self,
        parameters: CellParameters,
        running: Running,
        *,
        eps: float,
        stride: int,
        skip: nn.Module | None,
        residual_scale: float = RESIDUAL_SCALE,
    ) -> None:
        super().__init__()
        f = fold(parameters, running, eps=eps, residual_scale=residual_scale)
        self._keep(**f._asdict(), depthwise=parameters.depthwise)
        self._keep(**{name: getattr(parameters, name) for name in self.GATE})
        self.gated, self.residual_scale = parameters.reduce_weight is not None, residual_scale
        self.stride, self.upsample = max(stride, 1), 2 if stride == -1 else 1
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Few calls: kernels evict the interpreter's data from the processor's caches.
        plain = isinstance(x, torch.Tensor) and x.dim() == 4 and x.is_floating_point() and not x.requires_grad
        if not plain or x.shape[1] != self.expand.shape[1]:
            self._check(x, self.expand.shape[1])
        skip = x if self.skip is None else self.skip(x)
        expand, project, gate = self._derived.get("cell") or self._prepare()
        if torch.compiler.is_compiling() or not _backend.fused(self.NAME, x.device):
            return self._composed(x, skip, expand, project, gate)
        half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
        if half and x.numel() and wide_conv2d.convolves(x, self.expand):
            s = self._in_float32(x, expand, project)
        else:
            h = expand(x.contiguous(memory_format=torch.channels_last))
            h = depthwise_affine(
                h, self.depthwise, self.scale, self.shift, self.stride, self.upsample, "swish", "swish"
            )
            s = project(h)
        return skip + s if gate is None else without_grad(s, *gate, skip, self.residual_scale)[0]  # type: ignore[call-arg]

    def _in_float32(self, x: torch.Tensor, expand: PackedMatrix, project: PackedMatrix) -> torch.Tensor:
        """The branch of a bfloat16 map by float32 arithmetic: the expanded map is not rounded, which costs two conversions."""
        affine = self.depthwise, self.scale, self.shift, self.stride, self.upsample
        with torch.autocast("cpu", enabled=False):
            h = expand(x.to(self.expand.dtype, memory_format=torch.channels_last))
            return project(depthwise_affine(h, *affine, "swish", "swish")).bfloat16()

    def _prepare(self) -> tuple[PackedMatrix, PackedMatrix, Any]:
        gate = tuple(getattr(self, name) for name in self.GATE) if self.gated else None
        made = (
            PackedMatrix(self.expand, self.expand_bias),
            PackedMatrix(self.project, self.project_bias),
            gate,
        )
        if not torch.compiler.is_compiling():
            self._derived["cell"] = made
        return made

    def _composed(
        self, x: torch.Tensor, skip: torch.Tensor, expand: PackedMatrix, project: PackedMatrix, gate: Any
    ) -> torch.Tensor:
        """The same, composed of public operators, which a compiler can trace."""
        h = expand(x.contiguous(memory_format=torch.channels_last))
        weight = self.depthwise.to(h.dtype)
        d = depthwise_conv2d(h, weight, stride=self.stride, upsample=self.upsample, activation="swish")
        s = project(affine_activation(d, self.scale, self.shift, "swish"))
        if gate is None:
            return skip + s
        return squeeze_excite(s, *gate, skip=skip, residual_scale=self.residual_scale)


# Results by identity, for shared parts. A module that was replaced is kept: else a new one could get its identity.
Done = dict[int, tuple[nn.Module, nn.Module]]


def _frozen_cell(cell: ResidualCell, done: Done) -> nn.Module | None:
    """The cell as one call, or None where its parts are frozen one by one."""
    op = cell.ops[0] if len(cell.ops) == 1 else None
    if not isinstance(op, InvertedResidual) or not op.is_fusable(cell.se):
        return None
    skip = None if type(cell.skip) is nn.Identity else _converted(cell.skip, done)
    return FrozenResidualCell(
        op.cell_parameters(cell.se),
        op.running_statistics(),
        eps=op.norm.eps,
        stride=-1 if op.upsample else op.depthwise.stride[0],
        skip=skip,
    )


# The replacement of a module of exactly that class; None: its parts are frozen one by one.
MAKERS: dict[type, Callable[..., nn.Module | None]] = {
    WeightNormConv2d: lambda conv, done: FrozenConv2d(conv),
    BatchNormSwish: lambda norm, done: (
        None if norm.running_mean is None else FrozenBatchNorm(norm, norm.activation)
    ),
    ResidualCell: _frozen_cell,
    InvertedResidualCell: _frozen_cell,
}


# Functions ``(module, convert)`` that freeze modules of other code bases in place; ``convert`` freezes a child.
# nvae_fast.patching, which imports this module, adds its own.
FREEZERS: list[Callable[[nn.Module, Callable[[nn.Module], nn.Module]], None]] = []

WEIGHTED.add(FrozenConv2d)


def _converted(module: nn.Module, done: Done) -> nn.Module:
    """Return ``module``, which is a copy already, or its replacement."""
    if id(module) in done:
        return done[id(module)][1]
    make = MAKERS.get(type(module))
    made = make(module, done) if make is not None and is_plain(module) else None
    if made is None:
        made = module
        for freeze_part in FREEZERS:
            freeze_part(module, lambda child: _converted(child, done))
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _converted(child, done)
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(name, None if parameter is None else parameter.detach())
        made.training = False
    done[id(module)] = module, made
    return made
