"""What is measured once, outside the timed rounds: peak memory, operator calls or kernel launches, and what
the machine can do at best (copy bandwidth, multiply-add rate)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_COPY_BYTES = 2**30


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the profiler's library prints on standard error whenever it starts and stops."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operator_calls(work: Callable[[], Any]) -> int:
    """Operators that ``work`` sends to a device, views included, backward included. Not for compiled
    functions: they fall back to eager while calls are counted."""
    with _Calls() as calls:
        work()
    return calls.count


def kernel_launches(work: Callable[[], Any]) -> int:
    """Kernels that ``work`` starts on the GPU; copies and fills by the driver are not counted."""
    torch.cuda.synchronize()
    with _quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    return sum(
        event.device_type() == torch.autograd.DeviceType.CUDA
        and not event.name().startswith(("Memcpy", "Memset"))
        for event in record.profiler.kineto_results.events()
    )


def host_launches(work: Callable[[], Any]) -> int:
    """How often the host sends something for ``work`` to the GPU: kernels, copies, fills, whole graphs."""
    torch.cuda.synchronize()
    with _quiet(), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        work()
        torch.cuda.synchronize()
    launches = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")
    return sum(event.name().startswith(launches) for event in record.profiler.kineto_results.events())


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory ``work`` held at once beyond what was there before it: outputs, gradients, saved and
    temporary tensors. On the GPU the allocator's own peak; on the CPU the running sum of what PyTorch's
    allocator reports to the profiler (memory a library allocates for itself is not in it). None when nothing
    was reported."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    if not changes:
        return None
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def copy_buffers(nbytes: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and destination of a copy that reads and writes ``nbytes`` in all."""
    count = max(nbytes // 8, 1)  # float32, half of the bytes each
    return torch.ones(count, device=device), torch.empty(count, device=device)


def ceilings(device: torch.device) -> dict[str, float]:
    """``matmul_gflops``: the best float32 matrix product (TF32 off), the practical multiply-add peak; on the
    GPU also ``copy_gb_per_s``: the best large copy, bytes read plus bytes written."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    result = {"matmul_gflops": 2e-9 * side**3 / _best(lambda: a @ b, device)}
    if device.type == "cuda":
        source, target = copy_buffers(CUDA_COPY_BYTES, device)
        result["copy_gb_per_s"] = 1e-9 * CUDA_COPY_BYTES / _best(lambda: target.copy_(source), device)
    return result


def _best(work: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """The shortest of a few runs after one warm-up, in seconds."""
    seconds = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def settle_allocator(device: torch.device) -> None:
    """Bring glibc's allocator where a training process has it after its first step.

    It hands the top of the heap back to the system whenever more than twice the largest block freed so far is
    free there, and the next allocation then pays for page faults: at a few hundred kilobytes a tensor they cost
    more than the kernels, for every provider, depending on who ran before. Freeing one block just under its
    ceiling of 32 MiB ends that.
    """
    if device.type == "cpu":
        torch.empty(31 * 2**20, dtype=torch.uint8).fill_(1)
