"""CUDA graphs of functions of tensors, captured once and replayed: one launch in place of thousands.

A graph replays kernels on fixed addresses. Whatever changes between two replays therefore lives in device tensors
that are written before the replay: images in a buffer of their own, numbers in `DeviceScalars`. What Python decides while
the function is captured is decided for good.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nvae_fast.ops import _capture

# Runs before a capture: libraries choose their algorithms and Triton compiles in the first, the optimizer's state is
# allocated, and the allocator has seen a complete run.
WARM_UP = 3


class Recorder(Protocol):
    """Interface of what captures: `CudaRecorder`, or in tests without a GPU an object that calls the function again."""

    def warm_up(self, body: Callable[[], Any]) -> Any:
        """Run `body` on the stream on which it would be captured."""
        ...

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, what `body` returned): the outputs are written by every replay."""
        ...


class CudaRecorder:
    """Captures on a side stream of `device`, where the warm-up runs too (the default stream cannot be captured)."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._needed = 0  # numbers in the tables of the rehearsals since the last capture

    def warm_up(self, body: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        rehearsal = _capture.Recording()
        with torch.cuda.stream(self.stream), _capture.recording(self.stream, rehearsal):
            result = body()
        self._needed += rehearsal.needed
        current.wait_stream(self.stream)
        for tensor in _tensors(result):
            tensor.record_stream(current)
        return result

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        memory = torch.empty(self._needed, dtype=torch.int64, device=self.stream.device)
        recording, self._needed = _capture.Recording(memory), 0
        with _capture.recording(self.stream, recording), torch.cuda.graph(graph, stream=self.stream):
            result = body()
        recording.fill()

        def replay(recording: _capture.Recording = recording) -> None:  # which the graph reads and this keeps
            graph.replay()

        return replay, result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


class CapturedFunction:
    """Holds the newest capture of one function, known by a key (shapes, or anything else that was decided for good).

    A new key drops the old capture: its memory goes back before the new one takes its own.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.captures = 0
        self._key: Hashable = None
        self._warm = 0
        self._replay: Callable[[], None] | None = None
        self._outputs: Any = None

    def reset(self) -> None:
        """Discard the capture, because the memory it refers to has been replaced."""
        self._key, self._warm, self._replay, self._outputs = None, 0, None, None

    def ready(self, key: Hashable) -> bool:
        """Whether `key` was warmed up often enough. Another key discards the capture and the count."""
        if key != self._key:
            self.reset()
            self._key = key
        return self._warm >= WARM_UP

    def warm_up(self, body: Callable[[], Any]) -> Any:
        """Run `body` once as warm-up."""
        result = self.recorder.warm_up(body)
        self._warm += 1
        return result

    def run(self, body: Callable[[], Any]) -> Any:
        """Replay, after capturing `body` if that was not done yet. The outputs are overwritten by the next replay."""
        if self._replay is None:
            self._replay, self._outputs = self.recorder.capture(body)
            self.captures += 1
        self._replay()
        return self._outputs


class DeviceScalars:
    """A few numbers and a seed on the device, written together in one copy before each run.

    `numbers`: 0-d float64 views, in the order of the names; `seed`: a 0-d int64 view.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        size = len(names) + 1
        self._names = tuple(names)
        self._host = torch.zeros(size, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(size, dtype=torch.float64, device=device)
        self.numbers = {name: self._device[index] for index, name in enumerate(names)}
        self.seed = self._device.view(torch.int64)[-1]
        # The source of the previous copy must have been read before it is written again.
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    @torch.no_grad()
    def write(self, seed: Tensor | int, **values: float) -> None:
        """Set every number and the seed (an int mod 2^64, or a 0-d int64 tensor on the device)."""
        if self._copied is not None:
            self._copied.synchronize()
        for index, name in enumerate(self._names):
            self._host[index] = values[name]
        if not isinstance(seed, Tensor):
            self._host.view(torch.int64)[-1] = (seed + 2**63) % 2**64 - 2**63
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if isinstance(seed, Tensor):
            self.seed.copy_(seed)


def layout(tensor: Tensor) -> Hashable:
    """Properties of an input that a capture fixes: shape, strides and dtype."""
    return tuple(tensor.shape), tensor.stride(), tensor.dtype
