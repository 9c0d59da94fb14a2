"""What every source of images becomes: an `ImageDataset` that turns sample indices into float batches."""

from __future__ import annotations

import copy
import logging
import operator
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from . import hashing
from .integers import plain

logger = logging.getLogger("nvae_fast.data")


class Source(Protocol):
    """Where pixels come from. `read` takes (N,) int64 indices, already checked, and gives uint8 (N,C,H,W)."""

    name: str
    shape: tuple[int, int, int]

    @property
    def skipped(self) -> list[tuple[str, str]]: ...

    def __len__(self) -> int: ...

    def read(self, indices: np.ndarray) -> np.ndarray: ...


class MemoryImages:
    """Images held as one uint8 array (N,C,H,W), or as an object that is indexed like one.

    pad: pixels of zeros added on each side. binary: the values are 0 and 1, given as 0 and 255.
    """

    def __init__(self, name: str, pixels: Any, *, pad: int = 0, binary: bool = False) -> None:
        if pixels.dtype != np.uint8 or len(pixels.shape) != 4:
            raise ValueError(f"{name}: expected uint8 (N,C,H,W), got {pixels.dtype} {pixels.shape}")
        if pixels.shape[0] == 0:
            raise ValueError(f"{name}: holds no images, shape {pixels.shape}")
        self.name = name
        self.pixels = pixels
        self.pad = pad
        self.binary = binary
        _, channels, height, width = pixels.shape
        self.shape: tuple[int, int, int] = (channels, height + 2 * pad, width + 2 * pad)
        self.skipped: list[tuple[str, str]] = []
        self.binary_format = False  # one-channel images that are published for a Bernoulli likelihood

    def __len__(self) -> int:
        return int(self.pixels.shape[0])

    def read(self, indices: np.ndarray) -> np.ndarray:
        part = self.pixels[indices]
        if self.binary:
            if part.max(initial=0) > 1:
                raise ValueError(
                    f"{self.name}: most pixels are 0 and 1 only, some are greater (up to {part.max()}): save all "
                    "images with the same range, 0 to 255"
                )
            part = part * np.uint8(255)
        if self.pad:
            part = np.pad(part, ((0, 0), (0, 0), (self.pad, self.pad), (self.pad, self.pad)))
        return part


def reduce_bits(pixels: np.ndarray, num_bits: int) -> np.ndarray:
    """float32 `floor(v / 2^(8-b)) / (2^b - 1)` of uint8 pixels v, any shape; only the division rounds.

    With x = v / 255 this is the specification's floor(x*255 / 2^(8-b)) / (2^b - 1), on integers and so exact.
    """
    levels = np.right_shift(pixels, np.uint8(8 - num_bits)) if num_bits < 8 else pixels
    return np.divide(levels, np.float32(2**num_bits - 1), dtype=np.float32)


