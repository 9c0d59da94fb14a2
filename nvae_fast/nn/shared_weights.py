"""The normalised weights of all convolutions of a model, computed by one call per forward pass.

``with prepare_weights(model):`` opens a scope. The first convolution that asks for its weight inside it has the weights
of all computed (:func:`nvae_fast.weight_norm_many`), under autocast in the dtype that convolutions compute in; the others
take theirs. In a scope with gradients they are one node of the graph, whatever uses them: forward passes, regularisers.
A convolution computes its own weight outside every scope, and where the shared one could differ from it:

- its weight or log norm is another tensor, or was changed in place since (data-dependent initialisation),
- it waits for data-dependent initialisation, is not part of the model, or is compiled: the compiler's graph then has it,
- it, or a module that it is inside of, is not plain (``nn/plain.py``): hooks may change parameters before they are used,
- it runs under hooks on saved tensors, as activation checkpointing installs them: what is saved must be the same when the
  region runs again after the scope. Checkpointing with ``context_fn=checkpoint_contexts`` keeps the shared weights.

Nothing outlives the scope: every forward pass computes from the parameters as they are. For inference :func:`nvae_fast.freeze`
computes the weights once. Nothing is kept in the modules: copies, pickles and state dicts hold parameters only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nvae_fast.nn.plain import is_plain
from nvae_fast.ops import _backend, wide_conv2d
from nvae_fast.ops.weight_norm_many import weight_norm_many

OP = "weight_norm_many"
Convolution = Any  # a WeightNormed with the attributes of nn.WeightNormConv2d
Mode = tuple[torch.dtype | None, bool]  # dtype of the weights when not their own; with gradients


class WeightNormed(nn.Module):
    """The base class of ``nn.WeightNormConv2d``, whose normalised weights are computed together."""


@dataclass
class _Layer:
    """The normalised weight of a convolution, and the tensors that it was computed from."""

    normalized: torch.Tensor
    sources: tuple[torch.Tensor | None, ...]
    versions: tuple[int, ...]
    places: tuple[Any, ...]

    def fits(self, conv: Convolution) -> bool:
        sources = _sources(conv)
        return (
            all(a is b for a, b in zip(self.sources, sources, strict=True))
            and self.versions == _versions(sources)
            and self.places == _places(sources)
        )


def _sources(conv: Convolution) -> tuple[torch.Tensor | None, ...]:
    return conv.weight, conv.log_weight_norm, conv.mask


def _versions(sources: tuple[torch.Tensor | None, ...]) -> tuple[int, ...]:
    return tuple(0 if t.is_inference() else t._version for t in sources if t is not None)


def _places(sources: tuple[torch.Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple((t.dtype, t.device) for t in sources if t is not None)


class _Prepared:
    """The weights of one scope, by mode. A scope that was opened without gradients offers none with gradients."""

    def __init__(self, model: nn.Module, convolutions: dict[Convolution, None]) -> None:
        self.with_gradients = torch.is_grad_enabled()
        self.model, self.convolutions = model, convolutions
        self.layers: dict[Mode, dict[Convolution, _Layer]] = {}

    def get(self, conv: Convolution, mode: Mode) -> _Layer | None:
        dtype, grad = mode
        if conv not in self.convolutions or (grad and not self.with_gradients):
            return None
        layers = self.layers.get(mode)
        if layers is None and not grad:
            layers = self.layers.get((dtype, True))
        if layers is None:
            layers = self.compute(mode)
        layer = layers.get(conv)
        return None if layer is None or not layer.fits(conv) else layer

    def compute(self, mode: Mode) -> dict[Convolution, _Layer]:
        groups: dict[torch.device, list[Convolution]] = {}
        for conv in self.convolutions:
            if not (conv.needs_data_init and conv.training):
                groups.setdefault(conv.weight.device, []).append(conv)
        layers: dict[Convolution, _Layer] = {}
        with torch.set_grad_enabled(mode[1]):
            for group in groups.values():
                weights, log_norms, masks = zip(*map(_sources, group), strict=True)
                normalized = weight_norm_many(weights, log_norms, masks, dtype=mode[0])
                for conv, value in zip(group, normalized, strict=True):
                    sources = _sources(conv)
                    layers[conv] = _Layer(value, sources, _versions(sources), _places(sources))
        self.layers[mode] = layers
        return layers


class _State(threading.local):
    def __init__(self) -> None:
        self.scopes: list[_Prepared] = []
        self.hooks_allowed = False


_state = _State()


def _convolutions(model: nn.Module) -> dict[Convolution, None]:
    """The weight-normed convolutions inside ``model`` whose weights may be computed before they are called.

    Compiled modules are left out, and so are those inside a module with hooks or a forward of its own, which may change or
    replace parameters before it runs: FSDP2 gathers them there.
    """
    found: dict[Convolution, None] = {}
    waiting = list(model._modules.values())
    while waiting:
        module = waiting.pop()
        is_convolution = isinstance(module, WeightNormed)
        if module is None or not (is_convolution or module._modules):
            continue
        if module._compiled_call_impl is not None or not is_plain(module):
            continue
        if is_convolution:
            found[module] = None
        else:
            waiting += module._modules.values()
    return found


def prepare_weights(model: nn.Module) -> AbstractContextManager[None]:
    """Open a scope in which the weight-normed convolutions inside ``model`` share one computation of their weights.

    See the module's docstring. Scopes nest: an inner one of the same model, or of a part of it, is the outer one. Gradients
    flow through the weights of a scope in one backward pass.
    """
    if torch.compiler.is_compiling() or _backend.forced_reference():
        return nullcontext()
    return _open(model)


@contextmanager
def _open(model: nn.Module) -> Iterator[None]:
    scopes, grad = _state.scopes, torch.is_grad_enabled()
    usable = [scope for scope in scopes if scope.with_gradients or not grad]
    convs = {} if any(scope.model is model for scope in usable) else _convolutions(model)
    if all(any(conv in scope.convolutions for scope in usable) for conv in convs):
        yield
        return
    scopes.append(_Prepared(model, convs))
    try:
        yield
    finally:
        scopes.pop()


def prepared_layer(conv: Convolution) -> _Layer | None:
    """Return the weight of ``conv`` in the current scope, or None where it must compute its own."""
    if torch.compiler.is_compiling():
        return None
    scopes = _state.scopes
    if not scopes or (conv.needs_data_init and conv.training):
        return None
    weight = conv.weight
    if not _backend.fused(OP, weight.device):
        return None
    grad = torch.is_grad_enabled()
    if grad and not _state.hooks_allowed and torch._C._autograd._top_saved_tensors_default_hooks(False):
        return None
    mode = _mode(weight.device, weight.dtype, grad)
    for scope in reversed(scopes):
        found = scope.get(conv, mode)
        if found is not None:
            return found
    return None


def _mode(device: torch.device, dtype: torch.dtype, grad: bool) -> Mode:
    if not torch.is_autocast_enabled(device.type) or dtype == torch.float64:  # which autocast leaves alone
        return None, grad
    wanted = torch.get_autocast_dtype(device.type)
    return (None if wanted == dtype or wide_conv2d.computes(wanted, device) else wanted), grad


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts in which a region inside a scope uses the shared weights, also when it is run again.

    For ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=checkpoint_contexts)``.
    """
    if not _state.scopes:
        return nullcontext(), nullcontext()
    scope = _state.scopes[-1]
    # The weights are computed here, outside the region, in which nothing but the region's own tensors may be saved.
    next(filter(None, map(prepared_layer, scope.convolutions)), None)
    return _inside(scope), _inside(scope)


@contextmanager
def _inside(scope: _Prepared) -> Iterator[None]:
    before = _state.hooks_allowed
    _state.scopes.append(scope)
    _state.hooks_allowed = True
    try:
        yield
    finally:
        _state.scopes.pop()
        _state.hooks_allowed = before
