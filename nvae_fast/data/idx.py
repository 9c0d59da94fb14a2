"""MNIST's IDX files, raw or gzip-compressed.

Format: bytes 0, 0, type (8 = uint8), number of dimensions; then each dimension as a big-endian uint32; then
the values.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from .dataset import MemoryImages
from .fit import fit_pixels

_PREFIX = {"train": "train", "test": "t10k"}
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
    with open(path, "rb") as raw:
        data = raw.read()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file ({error}); download it again") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(
            f"{path}: wrong magic number {data[:4].hex() or '(empty file)'}, expected 00000803 (IDX images)"
        )
    kind, dimensions = data[2], data[3]
    if kind != 8:
        raise ValueError(f"{path}: wrong data type 0x{kind:02x} in the IDX header, expected 0x08 (uint8)")
    if dimensions != 3:
        hint = " (a file of labels?)" if dimensions == 1 else ""
        raise ValueError(f"{path}: {dimensions} dimension(s) in the IDX header, expected 3 (N,H,W){hint}")
    if len(data) < 16:
        raise ValueError(f"{path}: truncated, the IDX header needs 16 bytes, got {len(data)}")
    shape = struct.unpack(">3I", data[4:16])
    expected = 16 + shape[0] * shape[1] * shape[2]
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "too long"
        raise ValueError(
            f"{path}: {what}, its header {shape} needs {expected} bytes, got {len(data)}; download it again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=16).reshape(shape)


def open_idx(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """The images of an IDX file (False), or the split's file in a folder, MNIST/raw, raw, MNIST (True)."""
    file: Path | None = path
    if path.is_dir():
        folders = [path, path / "MNIST" / "raw", path / "raw", path / "MNIST"]
        file = next((found for folder in folders if (found := find_file(folder, split)) is not None), None)
        if file is None:
            raise FileNotFoundError(f"{path}: no {split} images; looked for {FILE_NAMES}")
    assert file is not None
    pixels = fit_pixels(read_idx(file)[:, None], str(file), image_size, channels)
    return MemoryImages(str(file), pixels), path.is_dir()
