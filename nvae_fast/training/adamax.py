"""Adamax in one pass over the parameters, whose host reads one count of steps, not one per parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.ops import _backend
from nvae_fast.ops import adamax as op


class Adamax(torch.optim.Adamax):
    """`torch.optim.Adamax(foreach=True)`, bit for bit, with the same state.

    On a CPU PyTorch reads every parameter's own count of steps (1269 of them in the mnist preset) for a bias correction
    that is the same for all. Here one is read, as long as they are all equal, which is checked whenever the parameters
    that have a gradient change or a state was loaded; otherwise PyTorch's own step runs. On a CPU in float32 the rest is
    one pass over memory, where PyTorch makes eight. A capturable one always is PyTorch's own: there the counts stay on
    the device.
    """

    _checked: list[int] | None = None  # which parameters had equal counts
    _fits = False  # and whether the kernel takes them

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
            self._fits = op.fits(parameters, averages, norms)
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, torch.ones(()), alpha=1.0)
        rate = float(group["lr"]) / (1 - beta1 ** float(steps[0]))
        constants = (rate, beta1, beta2, group["eps"], group["weight_decay"])
        if not self._fits or _backend.forced_reference():
            op.formula(parameters, grads, averages, norms, *constants)
            return None
        grads = [
            g if g.stride() == p.stride() or op.alike(g, p) else torch.empty_like(p).copy_(g)
            for p, g in zip(parameters, grads, strict=True)
        ]
        op.adamax(parameters, grads, averages, norms, *constants)
        torch.autograd.graph.increment_version([*parameters, *averages, *norms])
        return None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch."""
        super().load_state_dict(state_dict)
        self._checked = None
