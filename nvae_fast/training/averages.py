"""Exponential moving averages of a model's weights.

Each average is PyTorch's (`torch.optim.swa_utils.get_ema_multi_avg_fn`), applied to all tensors in a few fused operations on
fixed addresses. `torch.optim.swa_utils.AveragedModel` computes the same, but collects its tensors anew in every step and either
averages all buffers or copies them one at a time.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

# Batch-norm statistics, which follow the weights. Other buffers (counters, vectors of the power iteration) are copied.
_STATISTICS = ("running_mean", "running_var")


class WeightAverages:
    """Averages of the weights of `model`: `average = d * average + (1 - d) * weight` after every optimizer step.

    model: the model that is trained; its tensors must stay where they are. decay: d, between 0 and 1. In update n (from 0) it
    is at most `(1 + n) / (10 + n)`, so that the first weights do not dominate a short run; the first update copies. `module` is
    a model in evaluation mode with the averages, at first a copy of `model`.

    Batch-norm statistics are averaged with the same d: they then belong to the averaged weights, to first order in the
    differences between the weights. Other buffers are copied.
    """

    def __init__(self, model: NVAE, decay: float) -> None:
        # A process group cannot be copied, the copy uses the same one.
        groups = [getattr(part, "process_group", None) for part in model.modules()]
        self.module: NVAE = copy.deepcopy(model, {id(group): group for group in groups if group is not None})
        self.module.requires_grad_(False).eval()
        self._model = model
        self.decay = decay
        self.updates = 0
        self._averages, self._copies = _tensors(self.module)
        self._weights, self._buffers = _tensors(model)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Begin anew with the present weights."""
        self.module.load_state_dict(self._model.state_dict())
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after an optimizer step."""
        if self.updates == 0:
            torch._foreach_copy_(self._averages, self._weights)
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            get_ema_multi_avg_fn(decay)(self._averages, self._weights, self.updates)
        if self._copies:
            torch._foreach_copy_(self._copies, self._buffers)
        self.updates += 1

    def state(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint."""
        return {"decay": self.decay, "updates": self.updates, "model": self.module.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned, with the decay of this object."""
        self.module.load_state_dict(state["model"])
        self.updates = state["updates"]


def _tensors(model: NVAE) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors that are averaged, tensors that are copied) of a model."""
    buffers = list(model.named_buffers())
    averaged = [value for name, value in buffers if name.rpartition(".")[2] in _STATISTICS]
    copied = [value for name, value in buffers if name.rpartition(".")[2] not in _STATISTICS]
    return [*(p.detach() for p in model.parameters()), *averaged], copied
