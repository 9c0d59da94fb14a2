"""Decisions for a model and an input at hand: each accelerated part is measured on the inputs that it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nvae_fast.patching import wins
from nvae_fast.patching.bound import bound_forward
from nvae_fast.patching.clone import clone
from nvae_fast.patching.measure import speedups
from nvae_fast.patching.progress import Progress
from nvae_fast.patching.signature import signature
from nvae_fast.patching.verify import restored

SECONDS = 0.05  # for a part and mode


def measure_with(model: nn.Module, sample_input: Any, progress: bool | None) -> None:
    """Measure the accelerated parts of ``model`` on what they are given in ``model(sample_input)``.

    A tuple holds several arguments, a mapping keyword arguments. The model runs once in evaluation mode, on a copy. Each
    part then uses its kernel in the modes in which it was faster than its own forward.
    """
    inputs = _inputs(model, sample_input)
    known: dict[Any, dict[str, wins.Speedup]] = {}
    parts = [(part, inputs[name]) for name, part in model.named_modules() if name in inputs]
    with Progress("accelerate: measuring parts", len(parts), progress) as line:
        for part, x in parts:
            line.advance()
            key = signature(part), x.shape, x.dtype, wins.layout_name(x)
            if key not in known:
                known[key] = speedups(part, x, SECONDS)
            bound = bound_forward(part)
            if bound is not None:
                bound.measured = {mode: found.is_enough() for mode, found in known[key].items()}
                bound.decided.clear()
                bound.find_rests()


def _inputs(model: nn.Module, sample_input: Any) -> dict[str, torch.Tensor]:
    """The first map that each accelerated part is given, by its name."""
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    found: dict[str, torch.Tensor] = {}
    twin = clone(model, None).eval()
    for name, part in twin.named_modules():
        bound = bound_forward(part)
        if bound is not None and bound.removable:

            def keep(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name
            ) -> None:
                x = args[0] if args else next(iter(kwargs.values()), None)
                if isinstance(x, torch.Tensor) and x.dim() == 4 and x.numel():
                    found.setdefault(name, x.detach().clone(memory_format=torch.preserve_format))

            part.register_forward_pre_hook(keep, with_kwargs=True)
    args: Sequence[Any] = sample_input if isinstance(sample_input, (tuple, list)) else (sample_input,)
    with restored(device), torch.no_grad():
        if isinstance(sample_input, Mapping):
            twin(**sample_input)
        else:
            twin(*args)
    return found
