"""Issue slots of CUDA kernels, counted without a GPU: the instructions that SASS has for the lines of each region
(``NVAE_REGION``), times how often threads enter the region when the stand-in for CUDA runs the kernel."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import aot
import pytest

Frame = tuple[str, int]  # file name, line
FRAME = re.compile(r'//## File "([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True)
class Instruction:
    opcode: str
    frames: tuple[Frame, ...]  # where it comes from: innermost inlined function first, the kernel last


@dataclass
class Visits:
    """Of a region: threads that entered it, and copies of it in SASS per call of its function."""

    count: int = 0
    copies: int = 0


def disassembler() -> str:
    """nvdisasm of the CUDA toolkit, or the one that comes with Triton."""
    triton = find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    found = shutil.which("nvdisasm") or next((shutil.which("nvdisasm", path=str(f)) for f in folders), None)
    if found is None:
        pytest.skip("nvdisasm is not installed")
    return found


@cache
def instructions(source: Path, arch: str) -> dict[str, list[Instruction]]:
    """Each kernel of a .cu file, by its mangled name."""
    tool = disassembler()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        aot.nvcc(source, arch, ["-cubin", "-lineinfo", "-o", str(cubin)])
        command = [tool, "--print-line-info-inline", "--print-code", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[Instruction]] = {}
    frames: tuple[Frame, ...] = ()
    fresh: list[Frame] = []
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            current = kernels.setdefault(section[1], [])
        elif frame := FRAME.search(line):
            fresh.append((Path(frame[1]).name, int(frame[2])))
        elif found := INSTRUCTION.match(line):
            if fresh:
                frames, fresh = tuple(fresh), []
            if found[1] != "NOP":  # the padding after the end
                current.append(Instruction(found[1], frames))
    return kernels


@cache
def regions(path: Path) -> list[int]:
    """The mark whose region each line of a file belongs to (0: none). A region extends from its mark to the next one
    or to the end of the block, after which that of the enclosing block continues. A lambda starts without one, as
    functions do: it belongs to where it is called."""
    marks, blocks = [0], [0]
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        code = line.split("//")[0].strip()
        if code.startswith("NVAE_REGION("):
            blocks[-1] = number
        if code.startswith("}"):
            code = code[1:]
            blocks.pop()
        whole_lambda = "[&]" in code and code.count("{") == code.count("}") > 0
        marks.append(0 if whole_lambda else blocks[-1])
        for brace in re.findall("[{}]", code):
            if brace == "{":
                blocks.append(0 if "[&]" in code else blocks[-1])
            else:
                blocks.pop()
    return marks


def slots(kernel: list[Instruction], visits: dict[Frame, Visits], folder: Path) -> Counter[Frame]:
    """Issue slots of a run, in threads, by region."""

    def marks(frame: Frame) -> Frame | None:
        path = folder / frame[0]
        mark = regions(path)[frame[1]] if path.exists() else 0
        return (frame[0], mark) if mark else None

    members: dict[tuple[Frame, tuple[Frame, ...]], int] = defaultdict(int)
    for instruction in kernel:
        found = [(n, mark) for n, f in enumerate(instruction.frames) if (mark := marks(f))]
        if not found:  # the kernel's first and last line
            name, line = instruction.frames[-1]
            first = next(mark for mark in regions(folder / name)[line:] + regions(folder / name) if mark)
            found = [(0, (name, first))]
        if any(visits.get(mark, Visits()).count == 0 for _, mark in found):
            continue  # a branch that was not taken
        n, owner = next((n, mark) for n, mark in found if visits[mark].copies)
        members[owner, instruction.frames[n + 1 :]] += 1
    sites = Counter(owner for owner, _ in members)
    total: Counter[Frame] = Counter()
    for (owner, _), count in members.items():
        total[owner] += count * visits[owner].count / (visits[owner].copies * sites[owner])
    return total
