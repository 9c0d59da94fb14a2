"""Launching kernels over maps (B, Z, H, W): strides, launch choices, outputs. The kernels' side is kernels/maps.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

from nvae_fast.kernels.launch import check_dtype, launch
from nvae_fast.kernels.maps import Tile, sum_chunks_kernel

# Launch choices, predicted from counts of bytes and instructions; no GPU has timed them yet.
MULTIPROCESSORS = 132  # of an H200
# Tiles of rows: elements a program and warps, 8 elements a thread (two 16-byte accesses in float32 and one in bfloat16) or,
# where that makes too few programs, 4.
ROW_TILES = ((1024, 4), (512, 4))
# Tiles of channels have a lane to a thread and 16, 8 or 4 elements to a lane. More lanes than these leave a thread fewer
# registers than the backward pass takes.
LANES, MOST_ELEMENTS = (128, 256, 512), 4096
# In units of one element on a warp, some 140 instructions of residual_normal: what a thread does besides its elements; a sum
# across threads, for each channel of a lane; a partial sum, which is written and read again; a second launch that adds up.
THREAD_COST, REDUCE_COST, PARTIAL_COST, STAGE_COST = 1.0, 0.3, 1.0, 14.0
ACCESS_COST = 0.1  # of an element that is loaded and stored alone; a share of it where several are
BUSY_WARPS = 3  # on a scheduler; with fewer it waits for their results
# (tiles of the map, tiles that one program adds up): adding across threads at the end costs about a third of a tile, but
# a multiprocessor wants several programs.
SUM_TILES = ((32768, 8), (16384, 4), (8192, 2), (0, 1))
_INT32_LIMIT = 2**31 - 2**22  # of offsets: leaves space for the masked elements of the last tile


class View(NamedTuple):
    """A tensor as kernels index it; strides in elements, see the module's docstring."""

    tensor: torch.Tensor | None
    batch: int
    step: int


_NOTHING = View(None, 0, 0)


class Map:
    """The map (B, Z, H, W) of an op, and the order in which its kernels go through it: that of the tensor ``like``,
    (B, Z, H, W) or, packed, (B, 2Z, H, W). Raises TypeError for float64, which is the reference's."""

    def __init__(self, op: str, like: torch.Tensor, *, packed: bool) -> None:
        check_dtype(op, like.dtype)
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
        offsets64 = max(2 * self.count, *furthest, 0) > _INT32_LIMIT
        plan = _plan(
            self.batches, self.channels, self.pixels, self.by_channels, width, access, offsets64, sums
        )
        return Launch(self, *plan)


@dataclass(frozen=True)
class Launch:
    """One launch over a map: the tile, chunks of pixels, programs along the one axis of the grid."""

    space: Map
    tile: Tile
    chunks: int
    programs: int
    warps: int

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
        device = self.space.device
        launch(kernel, self.programs, device, *args, warps=self.warps, TILE=tuple(self.tile), **constants)


class Sums:
    """Outputs (B, Z) of sums over pixels, float32, and ``targets`` for the kernel: the outputs themselves where one chunk
    covers the map, else a workspace (chunks, B, Z) each, which :meth:`finish` adds up in a second stage."""

    def __init__(self, launch: Launch, kinds: int) -> None:
        space = launch.space
        self.rows, self.chunks = space.batches * space.channels, launch.chunks
        shape = (space.batches, space.channels)
        self.outputs = tuple(
            torch.empty(shape, dtype=torch.float32, device=space.device) for _ in range(kinds)
        )
        self.workspace: torch.Tensor | None = None
        if self.chunks > 1:
            self.workspace = torch.empty(
                (kinds, self.chunks, *shape), dtype=torch.float32, device=space.device
            )

    @property
    def targets(self) -> tuple[torch.Tensor, ...]:
        return self.outputs if self.workspace is None else self.workspace.unbind()

    def finish(self) -> tuple[torch.Tensor, ...]:
        if self.workspace is not None:
            sum_chunks(self.workspace, self.outputs, self.rows, self.chunks)
        return self.outputs


def no_sums(space: Map, kinds: int) -> tuple[torch.Tensor, ...]:
    """The sums of an empty map."""
    return tuple(
        torch.zeros((space.batches, space.channels), dtype=torch.float32, device=space.device)
        for _ in range(kinds)
    )


