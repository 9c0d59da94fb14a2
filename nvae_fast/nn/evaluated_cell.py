"""The inverted residual of :mod:`nvae_fast.nn` in evaluation without gradients: folded once and one call from then on, until
something that it was made from changes.

Changes show by identity, address or version counter of a tensor, by a part or a hook that was put in, by the mode of a batch
norm. Writes that PyTorch does not count (through ``.data``, by replaying a CUDA graph) do not show: ``train()`` or
``forget_weights`` says so. All of it is kept outside the modules: copies, pickles and state dicts know nothing of it.

A sample from a deep model is hundreds of such cells, and between two kernels the caches forget what Python needs: so the way to
a kept cell asks for little.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from nvae_fast.ops import _capture
from nvae_fast.ops._folded_cell import ReadyCell, Running, fold, ready
from nvae_fast.ops.inverted_residual_cell import CellParameters, available, check_cell, check_maps
from nvae_fast.ops.squeeze_excite import gated_sum


def hooks_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )


def has_hooks(module: nn.Module) -> bool:
    return any(hooks_of(module))


class EvaluatedCell:
    """A cell that was folded, and what it was folded from. Does not keep the module itself."""

    def __init__(
        self,
        cell: nn.Module,
        gate: nn.Module | None,
        norms: Sequence[Any],
        parameters: CellParameters,
        folded: ReadyCell,
        stride: int,
        residual_scale: float,
        stream: int,
    ) -> None:
        self.parameters, self.stride, self.residual_scale, self.stream = (
            parameters,
            stride,
            residual_scale,
            stream,
        )
        self._folded = folded
        self._gate = gate
        self._norms = [(norm, norm.eps, norm.activation) for norm in norms]
        self._parts: list[tuple[dict[str, Any], str, nn.Module, type, tuple[dict[Any, Any], ...]]] = []
        self._tensors: list[tuple[dict[str, Any], str, torch.Tensor, torch.dtype, int, int]] = []
        # Aliases live as long as this: no other tensor can come to stand at their addresses.
        self._aliases: list[torch.Tensor] = []
        if gate is not None:
            self._parts.append(({"": gate}, "", gate, type(gate), hooks_of(gate)))
        for owner in (cell,) if gate is None else (cell, gate):
            for name, part in owner._modules.items():
                if part is None:
                    continue
                self._parts.append((owner._modules, name, part, type(part), hooks_of(part)))
                for kind in (part._parameters, part._buffers):
                    for key, t in kind.items():
                        if t is not None and t.is_floating_point():
                            self._tensors.append((kind, key, t, t.dtype, t.data_ptr(), t._version))
                            self._aliases.append(t.detach())

    def fits(self, gate: nn.Module | None, stream: int) -> bool:
        """Whether folding again would give the same."""
        if self._gate is not gate or self.stream != stream:
            return False
        for norm, eps, activation in self._norms:
            if norm.training or norm.eps != eps or norm.activation != activation:
                return False
        for modules, name, part, kind, hooks in self._parts:
            if modules.get(name) is not part or type(part) is not kind or any(hooks):
                return False
        for tensors, key, t, dtype, address, version in self._tensors:
            if (
                tensors.get(key) is not t
                or t._version != version
                or t.data_ptr() != address
                or t.dtype != dtype
            ):
                return False
        return True

    def __call__(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        q = self.parameters
        check_maps(x, skip, q, self.stride)
        s = self._folded.branch(x.contiguous(memory_format=torch.channels_last), q.depthwise, self.stride)
        if q.reduce_weight is None:
            return skip + s
        layers = (q.reduce_weight, q.reduce_bias, q.gate_weight, q.gate_bias)
        return gated_sum(s, *layers, skip, self.residual_scale)  # type: ignore[arg-type]


_kept: WeakKeyDictionary[nn.Module, EvaluatedCell] = WeakKeyDictionary()


def _stream(device: torch.device) -> int | None:
    """Where a kept cell may be used: on the stream it was made on, and not in a graph, which must compute what it is replayed
    with (then None)."""
    if device.type != "cuda":
        return 0
    if _capture.recorded(device):
        return None
    return torch.cuda.current_stream(device).cuda_stream


def find(cell: nn.Module, gate: nn.Module | None, x: torch.Tensor) -> EvaluatedCell | None:
    """What is kept for ``cell`` and its gate and still is what they compute; None where gradients may be wanted or a graph is
    being recorded."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    kept = _kept.get(cell)
    if kept is None or not available(x.device):
        return None
    stream = _stream(x.device)
    return kept if stream is not None and kept.fits(gate, stream) else None


def keep(
    cell: nn.Module,
    gate: nn.Module | None,
    norms: Sequence[Any],
    parameters: CellParameters,
    running: Running,
    *,
    x: torch.Tensor,
    skip: torch.Tensor,
    stride: int,
    residual_scale: float,
) -> EvaluatedCell | None:
    """Fold and keep; None where :func:`find` would not look. Raises what the cell raises for bad arguments."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    sources = (*(t for t in parameters if t is not None), *(t for pair in running for t in pair))
    stream = _stream(x.device)
    if stream is None or any(t.is_inference() for t in sources):
        return None
    check_cell(x, skip, parameters, stride)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        f = fold(parameters, running, eps=norms[0].eps, residual_scale=residual_scale)
    made = EvaluatedCell(cell, gate, norms, parameters, ready(f, again=True), stride, residual_scale, stream)
    _kept[cell] = made
    return made


def forget(model: nn.Module) -> None:
    """Drop what is kept for the modules of ``model``: their tensors were changed behind PyTorch's back."""
    for module in model.modules():
        _kept.pop(module, None)
