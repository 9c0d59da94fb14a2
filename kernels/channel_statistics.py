"""channel_statistics in Triton; formulas are the docstring of nvae_fast/ops/channel_statistics.py.

The first stage reads x once and stores sums of d and d^2 of every part, d the deviation from the part's first value; the
second merges them in double precision, in a fixed order: with the mean m of everything,
``m2 = sum (s2 + 2 s1 (pivot - m) + n (pivot - m)^2)``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from nvae_fast.kernels.launch import launch
from nvae_fast.kernels.planes import dense, is_last, offsets, plan, program, store_partial


@triton.jit(do_not_specialize=["batches"])
def parts_kernel(
    x, workspace, batches, channels, pixels, c_tiles, parts,
    LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, TIMES: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    b, c, part, first = program(c_tiles, parts, BC, BP, TIMES, OFFSETS64)
    pivot = tl.load(x + offsets(b, c, first, channels, pixels, LAST), mask=c < channels, other=0.0)
    pivot = pivot.to(tl.float32)
    pivot = tl.where(pivot - pivot == 0.0, pivot, 0.0)
    sums = tl.zeros((BC, BP), tl.float32)
    squares = tl.zeros((BC, BP), tl.float32)
    for i in range(TIMES):
        p = first + i * BP + tl.arange(0, BP)[None, :]
        mask = (c < channels) & (p < pixels)
        value = tl.load(x + offsets(b, c, p, channels, pixels, LAST), mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, value - pivot, 0.0)
        sums += d
        squares += d * d
    store_partial(workspace, 0, sums, b, c, part, batches, channels, parts)
    store_partial(workspace, 1, squares, b, c, part, batches, channels, parts)
    place = ((2 * parts + part) * batches + b) * channels + c
    tl.store(workspace + place, pivot, mask=c < channels)


@triton.jit(do_not_specialize=["rows", "chunks", "pixels", "count", "kind"])
def merge_kernel(
    workspace, out_mean, out_m2, rows, chunks, pixels, count, kind,
    SPAN: tl.constexpr, REPEAT: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """``workspace`` (3, chunks, rows) -> mean and m2 (rows). REPEAT chunks follow each other that begin at the same pixel:
    those of the samples, where they are merged."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
    total = tl.zeros((CHUNKS, ROWS), tl.float64)
    for i in range(STEPS):
        chunk = i * CHUNKS + tl.arange(0, CHUNKS)[:, None]
        mask = (chunk < chunks) & (row < rows)
        place = workspace + chunk.to(tl.int64) * rows + row
        n = tl.minimum(pixels - (chunk // REPEAT) * SPAN, SPAN).to(tl.float64)
        sums = tl.load(place, mask=mask, other=0.0).to(tl.float64)
        pivot = tl.load(place + 2 * kind, mask=mask, other=0.0).to(tl.float64)
        total += tl.where(mask, sums + n * pivot, 0.0)
    mean = tl.sum(total, 0)[None, :] / count
    spread = tl.zeros((CHUNKS, ROWS), tl.float64)
    for i in range(STEPS):
        chunk = i * CHUNKS + tl.arange(0, CHUNKS)[:, None]
        mask = (chunk < chunks) & (row < rows)
        place = workspace + chunk.to(tl.int64) * rows + row
        n = tl.minimum(pixels - (chunk // REPEAT) * SPAN, SPAN).to(tl.float64)
        sums = tl.load(place, mask=mask, other=0.0).to(tl.float64)
        squares = tl.load(place + kind, mask=mask, other=0.0).to(tl.float64)
        off = tl.load(place + 2 * kind, mask=mask, other=0.0).to(tl.float64) - mean
        spread += tl.where(mask, squares + off * (2.0 * sums + n * off), 0.0)
    m2 = tl.sum(spread, 0)[None, :]
    m2 = tl.where(m2 < 0.0, 0.0, m2)
    tl.store(out_mean + row, mean.to(tl.float32), mask=row < rows)
    tl.store(out_m2 + row, m2.to(tl.float32), mask=row < rows)


def channel_statistics(x: torch.Tensor, per_sample: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """mean and m2 of the operator's arguments."""
    last = is_last(x)
    space = plan("channel_statistics", x, by_channels=last, sums=True)
    shape = (space.batches, space.channels) if per_sample else (space.channels,)
    if space.empty:
        return x.new_zeros(shape, dtype=torch.float32), x.new_zeros(shape, dtype=torch.float32)
    mean, m2 = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))
    workspace = space.workspace(3)
    space.run(parts_kernel, dense(x, last), workspace, space.batches, LAST=last)
    repeat = 1 if per_sample else space.batches
    rows, chunks = mean.numel(), space.parts * repeat
    block = min(next_power_of_2(chunks), 32)
    launch(
        merge_kernel, -(-rows // 32), x.device,
        workspace, mean, m2, rows, chunks, space.pixels, space.pixels * repeat, chunks * rows,
        SPAN=space.constants["BP"] * space.constants["TIMES"], REPEAT=repeat,
        ROWS=32, CHUNKS=block, STEPS=-(-chunks // block),
    )  # fmt: skip
    return mean, m2
