"""Triton launches as a launcher makes them, recorded on a machine without a GPU and compiled with exactly what Triton would
compile for them: types, specialisation, constants and options all come from the recorded call."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@dataclass(frozen=True)
class Launch:
    """One call of a ``@triton.jit`` kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def programs(self) -> int:
        count = 1
        for extent in self.grid:
            count *= extent
        return count


def recorded(launcher: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Launch]:
    """The launches of one call; nothing runs, and tensors may be on the meta device."""
    jit = pytest.importorskip("triton").runtime.jit
    found: list[Launch] = []

    def run(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert not warmup
        found.append(Launch(self, tuple(grid), given, options))

    with mock.patch.object(jit.JITFunction, "run", run):
        launcher(*args, **kwargs)
    return found


def bound(launch: Launch, backend: Any) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """Arguments by name, the specialisation of each, and options, from the binder that Triton generates."""
    from triton.runtime.jit import create_function_from_signature

    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    return binder(*launch.args, **launch.kwargs)


def compiled(launch: Launch, capability: int) -> Any:
    """What Triton's JIT would load for this launch on a device of that capability (80, 90, ...)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    arguments, specialization, options = bound(launch, backend)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.kwargs, arguments, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


@dataclass(frozen=True)
class Binary:
    """What a compiled kernel takes on the device: 32-bit registers a thread, bytes of stack (all spills are there), bytes of
    shared memory a program, and its instructions, the padding at the end left out."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: tuple[str, ...]
    ptx: str

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return sum(re.search(pattern, text) is not None for text in self.instructions)

    def slots(self, launch: Launch, elements: int) -> float:
        """Issue slots for each of ``elements`` results, for a kernel in which no loop runs more than once."""
        threads = 32 * launch.kwargs["num_warps"] * launch.programs
        return len(self.instructions) * threads / elements


def binary(launch: Launch, capability: int) -> Binary:
    """The launch compiled and taken apart, with the tools that Triton brings."""
    import triton

    kernel = compiled(launch, capability)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [str(tool), "-sass", "-res-usage", cubin.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    assert usage is not None, done.stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", done.stdout, re.MULTILINE)
    while instructions and re.match(r"NOP|BRA 0x|BRA `", instructions[-1]):
        instructions.pop()
    assert instructions, done.stdout
    return Binary(
        int(usage[1]), int(usage[2]), kernel.metadata.shared, tuple(instructions), kernel.asm["ptx"]
    )
