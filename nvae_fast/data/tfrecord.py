"""TFRecord files of raw images, as CelebA-HQ and FFHQ are shared for likelihood models; read without TensorFlow.

A record is: length (8 bytes), checksum (4), data, checksum (4). The data is an Example message whose features `data` (bytes)
and `shape` (three integers: H, W, C or C, H, W) make an image. Checksums are not verified: they use a polynomial that
Python has no function for.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .decode import MAX_FILE_BYTES, DamagedImage
from .retry import retry

_HEADER = 12
_FOOTER = 4


def records(path: Path) -> list[tuple[int, int]]:
    """(offset, length) of the data of every record. ValueError names the file when a length leads out of it."""

    def read() -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = 0
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            while at < size:
                file.seek(at)
                head = file.read(_HEADER)
                length = struct.unpack("<Q", head[:8])[0] if len(head) == _HEADER else size
                if at + _HEADER + length + _FOOTER > size:
                    raise ValueError(
                        f"{path}: damaged TFRecord file: record {len(found)} ends outside of the file"
                    )
                found.append((at + _HEADER, length))
                at += _HEADER + length + _FOOTER
        return found

    return retry(read, str(path))


def read_record(path: Path, offset: int, length: int) -> np.ndarray:
    """The image of a record, uint8 (H,W,3). DamagedImage when it holds none."""
    if length > MAX_FILE_BYTES:
        raise DamagedImage(f"a record of {length} bytes, more than the {MAX_FILE_BYTES} that are read")

    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    data = retry(read, str(path))
    try:
        features = _features(data)
        pixels, shape = _bytes(features["data"]), _integers(features["shape"])
    except (KeyError, IndexError, ValueError) as error:
        raise DamagedImage(f"no image with the features data and shape in the record: {error!r}") from error
    if len(shape) != 3 or 3 not in (shape[0], shape[2]) or math.prod(shape) != len(pixels) or min(shape) < 1:
        raise DamagedImage(f"{len(pixels)} bytes of shape {shape}, expected (H, W, 3) or (3, H, W)")
    array = np.frombuffer(pixels, dtype=np.uint8).reshape(shape)
    return array if shape[2] == 3 else array.transpose(1, 2, 0)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(number, value) of the fields of a message: lengths and varints, the kinds that an Example has."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 2:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field that ends outside of its message")
            yield tag >> 3, data[at : at + length]
            at += length
        elif tag & 7 == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
        else:
            raise ValueError(f"a field of the kind {tag & 7}")


def _messages(data: bytes, number: int) -> list[bytes]:
    return [value for own, value in _fields(data) if own == number and isinstance(value, bytes)]


def _features(data: bytes) -> dict[str, bytes]:
    """{name: Feature message} of an Example."""
    entries = [entry for features in _messages(data, 1) for entry in _messages(features, 1)]
    return {_messages(entry, 1)[0].decode(): _messages(entry, 2)[0] for entry in entries}


def _bytes(feature: bytes) -> bytes:
    return _messages(_messages(feature, 1)[0], 1)[0]


def _integers(feature: bytes) -> list[int]:
    found: list[int] = []
    for number, value in _fields(_messages(feature, 3)[0]):
        if number == 1 and isinstance(value, int):
            found.append(value)
        elif number == 1 and isinstance(value, bytes):  # packed
            at = 0
            while at < len(value):
                item, at = _varint(value, at)
                found.append(item)
    return found
