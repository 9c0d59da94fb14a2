"""LMDB databases as prepared for NVAE: the key of sample i is str(i) in ASCII, the value an image.

Where keys are no numbers, as in LSUN's databases, samples are in the order of the keys.

A value is either an encoded image (PNG, JPEG, ...), decoded, centre-cropped and resized like the files of a
folder, or the raw uint8 bytes of H x W x C (C = 3 unless `channels` says 1). Raw square images are recognised
by their length, and so is CelebA's aligned format of 218x178x3.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import contents
from .arrays import SPLIT_NAMES
from .decode import (
    MAX_FILE_BYTES,
    DamagedImage,
    DatasetError,
    PixelRange,
    Reading,
    find_range,
    fit_image,
    looks_encoded,
    open_image,
)
from .extras import require
from .fit import warn_binary
from .lazy import MAX_SKIPPED, SAMPLED, LazyImages, Skipped
from .lmdb_pages import check_file
from .memory import CACHE_BYTES
from .retry import retry

_CELEBA_ALIGNED = (218, 178, 3)


def find_database(path: Path, split: str) -> tuple[Path, bool] | None:
    """(database, whether it is the split's own): `path` itself, or train.lmdb, validation.lmdb, ... in it."""
    if path.is_file() or (path / "data.mdb").is_file():
        return path, False
    for name in SPLIT_NAMES[split]:
        categories = sorted(path.glob(f"*_{name}_lmdb"))  # as LSUN is published
        if len(categories) > 1:
            raise ValueError(
                f"{path}: several databases, give one of them: {', '.join(map(str, categories))}"
            )
        for candidate in (path / f"{name}.lmdb", path / name, *categories):
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
        self.file = path / "data.mdb" if path.is_dir() else path
        self._environment: Any = None
        self._process = -1
        self._size = 0
        self._lock = threading.Lock()

    def environment(self) -> Any:
        """The environment, opened in this process after its file was checked."""
        with self._lock:
            if self._process == os.getpid():
                return self._environment
            if self._environment is not None:
                self._environment.close()  # inherited through a fork, across which LMDB must not be used
                self._environment = None
            lmdb = require("lmdb", "lmdb", "reading an LMDB database")
            retry(lambda: check_file(self.file), str(self.file))
            try:
                environment = lmdb.open(
                    str(self.path),
                    subdir=self.path.is_dir(),
                    readonly=True,
                    lock=False,
                    readahead=False,
                    meminit=False,
                    max_readers=1024,
                )
            except lmdb.Error as error:
                raise ValueError(f"{self.path}: cannot be opened as an LMDB database: {error}") from error
            self._size = self.file.stat().st_size
            self._environment, self._process = environment, os.getpid()
            return environment

    def value(self, key: bytes) -> bytes | None:
        """The value of a key, or None. OSError when the file cannot be reached, ValueError when it has changed.

        The size is looked at before: reading a part of the map that the file lost ends the process (SIGBUS). The command line
        names the file then (csrc/bus_errors.cpp).
        """
        environment = self.environment()
        size = retry(lambda: os.stat(self.file).st_size, str(self.file))
        if size < self._size:
            raise DatasetError(
                f"{self.file} has shrunk from {self._size} to {size} bytes while it is read; copy it again"
            )
        lmdb = require("lmdb", "lmdb", "reading an LMDB database")
        try:
            with environment.begin(buffers=True) as transaction:
                found = transaction.get(key)
                if found is not None and len(found) > MAX_FILE_BYTES:
                    raise DamagedImage(f"{len(found)} bytes, more than the {MAX_FILE_BYTES} that are read")
                return None if found is None else bytes(found)
        except lmdb.Error as error:
            raise DatasetError(f"{self.file}: damaged LMDB database ({error}); copy it again") from error

    def other_keys(self) -> list[bytes] | None:
        """All keys in order when the first is no number, else None: they are '0' to 'N-1' then."""
        with self.environment().begin(buffers=False) as transaction, transaction.cursor() as cursor:
            if not cursor.first() or bytes(cursor.key()).isdigit():
                return None
            return [bytes(key) for key in cursor.iternext(keys=True, values=False)]


_databases: weakref.WeakValueDictionary[str, _Database] = weakref.WeakValueDictionary()


def _database(path: Path) -> _Database:
    real = os.path.realpath(path)
    found = _databases.get(real)
    if found is None:
        found = _databases[real] = _Database(path)
    return found


def _holds_floats(value: bytes) -> bool:
    """Whether a raw value holds floating-point numbers, not bytes.

    Read as floats, bytes of an image have any exponent. In a float the first byte is nothing like the last, in an
    image they are neighbouring pixels.
    """
    for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
        if not value or len(value) % dtype.itemsize:
            continue
        with np.errstate(invalid="ignore"):
            sizes = np.abs(np.frombuffer(value, dtype=dtype).astype(np.float64))
            plausible = bool(((sizes == 0) | ((sizes > 1e-6) & (sizes <= 256))).all()) and bool(sizes.any())
        planes = np.frombuffer(value, dtype=np.uint8).reshape(-1, dtype.itemsize)[sizes > 0].astype(np.int64)
        if plausible and np.abs(planes[:, -1] - planes[:, 0]).mean() > 16:
            return True
    return False


class LmdbImages(LazyImages):
    """The samples '0' .. 'N-1' of a database. Opened read-only, without lock, once per process."""

    def __init__(
        self,
        path: Path,
        image_size: int | None,
        channels: int | None,
        max_skipped: float = MAX_SKIPPED,
        reading: Reading | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.reading = reading or Reading()
        self.path = path
        require("lmdb", "lmdb", "reading an LMDB database")
        self._database = _database(path)
        count = int(self._database.environment().stat()["entries"])
        if count == 0:
            raise ValueError(f"{path}: an empty LMDB database")
        skipped = Skipped(str(path), count, max_skipped)
        self._keys = self._database.other_keys()
        self.raw_shape: tuple[int, int, int] | None = None
        size, bands = self._first(count, image_size, channels, skipped.most)
        self.values = PixelRange()
        # Raw values are read from the file's own pages, which the system caches.
        cache_bytes = cache_bytes if self.raw_shape is None else 0
        super().__init__(str(path), count, (bands, size, size), skipped, cache_bytes=cache_bytes)
        if self.raw_shape is None:
            self.values = find_range(self.pictures(), str(path))
        elif self._is_binary():
            warn_binary(str(path))
            self.values = PixelRange(eight=255)
        self._one(0)

    def _first(
        self, count: int, image_size: int | None, channels: int | None, most_skipped: int
    ) -> tuple[int, int]:
        """The size and channels that the first sound value gives; sets `raw_shape` where values are not encoded."""
        errors: list[Exception] = []
        for index in range(min(count, most_skipped + 1)):
            try:
                value = self._value(index)
                if looks_encoded(value[:16]):
                    with open_image(value) as picture:
                        return image_size or self.reading.side(picture.size), channels or 3
                self.raw_shape = self._raw_shape(value, index, image_size, channels)
                height, width, bands = self.raw_shape
                return image_size or self.reading.side((width, height)), bands
            except DatasetError:
                raise
            except (DamagedImage, ValueError, KeyError) as error:
                errors.append(error)
        first = errors[0]
        if isinstance(first, KeyError):
            raise ValueError(
                f"{self.path}: {count} entries, but none has the key '0'; expected keys '0' to 'N-1'"
            ) from first
        text = str(first)
        where = "" if text.startswith(str(self.path)) else f"{self.label(0)}: damaged image: "
        raise ValueError(where + text) from first

    def _raw_shape(
        self, value: bytes, index: int, image_size: int | None, channels: int | None
    ) -> tuple[int, int, int]:
        length, bands = len(value), channels or 3
        side = math.isqrt(length // bands)
        asked = image_size is not None and length == image_size * image_size * bands
        if not asked and _holds_floats(value):
            raise DatasetError(
                f"{self.path}: the value of key {self._key(index)} has {length} bytes that are floating-point numbers; "
                "expected the uint8 bytes (0 to 255) of an image, or an encoded image (PNG, JPEG, ...)"
            )
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
            f"{self.path}: the value of key {self._key(index)} has {length} bytes, "
            f"neither an encoded image (PNG, JPEG, ...) nor {expected}"
            + contents.but_it_is(value[: contents.HEAD])
        )

    def _sampled(self) -> Iterator[bytes]:
        """Some values, evenly spaced; those that are missing are left out."""
        for index in np.unique(np.linspace(0, self._count - 1, SAMPLED).astype(int)):
            try:
                yield self._value(int(index))
            except (KeyError, DamagedImage):  # counted when it is decoded
                continue

    def names(self) -> list[str]:
        """The keys of the images."""
        return [self._key(index) for index in range(self._count)]

    def pictures(self) -> Iterator[Any]:
        """Some images, evenly spaced, as Pillow reads them; damaged ones are left out."""
        for value in self._sampled():
            try:
                with open_image(value) if self.raw_shape is None else self._picture(value) as picture:
                    picture.load()
                    yield picture
            except ModuleNotFoundError:
                raise
            except Exception:  # counted when it is decoded
                continue

    def _is_binary(self) -> bool:
        largest = [max(value, default=0) for value in self._sampled()]
        return max(largest, default=0) == 1

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_database"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._database = _database(self.path)

    def _value(self, index: int) -> bytes:
        key = str(index).encode("ascii") if self._keys is None else self._keys[index]
        value = self._database.value(key)
        if value is None:
            raise KeyError(f"no key {self._key(index)}")
        return value

    def _key(self, index: int) -> str:
        return f"'{index}'" if self._keys is None else repr(self._keys[index])[1:]

    def decode(self, index: int) -> np.ndarray:
        value = self._value(index)
        bands, size, _ = self.shape
        if self.raw_shape is None or (len(value) != math.prod(self.raw_shape) and looks_encoded(value[:16])):
            with open_image(value) as picture:
                return fit_image(picture, size, bands, self.values, self.reading)
        if len(value) != math.prod(self.raw_shape):
            raise ValueError(
                f"{len(value)} bytes, expected {math.prod(self.raw_shape)} for {self.raw_shape} (H,W,C)"
            )
        height, width, _ = self.raw_shape
        if not height == width == size == self.reading.side((width, height)):
            return fit_image(self._picture(value), size, bands, self.values, self.reading)
        pixels = np.frombuffer(value, dtype=np.uint8).reshape(self.raw_shape)
        if self.values.eight != 1:
            self.values.check_eight(int(pixels.max()))
            pixels = pixels * np.uint8(self.values.eight)
        return pixels.transpose(2, 0, 1)

    def _picture(self, value: bytes) -> Any:
        """A Pillow image of a raw value."""
        assert self.raw_shape is not None
        image = require("PIL.Image", "Pillow", "resizing images")
        pixels = np.frombuffer(value, dtype=np.uint8).reshape(self.raw_shape)
        return image.fromarray(pixels if self.raw_shape[2] == 3 else pixels[..., 0])

    def label(self, index: int) -> str:
        return f"{self.path}, key {self._key(index)}"


def open_lmdb(
    path: Path,
    split: str,
    image_size: int | None,
    channels: int | None,
    max_skipped: float = MAX_SKIPPED,
    reading: Reading | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[LmdbImages, bool]:
    """The images and whether the database is the split's own."""
    found = find_database(path, split)
    if found is None:
        names = ", ".join(f"{name}.lmdb" for name in SPLIT_NAMES[split])
        raise contents.MissingSplit(f"{path}: no {split} database; looked for data.mdb, {names}")
    return LmdbImages(found[0], image_size, channels, max_skipped, reading, cache_bytes), found[1]
