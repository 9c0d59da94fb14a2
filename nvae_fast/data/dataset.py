"""What every source of images becomes: an `ImageDataset` that turns sample indices into float batches."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from . import hashing
from .integers import plain

logger = logging.getLogger("nvae_fast.data")


class Source(Protocol):
    """Where pixels come from. `read` takes (N,) int64 indices, already checked, and gives uint8 (N,C,H,W)."""

    name: str
    shape: tuple[int, int, int]
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray: ...


class MemoryImages:
    """Images held in memory as one uint8 array (N,C,H,W)."""

    def __init__(self, name: str, pixels: np.ndarray) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise ValueError(f"{name}: expected uint8 (N,C,H,W), got {pixels.dtype} {pixels.shape}")
        if pixels.shape[0] == 0:
            raise ValueError(f"{name}: holds no images, shape {pixels.shape}")
        self.name = name
        self.pixels = pixels
        self.shape: tuple[int, int, int] = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return int(self.pixels.shape[0])

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.pixels[indices]


def reduce_bits(pixels: np.ndarray, num_bits: int) -> np.ndarray:
    """float32 `floor(v / 2^(8-b)) / (2^b - 1)` of uint8 pixels v, any shape; only the division rounds.

    With x = v / 255 this is the specification's floor(x*255 / 2^(8-b)) / (2^b - 1), on integers and so exact.
    """
    levels = np.right_shift(pixels, np.uint8(8 - num_bits)) if num_bits < 8 else pixels
    return np.divide(levels, np.float32(2**num_bits - 1), dtype=np.float32)


class ImageDataset:
    """Images of one size, addressed by index.

    Attributes: `name`; `split`; `image_size` (pixels a side); `channels` (1 or 3); `num_bits` (1..8);
    `binarize` (a fresh Bernoulli draw at every load); `skipped`, a list of (file, reason) of the unreadable
    images met so far.

    With `binarize` a pixel of stored value v becomes 1 with probability v/255, else 0. Fewer bits leave 0
    and 1 as they are, so `num_bits` has no effect then.

    source: where the images come from; :func:`open_dataset` makes one. Raises ValueError for images that are not square, of
    another number of channels than 1 or 3, or another `num_bits`.
    """

    def __init__(self, source: Source, *, split: str, num_bits: int = 8, binarize: bool = False) -> None:
        num_bits = plain(num_bits)
        if isinstance(num_bits, bool) or not isinstance(num_bits, int) or not 1 <= num_bits <= 8:
            raise ValueError(f"num_bits: expected an integer from 1 to 8, got {num_bits!r}")
        channels, height, width = source.shape
        if channels not in (1, 3) or height != width:
            raise ValueError(
                f"{source.name}: expected square images of 1 or 3 channels, got (C,H,W) = {source.shape}"
            )
        self.source = source
        self.name = source.name
        self.split = split
        self.image_size = height
        self.channels = channels
        self.num_bits = num_bits
        self.binarize = binarize

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(file, reason) of the unreadable images met so far."""
        return self.source.skipped

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        shape = f"{self.channels}x{self.image_size}x{self.image_size}"
        extra = ", binarised" if self.binarize else f", {self.num_bits} bits"
        return f"ImageDataset({self.name!r}, split={self.split!r}, {len(self)} images of {shape}{extra})"

    def batch(self, indices: Tensor | np.ndarray | Sequence[int], seed: int) -> Tensor:
        """float32 (N,C,H,W) in [0,1] of the samples `indices` (N,) integers in 0..len-1.

        Every image depends on (seed, its index) alone, not on its neighbours in the batch: a sample listed
        twice comes out twice the same, and another `seed` gives another binarisation. N = 0 gives an empty
        tensor. Raises TypeError, ValueError or IndexError for indices that are no integers, not (N,) or out of range.
        """
        index = self._check_indices(indices)
        seed = hashing.as_seed(seed)
        pixels = self.source.read(index)
        if not self.binarize:
            return torch.from_numpy(reduce_bits(pixels, self.num_bits))
        flat = pixels.reshape(len(index), self.channels * self.image_size**2)
        bits = hashing.bernoulli(flat, hashing.index_keys(seed, index))
        return torch.from_numpy(bits.reshape(pixels.shape).astype(np.float32))

    def _check_indices(self, indices: Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
        array = indices.detach().cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)
        if array.ndim == 1 and array.size == 0:
            return np.zeros(0, dtype=np.int64)
        if array.dtype.kind not in "iu":
            raise TypeError(f"indices: expected integers, got {array.dtype}")
        if array.ndim != 1:
            raise ValueError(f"indices: expected one dimension (N,), got shape {tuple(array.shape)}")
        array = array.astype(np.int64)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= len(self):
            wrong = low if low < 0 else high
            raise IndexError(f"indices: expected 0 to {len(self) - 1} for {self.name}, got {wrong}")
        return array
