"""The GPU kernels of depthwise_conv2d, compiled for the CPU against the stand-in headers of this folder."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # enum class Dtype
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


@cache
def library() -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    if os.uname().machine != "x86_64":
        pytest.skip("the fibers are written for x86-64")
    path = Path(mkdtemp()) / "shim.so"
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command += [
        f"-I{HERE}",
        f"-I{ROOT / 'csrc'}",
        str(HERE / "fibers.cpp"),
        str(HERE / "depthwise_conv2d.cpp"),
    ]
    done = subprocess.run([*command, "-o", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    found = ctypes.CDLL(str(path))
    for result in ("workspace", "shared_memory"):
        for direction in ("forward", "backward"):
            getattr(found, f"shim_{direction}_{result}").restype = ctypes.c_int64
    return found


class Guarded:
    """Results with 256 bytes of sentinel on either side; fresh ones are NaN."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def bytes(self, count: int) -> torch.Tensor:
        buffer = torch.full((count + 512,), 0xFF, dtype=torch.uint8)
        buffer[:256] = buffer[256 + count :] = 0x5A
        self.buffers.append(buffer)
        return buffer[256 : 256 + count]

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> torch.Tensor:
        if channels_last:
            b, c, h, w = shape
            return self.tensor((b, h, w, c), dtype).permute(0, 3, 1, 2)
        count = torch.Size(shape).numel()
        return self.bytes(count * dtype.itemsize).view(dtype).view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert bool((buffer[:256] == 0x5A).all() and (buffer[-256:] == 0x5A).all()), (
                "written out of bounds"
            )


def pointer(t: torch.Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def describe(
    problem: Problem,
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
) -> list[torch.Tensor]:
    """Fills in a problem; the caller keeps what is returned alive."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    weight = weight.contiguous()
    hold = [x, weight]
    vectors = [None if v is None else v.to(accumulate(x.dtype)).contiguous() for v in (scale, shift)]
    problem.batch, problem.channels, problem.height, problem.width = x.shape
    problem.kernel, problem.stride, problem.dilation = weight.shape[-1], stride, dilation
    problem.upsample, problem.activation = upsample, ACTIVATIONS.index(activation)
    problem.channels_last, problem.masked = channels_last, taps is not None
    for tap in taps or ():
        problem.live[tap // 32] |= 1 << tap % 32
    problem.dtype, problem.weight_dtype = DTYPES.index(x.dtype), DTYPES.index(weight.dtype)
    problem.x, problem.weight = pointer(x), pointer(weight)
    problem.scale, problem.shift = pointer(vectors[0]), pointer(vectors[1])
    return [*hold, *(v for v in vectors if v is not None)]


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
) -> tuple[torch.Tensor, ...]:
    p, guard = Forward(), Guarded()
    hold = describe(p, x, weight, scale, shift, stride, dilation, upsample, activation, taps, channels_last)
    b, c, h, w = x.shape
    shape = (b, c, extent(h, stride, upsample), extent(w, stride, upsample))
    y = guard.tensor(shape, x.dtype, channels_last)
    mean, m2 = (guard.tensor((c if stats else 0,), accumulate(x.dtype)) for _ in range(2))
    p.y = pointer(y)
    if stats:
        p.mean, p.m2 = pointer(mean), pointer(m2)
    p.workspace = pointer(guard.bytes(library().shim_forward_workspace(ctypes.byref(p))))
    assert library().shim_forward(ctypes.byref(p)) == 0
    guard.check()
    del hold
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
) -> tuple[torch.Tensor | None, ...]:
    p, guard = Backward(), Guarded()
    hold = describe(p, x, weight, scale, shift, stride, dilation, upsample, activation, taps, channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for name, value in (("grad", grad), ("out", out)):
        if value is not None:
            hold.append(value.to(x.dtype).contiguous(memory_format=memory_format))
            setattr(p, name, pointer(hold[-1]))
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma), ("pivot", pivot)):
        if value is not None:
            hold.append(value.to(accumulate(x.dtype)).contiguous())
            setattr(p, name, pointer(hold[-1]))
    wide = accumulate(x.dtype)
    grad_x = guard.tensor(tuple(x.shape), x.dtype, channels_last) if need[0] else None
    grad_weight = guard.tensor(tuple(weight.shape), weight.dtype) if need[1] else None
    grad_scale, grad_shift = (guard.tensor((x.shape[1],), wide) if need[2] else None for _ in range(2))
    p.grad_x, p.grad_weight = pointer(grad_x), pointer(grad_weight)
    p.grad_scale, p.grad_shift = pointer(grad_scale), pointer(grad_shift)
    p.workspace = pointer(guard.bytes(library().shim_backward_workspace(ctypes.byref(p))))
    assert library().shim_backward(ctypes.byref(p)) == 0
    guard.check()
    return grad_x, grad_weight, grad_scale, grad_shift
