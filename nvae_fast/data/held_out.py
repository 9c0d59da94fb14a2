"""A held-out part of images that have no parts: chosen by the names of the images, so that it can be found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np

from .dataset import ImageDataset, Source
from .integers import plain

_MOST = 2**63


@dataclass(frozen=True)
class HeldOut:
    """Which images are held out: those whose name has a hash below `bound`.

    fraction: the share that was asked for. bound: None until the images are known; `split_off` then sets it to where that share
    of them is below. A training image is never held out later, also when images are added.
    """

    fraction: float
    bound: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint; `HeldOut(**values)` reads them back."""
        return asdict(self)


def check_fraction(value: float | None) -> float:
    """``value`` when it is a share from 0 up to, not including, 1; 0 for None. Else ValueError or TypeError."""
    value = 0.0 if value is None else plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"val_fraction (--val-fraction): expected a number from 0 to 1, got {value!r}")
    if not 0 <= value < 1:
        raise ValueError(
            f"val_fraction (--val-fraction): expected a share of at least 0 and less than 1, got {value!r}"
        )
    return float(value)


def split_off(dataset: ImageDataset, held_out: HeldOut, *, training: bool) -> ImageDataset:
    """The images of ``dataset`` that are not held out, or with ``training`` False those that are.

    At least one image is held out and one is left. Raises ValueError when there is only one image.
    """
    hashes = _hashes(_names(dataset.source))
    if held_out.bound is None:
        if len(hashes) < 2:
            raise ValueError(
                f"{dataset.name}: one image alone cannot be split into training and validation images: add images, or "
                "switch validation off with val_fraction=0 (--val-fraction 0)"
            )
        count = min(max(round(held_out.fraction * len(hashes)), 1), len(hashes) - 1)
        held_out = replace(held_out, bound=int(np.partition(hashes, count)[count]))
    below = hashes < held_out.bound
    result = _part(dataset, dataset.source, np.flatnonzero(~below if training else below), dataset.split)
    result.own_split = True
    result.held_out = held_out
    return result


def validation_part(training: ImageDataset) -> ImageDataset:
    """The images that were held out of ``training``, which `split_off` made. They are read from the same source: it is not
    opened again, and its cache is shared. Raises ValueError when there are none."""
    source = cast(SomeImages, training.source)
    others = np.setdiff1d(np.arange(len(source.whole)), source.positions, assume_unique=True)
    return _part(training, source.whole, others, "validation")


def _part(dataset: ImageDataset, source: Source, positions: np.ndarray, split: str) -> ImageDataset:
    """``dataset`` with the images of ``source`` at these positions. Raises ValueError when there are none."""
    if not len(positions):
        part = "training" if split == "train" else "validation"
        raise ValueError(
            f"{dataset.name}: no {part} images among its {len(source)}, when they are split as the checkpoint says: give "
            "the data that it was trained on"
        )
    result = dataset.with_source(SomeImages(source, positions))
    result.split = split
    return result


class SomeImages:
    """The images of another source at these positions, in this order."""

    def __init__(self, source: Source, positions: np.ndarray) -> None:
        self.whole, self.positions = source, positions
        self.name, self.shape = source.name, source.shape
        self.reading = getattr(source, "reading", None)
        self.binary_format = getattr(source, "binary_format", False)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(file, reason) of the damaged images met so far."""
        return self.whole.skipped

    def __len__(self) -> int:
        return len(self.positions)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.whole.read(self.positions[indices])


def _names(source: Source) -> Iterable[str]:
    """What the images are called within their data: the path of a file, else the number of an image."""
    names = getattr(source, "names", None)
    return map(str, range(len(source))) if names is None else names()


def _hashes(names: Iterable[str]) -> np.ndarray:
    """A whole number from 0 to 2^63-1 for each name, (N,) int64."""
    numbers = [
        int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big")
        for name in names
    ]
    return np.array([number % _MOST for number in numbers], dtype=np.int64)
