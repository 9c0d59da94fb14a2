"""Counter-based integer noise: the same number for the same (seed, index, counter), in any batch.

    word(key, j) = mix64(key + (j + 1) * 0x9E3779B97F4A7C15)

    mix64(z):    z ^= z >> 30
                 z *= 0xBF58476D1CE4E5B9
                 z ^= z >> 27
                 z *= 0x94D049BB133111EB
                 z ^= z >> 31                    all modulo 2^64

This is the SplitMix64 generator (Steele, Lea, Flood 2014) addressed by counter. Written in numpy integers
rather than `numpy.random.Generator`, whose streams may change between numpy versions: a run resumed after
an upgrade must see the same order, flips and binarisation.
"""

from __future__ import annotations

import operator

import numpy as np

_GAMMA = 0x9E3779B97F4A7C15
_KEYS = 0x6B657973
_MASK = (1 << 64) - 1
_ROWS_AT_ONCE = 64  # the scratch, 64 x 512 words for images of 32x32 pixels, then stays in the cache


def _mix64(z: np.ndarray) -> np.ndarray:
    """mix64 in place on a uint64 array; returns it."""
    scratch = np.empty_like(z)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(z, np.uint64(shift), out=scratch)
        np.bitwise_xor(z, scratch, out=z)
        if factor is not None:
            np.multiply(z, np.uint64(factor), out=z)
    return z


def as_seed(value: object, name: str = "seed") -> int:
    """An integer (python, numpy, 0-d integer tensor) as an int modulo 2^64. TypeError otherwise."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value) & _MASK  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{name}: expected an integer, got {value!r} of type {type(value).__name__}"
        ) from None


def splitmix64(state: int) -> int:
    """``mix64(state + 0x9E3779B97F4A7C15)``, mod 2^64: the next number of the generator in that state."""
    return int(_mix64(np.array([(state + _GAMMA) & _MASK], dtype=np.uint64))[0])


def fold_seed(seed: int, *words: int) -> int:
    """One 64-bit seed from a seed and any number of integers; order matters."""
    for word in words:
        seed = splitmix64(seed) ^ (word & _MASK)
    return splitmix64(seed)


def index_keys(seed: int, indices: np.ndarray) -> np.ndarray:
    """(N,) uint64 keys, one per sample index, independent across indices and seeds."""
    state = np.asarray(indices).astype(np.uint64)  # a copy, mixed in place
    state += np.uint64(_GAMMA)
    _mix64(state)
    state ^= np.uint64(fold_seed(seed, _KEYS))  # mixed unlike the index: (3, 5) is not (5, 3)
    state += np.uint64(_GAMMA)
    return _mix64(state)


def _words32(keys: np.ndarray, counters: np.ndarray) -> np.ndarray:
    words = _mix64(keys[:, None] + counters[None, :])
    return words.astype("<u8", copy=False).view("<u4")


def bernoulli(probability_255: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """(N, P) uint8 of 0 and 1 with P(1) = v / 255 for v in `probability_255` (N, P) uint8, keys (N,) uint64.

    Pixel j of row i uses 31 bits of word(keys[i], j // 2), the low half for even j, and compares them with
    round(v * 2^31 / 255), so that 0 never and 255 always gives 1.
    """
    rows, pixels = probability_255.shape
    threshold = np.array([(2 * v * 2**31 + 255) // 510 for v in range(256)], dtype=np.uint32)
    with np.errstate(over="ignore"):
        counters = np.arange(1, (pixels + 1) // 2 + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    out = np.empty((rows, pixels), dtype=np.uint8)
    for start in range(0, rows, _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        words = _words32(keys[part], counters)[:, :pixels]
        np.right_shift(words, np.uint32(1), out=words)
        np.less(words, threshold[probability_255[part]], out=out[part].view(np.bool_))
    return out


def permutation(n: int, seed: int) -> np.ndarray:
    """A (n,) int64 permutation: 0..n-1 sorted by their keys (ties, one in 2^64, by index)."""
    return np.argsort(index_keys(seed, np.arange(n)), kind="stable")


def coin_flips(seed: int, indices: np.ndarray) -> np.ndarray:
    """(N,) bool, true with probability 1/2, from the top bit of each index's key."""
    return (index_keys(seed, indices) >> np.uint64(63)).astype(bool)
