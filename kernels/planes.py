"""How the kernels over planes (channel statistics, batch norm, affine maps) walk maps (B, C, H, W), and their launches.

A program works on a tile of ``BC`` channels x ``BP`` pixels of one sample, ``TIMES`` times along the pixels. Maps are dense
in one of the two memory formats, each in its own: a tile of one is brought to the layout of the other by the compiler,
through shared memory. Sums over pixels are left in a workspace (parts, B, C), which a second stage adds up in order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from nvae_fast.kernels.launch import check_dtype, launch
from nvae_fast.kernels.map_launch import sum_chunks

# Launch choices, predicted from counts of bytes; no GPU has timed them yet. 8 elements a thread.
ELEMENTS = 1024
MIXED_CHANNELS = 32  # of a tile where memory formats meet: runs of 32 either way
LONGEST = 16  # tiles that one program adds up
PROGRAMS = 1024  # fewer programs than this are not made fewer by adding up
_INT32_LIMIT = 2**31 - 2**20


class Planes(NamedTuple):
    """One launch over the planes of a map; the first fields are what every kernel takes."""

    channels: int
    pixels: int
    c_tiles: int
    parts: int  # chunks of pixels
    batches: int
    device: torch.device
    constants: dict[str, Any]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self[:4]

    @property
    def empty(self) -> bool:
        return self.batches * self.channels * self.pixels == 0

    def run(self, kernel: Any, *args: Any, **constants: Any) -> None:
        programs = self.parts * self.c_tiles * self.batches
        launch(kernel, programs, self.device, *args, *self.sizes, **self.constants, **constants)

    def workspace(self, kinds: int) -> torch.Tensor:
        """(kinds, parts, B, C), uninitialised."""
        size = (kinds, self.parts, self.batches, self.channels)
        return torch.empty(size, dtype=torch.float32, device=self.device)


def is_last(t: torch.Tensor) -> bool:
    """The rule by which maps take their memory format, see nvae_fast/ops/_squash.py."""
    return t.stride(1) == 1 and t.shape[2] * t.shape[3] > 1


def dense(t: torch.Tensor, last: bool) -> torch.Tensor:
    """``t`` in the memory format asked for, a copy only when it is not."""
    return t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def either(t: torch.Tensor, last: bool) -> tuple[torch.Tensor, bool]:
    """``t`` as it is where it is dense in either format, else a copy in the one given; and which it is in."""
    if not dense_in(t, last) and dense_in(t, not last):
        return t, not last
    return dense(t, last), last


def dense_in(t: torch.Tensor, last: bool) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def empty_like(t: torch.Tensor, last: bool) -> torch.Tensor:
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format)


def plan(op: str, x: torch.Tensor, *, by_channels: bool, mixed: bool = False, sums: bool = False) -> Planes:
    """How to launch a kernel over maps of the shape of x, most of whose accesses run along channels or pixels."""
    check_dtype(op, x.dtype)
    b, c, h, w = x.shape
    pixels = h * w
    if mixed:
        bc = min(next_power_of_2(c), MIXED_CHANNELS)
    elif by_channels:
        bc = min(next_power_of_2(c), 128)
    else:
        bc = max(1, ELEMENTS // next_power_of_2(max(pixels, 1)))
    bc = max(1, min(bc, next_power_of_2(max(c, 1))))
    bp = max(1, min(ELEMENTS // bc, next_power_of_2(max(pixels, 1))))
    c_tiles, tiles = -(-c // bc), -(-pixels // bp)
    times = 1
    while sums and times < min(LONGEST, tiles) and b * c_tiles * -(-tiles // (2 * times)) >= PROGRAMS:
        times *= 2
    offsets64 = x.numel() + 2 * ELEMENTS * times > _INT32_LIMIT
    constants = {"BC": bc, "BP": bp, "TIMES": times, "OFFSETS64": offsets64}
    return Planes(c, pixels, c_tiles, -(-tiles // times), b, x.device, constants)


@triton.jit
def program(c_tiles, parts, BC: tl.constexpr, BP: tl.constexpr, TIMES: tl.constexpr, OFFSETS64: tl.constexpr):
    """This program's sample, channels (BC, 1), part, and first pixel."""
    index = tl.program_id(0)
    if OFFSETS64:
        index = index.to(tl.int64)
    part = index % parts
    rest = index // parts
    c = (rest % c_tiles) * BC + tl.arange(0, BC)[:, None]
    return rest // c_tiles, c, part, part * (TIMES * BP)


@triton.jit
def offsets(b, c, p, channels, pixels, LAST: tl.constexpr):
    """Of a tile in a dense map."""
    if LAST:
        return (b * pixels + p) * channels + c
    else:
        return (b * channels + c) * pixels + p


@triton.jit
def coefficient(pointer, b, c, batch, channels):
    """(BC, 1) of coefficients (B, C), or (C) with ``batch`` 0."""
    return tl.load(pointer + b * batch + c, mask=c < channels, other=0.0).to(tl.float32)


@triton.jit
def store_partial(workspace, kind, total, b, c, part, batches, channels, parts):
    """Sums of a part (BC, BP) where the second stage finds them."""
    place = ((kind * parts + part) * batches + b) * channels + c
    tl.store(workspace + place, tl.sum(total, 1, keep_dims=True), mask=c < channels)


def add_up(workspace: torch.Tensor, per_sample: bool) -> tuple[torch.Tensor, ...]:
    """The second stage: (kinds, parts, B, C) -> kinds tensors (B, C) or (C)."""
    kinds, parts, batches, channels = workspace.shape
    shape = (batches, channels) if per_sample else (channels,)
    rows, chunks = (batches * channels, parts) if per_sample else (channels, parts * batches)
    outputs = tuple(torch.empty(shape, dtype=torch.float32, device=workspace.device) for _ in range(kinds))
    sum_chunks(workspace, outputs, rows, chunks)
    return outputs
