"""The processes of a run: one, or the several that torchrun started. Only rank 0 writes files and speaks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and the device it works on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """The element-wise maximum over all processes, so that every one of them decides alike."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes of a tensor that carries no gradient."""
        if self.size == 1:
            return tensor
        shared = tensor.detach().clone()
        dist.all_reduce(shared)
        return shared / self.size

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if there is one."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start_world(device: str = "auto") -> World:
    """Join the processes torchrun started (environment RANK, WORLD_SIZE, LOCAL_RANK), or be the only one.

    device: "auto" (the GPU of this process if there is one, else the CPU), "cpu", "cuda" or "cuda:<index>".
    Raises ValueError for a device that is not there.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local_rank if size > 1 else None)
    if size > 1:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=size)
    return World(rank, size, chosen)


def pick_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """The torch device for a name; see `start_world`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>, got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"device {name!r} asked for, but this PyTorch sees no CUDA GPU; use --device cpu")
    index = device.index if device.index is not None else (local_rank or 0)
    if index >= torch.cuda.device_count():
        raise ValueError(f"device cuda:{index} asked for, but there are {torch.cuda.device_count()} GPU(s)")
    return torch.device("cuda", index)