def sum_chunks(workspace: torch.Tensor, outputs: tuple[torch.Tensor, ...], rows: int, chunks: int) -> None:
    """The second stage of sums: a workspace (kinds, chunks, rows) added up into up to three outputs (rows)."""
    block = min(next_power_of_2(chunks), 32)
    launch(
        sum_chunks_kernel, -(-rows // 32), workspace.device,
        workspace, *(*outputs, *outputs, *outputs)[:3], rows, chunks,
        KINDS=len(outputs), ROWS=32, CHUNKS=block, STEPS=-(-chunks // block),
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _plan(
    batches: int,
    channels: int,
    pixels: int,
    by_channels: bool,
    width: int,
    access: int,
    offsets64: bool,
    sums: bool,
) -> tuple[Tile, int, int, int]:
    """The tile, chunks of pixels, programs and warps for a map that is not empty; ``width`` is of the longest run of channels,
    ``access`` of a run of pixels."""
    make = _channel_plans if by_channels else _row_plans
    plans = make(batches, channels, pixels, width, access, offsets64, sums)
    return min(plans, key=lambda plan: _cost(*plan, sums))


def _cost(tile: Tile, chunks: int, programs: int, warps: int, sums: bool) -> tuple[float, int]:
    """What the busiest multiprocessor does."""
    elements = tile.lanes * tile.width * tile.pixels // (32 * warps)
    work = THREAD_COST + elements * tile.iterations * (1 + ACCESS_COST / min(tile.width, elements))
    if sums and tile.by_channels:
        slots = tile.lanes // tile.bundle
        work += tile.width * ((REDUCE_COST if slots > 1 else 0) + PARTIAL_COST / slots)
    on_scheduler = -(-programs // MULTIPROCESSORS) * warps / 4
    return work * max(on_scheduler, BUSY_WARPS) + (STAGE_COST if sums and chunks > 1 else 0), warps


def _iterations(tiles: int, all_tiles: int, sums: bool) -> int:
    """The tiles of ``tiles`` that a program adds up: the fewest programs that run at most an eighth more than there are."""
    most = next(n for least, n in SUM_TILES if all_tiles >= least) if sums else 1
    return next(n for n in range(min(most, tiles), 0, -1) if 8 * (-tiles % n) <= tiles)


def _row_plans(
    batches: int, channels: int, pixels: int, width: int, access: int, offsets64: bool, sums: bool
) -> Iterator[tuple[Tile, int, int, int]]:
    quads = pixels % 4 == 0
    for elements, warps in ROW_TILES:
        run = min(access, elements // (32 * warps))
        width = min(max(next_power_of_2(pixels), run), elements)
        lanes = elements // width
        blocks, tiles = -(-batches * channels // lanes), -(-pixels // width)
        iterations = _iterations(tiles, blocks * tiles, sums)
        tile = Tile(False, quads, offsets64, lanes, width, 1, run, width, iterations, 1, 1, 1, lanes)
        chunks = -(-tiles // iterations)
        yield tile, chunks, blocks * chunks, warps


def _channel_plans(
    batches: int, channels: int, pixels: int, longest: int, access: int, offsets64: bool, sums: bool
) -> Iterator[tuple[Tile, int, int, int]]:
    quads = pixels % 4 == 0
    step = 4 if quads else 1
    steps = pixels // step
    for width, lanes in itertools.product((4, 2, 1), LANES):
        if width > longest or lanes * width * step > MOST_ELEMENTS:
            continue
        runs = channels // width
        fewest = -(-runs // lanes)
        # Slices hold 16 runs at least, whose lanes touch adjacent addresses.
        for slices in range(fewest, max(fewest, runs // 16) + 1):
            groups = -(-runs // slices)
            slots = 1
            while slots <= next_power_of_2(steps) and slots * groups <= lanes:
                tiles, bundle = -(-steps // slots), lanes // slots
                iterations = _iterations(tiles, batches * tiles * runs * slots // lanes, sums)
                chunks = -(-tiles // iterations)
                parts = min(bundle // groups, batches * chunks)
                tile = Tile(
                    True, quads, offsets64, lanes, width, step, access, slots * step, iterations, groups, slices, parts, bundle
                )  # fmt: skip
                yield tile, chunks, -(-batches * chunks // parts) * slices, lanes // 32
                slots *= 2
