"""Several gloo processes that run one function, for the tests of everything that merges."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

START = "import sys, torch\ntorch.set_num_threads(1)\nfrom nvae_fast.cli import main\nsys.exit(main(sys.argv[1:]))"


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


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **more}


def ranks(
    size: int, options: list[str], before: dict[int, str] | None = None, start: str = START
) -> list[subprocess.Popen]:
    """The processes that torchrun would start; ``before``: Python to run first, by rank."""
    ports = f"{free_port()} {free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, "-c", (before or {}).get(rank, "") + start, *options],
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=ports.split()[0], SECOND_PORT=ports.split()[1],
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def wait_until(condition: Callable[[], Any], running: Sequence[subprocess.Popen], limit: float = 300) -> None:
    """Wait for ``condition`` while the processes run. It is an error if one of them ends, or after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while not condition():
        ended = [process for process in running if process.poll() is not None]
        if ended:
            raise RuntimeError(f"a process ended too early: {ended[0].communicate()}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting after {limit:g} seconds")
        time.sleep(0.02)


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
