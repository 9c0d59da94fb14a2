"""CIFAR-10 and CIFAR-100 as they are published: the binary and the Python version, unpacked or in their .tar.gz.

A record of the binary version is a label byte (two in CIFAR-100) and 3x32x32 pixel bytes (red, green, blue planes). A file of
the Python version pickles a dictionary whose entry "data" is an array (N, 3072); see `arrays_only`.
"""

from __future__ import annotations

import logging
import pickle
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import arrays_only, contents
from .arrays import check_expansion
from .dataset import MemoryImages
from .fit import array_source
from .retry import named, retry

logger = logging.getLogger("nvae_fast.data")

PIXELS = 3 * 32 * 32
FILE_NAMES = (
    "data_batch_* and test_batch, or train and test of CIFAR-100, with or without .bin, or their .tar.gz"
)
_MOST_BYTES = 1 << 28  # of a file of batches; the largest that is published has 184 MB
# Names within a folder or an archive, by data set and split.
_BATCHES = {
    ("cifar10", "train"): r"data_batch_\d+(\.bin)?",
    ("cifar10", "test"): r"test_batch(\.bin)?",
    ("cifar100", "train"): r"train(\.bin)?",
    ("cifar100", "test"): r"test(\.bin)?",
}
_FOLDERS = {
    "cifar10": ("cifar-10-batches-bin", "cifar-10-batches-py"),
    "cifar100": ("cifar-100-binary", "cifar-100-python"),
}
_ARCHIVES = {
    "cifar10": ("cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"),
    "cifar100": ("cifar-100-binary.tar.gz", "cifar-100-python.tar.gz"),
}


def _looked_for(kind: str, split: str) -> str:
    name = _BATCHES[kind, split].removesuffix(r"(\.bin)?").replace(r"\d+", "*")
    return f"{name}.bin or {name}"


def _files(folder: Path, kind: str, split: str) -> list[Path]:
    if not folder.is_dir():
        return []
    pattern = re.compile(_BATCHES[kind, split])
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_file()]
    binary = [path for path in found if path.suffix == ".bin"]
    return sorted(binary or found)


def find(path: Path, kind: str) -> Path | None:
    """What of `kind` (cifar10, cifar100) is in a folder: itself, a subfolder, or an archive; None when nothing is."""
    own = kind == "cifar10" or path.name in _FOLDERS["cifar100"]  # train and test alone say little
    folders = [*([path] if own else []), *(path / name for name in _FOLDERS[kind])]
    for folder in folders:
        if any(_files(folder, kind, split) for split in ("train", "test")):
            return folder
    return next((path / name for name in _ARCHIVES[kind] if (path / name).is_file()), None)


def read_batch(path: Path) -> np.ndarray:
    """uint8 (N,3,32,32) of one batch file. ValueError names the file and what is wrong with it."""
    if contents.check_regular(path) > _MOST_BYTES:
        raise ValueError(f"{path}: larger than any file of CIFAR batches")
    return _batch(retry(path.read_bytes, str(path)), str(path))


def _batch(data: bytes, where: str) -> np.ndarray:
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return _pickled(data, where)
    hundred = Path(where).stem in ("train", "test")
    labels = 2 if hundred else 1
    size = PIXELS + labels
    if not data or len(data) % size:
        hint = " (3074 a record: CIFAR-100?)" if data and len(data) % (PIXELS + 2) == 0 else ""
        raise ValueError(
            f"{where}: expected records of {size} bytes ({labels} of labels, 3x32x32) or a pickled dictionary, got "
            f"{len(data)} bytes, which is {len(data) // size} records and {len(data) % size} bytes over{hint}"
            + contents.but_it_is(data[: contents.HEAD])
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
    for column, most in enumerate((19, 99) if hundred else (9,)):
        if records[:, column].max() > most:
            bad = int(np.argmax(records[:, column] > most))
            raise ValueError(
                f"{where}: record {bad} has label {records[bad, column]}, expected 0 to {most}; not a CIFAR batch"
            )
    return records[:, labels:].reshape(-1, 3, 32, 32)


def _pickled(data: bytes, where: str) -> np.ndarray:
    try:
        value = arrays_only.loads(data)
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"expected a dictionary, got {type(value).__name__}")
        pixels = value.get(b"data", value.get("data"))
        if pixels is None:
            raise pickle.UnpicklingError(f"expected an entry 'data', got {list(value)[:5]}")
        array = arrays_only.uint8_array(pixels)
    except (pickle.UnpicklingError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: not a pickled CIFAR batch: {error}") from error
    if array.ndim != 2 or array.shape[1] != PIXELS:
        raise ValueError(f"{where}: expected an array of shape (N, {PIXELS}), got {array.shape}")
    return array.reshape(-1, 3, 32, 32)


def is_archive(path: Path) -> bool:
    """Whether the name is that of a tar archive."""
    return path.name.endswith((".tar.gz", ".tgz", ".tar"))


def _members(path: Path, pattern: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files of an archive whose name without folders matches."""
    size = contents.check_regular(path)
    with named(path, "damaged archive, download it again"), tarfile.open(path, "r:*") as archive:
        for member in archive:
            check_expansion(member.offset_data + member.size, size, str(path))
            if member.isfile() and pattern.fullmatch(Path(member.name).name):
                if member.size > _MOST_BYTES:
                    raise ValueError(f"{path}, {member.name}: larger than any file of CIFAR batches")
                file: Any = archive.extractfile(member)
                yield member.name, file.read()


def _from_archive(path: Path, kind: str, split: str) -> list[np.ndarray]:
    pattern = re.compile(_BATCHES[kind, split])
    found = sorted((name, _batch(data, f"{path}, {name}")) for name, data in _members(path, pattern))
    if not found:
        raise contents.MissingSplit(
            f"{path}: no {split} images of {kind}; looked for {_looked_for(kind, split)}"
        )
    return [pixels for _, pixels in found]


def _open(
    path: Path, kind: str, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    own_split = True
    place = find(path, kind) if path.is_dir() else path
    if place is None:
        raise FileNotFoundError(f"{path}: no {kind} batches; looked for {FILE_NAMES}")
    if place.is_dir():
        files = _files(place, kind, split)
        if not files:
            raise contents.MissingSplit(f"{place}: no {split} images; looked for {_looked_for(kind, split)}")
        parts = [read_batch(file) for file in files]
    elif is_archive(place):
        parts = _from_archive(place, kind, split)
    else:
        parts, own_split = [read_batch(place)], False
    if own_split and (kind, split) == ("cifar10", "train") and len(parts) != 5:
        logger.warning("%s: found %d of the 5 training batches of CIFAR-10", place, len(parts))
    return array_source(np.concatenate(parts), str(path), image_size, channels), own_split


def open_cifar10(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """A folder or archive (train: data_batch_* in order) and True, or one file of batches and False."""
    return _open(path, "cifar10", split, image_size, channels)


def open_cifar100(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """A folder or archive (files train and test) and True, or one of the files and False."""
    return _open(path, "cifar100", split, image_size, channels)
