"""Images decoded when they are asked for, and what happens when one cannot be."""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from .decode import DatasetError
from .memory import CACHE_BYTES, fits
from .retry import is_io_error

logger = logging.getLogger("nvae_fast.data")

MAX_SKIPPED = 0.01
"""The default share of damaged images that are skipped before reading stops with an error."""
SAMPLED = 32  # images looked at, evenly spaced, to decide what pixel values mean
_REPORT_AT_MOST = 10  # unreadable images named one by one in the log; all of them are in `skipped`


def check_max_skipped(value: float) -> float:
    """`value` when it is a share from 0 to 1, else ValueError or TypeError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"max_skipped (--max-skipped-images): expected a number from 0 to 1, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"max_skipped (--max-skipped-images): expected a share from 0 to 1, got {value!r}")
    return float(value)


class Skipped:
    """The damaged images of a set, each named once; stops when they are more than the share that is allowed.

    max_skipped: the share of `count` images that may be damaged. Above 0, one image always may.
    """

    def __init__(self, name: str, count: int, max_skipped: float) -> None:
        self.name = name
        self.max_skipped = max_skipped
        self.most = 0 if max_skipped == 0 else max(1, math.floor(max_skipped * count))
        self.count = count
        self.items: list[tuple[str, str]] = []

    def add(self, label: str, reason: str) -> None:
        """Count an image, and log it."""
        self.items.append((label, reason))
        if len(self.items) <= _REPORT_AT_MOST:
            logger.warning("%s: unreadable image skipped: %s", label, reason)
        elif len(self.items) == _REPORT_AT_MOST + 1:
            logger.warning("%s: more unreadable images are skipped and only counted from here on", self.name)

    def check(self) -> None:
        """Raise ValueError when there are too many."""
        if len(self.items) > self.most:
            label, reason = self.items[0]
            raise ValueError(
                f"{self.name}: {len(self.items)} of {self.count} images cannot be read, more than the {self.most} "
                f"that max_skipped={self.max_skipped:g} (--max-skipped-images {self.max_skipped:g}) allows; "
                f"the first: {label}: {reason}"
            )


class LazyImages(ABC):
    """Images decoded when asked for. A damaged one is replaced by the next readable one.

    The replacement depends on the data alone, so it is the same in every epoch, worker and process; each
    damaged image is logged once and counted once in `skipped`. Subclasses give `decode(i)` (C,H,W)
    uint8, which may raise, and `label(i)`. An error of the operating system is not a damaged image: it is raised.

    cache_bytes: decoded images are kept in memory when all of them fit into so many bytes, see `memory.fits`; else none are.
    """

    def __init__(
        self,
        name: str,
        count: int,
        shape: tuple[int, int, int],
        skipped: Skipped,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.name = name
        self.shape = shape
        self._skipped = skipped
        self._count = count
        self._keep = fits(count * int(np.prod(shape)), cache_bytes)
        self._bad: set[int] = set()
        self._lock = threading.Lock()
        self._make_cache()

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(file, reason) of the damaged images met so far."""
        return self._skipped.items

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

    def _skip(self, index: int, reason: str) -> None:
        """Count sample `index` as damaged, once."""
        with self._lock:
            if index not in self._bad:
                self._bad.add(index)
                self._skipped.add(self.label(index), reason)

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
            except DatasetError as error:
                raise DatasetError(f"{self.label(candidate)}: {error}") from error
            except Exception as error:  # Pillow's decoders raise many kinds
                if is_io_error(error):
                    raise
                self._skip(candidate, f"{type(error).__name__}: {error}")
                self._skipped.check()
                continue
            if self._cache is not None:
                self._cache[candidate] = pixels  # two threads may both write this: the same bytes
                self._cached[candidate] = True
            return pixels
        raise ValueError(
            f"{self.name}: none of the {self._count} images can be read; the first: {self.skipped[:1]}"
        )

    def read(self, indices: np.ndarray) -> np.ndarray:
        self._skipped.check()
        out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            out[row] = self._one(index)
        return out
