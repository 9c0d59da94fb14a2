"""Statistics over processes: the one place that talks to torch.distributed on behalf of the modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

_single_process = False
# PyTorch 2.13 calls it all_gather_single and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@contextmanager
def single_process() -> Iterator[None]:
    """Inside the block nothing is merged with other processes: each computes what it would compute by itself."""
    global _single_process
    before, _single_process = _single_process, True
    try:
        yield
    finally:
        _single_process = before


SINGLE_PROCESS = "alone"  # in place of a process group: this process, whatever others there are


def world_size(group: Any = None) -> int:
    """Number of processes whose statistics are merged; 1 without torch.distributed, or inside :func:`single_process`."""
    if _single_process or isinstance(group, str):
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


def gather(t: torch.Tensor, group: Any = None) -> torch.Tensor:
    """``t`` of each process of ``group``, which are of one shape, as (processes, *shape) in their order (not
    differentiable)."""
    everyone = t.new_empty(dist.get_world_size(group), *t.shape)
    _all_gather(everyone.view(-1), t.contiguous().view(-1), group=group)
    return everyone


def merge(
    mean: torch.Tensor, m2: torch.Tensor, count: int, group: Any = None
) -> tuple[torch.Tensor, torch.Tensor, int | torch.Tensor]:
    """Mean, sum of squared deviations (C,) and count over every process of ``group`` from each one's, by Chan's formula, in
    one exchange (not differentiable). A count of 0 counts as nothing; the count returned is at least 1."""
    if world_size(group) == 1:
        return mean, m2, max(count, 1)
    everyone = gather(torch.cat([mean, m2, mean.new_full((1,), count)]), group)
    means, m2s, counts = everyone.split([mean.numel(), m2.numel(), 1], dim=1)
    n = counts.sum().clamp_min(1)
    # Means differ by about a standard deviation; sums of their deviations from one of them lose no digits to |mean| >> std.
    pivot = means.index_select(0, counts.argmax(0))
    merged = pivot[0] + (counts * (means - pivot)).sum(0) / n
    return merged, (m2s + counts * (means - merged).square()).sum(0), n
