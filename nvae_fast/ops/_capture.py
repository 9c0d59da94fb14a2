"""State of CUDA graph capture, and tables of numbers that a captured graph reads.

Code under capture can neither copy from the host nor read memory that may be freed before a replay. The recorder of this
package (:class:`nvae_fast.training.graph.CudaRecorder`) registers its stream here. During warm-up the same code path runs as
under capture, so that every kernel is loaded by then. During capture, tables of numbers are placed in memory that the graph's
owner keeps; the host fills them once, before the first replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Stream = tuple[torch.device, int]  # a device and the number of a stream on it


ALIGNED = 64  # numbers: tables begin at multiples of 512 bytes, as memory of their own would


class Recording:
    """Tables of int64 for one graph: the warm-up counts how much they need, a capture takes them from ``memory``.

    The memory is allocated before the capture. An allocation during it could ask the driver, which refuses outside of the
    graph's pool; and in the pool the memory may be another tensor's earlier in the same graph, so that each replay would
    overwrite the table. Tables exist as long as this object, which the owner of the graph keeps.
    """

    def __init__(self, memory: Tensor | None = None) -> None:
        self.needed = 0
        self._memory = memory
        self._pending: list[tuple[int, Sequence[int]]] = []

    def table(self, numbers: Sequence[int]) -> Tensor | None:
        """A table that will hold ``numbers`` once :meth:`fill` has run; None where no memory for it was reserved."""
        start, self.needed = self.needed, self.needed + -(-len(numbers) // ALIGNED) * ALIGNED
        if self._memory is None or self.needed > self._memory.numel():
            return None
        self._pending.append((start, numbers))
        return self._memory[start : start + len(numbers)]

    def fill(self) -> None:
        """Copy the numbers, after the capture and before the first replay."""
        if self._memory is None or not self._pending:
            return
        values = torch.zeros(self._memory.numel(), dtype=torch.int64)
        for start, numbers in self._pending:
            values[start : start + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        self._memory.copy_(values)
        self._pending.clear()


# By stream and not by thread, because autograd runs a backward pass in a thread of its own, on the stream of the forward pass.
_recordings: dict[Stream, Recording] = {}


def _current(device: torch.device) -> Stream:
    stream = torch.cuda.current_stream(device)
    return stream.device, stream.cuda_stream


@contextlib.contextmanager
def recording(stream: torch.cuda.Stream, what: Recording) -> Iterator[None]:
    """Register ``stream``: what runs on it is captured into a graph, or is the warm-up of a capture."""
    key = stream.device, stream.cuda_stream
    _recordings[key] = what
    try:
        yield
    finally:
        del _recordings[key]


def capturing(device: torch.device) -> bool:
    """Whether what runs now on ``device`` goes into a graph, by any recorder."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def recorded(device: torch.device) -> bool:
    """Whether what runs now on ``device`` is captured, or is the warm-up of a capture. It must then use no cached tensor that
    may be freed, and compute everything that a replay is to compute again."""
    return capturing(device) or (device.type == "cuda" and _current(device) in _recordings)


def table(numbers: Sequence[int], device: torch.device) -> Tensor | None:
    """``numbers`` as a constant of the graph under capture; None outside of one, where the warm-up counts them, and in one that
    another recorder captures."""
    here = _recordings.get(_current(device)) if device.type == "cuda" else None
    return None if here is None else here.table(numbers)
