"""LMDB databases as prepared for NVAE: the key of sample i is str(i) in ASCII, the value an image.

A value is either an encoded image (PNG, JPEG, ...), decoded, centre-cropped and resized like the files of a
folder, or the raw uint8 bytes of H x W x C (C = 3 unless `channels` says 1). Raw square images are recognised
by their length, and so is CelebA's aligned format of 218x178x3.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import SPLIT_NAMES
from .decode import LazyImages, fit_image, looks_encoded, open_image
from .extras import require

_CELEBA_ALIGNED = (218, 178, 3)


def find_database(path: Path, split: str) -> tuple[Path, bool] | None:
    """(database, whether it is the split's own): `path` itself, or train.lmdb, validation.lmdb, ... in it."""
    if path.is_file() or (path / "data.mdb").is_file():
        return path, False
    for name in SPLIT_NAMES[split]:
        for candidate in (path / f"{name}.lmdb", path / name):
            if (candidate.is_file() and candidate.suffix == ".lmdb") or (candidate / "data.mdb").is_file():
                return candidate, True
    return None


def is_database_file(head: bytes) -> bool:
    """Whether the first 32 bytes are an LMDB meta page: the magic 0xBEEFC0DE after a page header."""
    return any(head[at : at + 4] in (b"\xde\xc0\xef\xbe", b"\xbe\xef\xc0\xde") for at in (8, 12, 16))


class _Database:
    """One read-only environment per process, shared by its readers (LMDB forbids opening a file twice)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment: Any = None
        self._process = -1
        self._lock = threading.Lock()

    def environment(self) -> Any:
        with self._lock:
            if self._process == os.getpid():
                return self._environment
            if self._environment is not None:
                self._environment.close()  # inherited through a fork, across which LMDB must not be used
            lmdb = require("lmdb", "lmdb", "reading an LMDB database")
            subdir = self.path.is_dir()
            environment = lmdb.open(
                str(self.path),
                subdir=subdir,
                readonly=True,
                lock=False,
                readahead=False,
                meminit=False,
                max_readers=1024,
            )
            file = self.path / "data.mdb" if subdir else self.path
            needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
            if file.stat().st_size < needed:  # reading on would end in SIGBUS, not in an exception
                environment.close()
                raise ValueError(
                    f"{file}: truncated, {file.stat().st_size} of at least {needed} bytes; copy it again"
                )
            self._environment, self._process = environment, os.getpid()
            return environment


_databases: weakref.WeakValueDictionary[str, _Database] = weakref.WeakValueDictionary()


def _database(path: Path) -> _Database:
    real = os.path.realpath(path)
    found = _databases.get(real)
    if found is None:
        found = _databases[real] = _Database(path)
    return found


class LmdbImages(LazyImages):
    """The samples '0' .. 'N-1' of a database. Opened read-only, without lock, once per process."""

    def __init__(self, path: Path, image_size: int | None, channels: int | None) -> None:
        self.path = path
        self._database = _database(path)
        require("lmdb", "lmdb", "reading an LMDB database")
        try:
            count = int(self._database.environment().stat()["entries"])
            first = self._value(0) if count else b""
        except KeyError as error:
            raise ValueError(
                f"{path}: {count} entries, but none has the key '0'; expected keys '0' to 'N-1'"
            ) from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # lmdb.Error, whose class is known only when lmdb is
            raise ValueError(f"{path}: cannot be opened as an LMDB database: {error}") from error
        if count == 0:
            raise ValueError(f"{path}: an empty LMDB database")
        self.raw_shape: tuple[int, int, int] | None = None
        if looks_encoded(first[:16]):
            with open_image(first) as picture:
                size = min(picture.size) if image_size is None else image_size
                bands = 3 if channels is None else channels
        else:
            self.raw_shape = self._raw_shape(len(first), image_size, channels)
            size = min(self.raw_shape[:2]) if image_size is None else image_size
            bands = self.raw_shape[2]
        super().__init__(str(path), count, (bands, size, size), keep=self.raw_shape is None)
        self._one(0)

    def _raw_shape(self, length: int, image_size: int | None, channels: int | None) -> tuple[int, int, int]:
        bands = channels or 3
        side = math.isqrt(length // bands)
        if side and side * side * bands == length:
            return side, side, bands
        if length == math.prod(_CELEBA_ALIGNED) and channels in (None, 3):
            return _CELEBA_ALIGNED
        expected = (
            f"{image_size}*{image_size}*{channels or 3} bytes"
            if image_size
            else "H*H*3 bytes (square images)"
        )
        raise ValueError(
            f"{self.path}: the value of key '0' has {length} bytes, "
            f"neither an encoded image (PNG, JPEG, ...) nor {expected}"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_database"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._database = _database(self.path)

    def _value(self, index: int) -> bytes:
        with self._database.environment().begin(buffers=False) as transaction:
            value = transaction.get(str(index).encode("ascii"))
        if value is None:
            raise KeyError(f"no key '{index}'")
        return bytes(value)

    def decode(self, index: int) -> np.ndarray:
        value = self._value(index)
        bands, size, _ = self.shape
        if self.raw_shape is None or (len(value) != math.prod(self.raw_shape) and looks_encoded(value[:16])):
            with open_image(value) as picture:
                return fit_image(picture, size, bands)
        if len(value) != math.prod(self.raw_shape):
            raise ValueError(
                f"{len(value)} bytes, expected {math.prod(self.raw_shape)} for {self.raw_shape} (H,W,C)"
            )
        pixels = np.frombuffer(value, dtype=np.uint8).reshape(self.raw_shape)
        if self.raw_shape[:2] == (size, size):
            return pixels.transpose(2, 0, 1)
        image = require("PIL.Image", "Pillow", "resizing images")
        return fit_image(image.fromarray(pixels if bands == 3 else pixels[..., 0]), size, bands)

    def label(self, index: int) -> str:
        return f"{self.path}, key '{index}'"


def open_lmdb(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[LmdbImages, bool]:
    """The images and whether the database is the split's own."""
    found = find_database(path, split)
    if found is None:
        names = ", ".join(f"{name}.lmdb" for name in SPLIT_NAMES[split])
        raise FileNotFoundError(f"{path}: no {split} database; looked for data.mdb, {names}")
    return LmdbImages(found[0], image_size, channels), found[1]
