"""The GPU kernels of depthwise_conv2d on the CPU: a stand-in for CUDA whose checker watches every access.

Threads are fibers that run from barrier to barrier, warps and lanes in random order (``shim_seed``). The kernels are
compiled with -fsanitize=thread,alignment, but the functions that such code calls at each access are the stand-in's own.
A report names the kernel, block, thread, byte offset and line. Reported are:

- races: two threads access the same bytes, one of them writes, and no barrier, ``__syncwarp`` or shuffle orders the two;
  in shared memory and in results, there between the blocks of a launch, too;
- accesses out of bounds of the launch's dynamic shared memory and of the buffers given to it, reads and writes; writes
  to inputs;
- vector accesses and cp.async at addresses that are no multiple of their type's alignment;
- cp.async: the data arrives when the thread that asked for it waits; until then nobody, itself included, may touch it;
- results read before they were written. Shared memory that nobody wrote holds NaN: it may be read, but not used;
- threads of a block at different barriers, or gone while others wait; lanes missing in a collective of their warp;
- launches that the device refuses: ``Problem.device`` chooses one of four GPUs by their shared memory for a block.

It cannot see: what only real timing or the memory model shows (a race in a spin-wait, a missing ``__threadfence``),
atomics, textures and caches; PTX, as code under ``__CUDA_ARCH__`` is not compiled; an access past one array that stays
in its buffer, or hits another buffer (they are at least 2 KB apart); approximate instructions, registers, spills and
bank conflicts. Static shared memory is checked for races, but not for its bounds.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # enum class Dtype
DEVICES = {
    "H200": 227 * 1024,
    "A100": 163 * 1024,
    "L40": 99 * 1024,
}  # shared memory of a block, as devices.cpp
T4 = 3  # a device whose 64 KB are too little
STEPS = {  # stride, dilation, upsample
    "plain": (1, 1, 1),
    "stride": (2, 1, 1),
    "up": (1, 1, 2),
    "dilated": (1, 2, 1),
    "both": (2, 2, 1),
    "up dilated": (1, 2, 2),
}
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 20, 24, 28, 32, 33, 48, 64, 128, 256)
SIZES = [(b, c, w, w) for w in WIDTHS for b in (1, 2, 3, 4, 8, 32, 200) for c in (30, 32)]
ACTIVATIONS = (None, "swish", "elu")
FIRST, LAST = list(range(13)), list(range(12, 25))  # the taps of the causal 5x5 kernels


class Problem(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_int64) for n in ("batch", "channels", "height", "width", "kernel")),
        *((n, ctypes.c_int64) for n in ("stride", "dilation", "upsample", "activation")),
        *((n, ctypes.c_int64) for n in ("channels_last", "device", "masked")),
        ("live", ctypes.c_uint32 * 32),
        *((n, ctypes.c_int) for n in ("dtype", "weight_dtype")),
        *((n, ctypes.c_void_p) for n in ("x", "weight", "scale", "shift")),
    ]


class Forward(Problem):
    _fields_ = [(n, ctypes.c_void_p) for n in ("y", "mean", "m2", "workspace")]


class Backward(Problem):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("grad", "out", "alpha", "beta", "gamma", "pivot")),
        *((n, ctypes.c_void_p) for n in ("grad_x", "grad_weight", "grad_scale", "grad_shift", "workspace")),
    ]


SANITIZE = ["-O1", "-g1", "-fsanitize=thread,alignment"]  # the kernels; nothing of a sanitizer is linked


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def temporary_folder() -> Path:
    """One that lasts as long as the process: addr2line reads the library in it."""
    folder = mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def build(source: Path, csrc: Path = ROOT / "csrc", *flags: str) -> ctypes.CDLL:
    """The kernels that `source` includes, with the stand-in, as a library."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    if os.uname().machine != "x86_64":
        pytest.skip("the fibers are written for x86-64")
    folder = temporary_folder()
    command = [compiler, "-std=c++17", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += [f"-I{HERE}", f"-I{csrc}", *flags]
    run([*command, *SANITIZE, "-c", str(source), "-o", str(folder / "kernels.o")])
    stand_in = [str(HERE / f"{name}.cpp") for name in ("scheduler", "checker", "devices")]
    path = folder / "shim.so"
    run([*command, "-O2", "-shared", *stand_in, str(folder / "kernels.o"), "-ldl", "-o", str(path)])
    found = ctypes.CDLL(str(path))
    for name in ("shim_reports", "shim_launches", "shim_error_text"):
        getattr(found, name).restype = ctypes.c_char_p
    for result in ("workspace", "shared_memory"):
        for direction in ("forward", "backward"):
            if hasattr(found, f"shim_{direction}_{result}"):
                getattr(found, f"shim_{direction}_{result}").restype = ctypes.c_int64
    return found


LIBRARIES: list[ctypes.CDLL] = []


def library() -> ctypes.CDLL:
    """The kernels of depthwise_conv2d."""
    if not LIBRARIES:
        LIBRARIES.append(build(HERE / "depthwise_conv2d.cpp"))
    return LIBRARIES[-1]


@contextmanager
def using(other: ctypes.CDLL) -> Iterator[None]:
    """Kernels of another build in forward() and backward()."""
    LIBRARIES.append(other)
    try:
        yield
    finally:
        LIBRARIES.pop()


def reports(of: ctypes.CDLL) -> str:
    """What the checker found since the last call, with places in the source where addr2line is at hand."""
    text, tool = of.shim_reports().decode(), shutil.which("addr2line")
    if tool is None:
        return text

    def place(found: re.Match) -> str:
        at = run([tool, "-e", of._name, f"{int(found[1]):#x}"]).split(" ")[0].strip()
        return f" [{Path(at).name}]"

    return re.sub(r" @(\d+)$", place, text, flags=re.MULTILINE)


class Memory:
    """The buffers of a launch; those of four dimensions `offset` elements from an aligned address. Kernels must not
    touch a byte that belongs to none of them."""

    def __init__(self, of: ctypes.CDLL, offset: int = 0) -> None:
        self.library, self.offset = of, offset
        self.buffers: list[torch.Tensor] = []
        of.shim_forget_buffers()

    def fresh(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, result: bool = True
    ) -> torch.Tensor:
        """NaN everywhere, the margin too."""
        size, margin = torch.Size(shape).numel() * dtype.itemsize, 1024
        buffer = torch.full((size + 2 * margin + 64,), 0xFF, dtype=torch.uint8)
        self.buffers.append(buffer)
        begin = margin + -buffer.data_ptr() % 64
        begin += self.offset * dtype.itemsize if len(shape) == 4 else 0
        address = ctypes.c_void_p(buffer.data_ptr() + begin)
        self.library.shim_buffer(name.encode(), address, ctypes.c_size_t(size), int(result))
        return buffer[begin : begin + size].view(dtype).view(shape)

    def fresh_map(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
    ) -> torch.Tensor:
        if not channels_last:
            return self.fresh(name, shape, dtype)
        b, c, h, w = shape
        return self.fresh(name, (b, h, w, c), dtype).permute(0, 3, 1, 2)

    def given(self, name: str, value: torch.Tensor | None) -> int | None:
        """Where a copy of a contiguous (or channels_last) tensor is that kernels may only read."""
        if value is None:
            return None
        dense = value.as_strided((value.numel(),), (1,))
        copy = self.fresh(
            name, (1, 1, 1, len(dense)) if value.dim() == 4 else (len(dense),), value.dtype, False
        )
        copy.copy_(dense)
        return copy.data_ptr()


class Failure(AssertionError):
    """What the checker found, or the error that a launch returned."""


def launched(of: ctypes.CDLL, error: int) -> None:
    found = reports(of)
    if error or found:
        raise Failure(f"{of.shim_error_text(error).decode()}\n{found}")


def pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(
    problem: Problem,
    memory: Memory,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    stride: int,
    dilation: int,
    upsample: int,
    activation: str | None,
    taps: list[int] | None,
    channels_last: bool,
    device: int,
) -> None:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    problem.batch, problem.channels, problem.height, problem.width = x.shape
    problem.kernel, problem.stride, problem.dilation = weight.shape[-1], stride, dilation
    problem.upsample, problem.activation = upsample, ACTIVATIONS.index(activation)
    problem.channels_last, problem.masked = channels_last, taps is not None
    problem.device = device
    for tap in taps or ():
        problem.live[tap // 32] |= 1 << tap % 32
    problem.dtype, problem.weight_dtype = DTYPES.index(x.dtype), DTYPES.index(weight.dtype)
    problem.x = memory.given("x", x.contiguous(memory_format=memory_format))
    problem.weight = memory.given("weight", weight.contiguous())
    for name, value in (("scale", scale), ("shift", shift)):
        setattr(problem, name, memory.given(name, None if value is None else value.to(accumulate(x.dtype))))


def extent(n: int, stride: int, upsample: int) -> int:
    return -(-n * upsample // stride)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    activation: str | None = None,
    stats: bool = False,
    taps: list[int] | None = None,
    channels_last: bool = True,
    device: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor, ...]:
    """Maps begin `offset` elements from an aligned address."""
    p, memory = Forward(), Memory(library(), offset)
    step = (stride, dilation, upsample)
    describe(p, memory, x, weight, scale, shift, *step, activation, taps, channels_last, device)
    b, c, h, w = x.shape
    shape = (b, c, extent(h, stride, upsample), extent(w, stride, upsample))
    y = memory.fresh_map("y", shape, x.dtype, channels_last)
    mean, m2 = (memory.fresh(name, (c if stats else 0,), accumulate(x.dtype)) for name in ("mean", "m2"))
    p.y = pointer(y)
    if stats:
        p.mean, p.m2 = pointer(mean), pointer(m2)
    size = library().shim_forward_workspace(ctypes.byref(p))
    p.workspace = pointer(memory.fresh("workspace", (size,), torch.uint8))
    launched(library(), library().shim_forward(ctypes.byref(p)))
    return y, mean, m2


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    activation: str | None = None,
    taps: list[int] | None = None,
    channels_last: bool = True,
    out: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    pivot: torch.Tensor | None = None,
    need: tuple[bool, bool, bool] = (True, True, True),
    device: int = 0,
    offset: int = 0,
) -> tuple[torch.Tensor | None, ...]:
    p, memory = Backward(), Memory(library(), offset)
    step = (stride, dilation, upsample)
    describe(p, memory, x, weight, scale, shift, *step, activation, taps, channels_last, device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for name, value in (("grad", grad), ("out", out)):
        if value is not None:
            value = value.to(x.dtype).contiguous(memory_format=memory_format)
        setattr(p, name, memory.given(name, value))
    wide = accumulate(x.dtype)
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma), ("pivot", pivot)):
        setattr(p, name, memory.given(name, None if value is None else value.to(wide)))
    shape, c = tuple(x.shape), x.shape[1]
    grad_x = memory.fresh_map("grad_x", shape, x.dtype, channels_last) if need[0] else None
    grad_weight = memory.fresh("grad_weight", tuple(weight.shape), weight.dtype) if need[1] else None
    grad_scale = memory.fresh("grad_scale", (c,), wide) if need[2] else None
    grad_shift = memory.fresh("grad_shift", (c,), wide) if need[2] else None
    p.grad_x, p.grad_weight = pointer(grad_x), pointer(grad_weight)
    p.grad_scale, p.grad_shift = pointer(grad_scale), pointer(grad_shift)
    size = library().shim_backward_workspace(ctypes.byref(p))
    p.workspace = pointer(memory.fresh("workspace", (size,), torch.uint8))
    launched(library(), library().shim_backward(ctypes.byref(p)))
    return grad_x, grad_weight, grad_scale, grad_shift


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes of dynamic shared memory


