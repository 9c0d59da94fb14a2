"""Launching kernels over maps (B, Z, H, W): strides, launch choices, outputs. The kernels' side is kernels/maps.py."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from nvae_fast.kernels.maps import Tile, sum_chunks_kernel

# Launch choices, predicted from counts of bytes and instructions; no GPU has timed them yet.
# A tile of rows: 8 elements a thread, two 16-byte accesses in float32 and one in bfloat16, and few enough registers for
# some 16 warps on a multiprocessor, whose loads in flight cover the latency of memory.
ROW_TILE, ROW_WARPS = 1024, 4
# Lanes of a tile of channels, one to a thread, 16 elements each: the fewest that keep nearly all lanes busy. With 512
# threads a program, a thread would have 128 registers, and the backward pass takes 170.
LANE_CHOICES = (128, 256)
# (tiles of the map, tiles that one program adds up): adding across threads at the end costs about a third of a tile, but
# a multiprocessor wants several programs, and an H200 has 132 multiprocessors.
SUM_TILES = ((32768, 8), (16384, 4), (8192, 2), (0, 1))
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
# Said explicitly, because Triton's default differs between versions.
_FUSION = {"enable_fp_fusion": True}
_INT32_LIMIT = 2**31 - 2**22  # of offsets: leaves room for the masked elements of the last tile


class View(NamedTuple):
    """A tensor as kernels walk it; strides in elements, see the module's docstring."""

    tensor: torch.Tensor | None
    batch: int
    step: int


_NOTHING = View(None, 0, 0)


