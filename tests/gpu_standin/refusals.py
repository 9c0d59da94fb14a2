"""What the stand-in driver refuses, each asked for once; the errors as JSON."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from typing import Any

from start import device, driver, torch, triton

tl = triton.language
RTX = 101376  # bytes of shared memory that a block may have, of consumer GPUs
driver.device(shared=RTX)


@triton.jit
def copy_kernel(out, x, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at))


@triton.jit
def square_kernel(out, x, SIZE: tl.constexpr):
    """Both factors are in shared memory."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + row * SIZE + column)
    tl.store(out + row * SIZE + column, tl.dot(tile, tile))


class Pointer:
    """An argument with an address of its own choosing."""

    dtype = torch.float32

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address

    def element_size(self) -> int:
        return 4


def error(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as found:
        return f"{type(found).__name__}: {found}"
    return ""


def launch(grid: tuple[int, ...] = (1,), *, size: int = 256, source: Any = None) -> None:
    copy_kernel[grid](x, x if source is None else source, SIZE=size)


def in_capture(call: Callable[[], object]) -> str:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        return error(call)


def raw(function: int, threads: int, shared: int = 0) -> int:
    config = (ctypes.c_uint * 14)(1, 1, 1, threads, 1, 1, shared)
    return driver.library.cuLaunchKernelEx(config, ctypes.c_void_p(function), None, None)


x = torch.empty(256 * 256, device="cuda")
gone = torch.empty(1 << 22, device="cuda")
address = gone.data_ptr()
del gone
loaded = copy_kernel.warmup(x, x, SIZE=256, grid=(1,))
loaded._init_handles()
found: dict[str, Any] = {
    "launch": error(launch),
    "launch in a capture": in_capture(launch),
    "module load in a capture": in_capture(lambda: launch(size=512)),
    "grid": error(lambda: launch((1, 65536))),
    "pointer to the host": error(lambda: launch(source=torch.empty(256))),
    "pointer past the end": error(lambda: launch(source=Pointer(x.data_ptr() + 4 * x.numel() + 64))),
    "pointer to freed memory": error(lambda: launch(source=Pointer(address))),
    "misaligned pointer": error(lambda: launch(source=Pointer(x.data_ptr() + 2))),
    "too much shared memory": error(lambda: square_kernel[(1,)](x, x, SIZE=256)),
    "codes": {
        "launch": raw(loaded.function, 128),
        "too many threads": raw(loaded.function, 2048),
        "threads it was not compiled for": raw(loaded.function, 64),
        "more shared memory than asked for": raw(loaded.function, 128, 49153),
        "no function": raw(8, 128),
    },
}
waiting = torch.cuda.CUDAGraph()
with torch.cuda.graph(waiting):
    x[0].item()
    torch.tensor([1.0, 2.0]).to("cuda")
    x[[1, 2]] = 0.0
    x[x > 0]
    x.nonzero()
    torch.full((), 3.0, device="cuda")  # a kernel, no copy
    x[1:3] = 1.0
found["waits"] = waiting.capture.events
outside = torch.empty(8, device="cuda")
with torch.cuda.graph(reader := torch.cuda.CUDAGraph()):
    y = outside + 1
found["graph"] = error(reader.replay)
y.add_(1)
found["pool"] = device.events[-1]
del outside
found["graph of freed memory"] = error(reader.replay)
print("RESULT " + json.dumps({**found, "report": driver.report()}))
