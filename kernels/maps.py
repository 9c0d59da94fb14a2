"""How the kernels of the normal distributions tile maps (B, Z, H, W): indices, noise, sums over pixels. The launchers are in
kernels/map_launch.py.

A program works on a tile of ``LANES x WIDTH`` elements, ``ITERATIONS`` times.

- Rows (NCHW): a lane is a row, one channel of one sample, and WIDTH is a run of its pixels.
- Channels (channels_last, and maps of one pixel): WIDTH is a run of adjacent channels, one access of up to 16 bytes,
  and a lane is such a run at one slot: four adjacent pixels (which share their Philox blocks) where H*W is a multiple
  of 4, else one pixel. A part is a chunk of the pixels of one sample. A bundle holds the ``GROUPS`` runs of ``PARTS``
  parts, padded to a power of two, and a tile is ``SLOTS x BUNDLE`` lanes. SLOTS and BUNDLE are powers of two, so sums
  over pixels are a reduction along an axis; GROUPS and PARTS are not, so nearly all lanes work whatever Z is: with
  Z = 20, a bundle of 16 lanes holds the 5 runs of 3 parts.

Kernels take the constants of a tile as one tuple ``TILE``, in the order of :class:`Tile`. Their ``channels`` and the
strides called ``batch`` and ``step`` count runs of adjacent channels (WIDTH, or 1 for rows): so Triton knows that a run
is aligned. An element of a tensor is at ``batch * b + step * c + pixel`` for rows, ``batch * b + step * pixel + c`` for
channels.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from nvae_fast.kernels.philox import philox_normals4
from nvae_fast.kernels.pointwise import log_positive


class Tile(NamedTuple):
    """What a kernel is compiled for; the kernels index it by the constants below."""

    by_channels: bool
    quads: bool  # H*W is a multiple of 4: four adjacent pixels are one Philox block
    offsets64: bool  # 64-bit offsets
    lanes: int
    width: int
    pixels: int  # of a lane, a tile each: 4 for channels with quads, else 1
    access: int  # rows only: elements of 16 bytes, 4 or 8
    span: int  # pixels that one iteration covers
    iterations: int
    groups: int  # channels only, as all that follow: runs of channels in a program
    slices: int  # programs that share the runs of a part
    parts: int
    bundle: int


BY_CHANNELS = tl.constexpr(0)
QUADS = tl.constexpr(1)
OFFSETS64 = tl.constexpr(2)
LANES = tl.constexpr(3)
WIDTH = tl.constexpr(4)
PIXELS = tl.constexpr(5)
ACCESS = tl.constexpr(6)
SPAN = tl.constexpr(7)
ITERATIONS = tl.constexpr(8)
GROUPS = tl.constexpr(9)
SLICES = tl.constexpr(10)
PARTS = tl.constexpr(11)
BUNDLE = tl.constexpr(12)


@triton.jit
def _index(TILE: tl.constexpr):
    """Of this program."""
    index = tl.program_id(0)
    if TILE[OFFSETS64]:
        index = index.to(tl.int64)
    return index


@triton.jit
def _bundle(place, batches, channels, chunks, TILE: tl.constexpr):
    """Sample, chunk of pixels and run of channels at each place in the bundle, and whether there is one."""
    index = _index(TILE)
    part = place // TILE[GROUPS]
    row = (index // TILE[SLICES]) * TILE[PARTS] + part
    b = row // chunks
    group = (index % TILE[SLICES]) * TILE[GROUPS] + (place - part * TILE[GROUPS])
    return b, row - b * chunks, group, (part < TILE[PARTS]) & (b < batches) & (group < channels)


@triton.jit
def lanes(batches, channels, chunks, TILE: tl.constexpr):
    """Where the lanes are: sample and (first) channel (LANES, 1), first pixel of the chunk (scalar, or (LANES, 1)), pixel
    from there on (LANES, 1) or, for rows, (1, WIDTH), and which lanes are part of the map (LANES, 1)."""
    lane = tl.arange(0, TILE[LANES])
    if TILE[BY_CHANNELS]:
        b, chunk, group, inside = _bundle(lane % TILE[BUNDLE], batches, channels, chunks, TILE)
        first = chunk * (TILE[ITERATIONS] * TILE[SPAN])
        pixel = (lane // TILE[BUNDLE]) * TILE[PIXELS]
        return b[:, None], (group * TILE[WIDTH])[:, None], first[:, None], pixel[:, None], inside[:, None]
    else:
        index = _index(TILE)
        row = (index // chunks) * TILE[LANES] + lane
        b = row // channels
        pixel = tl.arange(0, TILE[WIDTH])[None, :]
        first = (index % chunks) * (TILE[ITERATIONS] * TILE[SPAN])
        return b[:, None], (row - b * channels)[:, None], first, pixel, (b < batches)[:, None]


@triton.jit
def offsets(b, c, pixel, batch, step, TILE: tl.constexpr):
    """Of the elements of a tile in a tensor with these strides."""
    if TILE[BY_CHANNELS]:
        return (
            b * (batch * TILE[WIDTH]) + pixel * (step * TILE[WIDTH]) + c + tl.arange(0, TILE[WIDTH])[None, :]
        )
    else:
        return b * batch + c * step + pixel


@triton.jit
def log_sigma_channel(c, channels, TILE: tl.constexpr):
    """The channel of packed parameters that holds log sigma where ``c`` holds mu."""
    if TILE[BY_CHANNELS]:
        return c + channels * TILE[WIDTH]
    else:
        return c + channels


@triton.jit
def load(tensor, offset, step, mask, TILE: tl.constexpr):
    """The tiles of a lane's pixels in float32, one or four; every load is on its way before the first is used."""
    if TILE[PIXELS] == 4:
        pixel = step * TILE[WIDTH]
        x0 = tl.load(tensor + offset, mask=mask, other=0.0)
        x1 = tl.load(tensor + offset + pixel, mask=mask, other=0.0)
        x2 = tl.load(tensor + offset + 2 * pixel, mask=mask, other=0.0)
        x3 = tl.load(tensor + offset + 3 * pixel, mask=mask, other=0.0)
        return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    else:
        x = tl.load(tensor + offset, mask=mask, other=0.0)
        return (x.to(tl.float32),)