class Map:
    """The map (B, Z, H, W) of an op, and the order in which its kernels walk it: that of the tensor ``like``, (B, Z, H, W)
    or, packed, (B, 2Z, H, W). Raises TypeError for float64, which is the reference's."""

    def __init__(self, op: str, like: torch.Tensor, *, packed: bool) -> None:
        if like.dtype not in FLOATING:
            raise TypeError(
                f"{op}: the GPU kernel computes in float32; expected one of {FLOATING}, got {like.dtype}"
            )
        b, channels, h, w = like.shape
        self.batches, self.channels, self.pixels = b, channels // 2 if packed else channels, h * w
        self.size, self.device, self.dtype = (h, w), like.device, like.dtype
        adjacent = like.stride(1) == 1
        self.by_channels = adjacent or self.pixels == 1
        self.format = torch.channels_last if adjacent and self.pixels > 1 else torch.contiguous_format

    @property
    def count(self) -> int:
        return self.batches * self.channels * self.pixels

    def empty(self, copies: int = 1, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(B, copies Z, H, W), uninitialised, in the memory format of the op's outputs."""
        shape = (self.batches, copies * self.channels, *self.size)
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device, memory_format=self.format)

    def view(self, t: torch.Tensor | None) -> View:
        """``t`` as it is where its strides can be walked, else a copy laid out like the map. None stays None."""
        if t is None:
            return _NOTHING
        h, w = self.size
        pixel = t.stride(3) if w > 1 else t.stride(2)
        even = h <= 1 or w <= 1 or t.stride(2) == w * t.stride(3)
        if self.by_channels:
            fits = even and (t.stride(1) == 1 or t.shape[1] == 1)
        else:
            fits = even and pixel == 1
        if fits:
            step = (pixel if self.pixels > 1 else 0) if self.by_channels else t.stride(1)
            return View(t, t.stride(0) if self.batches > 1 else 0, step)
        copy = t.contiguous(
            memory_format=torch.channels_last if self.by_channels else torch.contiguous_format
        )
        return View(copy, *self.dense(t.shape[1] // self.channels)[1:])

    def dense(self, copies: int = 1) -> View:
        """The strides of what :meth:`empty` makes."""
        channels = copies * self.channels
        return View(None, channels * self.pixels, channels if self.by_channels else self.pixels)

    def launch(self, *views: View, sums: bool) -> Launch:
        """How to launch a kernel that touches ``views`` and dense maps, with or without sums over pixels."""
        strides = [self.channels, *(stride for view in views for stride in (view.batch, view.step))]
        width = 4 if self.by_channels else 1
        while any(stride % width for stride in strides):
            width //= 2
        tensors = [view.tensor for view in views if view.tensor is not None]
        furthest = [sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in tensors]
        access = 4 if self.dtype == torch.float32 else 8
        wide = max(2 * self.count, *furthest, 0) > _INT32_LIMIT
        plan = _plan(self.batches, self.channels, self.pixels, self.by_channels, width, access, wide, sums)
        return Launch(self, *plan)


@dataclass(frozen=True)
class Launch:
    """One launch over a map: the tile, chunks of pixels, programs along the one axis of the grid."""

    space: Map
    tile: Tile
    chunks: int
    programs: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Samples, runs of channels, pixels, chunks and rows: what every kernel takes."""
        runs = self.space.channels // self.unit
        return (
            self.space.batches,
            runs,
            self.space.pixels,
            self.chunks,
            self.space.batches * self.space.channels,
        )

    @property
    def unit(self) -> int:
        return self.tile.width if self.tile.by_channels else 1

    def strides(self, *views: View) -> tuple[int, ...]:
        """batch and step of each, in runs of channels."""
        return tuple(stride // self.unit for view in views for stride in (view.batch, view.step))

    def run(self, kernel: Any, *args: Any, **constants: Any) -> None:
        warps = self.tile.lanes // 32 if self.tile.by_channels else ROW_WARPS
        with _on(self.space.device):
            kernel[(self.programs,)](*args, TILE=tuple(self.tile), num_warps=warps, **constants, **_FUSION)


class Sums:
    """Outputs (B, Z) of sums over pixels, float32, and ``targets`` for the kernel: the outputs themselves where one chunk
    covers the map, else a workspace (chunks, B, Z) each, which :meth:`finish` adds up in a second stage."""

    def __init__(self, launch: Launch, kinds: int) -> None:
        space = launch.space
        self.rows, self.device, self.chunks = space.batches * space.channels, space.device, launch.chunks
        shape = (space.batches, space.channels)
        self.outputs = tuple(
            torch.empty(shape, dtype=torch.float32, device=self.device) for _ in range(kinds)
        )
        self.workspace: torch.Tensor | None = None
        if self.chunks > 1:
            self.workspace = torch.empty(
                (kinds, self.chunks, *shape), dtype=torch.float32, device=self.device
            )

    @property
    def targets(self) -> tuple[torch.Tensor, ...]:
        return self.outputs if self.workspace is None else self.workspace.unbind()

    def finish(self) -> tuple[torch.Tensor, ...]:
        if self.workspace is not None:
            kinds, rows, chunks = len(self.outputs), 32, min(_power(self.chunks), 32)
            three = (*self.outputs, *self.outputs, *self.outputs)[:3]
            with _on(self.device):
                sum_chunks_kernel[(-(-self.rows // rows),)](
                    self.workspace,
                    *three,
                    self.rows,
                    self.chunks,
                    KINDS=kinds,
                    ROWS=rows,
                    CHUNKS=chunks,
                    STEPS=-(-self.chunks // chunks),
                    **_FUSION,
                )
        return self.outputs


def no_sums(space: Map, kinds: int) -> tuple[torch.Tensor, ...]:
    """The sums of an empty map."""
    return tuple(
        torch.zeros((space.batches, space.channels), dtype=torch.float32, device=space.device)
        for _ in range(kinds)
    )


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    # Triton launches on the current device.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=1024)
def _plan(
    batches: int,
    channels: int,
    pixels: int,
    by_channels: bool,
    width: int,
    access: int,
    wide: bool,
    sums: bool,
) -> tuple[Tile, int, int]:
    """The tile, chunks of pixels and programs for a map that is not empty; ``width`` is of a run of channels, ``access`` of a
    run of pixels."""
    quads = pixels % 4 == 0
    if by_channels:
        runs, steps = channels // width, pixels // 4 if quads else pixels
        choices = [_share(batches, runs, steps, lanes) for lanes in LANE_CHOICES]
        best = max(busy for busy, *_ in choices)
        _, lanes, groups, slots, samples = next(choice for choice in choices if choice[0] >= 0.9 * best)
        blocks, tiles = -(-batches // samples) * -(-runs // groups), -(-steps // slots)
        step = 4 if quads else 1
    else:
        width = min(max(_power(pixels), access), ROW_TILE)
        lanes, groups, slots, samples, step = ROW_TILE // width, 1, width, 1, 1
        blocks, tiles = -(-batches * channels // lanes), -(-pixels // width)
    most = next(n for least, n in SUM_TILES if blocks * tiles >= least) if sums else 1
    # The fewest programs that run at most an eighth more tiles than there are.
    iterations = next(n for n in range(min(most, tiles), 0, -1) if 8 * (-tiles % n) <= tiles)
    tile = Tile(
        by_channels, quads, wide, lanes, width, step, access, slots * step, iterations, groups, slots, samples,
        _power(groups), _power(slots), _power(samples),
    )  # fmt: skip
    chunks = -(-tiles // iterations)
    return tile, chunks, blocks * chunks


def _share(batches: int, runs: int, steps: int, lanes: int) -> tuple[float, int, int, int, int]:
    """How much of ``lanes`` a tile of channels keeps busy at best; lanes, groups, slots and samples of that tile."""
    found = []
    fewest = -(-runs // lanes)
    for slices in range(fewest, max(fewest, runs // 16) + 1):  # of 16 runs at least: neighbours stay together
        groups = -(-runs // slices)
        slots = lanes // groups
        samples = max(1, min(slots // steps, batches))
        slots = min(slots, steps)
        tiles = -(-runs // groups) * -(-steps // slots) * -(-batches // samples)
        found.append((batches * runs * steps / (tiles * lanes), lanes, groups, slots, samples))
    return max(found, key=lambda choice: choice[0])
