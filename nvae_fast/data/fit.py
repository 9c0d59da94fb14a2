"""Arrays of ready-made images as a source: values, layout, channels and size are checked against what was asked."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from .dataset import MemoryImages

_SAMPLED = 4096  # images looked at, evenly spaced, to tell 0 and 1 from 0 to 255


def check_dtype(dtype: np.dtype[Any], shape: tuple[int, ...], where: str) -> None:
    """Raise ValueError unless pixels of this dtype are uint8 (0 to 255) or bool; the message says how to convert."""
    if dtype in (np.uint8, np.bool_):
        return
    advice = {
        "u": "scale them to 0 to 255 and save array.astype(numpy.uint8)",
        "i": "scale them to 0 to 255 and save array.astype(numpy.uint8)",
        "f": "for values in [0, 1] save (array * 255).round().astype(numpy.uint8), "
        "for values in [-1, 1] ((array + 1) * 127.5).round().astype(numpy.uint8)",
        "c": "complex values are no images",
    }.get(dtype.kind, "save the images as one uint8 array")
    raise ValueError(
        f"{where}: expected uint8 pixels (0 to 255) or bool, got {dtype} of shape {shape}; {advice}"
    )


def to_nchw(pixels: np.ndarray, where: str, channels: int | None) -> np.ndarray:
    """uint8 or bool (N,H,W), (N,H,W,C) or (N,C,H,W), C in {1, 3}, or flat (N,H*H) or (N,3*H*H) -> uint8 (N,C,H,W).

    Which of the two four-dimensional layouts it is follows from which axis has 1 or 3 entries. Where both have
    (say (N,3,3,3), or (N,1,28,1)), `channels` decides, then square images are preferred, then channels last.
    """
    check_dtype(pixels.dtype, pixels.shape, where)
    if pixels.dtype == np.bool_:
        pixels = pixels.view(np.uint8)
    shapes = "(N,H,W), (N,H,W,C) or (N,C,H,W) with C = 1 or 3"
    if pixels.ndim == 2:  # flat rows: no length is both that of a gray and of an RGB square
        for bands in (1, 3):
            side = math.isqrt(pixels.shape[1] // bands)
            if side and bands * side * side == pixels.shape[1]:
                return pixels.reshape(-1, bands, side, side)
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim != 4:
        raise ValueError(f"{where}: expected {shapes}, got {pixels.shape}")
    last, first = pixels.shape[3] in (1, 3), pixels.shape[1] in (1, 3)
    if last and first:
        rank_last = (pixels.shape[3] == channels, pixels.shape[1] == pixels.shape[2])
        rank_first = (pixels.shape[1] == channels, pixels.shape[2] == pixels.shape[3])
        first = rank_first > rank_last
    elif not last and not first:
        raise ValueError(f"{where}: expected {shapes}, got {pixels.shape}")
    return pixels if first else pixels.transpose(0, 3, 1, 2)


def warn_binary(where: str) -> None:
    """Say that values 0 and 1 are taken as black and white."""
    warnings.warn(
        f"{where}: the pixels are 0 and 1 only, not 0 to 255; they are taken as black and white (1 becomes 255)",
        stacklevel=2,
    )


def is_binary(pixels: Any) -> bool:
    """Whether the pixels, an array (N,...) or an object indexed like one, are 0 and 1 with at least one 1.

    Looks at up to 4096 images evenly spaced; stops at the first greater value.
    """
    count = int(pixels.shape[0])
    largest = 0
    for part in np.array_split(np.linspace(0, count - 1, min(count, _SAMPLED)).astype(np.int64), 64):
        if len(part):
            largest = max(largest, int(pixels[part].max(initial=0)))
        if largest > 1:
            return False
    return largest == 1


def array_source(
    pixels: Any,
    where: str,
    image_size: int | None,
    channels: int | None,
    *,
    name: str | None = None,
    is_bool: bool = False,
) -> MemoryImages:
    """A source of uint8 pixels (N,C,H,W), an array or an object indexed like one, checked against what was asked for.

    28x28 one-channel images (MNIST, Omniglot) get two pixels of zeros on each side unless `image_size` is 28. Nothing
    else is resized: arrays are taken to be prepared, and a size that does not match is an error. Pixels that
    are 0 and 1 only, as binarised images are often saved, become 0 and 255, with a warning unless `is_bool`.
    """
    count, c, height, width = pixels.shape
    if height != width:
        raise ValueError(f"{where}: expected square images, got {height}x{width}")
    if channels is not None and c != channels:
        raise ValueError(f"{where}: expected {channels} channel(s), the images have {c}")
    pad = 2 if c == 1 and height == 28 and image_size in (None, 32) else 0
    if image_size is not None and height + 2 * pad != image_size:
        raise ValueError(f"{where}: expected images of {image_size}x{image_size}, got {height}x{width}")
    binary = is_bool or (count > 0 and is_binary(pixels))
    if binary and not is_bool:
        warn_binary(where)
    return MemoryImages(name or where, pixels, pad=pad, binary=binary)
