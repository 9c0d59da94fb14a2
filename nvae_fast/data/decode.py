"""Encoded images (PNG, JPEG, ...) into uint8 arrays of one size, with Pillow; the base of lazy sources."""

from __future__ import annotations

import errno
import io
import logging
import threading
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from .extras import require

logger = logging.getLogger("nvae_fast.data")

_MAGIC = (
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"GIF8",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"P4",
    b"P5",
    b"P6",
    b"\0\0\0\x0cjP",
)
_CACHE_BYTES = 1 << 30  # decoded images are kept when the whole set fits into this many bytes
_NOT_THE_FILES_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the process is short of something: say so
_REPORT_AT_MOST = 10  # unreadable images named one by one in the log; all of them are in `skipped`


def looks_encoded(head: bytes) -> bool:
    """Whether the first bytes (16 suffice) are those of an image file that Pillow reads."""
    return head.startswith(_MAGIC) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def open_image(data: Any) -> Any:
    """A Pillow image of a path or of bytes, its header read."""
    image = require("PIL.Image", "Pillow", "reading image files")
    return image.open(io.BytesIO(data) if isinstance(data, bytes) else data)


def fit_image(picture: Any, size: int, channels: int) -> np.ndarray:
    """uint8 (C,size,size), RGB or gray: upright by its EXIF tag, centre-cropped, resized (Lanczos).

    A picture that already has this size keeps its pixels unchanged.
    """
    image = require("PIL.Image", "Pillow", "reading image files")
    picture = require("PIL.ImageOps", "Pillow", "reading image files").exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16-bit gray, which convert() would clip instead of scale
        wide = np.asarray(picture).astype(np.int64)
        picture = image.fromarray(((np.clip(wide, 0, 65535) + 128) // 257).astype(np.uint8))
    picture = picture.convert("RGB" if channels == 3 else "L")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    if (left, top, picture.width, picture.height) != (0, 0, side, side):
        picture = picture.crop((left, top, left + side, top + side))
    if side != size:
        picture = picture.resize((size, size), image.Resampling.LANCZOS)
    pixels = np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)
    return pixels.transpose(2, 0, 1)


class LazyImages(ABC):
    """Images decoded when asked for. A sample that cannot be read is replaced by the next readable one.

    The replacement depends on the data alone, so it is the same in every epoch, worker and process; each
    unreadable sample is logged once and counted once in `skipped`. Subclasses give `decode(i)` (C,H,W)
    uint8, which may raise, and `label(i)`.
    """

    def __init__(self, name: str, count: int, shape: tuple[int, int, int], *, keep: bool = True) -> None:
        self.name = name
        self.shape = shape
        self.skipped: list[tuple[str, str]] = []
        self._count = count
        self._keep = keep and count * int(np.prod(shape)) <= _CACHE_BYTES
        self._bad: set[int] = set()
        self._lock = threading.Lock()
        self._make_cache()

    def _make_cache(self) -> None:
        self._cache = np.empty((self._count, *self.shape), dtype=np.uint8) if self._keep else None
        self._cached = np.zeros(self._count, dtype=bool)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache", "_cached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        self._make_cache()

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def decode(self, index: int) -> np.ndarray:
        """Sample `index` as (C,H,W) uint8; raises when it cannot be read."""

    @abstractmethod
    def label(self, index: int) -> str:
        """What to call sample `index` in a message."""

    def skip(self, index: int, reason: str) -> None:
        """Count sample `index` as unreadable, once."""
        with self._lock:
            if index in self._bad:
                return
            self._bad.add(index)
            self.record_skipped(self.label(index), reason)

    def record_skipped(self, label: str, reason: str) -> None:
        self.skipped.append((label, reason))
        if len(self.skipped) <= _REPORT_AT_MOST:
            logger.warning("%s: unreadable image skipped: %s", label, reason)
        elif len(self.skipped) == _REPORT_AT_MOST + 1:
            logger.warning("%s: more unreadable images are skipped and only counted from here on", self.name)

    def _one(self, index: int) -> np.ndarray:
        for step in range(self._count):
            candidate = (index + step) % self._count
            if candidate in self._bad:
                continue
            if self._cache is not None and self._cached[candidate]:
                return self._cache[candidate]
            try:
                pixels = self.decode(candidate)
            except (ModuleNotFoundError, MemoryError):
                raise
            except Exception as error:  # Pillow's decoders raise many kinds, and none may end a long run
                if isinstance(error, OSError) and error.errno in _NOT_THE_FILES_FAULT:
                    raise
                self.skip(candidate, f"{type(error).__name__}: {error}")
                continue
            if self._cache is not None:
                self._cache[candidate] = pixels  # two threads may both write this: the same bytes
                self._cached[candidate] = True
            return pixels
        raise ValueError(
            f"{self.name}: none of the {self._count} images can be read; the first: {self.skipped[:1]}"
        )

    def read(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            out[row] = self._one(index)
        return out
