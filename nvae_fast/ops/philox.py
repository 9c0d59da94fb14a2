"""Counter-based normal draws: one seed gives the same numbers on every device and in every layout, and a batch
begins with the numbers of any shorter one.

Draw number ``i`` is a pure function of ``(seed, i)``: nothing is stored, nothing is shared between threads, a
backward pass can draw its noise again. ``i`` is the logical index in NCHW order, whatever the memory format
of the output. This docstring is the definition; csrc/philox.h and kernels/philox.py are the same in C++ and Triton.

**Words.** Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011)
turns a counter of four 32-bit words and a key of two into four 32-bit words. ``block = i // 4`` and

    key     = (seed mod 2^32, seed div 2^32)              seed taken mod 2^64
    counter = (block mod 2^32, block div 2^32, 0, 0)

One round, ten times, the key growing by (0x9E3779B9, 0xBB67AE85) between rounds:

    hi0, lo0 = 0xD2511F53 * c0;  hi1, lo1 = 0xCD9E8D57 * c2
    c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0

**Normals.** Box-Muller in float32 on the pairs (w0, w1) and (w2, w3) of a block's words:

    u = (float(w0) + 0.5) * 2^-32                          in (0, 1]; float(w0) rounds to nearest even
    r = sqrt(-2 log u)                                     at most 6.77
    angle = 2 pi w1 / 2^32, reduced exactly, in integers:
        q = (w1 + 2^29) >> 30  (mod 4);  f = w1 - (q << 30)  in [-2^29, 2^29)
        phi = float(f) * (pi / 2 / 2^30)                   in [-pi/4, pi/4]
        (cos, sin) of the angle = (cos phi, sin phi) turned by q quarter turns
    elements 4 block + 0, 1 = r cos, r sin                 and + 2, 3 the same from (w2, w3)

Words agree bit for bit between backends, normals to 1e-6 (each backend has its own log, sine and cosine). The
float32 value is rounded to the requested dtype; for float64 it is widened.

**Sub-seeds.** ``split_seed`` uses the third counter word, which draws leave at zero, so that sub-seeds are no
draws of the parent: ``counter = (i mod 2^32, i div 2^32, 0x53504C54, 0)``, sub-seed ``i`` = ``w0 + (w1 mod
2^31) * 2^32``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._op import define_op, kernels

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
SPLIT = 0x53504C54  # third counter word of split_seed: "SPLT"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def philox_normal(
    size: Sequence[int],
    seed: int | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Standard normal draws number 0 to ``prod(size) - 1`` of the stream ``seed``.

    Args:
        size: shape of the output, such as (B, Z, H, W); draws are numbered in its logical (NCHW) order.
        seed: any int (taken mod 2^64) or a 0-d int64 tensor, on the device of the output.
        dtype: float32, float64, bfloat16 or float16.
        device: of the output. Default: the seed tensor's, for an int PyTorch's default device.
        memory_format: ``torch.contiguous_format``, or ``torch.channels_last`` for four dimensions. It changes
            where values are stored, not which.

    Raises:
        TypeError: seed is neither int nor int64 tensor, size holds no ints, or the dtype is another one.
        ValueError: negative size, seed tensor not 0-d or on another device, memory format that does not fit.
    """
    shape = _checked_size(size)
    if dtype not in DTYPES:
        raise TypeError(f"philox_normal: dtype must be one of {[str(d) for d in DTYPES]}, got {dtype}")
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"philox_normal: memory_format must be contiguous_format or channels_last, got {memory_format}"
        )
    channels_last = memory_format == torch.channels_last
    if channels_last and len(shape) != 4:
        raise ValueError(
            f"philox_normal: channels_last needs four dimensions (N, C, H, W), got size {tuple(shape)}"
        )
    given = _checks.seed("philox_normal", _no_seed("philox_normal") if seed is None else seed, device)
    return _normal(shape, given, dtype, channels_last)


def philox_words(seed: int | Tensor, n_blocks: int, first_block: int = 0) -> Tensor:
    """The words of blocks ``first_block`` to ``first_block + n_blocks - 1`` of the stream ``seed``.

    Returns int64 (n_blocks, 4) holding 32-bit words, 0 to 2^32 - 1, on the device of the seed.

    Raises:
        TypeError: seed is neither int nor int64 tensor, a count is not an int.
        ValueError: seed tensor not 0-d, negative count.
    """
    n_blocks = _checks.size("philox_words", "n_blocks", n_blocks)
    first_block = _checks.size("philox_words", "first_block", first_block)
    given = _checks.seed("philox_words", _no_seed("philox_words") if seed is None else seed, None)
    return _words(given, n_blocks, first_block)


def new_seed(device: torch.device | str | None = None) -> Tensor:
    """A fresh 0-d int64 seed from the default generator of ``device``, so that ``torch.manual_seed`` governs it."""
    return _checks.seed("new_seed", None, device)


