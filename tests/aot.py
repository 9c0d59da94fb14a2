"""Ahead-of-time compilation of GPU kernels on a machine without a GPU: what a kernel would use of each
architecture.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRITON_CAPABILITIES = (80, 90, 100)
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


def triton_usage(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int
) -> tuple[Usage, str]:
    """Compile a ``@triton.jit`` kernel for an NVIDIA capability (80, 90, ...); returns its usage and its PTX.

    ``signature`` gives the type of each argument that is no constant ("*fp32", "i32", ...). Pointers and
    integers are taken to be divisible by 16, as Triton finds most of them when it launches.
    """
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "src"):
        pytest.skip("triton was imported with TRITON_INTERPRET=1, which replaces its compiler")
    names = list(kernel.arg_names)
    types = {name: signature.get(name, "constexpr") for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in signature}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=divisible)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True}
    )
    ptx = compiled.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    ptxas = tools / "ptxas-blackwell"  # the newer of the two where there are two
    if not ptxas.exists():
        ptxas = tools / "ptxas"
    target = re.search(r"^\.target (\S+?),?\s", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx, encoding="utf-8")
        command = [str(ptxas), "-v", f"-arch={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    usages = _usages(done.stdout + done.stderr)
    assert len(usages) == 1
    return usages[0], ptx


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
