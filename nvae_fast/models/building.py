"""Models for the options and the state of a file, which may ask for more than there is memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE


def build(config: NVAEConfig, state: Mapping[str, Any], load: Callable[[NVAE], object]) -> NVAE:
    """A model of ``config`` into which ``load`` loads ``state``; building it takes memory in proportion to ``state``.

    Raises:
        ValueError: ``config`` asks for a larger model than ``state`` is of. Whatever ``load`` raises.
    """
    cells = config.num_cells
    if cells > max(len(state), 1000):
        raise ValueError(f"its options ask for {cells} cells, its state has {len(state)} entries")
    with _Budget(state):
        model = NVAE(config)
    load(model)
    return model


class _Budget(TorchFunctionMode):
    """Refuses to make many more tensors, or larger ones, than a state dict has. Models of common size can always be made, so
    that what is missing in the state dict can be named."""

    _SIZED = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__()
        tensors = [
            value
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.layout is torch.strided
        ]
        # Elements in memory: an expanded tensor shows many more.
        elements = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() // value.itemsize
            for value in tensors
        }
        # Twice as much, because initialisation makes temporary tensors.
        self.elements = max(2 * sum(elements.values()), 1 << 25)
        self.count = max(2 * len(tensors), 20_000)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._SIZED:
            size = args[0] if args and isinstance(args[0], (tuple, list)) else args
            elements = 1
            for side in size:
                elements *= int(side)
            self.elements -= elements
            self.count -= 1
            if self.elements < 0 or self.count < 0:
                raise ValueError("its options ask for a larger model than its state is of")
        return func(*args, **(kwargs or {}))
