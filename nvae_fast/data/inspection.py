"""What kind of images a data set holds: their size, whether they have colours, and whether they are black and white."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .dataset import ImageDataset
from .held_out import SomeImages

SAMPLED = 32  # images looked at, evenly spaced
LARGEST = 64  # the largest side that images are resized to where none is given
SMALLEST = 8
_ENOUGH = 256  # pixels a side of an image that are looked at


@dataclass(frozen=True)
class ImageKind:
    """Images as they are found. size: side in pixels to train on; resized: whether images are resized to it, and `side` is the
    side that they have; channels: 1 or 3; binary: only black and white; published: one-channel images that are published for a
    Bernoulli likelihood, such as MNIST."""

    size: int
    channels: int
    binary: bool
    published: bool
    resized: bool
    side: int

    @property
    def name(self) -> str:
        """What to call them in a message."""
        return "RGB" if self.channels == 3 else "black and white" if self.binary else "gray"


def inspect_images(dataset: ImageDataset) -> ImageKind:
    """Look at some images of a data set that was opened without a size and without a number of channels.

    Image files are resized, to the power of two that is nearest to the median of their short sides, from 8 to 64 pixels. RGB
    files whose three channels are equal are gray. Arrays are taken as they are.
    """
    source: Any = dataset.source
    source = source.whole if isinstance(source, SomeImages) else source
    published = bool(getattr(source, "binary_format", False))
    if not hasattr(source, "pictures"):
        pixels = source.read(_spread(len(source)))
        binary = dataset.channels == 1 and _black_and_white([pixels])
        return ImageKind(dataset.image_size, dataset.channels, binary, published, False, dataset.image_size)
    sides, grays = [], []
    colour = False
    for picture in source.pictures():
        sides.append(source.reading.side(picture.size))
        bands = _bands(picture)
        colour = colour or any(not np.array_equal(bands[0], band) for band in bands[1:3])
        grays.append(bands[0])
    side = round(statistics.median(sides)) if sides else dataset.image_size
    return ImageKind(
        nearest_power(side), 3 if colour else 1, not colour and _black_and_white(grays), published, True, side
    )


def nearest_power(side: int) -> int:
    """The power of two nearest to ``side`` on a logarithmic scale, from 8 to 64."""
    return int(np.clip(2 ** round(float(np.log2(side))), SMALLEST, LARGEST))


def _bands(picture: Any) -> list[np.ndarray]:
    """The colour channels of a Pillow image, each (H,W); palettes are looked up, transparency is left out."""
    if picture.mode not in ("1", "L", "LA", "RGB", "RGBA") and picture.mode[0] not in "IF":
        picture = picture.convert("RGB")
    values = np.asarray(picture)
    step = max(min(values.shape[:2]) // _ENOUGH, 1)
    values = values[::step, ::step].copy()
    return (
        [values] if values.ndim == 2 else list(np.moveaxis(values, -1, 0)[: 1 if picture.mode == "LA" else 3])
    )


def _black_and_white(parts: Iterable[np.ndarray]) -> bool:
    """Whether all values are two: 0, and 1 or 255."""
    found: set[Any] = set()
    for part in parts:
        found |= set(np.unique(part).tolist())
        if len(found) > 2:
            return False
    return len(found) == 2 and min(found) == 0 and max(found) in (1, 255)


def _spread(count: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, SAMPLED)).astype(np.int64))


def check_kind(kind: ImageKind, name: str, model: Any, given: Iterable[str]) -> None:
    """Raise ValueError when colour images would be trained on as something else than colours, unless that was asked for.

    model: an object with `channels` and `likelihood_name`. given: the options that were given, by the names of their fields.
    """
    if kind.channels != 3:
        return
    if model.channels == 1 and not (kind.resized and "image_channels" in given):
        gray = ", or --image-channels 1 to train on gray copies" if kind.resized else ""
        raise ValueError(
            f"{name} holds RGB images, the model has one channel: give --image-channels 3 --likelihood mixture_logistic for a "
            f"model of colours{gray}"
        )
    if model.channels == 3 and model.likelihood_name == "bernoulli":
        raise ValueError(
            f"{name} holds RGB images, the Bernoulli likelihood is for black and white ones: give --likelihood mixture_logistic"
        )
