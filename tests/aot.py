"""Ahead-of-time compilation of CUDA sources on a machine without a GPU: what a kernel would use of each architecture. For
Triton kernels see launches.py."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA_ARCHS = ("sm_80", "sm_90a", "sm_100")


@dataclass(frozen=True)
class Usage:
    """What ptxas says a kernel takes: 32-bit registers a thread, bytes of local memory for spills, bytes of
    stack.
    """

    registers: int
    spill_bytes: int
    stack_bytes: int


def _usages(ptxas_output: str) -> list[Usage]:
    memory = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    frames = re.findall(memory, ptxas_output)
    registers = re.findall(r"Used (\d+) registers", ptxas_output)
    assert len(frames) == len(registers), f"ptxas said something new:\n{ptxas_output}"
    return [
        Usage(int(r), int(stores) + int(loads), int(stack))
        for r, (stack, stores, loads) in zip(registers, frames, strict=True)
    ]


def nvcc(source: Path, arch: str, flags: list[str]) -> str:
    """Compile a .cu file for ``arch`` ("sm_90a") as setup.py does; what the compiler says. Skips without nvcc."""
    program = shutil.which("nvcc")
    if program is None:
        pytest.skip("nvcc is not installed")
    command = [program, "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
    command += ["-Xcompiler", "-Wall,-Wextra"]
    command += ["-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}", str(source), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def nvcc_usages(source: Path, arch: str) -> list[Usage]:
    """Compile a .cu file to an object for ``arch``; the usage of each kernel in it. Skips without nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        output = nvcc(source, arch, ["-Xptxas", "-v", "-c", "-o", str(Path(folder) / "object.o")])
    assert "warning" not in output, output
    return _usages(output)
