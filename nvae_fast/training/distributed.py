"""The processes of a run: one, or the several that torchrun started. Only rank 0 writes files and speaks.

When a process dies the others notice at their next exchange, at once on CPUs (the connection is closed), on GPUs as soon as
torchrun stops them or the exchange times out. `World.report_lost_process` turns that into a `ProcessLost` that says what to do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvae_fast import distributed


def _outlive_torchrun() -> None:
    """torchrun ends all processes with SIGTERM when one has died, often before the others have said what to do; it waits
    half a minute for them."""
    if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ProcessLost(RuntimeError):
    """Another process of the run has died or stopped; the message says what is safe and how to go on."""


@dataclass(frozen=True)
class World:
    """Which process this is, of how many, and the device it works on.

    rank: 0 to size - 1; 0 writes files and reports. size: how many processes there are. device: of this one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """The element-wise maximum over all processes, so that every one of them decides alike.

        values: numbers, as many on every process.
        """
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes of a tensor that carries no gradient."""
        if self.size == 1:
            return tensor
        shared = tensor.detach().clone()
        dist.all_reduce(shared)
        return shared

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes of a tensor that carries no gradient."""
        return tensor if self.size == 1 else self.sum(tensor) / self.size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process, in their order; all must be of one shape."""
        if self.size == 1:
            return [tensor]
        return list(distributed.gather(tensor).unbind())

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Check that all processes were started alike.

        facts: value by name, compared by what they print. Raises ValueError, on every process, naming the first that is
        not the same on all of them.
        """
        if self.size == 1:
            return
        prints = [float(zlib.crc32(repr(value).encode())) for value in facts.values()]
        both = self.largest(*prints, *(-p for p in prints))
        for (name, value), high, low in zip(
            facts.items(), both[: len(prints)], both[len(prints) :], strict=True
        ):
            if high != -low:
                raise ValueError(
                    f"the processes of this run differ in {name}, of which process {self.rank} of {self.size} has "
                    f"{_short(value)}: start all of them with the same options and data"
                )

    @contextlib.contextmanager
    def report_lost_process(self, advice: Callable[[], str]) -> Iterator[None]:
        """A block whose failures to exchange anything with another process become a `ProcessLost`.

        advice: called for the end of its message. Raises ProcessLost; other errors pass.
        """
        try:
            yield
        except ProcessLost:
            raise
        except RuntimeError as error:
            # gloo has no type of error of its own, but names its files.
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            _outlive_torchrun()
            raise ProcessLost(
                f"another process of this run died or stopped (process {self.rank} of {self.size} lost contact; what "
                f"happened stands in the other's output, or it was killed). {advice()}"
            ) from error

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if there is one. After an error, end the process instead: others notice that."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start_world(device: str = "auto") -> World:
    """Join the processes torchrun started (environment RANK, WORLD_SIZE, LOCAL_RANK), or be the only one.

    device: "auto" (the GPU of this process if there is one, else the CPU), "cpu", "cuda" or "cuda:<index>".
    Raises ValueError for a device that is not there, ProcessLost when the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device, local_rank if size > 1 else None)
    if size > 1:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=size)
        except dist.DistError as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ProcessLost(
                f"process {rank} of {size} could not join the others at {place}: {str(error).splitlines()[0]}. Check that "
                "torchrun is started on every node with the same --nnodes and --rdzv-endpoint"
            ) from error
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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else text[:197] + "..."
