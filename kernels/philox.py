"""Philox4x32-10 words and normals in Triton; the definition is the docstring of nvae_fast/ops/philox.py.

For other kernels: ``philox_words(seed, block)`` and ``philox_normals4(seed, block)``, device functions that
take the seed as an int64 scalar and int64 or int32 block numbers, and return four tensors (the four elements
of each block). ``philox_normal`` and ``philox_words_of`` launch kernels that only draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.launch import launch
from nvae_fast.kernels.pointwise import log_positive

_BLOCKS = 256  # Philox blocks a program: 8 elements a thread, two 16-byte float32 stores


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds: four uint32 counter words of one shape, two uint32 key words -> four words."""
    m0: tl.constexpr = 0xD2511F53
    m1: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        # Both halves of a product in one instruction.
        p0 = tl.mul(c0.to(tl.uint64), m0, sanitize_overflow=False)
        p1 = tl.mul(c2.to(tl.uint64), m1, sanitize_overflow=False)
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def philox_words(seed, block, stream: tl.constexpr = 0):
    """Words of ``block`` in the stream of ``seed`` (int64 scalar); ``stream``: the third counter word."""
    c0 = block.to(tl.uint32)
    c1 = (block.to(tl.int64) >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + stream
    return philox4x32(c0, c1, c2, tl.zeros_like(c0), seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def _radius(w):
    """``sqrt(-2 log u)`` of a uint32 word, ``u = (w + 0.5) 2^-32``."""
    # (w + 0.5) 2^-32, with the rounding that the sum has.
    u = tl.fma(w.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    # The square root, from an approximate reciprocal one and a step of Newton's method: no branch, and nothing but the
    # rounding is lost. At 0 it gives 1e-15.
    x = tl.maximum(-2.0 * log_positive(u), 1e-30)
    inverse = tl.rsqrt(x)
    root = x * inverse
    return tl.fma(tl.fma(root * -1.0, root, x), 0.5 * inverse, root)


@triton.jit
def box_muller(w0, w1):
    """Two uint32 words -> two float32 normals."""
    r = _radius(w0)
    # cos and sin of 2 pi w1 / 2^32: quarter turns in integers, then polynomials in t = angle / (pi/2).
    t = (w1 << 2).to(tl.int32, bitcast=True).to(tl.float32) * 2.3283064365386963e-10  # 2^-32
    q = t * t
    s = tl.fma(q, -0.0046024806797504425, 0.07968035340309143)
    s = tl.fma(tl.fma(s, q, -0.6459634900093079), q, -4.878174308942107e-08)
    s = tl.fma(t, 1.5707963705062866, s * t)
    c = tl.fma(q, 0.0008944862638600171, -0.020855596289038658)
    c = tl.fma(tl.fma(tl.fma(c, q, 0.25366854667663574), q, -1.2337005138397217), q, 1.0)
    # Bits 30 and 31 of the word, rounded to quarter turns: whether to swap, and the sign of the sine.
    turned = tl.add(w1, 0x20000000, sanitize_overflow=False)
    odd = (turned & 0x40000000) != 0
    cosine = r * tl.where(odd, s, c)
    sine = r * tl.where(odd, c, s)
    flip = tl.add(turned, 0x40000000, sanitize_overflow=False)
    return _flipped(cosine, flip), _flipped(sine, turned)


@triton.jit
def _flipped(x, word):
    """``x`` with its sign changed where bit 31 of ``word`` is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def philox_normals4(seed, block):
    """Elements 4 block .. 4 block + 3 of the stream of ``seed`` (int64 scalar): four float32 tensors."""
    w0, w1, w2, w3 = philox_words(seed, block)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def interleave4(z0, z1, z2, z3, SIZE: tl.constexpr):
    """(SIZE,) each -> (4 SIZE,): element 4 i + k is z_k[i]."""
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (4 * SIZE,))


@triton.jit(do_not_specialize=["seed"])
def normal_kernel(out, seed, count, BLOCKS: tl.constexpr):
    """Elements 0 .. count - 1, contiguous."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    z0, z1, z2, z3 = philox_normals4(tl.load(seed), first + tl.arange(0, BLOCKS))
    z = interleave4(z0, z1, z2, z3, BLOCKS)
    element = first * 4 + tl.arange(0, 4 * BLOCKS)
    tl.store(out + element, z.to(out.dtype.element_ty), mask=element < count)


@triton.jit(do_not_specialize=["seed"])
def normal_channels_last_kernel(
    out, seed, lanes, channels, quads, BLOCKS: tl.constexpr, OFFSETS64: tl.constexpr
):
    """(n, c, 4 quads pixels) stored channels_last. Lane (n * quads + quad) * channels + c makes one block:
    four pixels of one channel, so that neighbouring lanes store to neighbouring addresses.
    """
    first = tl.program_id(0)
    if OFFSETS64:
        first = first.to(tl.int64)
    lane = first * BLOCKS + tl.arange(0, BLOCKS)
    row = lane // channels
    c = lane - row * channels
    n = row // quads
    block = (n * channels + c) * quads + (row - n * quads)
    z0, z1, z2, z3 = philox_normals4(tl.load(seed), block)
    place = out + row * 4 * channels + c
    inside = lane < lanes
    tl.store(place, z0.to(out.dtype.element_ty), mask=inside)
    tl.store(place + channels, z1.to(out.dtype.element_ty), mask=inside)
    tl.store(place + 2 * channels, z2.to(out.dtype.element_ty), mask=inside)
    tl.store(place + 3 * channels, z3.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed"])
def normal_channels_last_odd_kernel(
    out, seed, count, channels, pixels, BLOCKS: tl.constexpr, OFFSETS64: tl.constexpr
):
    """The same for any number of pixels: a lane per element, each making its whole block."""
    first = tl.program_id(0)
    if OFFSETS64:
        first = first.to(tl.int64)
    place = first * BLOCKS + tl.arange(0, BLOCKS)
    row = place // channels
    c = place - row * channels
    n = row // pixels
    element = (n * channels + c) * pixels + (row - n * pixels)
    z0, z1, z2, z3 = philox_normals4(tl.load(seed), element >> 2)
    k = element & 3
    z = tl.where(k < 2, tl.where(k == 0, z0, z1), tl.where(k == 2, z2, z3))
    tl.store(out + place, z.to(out.dtype.element_ty), mask=place < count)


@triton.jit(do_not_specialize=["seed", "count", "first_block"])
def words_kernel(out, seed, count, first_block, STREAM: tl.constexpr, BLOCKS: tl.constexpr):
    """Words of ``count`` blocks from ``first_block`` on, (count, 4), widened to int64."""
    i = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    w0, w1, w2, w3 = philox_words(tl.load(seed), i + first_block, STREAM)
    inside = i < count
    tl.store(out + 4 * i, w0.to(tl.int64), mask=inside)
    tl.store(out + 4 * i + 1, w1.to(tl.int64), mask=inside)
    tl.store(out + 4 * i + 2, w2.to(tl.int64), mask=inside)
    tl.store(out + 4 * i + 3, w3.to(tl.int64), mask=inside)


def philox_normal(
    size: Sequence[int], seed: torch.Tensor, dtype: torch.dtype, channels_last: bool, blocks: int = _BLOCKS
) -> torch.Tensor:
    """Launch one kernel that fills a new tensor of ``size`` on the device of ``seed``."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty(size, dtype=dtype, device=seed.device, memory_format=memory_format)
    count = out.numel()
    if count == 0:
        return out
    channels, pixels = (size[1], math.prod(size[2:])) if channels_last else (1, count)
    offsets64 = count > 2**31 - 4 * blocks
    if channels == 1 or pixels == 1:
        launch(normal_kernel, triton.cdiv(count, 4 * blocks), seed.device, out, seed, count, BLOCKS=blocks)
    elif pixels % 4 == 0:
        launch(
            normal_channels_last_kernel, triton.cdiv(count // 4, blocks), seed.device,
            out, seed, count // 4, channels, pixels // 4, BLOCKS=blocks, OFFSETS64=offsets64,
        )  # fmt: skip
    else:
        launch(
            normal_channels_last_odd_kernel, triton.cdiv(count, blocks), seed.device,
            out, seed, count, channels, pixels, BLOCKS=blocks, OFFSETS64=offsets64,
        )  # fmt: skip
    return out


def philox_words_of(
    seed: torch.Tensor, count: int, first_block: int, stream: int, blocks: int = _BLOCKS
) -> torch.Tensor:
    """Words (count, 4) as int64 on the device of ``seed``."""
    out = torch.empty((count, 4), dtype=torch.int64, device=seed.device)
    if count:
        launch(
            words_kernel, triton.cdiv(count, blocks), seed.device,
            out, seed, count, first_block, STREAM=stream, BLOCKS=blocks,
        )  # fmt: skip
    return out
