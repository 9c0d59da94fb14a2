"""Several gloo processes that run one function, for the tests of everything that merges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def together(work: Callable[..., Any], size: int, directory: Path, *arguments: Any) -> list[Any]:
    """What ``work(rank, size, *arguments)`` returned in each of ``size`` processes."""
    torch.multiprocessing.spawn(_run, (work, size, str(directory), arguments), nprocs=size)
    return [torch.load(directory / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]


def _run(rank: int, work: Callable[..., Any], size: int, directory: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = f"file://{directory}/store-{size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    torch.save(work(rank, size, *arguments), f"{directory}/{size}-{rank}.pt")
    dist.destroy_process_group()


def part_of(shares: tuple[int, ...], rank: int) -> slice:
    """The rows of process ``rank`` when each takes its share in turn."""
    start = sum(shares[:rank])
    return slice(start, start + shares[rank])


class Exchanges(TorchDispatchMode):
    """Counts the exchanges between processes while entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))