@triton.jit
def store(tensor, offset, step, k, value, mask, TILE: tl.constexpr):
    """The tile of a lane's pixel number ``k``."""
    place = tensor + offset + k * (step * TILE[WIDTH])
    tl.store(place, value.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def normals(seed, b, c, start, pixel, channels, pixels, TILE: tl.constexpr):
    """The draws of a tile at pixels ``start + pixel``: one tile or four, as :func:`load`.

    Each thread draws what it needs: tensors of one block a thread are joined to the 4 or 8 elements of an access, which
    moves nothing; drawing whole tiles at once would go through shared memory.
    """
    key = tl.load(seed)
    if TILE[BY_CHANNELS]:
        row = b * (channels * TILE[WIDTH]) + c
    else:
        row = b * channels + c
    quads = pixels // 4
    if TILE[PIXELS] == 4:
        quad = (start + pixel) // 4
        if TILE[WIDTH] == 4:
            x0, x1, x2, x3 = philox_normals4(key, row * quads + quad)
            y0, y1, y2, y3 = philox_normals4(key, (row + 1) * quads + quad)
            z0, z1, z2, z3 = philox_normals4(key, (row + 2) * quads + quad)
            w0, w1, w2, w3 = philox_normals4(key, (row + 3) * quads + quad)
            return _four(x0, y0, z0, w0), _four(x1, y1, z1, w1), _four(x2, y2, z2, w2), _four(x3, y3, z3, w3)
        elif TILE[WIDTH] == 2:
            x0, x1, x2, x3 = philox_normals4(key, row * quads + quad)
            y0, y1, y2, y3 = philox_normals4(key, (row + 1) * quads + quad)
            return _two(x0, y0), _two(x1, y1), _two(x2, y2), _two(x3, y3)
        else:
            return philox_normals4(key, row * quads + quad)
    elif TILE[QUADS]:
        first = row * quads + start // 4
        if TILE[ACCESS] == 8:
            even = 2 * tl.arange(0, TILE[WIDTH] // 8)[None, :]
            x0, x1, x2, x3 = philox_normals4(key, first + even)
            y0, y1, y2, y3 = philox_normals4(key, first + even + 1)
            z = tl.join(tl.join(tl.join(x0, y0), tl.join(x2, y2)), tl.join(tl.join(x1, y1), tl.join(x3, y3)))
        else:
            x0, x1, x2, x3 = philox_normals4(key, first + tl.arange(0, TILE[WIDTH] // 4)[None, :])
            z = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        COLUMNS: tl.constexpr = TILE[WIDTH]
        return (tl.reshape(z, (z.shape[0], COLUMNS)),)
    else:  # a block may begin in another row: each element makes its own
        if TILE[BY_CHANNELS]:
            row = row + tl.arange(0, TILE[WIDTH])[None, :]
        element = row * pixels + start + pixel
        x0, x1, x2, x3 = philox_normals4(key, element >> 2)
        k = element & 3
        return (tl.where(k < 2, tl.where(k == 0, x0, x1), tl.where(k == 2, x2, x3)),)


@triton.jit
def _two(x, y):
    """(n, 1) each -> (n, 2)."""
    return tl.reshape(tl.join(x, y), (x.shape[0], 2))


@triton.jit
def _four(x, y, z, w):
    """(n, 1) each -> (n, 4)."""
    return tl.reshape(tl.join(tl.join(x, z), tl.join(y, w)), (x.shape[0], 4))


@triton.jit
def of_sums(gradient, b, c, batch, step, inside, TILE: tl.constexpr):
    """Upstream gradients (B, Z) of sums, for the lanes."""
    if TILE[BY_CHANNELS]:
        c = c + tl.arange(0, TILE[WIDTH])[None, :]
    return tl.load(gradient + b * batch + c * step, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def zero_sums(TILE: tl.constexpr):
    """Where a program adds up: channels (LANES, WIDTH), rows (LANES, WIDTH / 4), each four adjacent pixels together."""
    ROWS: tl.constexpr = TILE[LANES]
    COLUMNS: tl.constexpr = TILE[WIDTH] if TILE[BY_CHANNELS] else TILE[WIDTH] // 4
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def fold_sum(x, start, pixels, inside, TILE: tl.constexpr):
    """What a tile adds to such sums; elements outside the map add nothing."""
    if TILE[BY_CHANNELS]:
        return tl.where(inside, x, 0.0)
    else:
        if not TILE[QUADS]:
            x = tl.where(inside & (start + tl.arange(0, TILE[WIDTH])[None, :] < pixels), x, 0.0)
        left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
        first, second = tl.split(left + right)  # of one thread
        if TILE[QUADS]:
            return tl.where(
                inside & (start + 4 * tl.arange(0, TILE[WIDTH] // 4)[None, :] < pixels), first + second, 0.0
            )
        else:
            return first + second


@triton.jit
def fold_product(x, start, pixels, inside, TILE: tl.constexpr):
    """The product of a tile's elements where :func:`fold_sum` adds; elements outside the map count as 1."""
    if TILE[BY_CHANNELS]:
        return tl.where(inside, x, 1.0)
    else:
        if not TILE[QUADS]:
            x = tl.where(inside & (start + tl.arange(0, TILE[WIDTH])[None, :] < pixels), x, 1.0)
        left, right = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
        first, second = tl.split(left * right)
        if TILE[QUADS]:
            return tl.where(
                inside & (start + 4 * tl.arange(0, TILE[WIDTH] // 4)[None, :] < pixels), first * second, 1.0
            )
        else:
            return first * second


@triton.jit
def multiply(fraction, exponent, x, TILE: tl.constexpr):
    """``fraction 2^(exponent - 127 ITERATIONS)`` times x > 0, with the fraction brought back to [1, 2): the logarithm of
    a product costs a few instructions an iteration and one logarithm at the end."""
    fraction = fraction * x
    if TILE[ITERATIONS] > 1:
        bits = fraction.to(tl.int32, bitcast=True)
        exponent += bits >> 23
        fraction *= (0x7F000000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True)
    return fraction, exponent


@triton.jit
def log_product(fraction, exponent, TILE: tl.constexpr):
    """The logarithm of what :func:`multiply` made. Not a number gives some number: the sums it is added to are none already."""
    log = log_positive(fraction)
    if TILE[ITERATIONS] > 1:
        log = tl.fma((exponent - 127 * TILE[ITERATIONS]).to(tl.float32), 0.6931471805599453, log)
    return log


@triton.jit
def lane_sums(x, TILE: tl.constexpr):
    """Rows: (LANES, any) -> (LANES,). Channels: (LANES, WIDTH) -> (BUNDLE, WIDTH). In one order, whatever runs when."""
    if TILE[BY_CHANNELS]:
        SLOTS: tl.constexpr = TILE[LANES] // TILE[BUNDLE]
        PLACES: tl.constexpr = TILE[BUNDLE]
        return tl.sum(tl.reshape(x, (SLOTS, PLACES, x.shape[1])), 0)
    else:
        return tl.sum(x, 1)


@triton.jit
def sum_places(batches, channels, pixels, chunks, rows, TILE: tl.constexpr):
    """Where :func:`lane_sums` belong in (chunks, B, Z), which of them exist, and the pixels that each counts."""
    MOST: tl.constexpr = TILE[ITERATIONS] * TILE[SPAN]
    if TILE[BY_CHANNELS]:
        b, chunk, group, there = _bundle(tl.arange(0, TILE[BUNDLE]), batches, channels, chunks, TILE)
        row = (b * channels + group)[:, None] * TILE[WIDTH] + tl.arange(0, TILE[WIDTH])[None, :]
        chunk = chunk[:, None]
        return chunk * rows + row, there[:, None], tl.minimum(pixels - chunk * MOST, MOST)
    else:
        index = _index(TILE)
        chunk = index % chunks
        row = (index // chunks) * TILE[LANES] + tl.arange(0, TILE[LANES])
        return chunk * rows + row, row < rows, tl.minimum(pixels - chunk * MOST, MOST)


@triton.jit(do_not_specialize=["rows", "chunks"])
def sum_chunks_kernel(
    partial,
    out_0,
    out_1,
    out_2,
    rows,
    chunks,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """The second stage of sums: ``partial`` (KINDS, chunks, rows) -> KINDS outputs (rows), in a fixed order. Double
    precision costs nothing here and keeps the sums of a large map as good as those of a small one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
    for kind in tl.static_range(KINDS):
        total = tl.zeros((CHUNKS, ROWS), tl.float64)
        for i in range(STEPS):
            chunk = i * CHUNKS + tl.arange(0, CHUNKS)[:, None]
            place = partial + (chunk.to(tl.int64) + kind * chunks) * rows + row
            total += tl.load(place, mask=(chunk < chunks) & (row < rows), other=0.0).to(tl.float64)
        out = out_0 if kind == 0 else (out_1 if kind == 1 else out_2)
        tl.store(out + row, tl.sum(total, 0)[None, :].to(tl.float32), mask=row < rows)