def plan(
    size: tuple[int, int, int, int],
    kernel: int,
    dtype: torch.dtype,
    step: tuple[int, int, int] = (1, 1, 1),
    device: int = 0,
    offset: int = 0,
) -> list[Launch]:
    """The launches of a forward and a backward call with all arguments, of maps that nobody allocates: nothing
    runs, but a launch that the device would refuse fails."""
    calls, of = [], library()
    for problem in (Forward(), Backward()):
        p = ctypes.pointer(problem)
        problem.batch, problem.channels, problem.height, problem.width = size
        problem.kernel, problem.device, problem.channels_last = kernel, device, 1
        problem.stride, problem.dilation, problem.upsample = step
        problem.dtype = problem.weight_dtype = DTYPES.index(dtype)
        names = [
            name for c in type(problem).__mro__[:2] for name, kind in c._fields_ if kind is ctypes.c_void_p
        ]
        for name in names:
            setattr(problem, name, 4096 + offset * dtype.itemsize)
        calls.append((of.shim_forward if isinstance(problem, Forward) else of.shim_backward, p))
    of.shim_launches()
    of.shim_dry(1)
    try:
        for call, p in calls:
            launched(of, call(p))
    finally:
        of.shim_dry(0)
    lines = of.shim_launches().decode().splitlines()
    return [Launch(name, *map(int, rest)) for name, *rest in (line.split("\t") for line in lines)]
