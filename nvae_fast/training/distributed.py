"""The processes of a run: a single one, or those that torchrun, mpirun or srun started. Only rank 0 writes files.

When a process dies the others notice at their next exchange, at once on CPUs (the connection is closed), on GPUs as soon as
torchrun stops them or the exchange times out. `World.report_lost_process` turns that into a `ProcessLost` that says what to do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvae_fast import distributed
from nvae_fast.training.launch import Launch, find_launch

WAITING_NOTE = 10.0  # seconds after which a process says what it waits for, then every minute


def outlive_torchrun() -> None:
    """Ignore SIGTERM where torchrun started this process: it sends one to all processes when the first has ended, often
    before the others have written their last message, and waits half a minute for them."""
    if "TORCHELASTIC_RUN_ID" in os.environ and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


class ProcessLost(RuntimeError):
    """Another process of the run has died or stopped; the message names the newest checkpoint and how to continue."""


@dataclass(frozen=True)
class World:
    """Rank of this process, number of processes, and the device of this process.

    rank: 0 to size - 1; process 0 writes files and prints messages. size: number of processes. device: of this process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def largest(self, *values: float) -> list[float]:
        """The element-wise maximum over all processes, so that all of them take the same decision.

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
        """Check that all processes have the same facts.

        facts: value by name, compared by what they print. Raises ValueError, on every process, naming what is not the
        same on all of them.
        """
        if self.size == 1:
            return
        # The names first: the second exchange needs as many facts on every process.
        if self._differs([", ".join(facts)])[0]:
            differing = [("the command", ", ".join(facts))]
        else:
            differs = self._differs([repr(value) for value in facts.values()])
            differing = [fact for fact, differ in zip(facts.items(), differs, strict=True) if differ]
        if differing:
            mine = f"of which process {self.rank} of {self.size} has"
            named = "; ".join(f"{name}, {mine} {_short(value)}" for name, value in differing)
            raise ValueError(
                f"the processes of this run differ in {named}: start all of them with the same options, files and data"
            )

    def _differs(self, texts: list[str]) -> list[bool]:
        """For every one of ``texts`` whether it is not the same on all processes; they must be as many on each."""
        codes = [float(zlib.crc32(text.encode())) for text in texts]
        both = self.largest(*codes, *(-code for code in codes))
        return [high != -low for high, low in zip(both[: len(codes)], both[len(codes) :], strict=True)]

    @contextlib.contextmanager
    def report_lost_process(self, advice: Callable[[], str]) -> Iterator[None]:
        """Context manager that turns a failed exchange with another process into a `ProcessLost`.

        advice: returns the end of its message. Raises ProcessLost; other errors pass through.
        """
        try:
            yield
        except ProcessLost:
            raise
        except RuntimeError as error:
            # gloo raises plain RuntimeErrors, whose messages name its source files.
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            outlive_torchrun()
            raise ProcessLost(
                f"another process of this run died or stopped (process {self.rank} of {self.size} lost the connection; the "
                f"output of the other process says why, unless it was killed). {advice()}"
            ) from error

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group, if there is one. After an error, end the process instead: others notice that."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def start_world(device: str = "auto") -> World:
    """Join the processes that torchrun, mpirun or srun started, or be the only one.

    device: "auto" (the GPU of this process if there is one, else the CPU), "cpu", "cuda" or "cuda:<index>".
    Raises ValueError for a device that is not there or environment variables that contradict one another, ProcessLost when
    the other processes cannot be reached.
    """
    launch = find_launch()
    chosen = pick_device(device, launch.local_rank if launch.size > 1 else None)
    if launch.size == 1:
        return World(device=chosen)
    if chosen.type == "cuda":
        if launch.local_rank is None and device in ("auto", "cuda"):
            raise ValueError(
                "LOCAL_RANK is not set: it numbers the processes of a node and chooses their GPUs. Set it, give --device "
                "cuda:<index>, or start the processes with torchrun"
            )
        torch.cuda.set_device(chosen)
    os.environ.update(MASTER_ADDR=launch.address, MASTER_PORT=launch.port)
    try:
        with _say_what_is_waited_for(launch):
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo", rank=launch.rank, world_size=launch.size
            )
    except dist.DistError as error:
        raise ProcessLost(
            f"process {launch.rank} of {launch.size} could not join the others at {launch.address}:{launch.port}: "
            f"{str(error).splitlines()[0]}. Check that the same command with the same --nnodes and --rdzv-endpoint runs on "
            "every node, and that no other program uses the port"
        ) from error
    return World(launch.rank, launch.size, chosen)


@contextlib.contextmanager
def _say_what_is_waited_for(launch: Launch) -> Iterator[None]:
    """Print, after WAITING_NOTE seconds in the block and every minute from then on, that the other processes are missing."""
    joined = threading.Event()

    def report() -> None:
        seconds = WAITING_NOTE
        while not joined.wait(WAITING_NOTE if seconds == WAITING_NOTE else 60.0):
            who = "the other processes" if launch.rank == 0 else "process 0"
            print(
                f"nvae_fast: process {launch.rank} of {launch.size} has waited {seconds:.0f} s for {who} at "
                f"{launch.address}:{launch.port} (MASTER_ADDR, MASTER_PORT); Ctrl-C twice ends it",
                file=sys.stderr,
                flush=True,
            )
            seconds += 60.0

    threading.Thread(target=report, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        joined.set()


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


def fingerprint(value: Any) -> str:
    """A checksum of tensors, plain values, and dictionaries and lists of them, to compare processes with
    :meth:`World.agree`."""

    def code(value: Any, start: int) -> int:
        if isinstance(value, Mapping):
            for key in sorted(value, key=repr):
                start = code(value[key], zlib.crc32(repr(key).encode(), start))
        elif isinstance(value, (list, tuple)):
            for item in value:
                start = code(item, zlib.crc32(b",", start))
        elif isinstance(value, Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            start = zlib.crc32(content, zlib.crc32(f"{value.dtype}{list(value.shape)}".encode(), start))
        else:
            start = zlib.crc32(repr(value).encode(), start)
        return start

    return f"{code(value, 0):08x}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 200 else text[:197] + "..."
