"""Adamax whose host reads one count of steps, not one per parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Adamax(torch.optim.Adamax):
    """`torch.optim.Adamax(foreach=True)`, bit for bit, with the same state.

    On a CPU PyTorch reads every parameter's own count of steps (1269 of them in the mnist preset) for a bias correction
    that is the same for all. Here one is read, as long as they are all equal, which is checked whenever the parameters
    that have a gradient change or a state was loaded; otherwise PyTorch's own step runs. A capturable one always is
    PyTorch's own: there the counts stay on the device.
    """

    _checked: list[int] | None = None  # which parameters had equal counts

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As in PyTorch."""
        group = self.param_groups[0]
        if closure is not None or len(self.param_groups) > 1 or group["capturable"] or group["maximize"]:
            return super().step(closure)
        parameters: list[Tensor] = []
        grads: list[Tensor] = []
        averages: list[Tensor] = []
        norms: list[Tensor] = []
        steps: list[Tensor] = []
        self._init_group(group, parameters, grads, averages, norms, steps)
        if not parameters:
            return None
        names = [id(p) for p in parameters]
        if names != self._checked:
            if len({float(step) for step in steps}) > 1 or len({p.dtype for p in parameters}) > 1:
                self._checked = None
                return super().step()
            self._checked = names
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, torch.ones(()), alpha=1.0)
        rate = float(group["lr"]) / (1 - beta1 ** float(steps[0]))
        size: tuple[Tensor, ...] | list[Tensor] = grads
        if group["weight_decay"] != 0:
            size = torch._foreach_add(grads, parameters, alpha=group["weight_decay"])
        torch._foreach_lerp_(averages, size, 1 - beta1)
        torch._foreach_mul_(norms, beta2)
        if group["weight_decay"] != 0:
            torch._foreach_abs_(size)
        else:  # the gradients themselves stay as they are
            size = torch._foreach_abs(size)
        torch._foreach_add_(size, group["eps"])
        torch._foreach_maximum_(norms, size)
        torch._foreach_addcdiv_(parameters, averages, norms, value=-rate)
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch."""
        super().load_state_dict(state_dict)
        self._checked = None
