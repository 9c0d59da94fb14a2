"""Grids of images as PNG files, written by Pillow, whole or not at all."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from nvae_fast.io import atomic_file

from . import labels
from .extras import require
from .integers import plain

_GAP = 2  # pixels between images
_GAP_VALUE = 128
# Pixels a side: of an image that can be seen, and the most of a grid that is enlarged for it.
_SEEN = 96
_MOST = 4096


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of uint8 (H,W) gray or (H,W,3) RGB pixels."""
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(f"pixels: expected uint8 (H,W) or (H,W,3), got {pixels.dtype} {pixels.shape}")
    if not pixels.size:
        raise ValueError(f"pixels: expected at least one pixel, got {pixels.shape}")
    image = require("PIL.Image", "pillow", "writing PNG files")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def to_pixels(images: Tensor) -> np.ndarray:
    """uint8 (N,H,W,C) of images (N,C,H,W) in [0,1]: a value v becomes floor(255 v + 1/2).

    Raises ValueError for values that are not finite, or outside of [0,1] by more than rounding.
    """
    values = images.detach().double().cpu().numpy()
    if not np.isfinite(values).all():
        raise ValueError(
            f"images: {int((~np.isfinite(values)).sum())} of {values.size} values are not finite"
        )
    if values.min() < -1e-3 or values.max() > 1 + 1e-3:
        raise ValueError(f"images: expected values in [0,1], got {values.min():.4g} to {values.max():.4g}")
    pixels: np.ndarray = np.floor(np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels


def make_grid(images: Tensor, columns: int | None = None, scale: int = 1) -> np.ndarray:
    """uint8 (H',W') or (H',W',3): images (N,C,H,W) in [0,1], C = 1 or 3, row by row, 2 gray pixels between.

    A value v becomes floor(255 v + 1/2). `columns` None: ceil(sqrt(N)). `scale`: how often each pixel is repeated in both
    directions. Places left over in the last row are gray.
    """
    columns = _checked(images, columns)
    pixels = to_pixels(images).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    shape = (rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, channels)
    grid = np.full(shape, _GAP_VALUE, dtype=np.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + _GAP), (i % columns) * (width + _GAP)
        grid[top : top + height, left : left + width] = picture
    return grid if channels == 3 else grid[..., 0]


def save_grid(
    images: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    scale: int | None = None,
    title: str | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
) -> None:
    """Write a grid of images (N,C,H,W) in [0,1], C = 1 or 3, to `path` as a PNG; needs Pillow.

    columns: images in a row; None for ceil(sqrt(N)). title: a text above the grid. row_labels, column_labels: a text for each
    row and each column. Texts are in a white margin. scale: how often each pixel is repeated in both directions; None is 1
    for a grid without texts, and enlarges images beside texts to 96 pixels or a little more and to the width of their label,
    as long as the grid has at most 4096 pixels a side.

    Written to a temporary file in the same folder and moved into place: a crash or a full disk leaves an
    older file whole. Raises TypeError or ValueError for bad images, columns, scale, title or labels and FileNotFoundError for
    a missing folder, before anything is written.
    """
    columns = _checked(images, columns)
    rows = -(-images.shape[0] // columns)
    beside = labels.checked_labels("row_labels", row_labels, rows, "rows")
    above = labels.checked_labels("column_labels", column_labels, columns, "columns")
    if title is not None and not isinstance(title, str):
        raise TypeError(f"title: expected a string or None, got {title!r}")
    scale = plain(scale)
    if scale is None:
        scale = _scale(images, rows, columns, labels.widest(above)) if title or beside or above else 1
    elif isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale: expected a positive integer or None, got {scale!r}")
    grid = make_grid(images, columns, scale)
    if title or beside or above:
        height, width = (size * scale + _GAP for size in images.shape[-2:])
        grid = labels.with_labels(grid, beside, above, height, width, title or "")
    data = encode_png(grid)
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise IsADirectoryError(f"path: {str(target)!r} is a folder, expected the name of a PNG file")
    with atomic_file(target) as file:
        file.write(data)


def _checked(images: Tensor, columns: int | None) -> int:
    """The images in a row. Raises TypeError or ValueError for images and columns that make no grid."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a tensor (N,C,H,W), got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"images: expected (N,C,H,W) with C = 1 or 3 and nothing empty, got {tuple(images.shape)}"
        )
    if images.is_complex():
        raise TypeError(f"images: expected real values in [0,1], got {images.dtype}")
    columns = plain(columns)
    if columns is not None and (isinstance(columns, bool) or not isinstance(columns, int) or columns < 1):
        raise ValueError(f"columns: expected a positive integer or None, got {columns!r}")
    count = images.shape[0]
    return min(columns or math.ceil(math.sqrt(count)), count)


def _scale(images: Tensor, rows: int, columns: int, label: int) -> int:
    """How much to enlarge images so that they can be seen and a label of `label` pixels fits above each."""
    height, width = images.shape[-2:]
    most = _MOST // max(rows * (height + _GAP), columns * (width + _GAP))
    return max(-(-label // width), min(-(-_SEEN // width), most), 1)
