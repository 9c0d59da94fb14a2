"""MNIST's IDX files, raw or gzip-compressed.

Format: bytes 0, 0, type (8 = uint8), number of dimensions; then each dimension as a big-endian uint32; then
the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from . import contents
from .arrays import check_expansion, read_into
from .dataset import MemoryImages
from .fit import array_source
from .retry import retry

_PREFIX = {"train": "train", "test": "t10k"}
FOLDERS = ("", "MNIST/raw", "raw", "MNIST", "FashionMNIST/raw", "KMNIST/raw")
FILE_NAMES = "train-images-idx3-ubyte and t10k-images-idx3-ubyte, with or without .gz"


def find_file(folder: Path, split: str) -> Path | None:
    """The split's image file in a folder: `-idx3-ubyte` or `.idx3-ubyte`, raw before .gz; or None."""
    for joint in ("-", "."):
        for ending in ("", ".gz"):
            candidate = folder / f"{_PREFIX[split]}-images{joint}idx3-ubyte{ending}"
            if candidate.is_file():
                return candidate
    return None


def read_idx(path: Path) -> np.ndarray:
    """uint8 (N,H,W) of an IDX file of images. ValueError names the file and what is wrong with it."""
    size = contents.check_regular(path)
    with open(path, "rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            raw.seek(0)
            return _read_pixels(raw, path, size, compressed=False)
        raw.seek(0)
        try:
            with gzip.GzipFile(fileobj=raw) as file:
                return _read_pixels(file, path, size, compressed=True)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); download it again") from error


def _read_pixels(file: Any, path: Path, size: int, *, compressed: bool) -> np.ndarray:
    head = file.read(16)
    if len(head) < 4 or head[:2] != b"\0\0":
        raise ValueError(
            f"{path}: wrong magic number {head[:4].hex() or '(empty file)'}, expected 00000803 (IDX images)"
            + (contents.but_it_is(head + file.read(contents.HEAD)) if head else "")
        )
    kind, dimensions = head[2], head[3]
    if kind != 8:
        raise ValueError(f"{path}: wrong data type 0x{kind:02x} in the IDX header, expected 0x08 (uint8)")
    if dimensions != 3:
        hint = " (a file of labels?)" if dimensions == 1 else ""
        raise ValueError(f"{path}: {dimensions} dimension(s) in the IDX header, expected 3 (N,H,W){hint}")
    if len(head) < 16:
        raise ValueError(f"{path}: truncated, the IDX header needs 16 bytes, got {len(head)}")
    shape = struct.unpack(">3I", head[4:16])
    expected = 16 + math.prod(shape)
    if compressed:
        check_expansion(expected, size, str(path))
    elif size != expected:
        what = "truncated" if size < expected else "too long"
        raise ValueError(
            f"{path}: {what}, its header {shape} needs {expected} bytes, got {size}; download it again"
        )
    pixels = np.empty(shape, dtype=np.uint8)
    if pixels.size:
        read_into(file, pixels, str(path))
    if file.read(1):
        raise ValueError(f"{path}: too long, its header {shape} needs {expected} bytes; download it again")
    return pixels


def open_idx(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """The images of an IDX file (False), or the split's file in a folder or one of `FOLDERS` below it (True)."""
    file: Path | None = path
    if path.is_dir():
        found = [file for sub in FOLDERS if (file := find_file(path / sub, split)) is not None]
        if not found:
            raise contents.MissingSplit(f"{path}: no {split} images; looked for {FILE_NAMES}")
        if len(found) > 1:
            raise ValueError(
                f"{path}: several files of {split} images, give the folder of one: {[*map(str, found)]}"
            )
        file = found[0]
    assert file is not None
    source = array_source(retry(lambda: read_idx(file), str(file))[:, None], str(file), image_size, channels)
    source.binary_format = True
    return source, path.is_dir()
