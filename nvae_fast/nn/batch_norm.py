"""The batch norm of :mod:`nvae_fast.nn`, and whose statistics it merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nvae_fast.ops import _checks
from nvae_fast.ops._activation import ACTIVATIONS
from nvae_fast.ops.batch_norm_swish import batch_norm_swish
from nvae_fast.ops.sync_batch_norm_swish import sync_batch_norm_swish

# mean, biased variance, and the number of values
Statistics = tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]


def set_process_group(module: nn.Module, group: Any) -> nn.Module:
    """Let every batch norm (and data-dependent initialisation) in ``module`` merge statistics over ``group``.

    ``group`` is a ``torch.distributed`` process group, or None for the default: the world when initialised.
    Returns ``module``.

    Raises:
        TypeError: ``module`` is no torch.nn.Module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"set_process_group: module must be a torch.nn.Module, got {type(module).__name__}")
    for part in module.modules():
        if hasattr(part, "process_group"):
            part.process_group = group
    return module


class BatchNormSwish(nn.Module):
    """Batch norm and an activation, one operation: ``y = act(weight * (x - mean) / sqrt(var + eps) + bias)``.

    Maps (B, C, H, W) to the same shape and dtype. While training, mean and biased variance are those of the batch, merged
    exactly over the processes of :func:`set_process_group`, and ``running = (1 - momentum) * running + momentum * batch``
    (variance unbiased); in evaluation they are the running ones. NVAE (arXiv 2007.03898), section 3.1.1. The operation
    itself: :func:`nvae_fast.batch_norm_swish`, which raises for maps of another shape.

    Args:
        channels: C.
        activation: "swish" (``t * sigmoid(t)``), "elu" or None.
        eps: added to the variance.
        momentum: share of the newest batch in the running statistics.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self, channels: int, activation: str | None = "swish", *, eps: float = 1e-5, momentum: float = 0.05
    ) -> None:
        super().__init__()
        _checks.one_of("BatchNormSwish", "activation", activation, ACTIVATIONS)
        self.activation, self.eps, self.momentum = activation, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: torch.Tensor
        self.running_var: torch.Tensor
        self.num_batches_tracked: torch.Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.process_group: Any = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return batch_norm_swish(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                eps=self.eps,
                activation=self.activation,
            ).y
        count: int | torch.Tensor = x.numel() // max(x.shape[1], 1)
        merged = sync_batch_norm_swish(
            x, self.weight, self.bias, eps=self.eps, activation=self.activation, group=self.process_group
        )
        if merged is None:
            y, mean, var = batch_norm_swish(
                x, self.weight, self.bias, eps=self.eps, activation=self.activation
            )
        else:
            y, mean, var, count = merged
        update_running([self], [(mean, var, count)])
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, activation={self.activation!r}"


@torch.no_grad()
def update_running(
    norms: Sequence[Any], seen: Sequence[Statistics], counted: Sequence[bool] | None = None
) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` of batch norms, the variance unbiased, in a few calls for all.

    Args:
        norms: what has ``running_mean``, ``running_var``, ``momentum`` and ``num_batches_tracked``.
        seen: of each, mean and biased variance of the batch, and of how many values. A batch of one or none, on all processes
            together, changes nothing.
        counted: of each, whether its batches are counted; None for all.
    """
    old: list[torch.Tensor] = []
    new: list[torch.Tensor] = []
    momenta: list[float] = []
    variances, counters = [], []
    factors: list[Any] = []
    merged = False
    for i, (norm, (mean, var, count)) in enumerate(zip(norms, seen, strict=True)):
        known: torch.Tensor | int = 1
        if isinstance(count, torch.Tensor):
            known, merged = count > 1, True
            mean = torch.where(known, mean, norm.running_mean.to(mean.dtype))
            var = torch.where(known, var * (count / (count - 1)), norm.running_var.to(var.dtype))
        elif count <= 1:
            continue
        old += norm.running_mean, norm.running_var
        new += mean.to(norm.running_mean.dtype), var
        momenta.append(norm.momentum)
        variances.append(var)
        factors.append(count / (count - 1))
        if counted is None or counted[i]:
            counters.append((norm.num_batches_tracked, known))
    if not old:
        return
    if not merged:
        variances = list(torch._foreach_mul(variances, factors))
    new[1::2] = [var.to(running.dtype) for var, running in zip(variances, old[1::2], strict=True)]
    if len(set(momenta)) == 1:
        torch._foreach_lerp_(old, new, momenta[0])
    else:
        for i, momentum in enumerate(momenta):
            torch._foreach_lerp_(old[2 * i : 2 * i + 2], new[2 * i : 2 * i + 2], momentum)
    if merged:
        for counter, known in counters:
            counter += known
    elif counters:
        torch._foreach_add_([counter for counter, _ in counters], 1)
