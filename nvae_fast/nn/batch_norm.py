"""The batch norm of :mod:`nvae_fast.nn`, and the processes whose statistics it merges."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from nvae_fast import distributed
from nvae_fast.nn.state import check_state
from nvae_fast.ops import _checks
from nvae_fast.ops._activation import ACTIVATIONS
from nvae_fast.ops.batch_norm_swish import batch_norm_swish
from nvae_fast.ops.sync_batch_norm_swish import sync_batch_norm_swish

# mean, biased variance, and the number of values
Statistics = tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]


def set_process_group(module: nn.Module, group: Any) -> nn.Module:
    """Set the processes over which every batch norm (and data-dependent initialisation) in ``module`` merges statistics.

    ``group`` is a ``torch.distributed`` process group, or None for the default: all processes, once initialised.
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


class BatchNormSwish(_BatchNorm):
    """Batch norm and an activation, one operation: ``y = act(weight * (x - mean) / sqrt(var + eps) + bias)``.

    Maps (B, C, H, W) to the same shape and dtype. While training, mean and biased variance are those of the batch, merged
    exactly over the processes of :func:`set_process_group`, and ``running = (1 - momentum) * running + momentum * batch``
    (variance unbiased); in evaluation they are the running ones. NVAE (arXiv 2007.03898), section 3.1.1. The operation
    itself: :func:`nvae_fast.batch_norm_swish`, which raises for maps of another shape.

    ``torch.optim.swa_utils.update_bn`` works. ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` would drop the activation and
    is refused; statistics are merged over processes without it.

    Args:
        channels: C.
        activation: "swish" (``t * sigmoid(t)``), "elu" or None.
        eps: added to the variance.
        momentum: weight of the newest batch in the running statistics, from 0 to 1; None makes them the average over all
            batches since they were reset, as in torch.nn.BatchNorm2d.

    Raises:
        TypeError, ValueError: another activation; eps or momentum (also when it is set later) has the wrong type or value.
    """

    track_running_stats = True

    def __init__(
        self,
        channels: int,
        activation: str | None = "swish",
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.05,
    ) -> None:
        nn.Module.__init__(self)
        _checks.one_of("BatchNormSwish", "activation", activation, ACTIVATIONS)
        if not isinstance(eps, (int, float)) or not eps > 0:
            raise ValueError(f"BatchNormSwish: eps must be > 0, got {eps!r}")
        self.num_features, self.activation, self.eps, self.momentum = channels, activation, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.running_mean: torch.Tensor
        self.running_var: torch.Tensor
        self.num_batches_tracked: torch.Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))
        self.process_group: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "momentum" and value is not None:
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"BatchNormSwish: momentum must be a number or None, got {value!r}")
            if not 0 <= float(value) <= 1:
                raise ValueError(f"BatchNormSwish: momentum must be from 0 to 1 or None, got {value!r}")
        super().__setattr__(name, value)

    @property
    def affine(self) -> bool:  # type: ignore[override]
        """True; read by ``convert_sync_batchnorm``, which an activation makes impossible."""
        if self.activation is None:
            return True
        raise TypeError(
            "BatchNormSwish: cannot be converted into a torch.nn.SyncBatchNorm, which has no activation. It merges its "
            "statistics over processes by itself: leave convert_sync_batchnorm out"
        )

    def reset_parameters(self) -> None:
        """Set weight, bias and running statistics to their initial values."""
        self.reset_running_stats()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        check_state(self, state_dict, prefix)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return batch_norm(self, x, self.activation)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, activation={self.activation!r}"


def batch_norm(
    norm: Any, x: torch.Tensor, activation: str | None, *, merged: bool = True, counts: bool = True
) -> torch.Tensor:
    """Batch norm and activation with the parameters and buffers of ``norm``, which are updated as PyTorch's are.

    Args:
        norm: a module with the attributes of torch.nn.BatchNorm2d.
        merged: whether statistics are merged over the processes of ``norm.process_group``.
        counts: whether ``norm.num_batches_tracked`` counts the batch.
    """
    weight, bias, eps = norm.weight, norm.bias, norm.eps
    if not norm.training and norm.running_mean is not None:
        return batch_norm_swish(
            x, weight, bias, norm.running_mean, norm.running_var, eps=eps, activation=activation
        ).y
    count: int | torch.Tensor
    group = getattr(norm, "process_group", None)
    if merged and norm.training and distributed.world_size(group) > 1:
        y, mean, var, count = sync_batch_norm_swish(
            x, weight, bias, eps=eps, activation=activation, group=group
        )
    else:
        y, mean, var = batch_norm_swish(x, weight, bias, eps=eps, activation=activation)
        count = x.numel() // max(x.shape[1], 1)
    if norm.running_mean is not None:
        update_running([norm], [(mean, var, count)], [counts])
    return y


@torch.no_grad()
def update_running(
    norms: Sequence[Any], seen: Sequence[Statistics], counted: Sequence[bool] | None = None
) -> None:
    """``running = (1 - momentum) * running + momentum * batch`` of batch norms, the variance unbiased, in a few calls for all.

    Args:
        norms: modules with ``running_mean``, ``running_var``, ``momentum`` and ``num_batches_tracked``. A momentum of None is
            ``1 / num_batches_tracked``, this batch included.
        seen: for each, mean and biased variance of the batch, and of how many values. A batch of one or none, over all
            processes, changes nothing.
        counted: for each, whether its batches are counted; None for all.
    """
    old: list[torch.Tensor] = []
    new: list[torch.Tensor] = []
    updated, momenta, counters = [], [], []
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
        updated.append(norm)
        momenta.append(norm.momentum)
        old += norm.running_mean, norm.running_var
        new += mean.to(norm.running_mean.dtype), var
        factors.append(count / (count - 1))
        if counted is None or counted[i]:
            counters.append((norm.num_batches_tracked, known))
    if not old:
        return
    if not merged:
        new[1::2] = torch._foreach_mul(new[1::2], factors)
    for k in range(1, len(old), 2):
        new[k] = new[k].to(old[k].dtype)
    if merged:
        for counter, known in counters:
            counter += known
    elif counters:
        torch._foreach_add_(list(next(zip(*counters, strict=True))), 1)
    if momenta.count(momenta[0]) == len(momenta) and momenta[0] is not None:
        torch._foreach_lerp_(old, new, momenta[0])
        return
    for i, (norm, momentum) in enumerate(zip(updated, momenta, strict=True)):
        weight = momentum
        for running, value in zip(old[2 * i : 2 * i + 2], new[2 * i : 2 * i + 2], strict=True):
            if momentum is None:  # a tensor: reading the counter would wait for the device
                weight = norm.num_batches_tracked.clamp_min(1).to(running.dtype).reciprocal()
            running.lerp_(value, weight)
