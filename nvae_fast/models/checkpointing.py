"""Activation checkpointing of a cell: its input is kept, everything inside is computed again in the backward pass.

The second pass must have no side effects. Nothing is drawn inside a cell (latent variables are sampled between cells), so
there is no noise to repeat; the buffers that a forward pass in training mode updates (batch norm's running statistics)
are restored after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nvae_fast.nn.shared_weights import checkpoint_contexts


def recomputed(cell: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """``cell(x)``, with the same gradients and a fraction of the memory held until the backward pass.

    Arithmetic and autocast are those of the first pass, so the results are bitwise equal to ``cell(x)`` wherever the
    cell's own kernels repeat themselves.
    """
    result: torch.Tensor = checkpoint(
        cell,
        x,
        use_reentrant=False,
        preserve_rng_state=False,  # a cell draws nothing; saving the state would synchronise
        context_fn=lambda: _contexts(cell),
    )
    return result


def _contexts(cell: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first and the second pass, which share the normalised weights of the step."""
    first, second = checkpoint_contexts()
    return first, _together(second, _buffers_kept(cell))


@contextlib.contextmanager
def _together(*contexts: AbstractContextManager[None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextlib.contextmanager
def _buffers_kept(cell: nn.Module) -> Iterator[None]:
    """Restore the buffers after the block, also when it is left by an exception (the second pass stops early)."""
    buffers = [b for b in cell.buffers() if b is not None] if cell.training else []
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, saved)
