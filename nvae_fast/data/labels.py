"""Labels beside the rows and above the columns of a grid of images, and a title, with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from .extras import require

_MARGIN = 4
_PAPER, _INK = 255, 0


def checked_labels(name: str, labels: Any, count: int, what: str) -> list[str]:
    """``labels`` as a list of ``count`` strings, empty for None."""
    if labels is None:
        return []
    if (
        isinstance(labels, str)
        or not isinstance(labels, Sequence)
        or any(not isinstance(t, str) for t in labels)
    ):
        raise TypeError(f"{name}: expected a sequence of strings, got {labels!r}")
    if len(labels) != count:
        raise ValueError(f"{name}: expected one for each of {count} {what}, got {len(labels)}")
    return list(labels)


def widest(texts: Sequence[str]) -> int:
    """The width of the widest text in pixels, 0 for no texts."""
    return max((_size(text)[0] for text in texts), default=0)


def with_labels(
    grid: np.ndarray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    height: int,
    width: int,
    title: str = "",
) -> np.ndarray:
    """A grid, uint8 (H,W) or (H,W,3), with labels and a title in a white margin.

    A row takes ``height`` pixels, a column ``width``.
    """
    rows, columns = [_size(text) for text in row_labels], [_size(text) for text in column_labels]
    title_width, title_height = (size + 2 * _MARGIN for size in _size(title)) if title else (0, 0)
    left = max((w + 2 * _MARGIN for w, _ in rows), default=0)
    above = max((h + 2 * _MARGIN for _, h in columns), default=0)
    top = above + title_height
    shape = (grid.shape[0] + top, max(grid.shape[1] + left, title_width), *grid.shape[2:])
    canvas = np.full(shape, _PAPER, dtype=np.uint8)
    canvas[top:, left : left + grid.shape[1]] = grid
    image, draw, font = _pillow()
    picture = image.fromarray(canvas)
    options = dict(fill=_INK if grid.ndim == 2 else (_INK,) * 3, font=font.load_default(), align="center")
    pen = draw.Draw(picture)
    if title:
        pen.multiline_text((_MARGIN, _MARGIN), title, **{**options, "align": "left"})
    for row, (text, (w, h)) in enumerate(zip(row_labels, rows, strict=True)):
        pen.multiline_text((left - _MARGIN - w, top + row * height + (height - h) // 2), text, **options)
    for column, (text, (w, _)) in enumerate(zip(column_labels, columns, strict=True)):
        place = (left + column * width + (width - w) // 2, title_height + _MARGIN)
        pen.multiline_text(place, text, **options)
    return np.asarray(picture)


def _size(text: str) -> tuple[int, int]:
    """Width and height in pixels of a text of one or more lines."""
    image, draw, font = _pillow()
    pen = draw.Draw(image.new("L", (1, 1)))
    _, _, right, bottom = pen.multiline_textbbox((0, 0), text, font=font.load_default())
    return math.ceil(right), math.ceil(bottom)


def _pillow() -> list[ModuleType]:
    return [
        require(f"PIL.{name}", "pillow", "labels of a grid") for name in ("Image", "ImageDraw", "ImageFont")
    ]
