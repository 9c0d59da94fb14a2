"""Who computes an op: PyTorch eagerly, through torch.compile, through its best library route, or this
package's kernel."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import nvae_fast as nf
from benchmarks.case import Case, Inputs, Outputs, Shape

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FORMAT_NAMES = {"contiguous": "NCHW", "channels_last": "channels_last"}
OURS = "nvae_fast"
SEED = 1234


class Random:
    """Float32 standard normals on the CPU, the same on every machine."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self._generator)


@dataclass
class Candidate:
    """One provider in one memory format.

    run: the computation; None when it is absent, with the ``reason``. backend: what ``use_backend`` is set to
        around it.
    """

    provider: str
    memory_format: str
    run: Callable[[Inputs], Outputs] | None
    backend: str = "reference"
    reason: str = ""
    library: bool = False
    compiled: bool = False
    noise_given: bool = False  # takes the noise as an input at the gate, having its own generator

    @property
    def name(self) -> str:
        return f"{self.provider} {FORMAT_NAMES[self.memory_format]}"

    @contextlib.contextmanager
    def context(self, device: torch.device) -> Iterator[None]:
        """The settings it runs under. Float32 means float32: TF32 is off for everyone."""
        with nf.use_backend(self.backend), cudnn_benchmark(self.library and device.type == "cuda"):
            yield


@contextlib.contextmanager
def cudnn_benchmark(on: bool) -> Iterator[None]:
    """``torch.backends.cudnn.benchmark`` set to ``on`` inside the block."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def absent_reason(op: str, device: torch.device) -> str:
    """Why this package has no kernel of its own for ``op`` on ``device``; empty when it has one."""
    with nf.use_backend("auto"):
        kernel = nf.backends()[op][device.type]
    if not kernel.startswith("reference"):
        return ""
    return kernel.removeprefix("reference").strip().removeprefix("(").removesuffix(")")


def candidates(
    case: Case, shape: Shape, device: torch.device, *, compile_reason: str = ""
) -> list[Candidate]:
    """Every provider of ``case``. ``compile_reason``: why torch.compile is left out (empty: it is not)."""
    found = []
    ours_absent = absent_reason(case.op, device)
    compile_reason = compile_reason or case.uncompiled
    for memory_format in case.memory_formats:
        found.append(Candidate("reference", memory_format, case.run))
        run = None if compile_reason else _compiled(case, shape, device)
        found.append(
            Candidate(
                "torch.compile", memory_format, run, reason=compile_reason, compiled=True, noise_given=True
            )
        )
        if case.library is not None:
            found.append(
                Candidate("library", memory_format, case.library.run, library=True, noise_given=True)
            )
        run = None if ours_absent else case.run
        found.append(Candidate(OURS, memory_format, run, backend="auto", reason=ours_absent))
    return found


def _compiled(case: Case, shape: Shape, device: torch.device) -> Callable[[Inputs], Outputs]:
    size = case.noise(shape) if case.noise else None
    if size is None:
        return torch.compile(case.run, dynamic=False)

    def drawing(inputs: Inputs) -> Outputs:
        # Ten rounds of Philox in integer tensors, inlined into every use of the noise, take the compiler
        # minutes: what it compiles gets PyTorch's own generator instead, as its users would have it.
        noise = inputs["noise"]
        if noise is None:
            noise = torch.randn(size, device=device, dtype=torch.float32)
        return case.run({**inputs, "noise": noise})

    return torch.compile(drawing, dynamic=False)


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds``. Only in the main thread, where signals arrive; no
    limit elsewhere, or for 0."""
    if (
        seconds <= 0
        or threading.current_thread() is not threading.main_thread()
        or not hasattr(signal, "SIGALRM")
    ):
        yield
        return

    message = f"{what} took more than {seconds:.0f} s"
    rung = False

    def ring(*_: Any) -> None:
        nonlocal rung
        rung = True
        raise TimeoutError(message)

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        # The compiler wraps what interrupts it in errors of its own.
        if rung:
            raise TimeoutError(message) from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    """Type and message of an error, for a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def build_inputs(case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    """The case's inputs, rounded to the dtype under test; contiguous."""
    placed: Inputs = {}
    for name, value in case.inputs(shape, Random(SEED)).items():
        if isinstance(value, torch.Tensor):
            value = value.to(device, value.dtype if name in case.keep else dtype)
        placed[name] = value
    return placed


def as_tuple(outputs: Outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


class Execution:
    """A computation bound to its inputs: ``forward()`` makes outputs, ``backward(outputs)`` gradients for
    fixed upstream gradients, rounded to the dtype under test so that every provider and the float64 truth
    receive the same numbers."""

    def __init__(
        self,
        case: Case,
        run: Callable[[Inputs], Outputs],
        inputs: Inputs,
        *,
        dtype: torch.dtype,
        memory_format: str = "contiguous",
        double: bool = False,
    ) -> None:
        self._case, self._run, self._dtype = case, run, dtype
        self._layout = MEMORY_FORMATS[memory_format]
        self.inputs: Inputs = {}
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().to(torch.float64) if double else value.detach()
                value = self._laid_out(value).requires_grad_(name in case.differentiable)
            self.inputs[name] = value
        self._leaves = [self.inputs[name] for name in case.differentiable]
        self._upstream: list[torch.Tensor] | None = None

    @property
    def differentiable(self) -> bool:
        """Whether there is a backward pass."""
        return bool(self._leaves)

    def _laid_out(self, value: torch.Tensor) -> torch.Tensor:
        return value.clone(memory_format=self._layout if value.dim() == 4 else torch.contiguous_format)

    def forward(self) -> tuple[torch.Tensor, ...]:
        return as_tuple(self._run(self.inputs))

    def backward(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Empty for a case without gradients."""
        if not self._leaves:
            return ()
        if self._upstream is None:
            self._upstream = [
                self._laid_out(Random(SEED + 1 + i)(*y.shape).to(self._dtype).to(y.device, y.dtype))
                for i, y in enumerate(outputs)
            ]
        return torch.autograd.grad(outputs, self._leaves, self._upstream)

    def both(self) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        outputs = self.forward()
        return outputs, self.backward(outputs)
