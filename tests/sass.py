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
    block: int  # basic block
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
    block = 0
    for line in text.splitlines():
        if section := re.match(r"\.text\.(\S+):", line):
            current = kernels.setdefault(section[1], [])
        elif line.startswith(".L_"):
            block += 1
        elif frame := FRAME.search(line):
            fresh.append((Path(frame[1]).name, int(frame[2])))
        elif found := INSTRUCTION.match(line):
            if fresh:
                frames, fresh = tuple(fresh), []
            if found[1] != "NOP":  # the padding after the end
                current.append(Instruction(found[1], block, frames))
            block += found[1] in ("BRA", "EXIT")
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
    """Issue slots of a run, in threads, by region.

    A basic block runs as often as the region that most of its instructions come from: optimisers move some to where
    another region is, and give instructions of two branches that they merge the line of one of them.
    """
    nowhere = ("", 0)  # of branches that were not taken

    def mark(frame: Frame) -> Frame | None:
        path = folder / frame[0]
        line = regions(path)[frame[1]] if path.is_file() else 0
        return (frame[0], line) if line else None

    def owner(frames: tuple[Frame, ...]) -> tuple[Frame, tuple[Frame, ...]]:
        """The region of an instruction, and from where the function that holds it was called."""
        found = [(n, m) for n, frame in enumerate(frames) if (m := mark(frame))]
        if not found:  # the kernel's first and last line
            name, line = frames[-1]
            marks = regions(folder / name)
            found = [(len(frames), (name, next(m for m in marks[line:] + marks if m)))]
        if any(visits.get(m, Visits()).count == 0 for _, m in found):
            return nowhere, ()
        n, region = next((n, m) for n, m in found if visits[m].copies)
        return region, frames[n + 1 :]

    blocks: dict[int, Counter[Frame]] = defaultdict(Counter)
    sites: dict[Frame, set[tuple[Frame, ...]]] = defaultdict(set)
    for instruction in kernel:
        region, site = owner(instruction.frames)
        blocks[instruction.block][region] += 1
        sites[region].add(site)
    total: Counter[Frame] = Counter()
    for votes in blocks.values():
        region = votes.most_common(1)[0][0]
        if region != nowhere:
            runs = visits[region].count / (visits[region].copies * len(sites[region]))
            total[region] += votes.total() * runs
    return total
