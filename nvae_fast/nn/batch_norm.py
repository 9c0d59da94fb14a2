"""The batch norm of :mod:`nvae_fast.nn`, and whose statistics it merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nvae_fast.ops import _checks
from nvae_fast.ops import inverted_residual_cell as fused_cell
from nvae_fast.ops._activation import ACTIVATIONS
from nvae_fast.ops._merged_norm import merged_batch_norm_swish
from nvae_fast.ops.batch_norm_swish import batch_norm_swish


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
        merged = merged_batch_norm_swish(
            x, self.weight, self.bias, eps=self.eps, activation=self.activation, group=self.process_group
        )
        if merged is None:
            y, mean, var = batch_norm_swish(
                x, self.weight, self.bias, eps=self.eps, activation=self.activation
            )
        else:
            y, mean, var, count = merged
        self._update(mean, var, count)
        return y

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, var: torch.Tensor, count: int | torch.Tensor) -> None:
        if isinstance(count, int) and count == 0:
            return  # an empty batch says nothing
        if isinstance(
            count, torch.Tensor
        ):  # nor do batches that are empty, or hold one value, on all processes together
            says = count > 1
            mean = torch.where(says, mean, self.running_mean.to(mean.dtype))
            unbiased = torch.where(says, var * (count / (count - 1)), self.running_var.to(var.dtype))
            self.num_batches_tracked += says
        else:
            unbiased = var * (count / (count - 1))
            self.num_batches_tracked += 1
        mean, unbiased = mean.to(self.running_mean.dtype), unbiased.to(self.running_var.dtype)
        torch._foreach_lerp_([self.running_mean, self.running_var], [mean, unbiased], self.momentum)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, activation={self.activation!r}"


@torch.no_grad()
def update_together(norms: Sequence[BatchNormSwish], seen: Sequence[fused_cell.BatchStatistics]) -> None:
    """Running statistics of several batch norms from what they saw: a few calls for all of them."""
    counts = [s.count for s in seen if isinstance(s.count, int) and s.count > 1]
    alike = len({norm.momentum for norm in norms}) == 1
    if not alike or len(counts) < len(seen):
        for norm, s in zip(norms, seen, strict=True):
            norm._update(*s)
        return
    unbiased = torch._foreach_mul([s.var for s in seen], [count / (count - 1) for count in counts])
    new = [s.mean.to(norm.running_mean.dtype) for s, norm in zip(seen, norms, strict=True)]
    new += [t.to(norm.running_var.dtype) for t, norm in zip(unbiased, norms, strict=True)]
    old = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    torch._foreach_lerp_(old, new, norms[0].momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
