"""CUDA graphs, seen from the code that runs inside them: is this run recorded, and where do its numbers come from?

A graph under capture can neither copy from the host nor read what others may free. The recorder of this package
(:class:`nvae_fast.training.graph.CudaRecorder`) therefore announces its stream here: while it rehearses, so that what runs
takes the way that it will take under capture and loads every kernel of it; and while it captures, so that tables of numbers
become constants of the graph, which the host fills once before the first replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Stream = tuple[torch.device, int]  # a device and the number of a stream on it


class Constants:
    """Tables of int64 that one graph reads. They live as long as this object, which belongs to whoever replays the graph.

    They are allocated where ``outside``, a stream that is not captured, allocates: memory of the graph's own pool may hold
    another tensor earlier in the same graph, and each replay would overwrite the table with it.
    """

    def __init__(self, outside: torch.cuda.Stream) -> None:
        self._outside = outside
        self._pending: list[tuple[Tensor, Sequence[int]]] = []
        self._tensors: list[Tensor] = []

    def table(self, numbers: Sequence[int]) -> Tensor:
        """A table that will hold ``numbers`` once :meth:`fill` has run."""
        with torch.cuda.stream(self._outside):
            made = torch.empty(len(numbers), dtype=torch.int64, device=self._outside.device)
        self._pending.append((made, numbers))
        self._tensors.append(made)
        return made

    def fill(self) -> None:
        """Copy the numbers, after the capture and before the first replay."""
        for table, numbers in self._pending:
            table.copy_(torch.tensor(numbers, dtype=torch.int64))
        self._pending.clear()


# Of the streams that record: the constants of the graph under capture, None while rehearsing. By stream and not by thread,
# because autograd runs a backward pass in a thread of its own, on the stream of the forward pass.
_recorders: dict[Stream, Constants | None] = {}


def _current(device: torch.device) -> Stream:
    stream = torch.cuda.current_stream(device)
    return stream.device, stream.cuda_stream


@contextlib.contextmanager
def recording(stream: torch.cuda.Stream, constants: Constants | None = None) -> Iterator[None]:
    """What runs on ``stream`` is recorded into a graph with ``constants``, or without them rehearses a recording."""
    key = stream.device, stream.cuda_stream
    _recorders[key] = constants
    try:
        yield
    finally:
        del _recorders[key]


def capturing(device: torch.device) -> bool:
    """Whether what runs now on ``device`` goes into a graph, whoever captures it."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def recorded(device: torch.device) -> bool:
    """Whether what runs now on ``device`` goes into a graph, or rehearses it: it must compute what a replay shall compute
    anew, and use nothing that others may drop."""
    return capturing(device) or (device.type == "cuda" and _current(device) in _recorders)


def constants(device: torch.device) -> Constants | None:
    """The constants of the graph under capture; None outside of one, and in one that another recorder captures."""
    return _recorders.get(_current(device)) if capturing(device) else None