class ImageDataset(Dataset[Tensor]):
    """Images of one size, addressed by index: a map-style torch Dataset of images (C,H,W), with whole batches in one call.

    Attributes: `name`; `split`; `image_size` (pixels a side); `channels` (1 or 3); `num_bits` (1..8);
    `binarize` (a fresh Bernoulli draw at every load); `skipped`, a list of (file, reason) of the unreadable
    images met so far; `own_split`, False where the data know no splits and all images are given for each; `held_out`, the
    split that was made of data without splits, None where none was made.

    With `binarize` a pixel of stored value v becomes 1 with probability v/255, else 0. Fewer bits leave 0
    and 1 as they are, so `num_bits` has no effect then.

    source: where the images come from; :func:`open_dataset` makes one. num_bits, binarize: None leaves them to the model,
    see :meth:`for_model`; until then they are 8 bits, and binarised when there is one channel. Raises ValueError for
    images that are not square, of another number of channels than 1 or 3, or another `num_bits`.
    """

    def __init__(
        self, source: Source, *, split: str, num_bits: int | None = None, binarize: bool | None = False
    ) -> None:
        num_bits = plain(num_bits)
        if num_bits is not None and (
            isinstance(num_bits, bool) or not isinstance(num_bits, int) or not 1 <= num_bits <= 8
        ):
            raise ValueError(f"num_bits: expected an integer from 1 to 8, got {num_bits!r}")
        channels, height, width = source.shape
        if channels not in (1, 3) or height != width:
            raise ValueError(
                f"{source.name}: expected square images of 1 or 3 channels, got (C,H,W) = {source.shape}"
            )
        self.source = source
        self.name = source.name
        self.split = split
        self.own_split = True
        self.held_out: Any | None = None
        self.image_size = height
        self.channels = channels
        self.num_bits = 8 if num_bits is None else num_bits
        self.binarize = channels == 1 if binarize is None else bool(binarize)
        self._bits_given = num_bits is not None
        self._binarize_given = binarize is not None
        self._announce = binarize is None and channels == 1 and not getattr(source, "binary_format", False)

    def for_model(self, likelihood: str, num_bits: int) -> ImageDataset:
        """The images as a model with this likelihood and bits per colour takes them; the source is shared.

        A Bernoulli likelihood takes binarised images, any other takes them as they are. What was given when the
        dataset was made is kept, with a warning where it does not fit the likelihood.

        Raises:
            ValueError: ``num_bits`` was given, and a mixture of logistics takes another number of bits.
        """
        result = copy.copy(self)
        result._announce = False
        binarize = likelihood == "bernoulli"
        if not self._binarize_given:
            result.binarize = binarize
        elif self.binarize and not binarize:
            warnings.warn(
                f"{self.name}: binarize=True, but the likelihood is {likelihood}, not bernoulli: the model learns "
                "black and white noise; leave binarize out to follow the likelihood",
                stacklevel=3,
            )
        elif binarize and not self.binarize and self._has_gray():
            warnings.warn(
                f"{self.name}: binarize=False, but the likelihood is bernoulli: gray values are no data of "
                "that likelihood, and its numbers are cross-entropies, not log-probabilities",
                stacklevel=3,
            )
        if not self._bits_given:
            result.num_bits = num_bits
        elif likelihood == "mixture_logistic" and num_bits != self.num_bits:
            raise ValueError(
                f"{self.name}: num_bits={self.num_bits}, but the model has num_x_bits={num_bits}: leave num_bits out "
                "to follow the model"
            )
        return result

    def with_source(self, source: Source) -> ImageDataset:
        """The same options on the images of another ``source``, which have the same shape."""
        result = copy.copy(self)
        result.source = source
        return result

    def _has_gray(self) -> bool:
        """Whether the first images have values between black and white."""
        pixels = self.source.read(np.arange(min(len(self), 8)))
        return bool(((pixels > 0) & (pixels < 255)).any())

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(file, reason) of the unreadable images met so far."""
        return self.source.skipped

    @property
    def reading(self) -> dict[str, Any] | None:
        """The crop and the filter that images are read with, as plain values; None where they are taken as they are."""
        reading = getattr(self.source, "reading", None)
        return None if reading is None else asdict(reading)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor:
        """Image ``index``, float32 (C,H,W) in [0,1]. A draw of black and white pixels takes its seed from PyTorch's generator;
        :meth:`batch` takes one. Raises IndexError for an index out of range, TypeError for one that is no integer."""
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"index: expected -{len(self)} to {len(self) - 1} for {self.name}, got {number}")
        seed = int(torch.randint(2**62, ())) if self.binarize else 0
        return self.batch([number % len(self)], seed)[0]

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
        if self._announce:
            self._announce = False
            if ((pixels > 0) & (pixels < 255)).any():
                warnings.warn(
                    f"{self.name}: gray images are binarised at every load, as one-channel images are where neither "
                    "binarize nor likelihood is given; binarize=False keeps them gray",
                    stacklevel=2,
                )
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