def split_seed(seed: int | Tensor, n: int) -> Tensor:
    """``n`` independent sub-seeds of ``seed``, int64 (n,), each >= 0, on the device of the seed.

    Neighbouring seeds share no sub-seeds, and no sub-seed is a draw of its parent. Sub-seed ``i`` does not
    depend on n.

    Raises:
        TypeError, ValueError: as :func:`philox_words`.
    """
    n = _checks.size("split_seed", "n", n)
    return _split(_checks.seed("split_seed", _no_seed("split_seed") if seed is None else seed, None), n)


def as_seed(seed: int | Tensor | None, device: torch.device | str | None = None) -> Tensor:
    """``seed`` as a 0-d int64 tensor on ``device``: an int is wrapped mod 2^64, None draws a :func:`new_seed`.

    Raises:
        TypeError, ValueError: as :func:`philox_normal`.
    """
    return _checks.seed("seed", seed, device)


def _no_seed(op: str) -> NoReturn:
    raise TypeError(f"{op}: seed must be an int or a 0-d int64 tensor, got NoneType")


def _checked_size(size: Any) -> list[int]:
    if isinstance(size, (int, torch.SymInt, str)) or not isinstance(size, Sequence):
        raise TypeError(f"philox_normal: size must be a sequence of ints, got {type(size).__name__}")
    shape = [_checks.plain(extent) for extent in size]
    for extent in shape:
        if not isinstance(extent, (int, torch.SymInt)) or isinstance(extent, bool):
            raise TypeError(
                f"philox_normal: size must hold ints, got {type(extent).__name__} in {tuple(shape)}"
            )
        if extent < 0:
            raise ValueError(f"philox_normal: size must hold no negative extent, got {tuple(shape)}")
    return shape


# The reference: int64 tensors hold 32-bit words, so that it runs on any device.


def _mul_hi_lo(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Both halves of the 64-bit product of 32-bit numbers, 16 bits at a time: nothing overflows int64."""
    low = (word & 0xFFFF) * multiplier
    high = (word >> 16) * multiplier
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & _MASK


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four counter words, two key words -> four words. int64 tensors that
    broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(c0, _MULTIPLIERS[0])
        hi1, lo1 = _mul_hi_lo(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _words_of_stream(seed: Tensor, n_blocks: int, first_block: int, stream: int) -> Tensor:
    block = torch.arange(n_blocks, dtype=torch.int64, device=seed.device) + first_block
    zero = torch.zeros_like(block)
    words = philox4x32(
        (block & _MASK, block >> 32, zero + stream, zero), (seed & _MASK, (seed >> 32) & _MASK)
    )
    return torch.stack(torch.broadcast_tensors(*words), dim=1)


def _words_reference(seed: Tensor, n_blocks: int, first_block: int) -> Tensor:
    return _words_of_stream(seed, n_blocks, first_block, 0)


def _sub_seeds(words: Tensor) -> Tensor:
    return words[:, 0] | ((words[:, 1] & 0x7FFFFFFF) << 32)


def _split_reference(seed: Tensor, n: int) -> Tensor:
    return _sub_seeds(_words_of_stream(seed, n, 0, SPLIT))


def normals_of_words(words: Tensor) -> Tensor:
    """Box-Muller: words (n, 4) -> float32 normals (n, 4)."""
    u = (words[:, 0::2].to(torch.float32) + 0.5) * 2.0**-32
    r = torch.sqrt(-2.0 * torch.log(u))
    angle = words[:, 1::2]
    quarter = ((angle + 2**29) >> 30) & 3
    phi = (((angle + 2**29) & (2**30 - 1)) - 2**29).to(torch.float32) * (math.pi / 2**31)
    cosine, sine = torch.cos(phi), torch.sin(phi)
    odd = (quarter & 1).bool()
    turned_cosine = torch.where(odd, sine, cosine) * torch.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
    turned_sine = torch.where(odd, cosine, sine) * torch.where(quarter >= 2, -1.0, 1.0)
    return torch.stack((r * turned_cosine, r * turned_sine), dim=2).reshape(-1, 4)


def _normal_reference(size: Sequence[int], seed: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    count = math.prod(size)
    normals = normals_of_words(_words_reference(seed, (count + 3) // 4, 0)).reshape(-1)[:count]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return normals.reshape(size).to(dtype).clone(memory_format=memory_format)


def _empty_normal(size: Sequence[int], seed: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=seed.device, memory_format=memory_format)


# A compiler would trace ten rounds of integer arithmetic an element, for the same numbers.
_OPAQUE: Any = dict(backend="philox", opaque=True)
_normal = define_op(
    "philox_normal", _normal_reference, fake=_empty_normal, triton="philox", float64=True, **_OPAQUE
)
_words = define_op(
    "philox_words",
    _words_reference,
    fake=lambda seed, n_blocks, first_block: seed.new_empty((n_blocks, 4)),
    triton=lambda seed, n_blocks, first_block: kernels("philox").philox_words_of(
        seed, n_blocks, first_block, 0
    ),
    **_OPAQUE,
)
_split = define_op(
    "split_seed",
    _split_reference,
    fake=lambda seed, n: seed.new_empty((n,)),
    triton=lambda seed, n: _sub_seeds(kernels("philox").philox_words_of(seed, n, 0, SPLIT)),
    **_OPAQUE,
)
