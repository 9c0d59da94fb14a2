"""Two sets of real images that need no download, from scikit-learn's package data: `digits` and `photos`."""

from __future__ import annotations

import numpy as np

from .dataset import MemoryImages
from .extras import require

DIGITS_TRAIN = (
    1500  # of 1797; the rest is the test split (the file is ordered by writer, so mostly other hands)
)
_PHOTO_TRAIN_COLUMNS = 480  # of 640; the columns to the right are the test split
_PHOTO_SCALES = (1, 2, 3, 4)  # each region is shrunk by these factors before crops are cut


def cubic_matrix(size_out: int, size_in: int) -> np.ndarray:
    """(size_out, size_in) float64 Catmull-Rom weights: centres aligned, edges repeated, rows sum to 1."""
    position = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    base = np.floor(position).astype(int)
    matrix = np.zeros((size_out, size_in))
    for tap in range(-1, 3):
        distance = np.abs(position - (base + tap))
        near = 1.5 * distance**3 - 2.5 * distance**2 + 1
        far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
        weight = np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))
        np.add.at(matrix, (np.arange(size_out), np.clip(base + tap, 0, size_in - 1)), weight)
    return matrix


def digits(split: str, image_size: int | None, channels: int | None) -> MemoryImages:
    """Handwritten digits, 1 channel, 1500 train and 297 test images, `image_size` 8..128 (32).

    The originals are 8x8 with values 0..16: how many ink pixels each 4x4 block of a 32x32 bitmap held. So
    the way back is to interpolate the ink density (Catmull-Rom) and to steepen it around one half, which
    puts the stroke's edge where the bitmap had it and leaves a soft rim of about two pixels.
    """
    size = _check_size("digits", image_size, 32)
    if channels not in (None, 1):
        raise ValueError(f"channels: digits has 1 channel, got {channels}")
    datasets = require("sklearn.datasets", "scikit-learn", "the data set 'digits'")
    density = datasets.load_digits().images.astype(np.float64) / 16.0
    density = density[:DIGITS_TRAIN] if split == "train" else density[DIGITS_TRAIN:]
    matrix = cubic_matrix(size, 8)
    smooth = matrix @ density @ matrix.T
    steep = np.clip((smooth - 0.45) * 2.5 + 0.5, 0.0, 1.0)
    pixels = np.floor(steep * 255.0 + 0.5).astype(np.uint8)
    source = MemoryImages("digits", np.ascontiguousarray(pixels[:, None]))
    source.binary_format = True
    return source


def photos(split: str, image_size: int | None, channels: int | None) -> MemoryImages:
    """Square RGB crops of the two sample photographs (427x640), `image_size` 16..128 (32).

    The left 480 columns give the train split and the right 160 the test split. Each region is averaged down
    by 1, 2, 3 and 4 (where it stays large enough) and cut on a regular grid: steps of a quarter side in the
    train split (an eighth in the shrunk versions), of half a side in the test split. Order: photograph,
    scale, row, column.
    """
    size = _check_size("photos", image_size, 32, smallest=16)
    if channels not in (None, 3):
        raise ValueError(f"channels: photos has 3 channels, got {channels}")
    datasets = require("sklearn.datasets", "scikit-learn", "the data set 'photos'")
    require(
        "PIL.Image", "Pillow", "the data set 'photos'"
    )  # scikit-learn reads its JPEG files through Pillow
    crops = []
    for photo in datasets.load_sample_images().images:
        columns = slice(None, _PHOTO_TRAIN_COLUMNS) if split == "train" else slice(_PHOTO_TRAIN_COLUMNS, None)
        region = np.asarray(photo, dtype=np.uint8)[:, columns]
        for scale in _PHOTO_SCALES:
            small = _shrink(region, scale)
            if min(small.shape[:2]) < size:
                continue
            step = size // 2 if split == "test" else size // (4 if scale == 1 else 8)
            windows = np.lib.stride_tricks.sliding_window_view(small, (size, size), axis=(0, 1))
            crops.append(windows[::step, ::step].reshape(-1, 3, size, size))
    return MemoryImages("photos", np.concatenate(crops))


def _shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """uint8 (H//f, W//f, 3): the mean over f x f blocks, rounded to nearest, in integers."""
    if factor == 1:
        return image
    height, width = image.shape[0] // factor, image.shape[1] // factor
    blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    total = blocks.sum(axis=(1, 3), dtype=np.uint32)
    return ((2 * total + factor * factor) // (2 * factor * factor)).astype(np.uint8)


def _check_size(name: str, image_size: int | None, default: int, smallest: int = 8) -> int:
    size = default if image_size is None else image_size
    if not smallest <= size <= 128:
        raise ValueError(f"image_size: {name} comes in {smallest} to 128 pixels a side, got {size}")
    return size
