"""What nvae_fast.freeze makes of accelerated parts: inference-only modules with folded batch norms and normalised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from nvae_fast.models.frozen import FrozenBatchNorm, FrozenConv2d, FrozenModule, FrozenResidualCell, refuse
from nvae_fast.nn.plain import has_hooks
from nvae_fast.ops.inverted_residual.train import CellParameters
from nvae_fast.ops.weight_norm import weight_norm
from nvae_fast.patching import cells, forwards, mbconv
from nvae_fast.patching.bound import MISSING, BoundForward, bound_forward, remove
from nvae_fast.patching.plan import inside

_CHILD = "_nvae_fast_part"


class FrozenForward(BoundForward):
    """The forward of a part that freeze has replaced. The part has no other: it runs in exported programs too."""

    removable = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else self._only_input(args, kwargs)
        if x is MISSING:
            refuse(f"{type(self.module).__name__}.forward with arguments beside its input")
        made: Any = self.module._modules[_CHILD]
        return made(x)


class FrozenForeignConv2d(FrozenConv2d):
    """A convolution of another code base with a weight made of parameters alone; its padding is its own."""

    def __init__(self, conv: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super(FrozenConv2d, self).__init__()
        # As ints where they are equal, by which the forward chooses.
        stride, padding, dilation, self.groups = forwards.geometry_of(conv)
        self.stride, self.padding, self.dilation = (
            stride or conv.stride,
            padding or conv.padding,
            dilation or conv.dilation,
        )
        plain = forwards.pair(conv.stride) == (1, 1) and forwards.pair(conv.padding) in ((0, 0), None)
        self.is_matrix = weight.shape[2:] == (1, 1) and conv.groups == 1 and plain
        self._keep(weight=weight, bias=bias)


class FrozenMBConv(FrozenModule):
    """A block of :mod:`nvae_fast.patching.mbconv` with its batch norms in the convolutions.

    On a CPU it computes in channels_last, in which oneDNN is faster by more than the two conversions of the narrow maps cost.
    """

    NAME = "MBConv"

    def __init__(
        self, layers: list[nn.Module], activations: list[str | None], convolves: list[bool], residual: bool
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations, self.convolves, self.residual = activations, convolves, residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            refuse(f"{self.NAME}: x requires gradients")
        y = x.contiguous(memory_format=torch.channels_last) if x.is_cpu and x.dim() == 4 else x
        for layer, activation, convolves in zip(self.layers, self.activations, self.convolves, strict=True):
            y = layer(y)
            if convolves and activation is not None:
                y = mbconv.ACTIVATIONS[activation](y)
        if x.is_cpu and x.is_contiguous():
            y = y.contiguous()
        return y + x if self.residual else y


def freezes(kind: str) -> bool:
    """Return whether :func:`freeze_part` makes something faster of parts of that kind."""
    return kind in _MAKERS and kind != forwards.BATCH_NORM_ONLY


def freeze_part(part: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> None:
    """Freeze ``part``, which is a copy already, in place where it is accelerated; ``convert`` freezes a child.

    The part keeps its class and its plain attributes, which the forward around it may read.
    """
    bound = bound_forward(part)
    if bound is None or has_hooks(part) or "parametrizations" in part._modules:
        return
    for inner in part.modules():
        inner.training = False
    make = _MAKERS.get(bound.kind)
    made = None if make is None else make(part, bound, convert)
    if made is None:
        return
    remove(part)
    part._modules = {_CHILD: made}
    if bound.kind == cells.WHOLE_CELL:
        part._parameters, part._buffers = {}, {}
    FrozenForward(part, "frozen part", {}).install()


def _cell(part: Any, bound: BoundForward, convert: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
    plan = bound.settings["plan"]
    if cells.obstacle(part, plan) is not None:
        return None
    modules = inside(part, plan.layout)
    norms = [modules[norm.place] for norm in plan.norms]
    n0, n1, n2, n3 = norms
    expand, depthwise, project = (modules[place].weight for place in plan.convolutions)
    gate = cells.gate_layers(modules, plan)
    parameters = CellParameters(
        n0.weight, n0.bias, expand, n1.weight, n1.bias, depthwise, n2.weight, n2.bias, project, n3.weight, n3.bias, *gate
    )  # fmt: skip
    skip = part._modules[plan.layout.skip]
    return FrozenResidualCell(
        parameters,
        [(norm.running_mean, norm.running_var) for norm in norms],
        eps=n0.eps,
        stride=plan.stride,
        residual_scale=plan.scale,
        skip=None if type(skip) is nn.Identity else convert(skip),
    )


def _norm(part: Any, bound: BoundForward, convert: Any) -> nn.Module | None:
    if forwards.normalising(part) is not None or forwards.watched(*part.children()):
        return None
    return FrozenBatchNorm(part, bound.settings["activation"])


def _convolution(part: Any, bound: BoundForward, convert: Any) -> nn.Module | None:
    log_norm, mask = getattr(part, "log_weight_norm", None), getattr(part, "mask", None)
    if log_norm is None:
        return None
    mask = mask.to(part.weight.dtype).expand_as(part.weight) if isinstance(mask, torch.Tensor) else None
    return FrozenForeignConv2d(part, weight_norm(part.weight, log_norm, mask), part.bias)


def _folded(conv: Any, norm: Any) -> FrozenForeignConv2d:
    weight, bias = mbconv.folded(conv, norm)
    return FrozenForeignConv2d(conv, weight.contiguous(memory_format=torch.channels_last), bias)


def _mbconv(part: Any, bound: BoundForward, convert: Callable[[nn.Module], nn.Module]) -> nn.Module | None:
    chain, modules = bound.settings["chain"], mbconv.inside(part)
    if mbconv.obstacle(part, modules, chain) is not None:
        return None
    layers = [
        convert(modules[step.place])
        if step.norm is None
        else _folded(modules[step.place], modules[step.norm])
        for step in chain.steps
    ]
    activations = [step.activation for step in chain.steps]
    return FrozenMBConv(layers, activations, [step.norm is not None for step in chain.steps], chain.residual)


_MAKERS: dict[str, Callable[..., nn.Module | None]] = {
    cells.WHOLE_CELL: _cell,
    forwards.BATCH_NORM: _norm,
    forwards.BATCH_NORM_ONLY: _norm,
    forwards.WEIGHT_NORM: _convolution,
    forwards.DEPTHWISE_NORM: _convolution,
    mbconv.MBCONV: _mbconv,
}
