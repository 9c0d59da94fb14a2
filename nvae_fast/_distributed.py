"""Statistics over processes: the one place that talks to torch.distributed on behalf of the modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from nvae_fast.ops import _checks

ALONE = "alone"  # in place of a process group: this process, whatever others there are


def world_size(group: Any = None) -> int:
    """Number of processes whose statistics are merged; 1 when torch.distributed is not in use."""
    if isinstance(group, str):
        return 1
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def average(tensors: Sequence[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """Mean of each tensor over the processes of ``group`` (not differentiable)."""
    n = world_size(group)
    if n == 1:
        return list(tensors)
    packed = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(packed, group=group)
    parts = (packed / n).split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]


def total(t: torch.Tensor, group: Any = None) -> torch.Tensor:
    """Sum of ``t`` over the processes of ``group`` (not differentiable)."""
    if world_size(group) == 1:
        return t
    t = t.clone()
    dist.all_reduce(t, group=group)
    return t


def totals(tensors: Sequence[torch.Tensor], group: Any = None) -> Sequence[torch.Tensor]:
    """:func:`total` of several vectors of one length in one exchange."""
    return tensors if world_size(group) == 1 else total(torch.stack(tuple(tensors)), group).unbind()


def merge(
    mean: torch.Tensor, m2: torch.Tensor, count: int, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """Mean, sum of squared deviations (C,) and count over every process of ``group`` from each one's, by Chan's formula
    (not differentiable). A count of 0 counts as nothing; the count returned is at least 1."""
    if world_size(group) == 1:
        return mean, m2, max(count, 1)
    mine = torch.cat([mean, m2, mean.new_full((1,), count)])
    everyone = [torch.empty_like(mine) for _ in range(world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    means, m2s, counts = torch.stack(everyone).split([mean.numel(), m2.numel(), 1], dim=1)
    n = counts.sum().clamp_min(1)
    merged = (counts * means).sum(0) / n
    return merged, (m2s + counts * (means - merged).square()).sum(0), n


def merged_statistics(
    x: torch.Tensor, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Mean, biased variance (C,) and count of ``x`` (B, C, H, W) over every process of ``group``, differentiable;
    None when there is only one process. Chan's formula, so that |mean| >> std loses no digits and unequal local
    batches are weighted by their size."""
    if world_size(group) == 1:
        return None
    from torch.distributed.nn.functional import all_gather

    wide = x.to(_checks.accumulate_dtype(x.dtype))
    local_count = x.numel() // max(x.shape[1], 1)
    if local_count:
        local_var, local_mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    else:
        local_mean = local_var = wide.sum(
            (0, 2, 3)
        )  # zeros that stay in the graph: every rank must take part
    count = local_mean.new_full((1,), local_count)
    packed = torch.cat([local_mean, local_var, count])
    gathered = torch.stack(tuple(all_gather(packed, group=group if group is not None else dist.group.WORLD)))
    channels = x.shape[1]
    means, variances, counts = (
        gathered[:, :channels],
        gathered[:, channels : 2 * channels],
        gathered[:, -1:].detach(),
    )
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, total
