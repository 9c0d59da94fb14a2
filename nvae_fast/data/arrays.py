"""numpy files of uint8 images: .npy, .npz, or a folder that holds train.npy / test.npy (or .npz)."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from . import contents
from .dataset import MemoryImages
from .fit import array_source, check_dtype, to_nchw
from .retry import named, retry

_KEYS = {
    "train": ("train", "x_train", "train_images", "train_x"),
    "validation": ("val", "x_val", "val_images", "validation"),
    "test": ("test", "x_test", "test_images", "test_x", "val", "x_val", "val_images", "validation"),
}
_COMMON_KEYS = ("images", "x", "data", "arr_0")
_IN_MEMORY = 1 << 28  # bytes; a larger .npy file stays on disk, its images are read when they are asked for
# Where a data set has a validation part and no test part, that is what a test is made with.
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "val", "valid", "validation"),
}
# ImageNet at 32 and 64 pixels as it is published: arrays `data` (N, 3*H*H) of red, green and blue planes.
_BATCHES = {"train": "train_data_batch_*.npz", "validation": "val_data.npz", "test": "val_data.npz"}
# Images do not compress like this; a file made to fill the memory does. Below so many bytes it does not matter.
_LARGEST_RATIO = 200
_RATIO_FROM = 1 << 26


def find_files(folder: Path, split: str) -> list[Path]:
    """The split's files in `folder`: train.npy or train.npz (test, val, valid, validation for the test split), or the
    batches of ImageNet in the order of their numbers; none when there are none."""
    for name in SPLIT_NAMES[split]:
        for ending in (".npy", ".npz"):
            if (folder / (name + ending)).is_file():
                return [folder / (name + ending)]
    return sorted(folder.glob(_BATCHES[split]), key=lambda path: (len(path.name), path.name))


def other_splits(split: str) -> tuple[str, ...]:
    """The names of parts that are not a split's own."""
    return tuple(n for names in SPLIT_NAMES.values() for n in names if n not in SPLIT_NAMES[split])


def check_expansion(size: int, compressed: int, where: str) -> None:
    """Raise ValueError when `compressed` bytes would become so many that they cannot be images."""
    if size > _RATIO_FROM and size > _LARGEST_RATIO * compressed:
        raise ValueError(
            f"{where}: {compressed} compressed bytes would become {size}, more than {_LARGEST_RATIO} times as many; "
            "images do not compress like that, so it is not read"
        )


def read_into(file: Any, out: np.ndarray, where: str) -> None:
    """Fill a contiguous array from a file. ValueError when the file ends before it is full."""
    view, done = memoryview(out.data).cast("B"), 0
    while done < len(view):
        part = file.readinto(view[done : done + (1 << 24)])
        if not part:
            raise ValueError(f"{where}: truncated, its header needs {len(view)} bytes of pixels, got {done}")
        done += part


class _Header:
    """The header of a .npy file that `file` is at the start of, checked: shape, fortran_order, dtype, and its length."""

    def __init__(self, file: Any, size: int, where: str) -> None:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f".npy format version {version}, expected 1.0, 2.0 or 3.0")
        first = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        self.shape, self.fortran, self.dtype = read(file)
        if self.dtype.hasobject:
            raise ValueError(
                f"an array of Python objects (dtype {self.dtype}), which needs allow_pickle and could run any "
                "program: it is not read; save the images as one uint8 array"
            )
        if any(length < 0 for length in self.shape):
            raise ValueError(f"its header gives the shape {self.shape}, which has a negative length")
        check_dtype(self.dtype, self.shape, where)
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        self.offset = file.tell()
        if self.offset + self.bytes > size:
            raise ValueError(
                f"truncated, or its header is wrong: the shape {self.shape} needs {self.offset + self.bytes} "
                f"bytes, the file has {size}"
            )

    def read(self, file: Any, where: str) -> np.ndarray:
        """The array."""
        shape = self.shape[::-1] if self.fortran else self.shape
        out = np.empty(shape, dtype=self.dtype)
        if out.size:
            read_into(file, out, where)
        return out.T if self.fortran else out


class FileArray:
    """The pixels of a large .npy file as uint8 (N,C,H,W), read when indexed.

    Unlike a memory map it reports a file that cannot be reached as an error; the system's cache is shared as well.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, path: Path, header: _Header, channels: int | None, start: int = 0) -> None:
        self._path, self._channels, self._offset = os.fspath(path), channels, start + header.offset
        self._image = header.shape[1:]
        empty = to_nchw(np.empty((0, *self._image), self.dtype), self._path, channels)
        self.shape = (header.shape[0], *empty.shape[1:])

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        rows = np.empty((len(indices), *self._image), self.dtype)

        def read() -> None:
            with open(self._path, "rb", buffering=0) as file:
                for row, index in zip(rows, indices.tolist(), strict=True):
                    file.seek(self._offset + index * row.nbytes)
                    read_into(file, row, self._path)

        retry(read, self._path)
        return to_nchw(rows, self._path, self._channels)


class _Parts:
    """Arrays (N,C,H,W), or objects indexed like one, one after another."""

    dtype = np.dtype(np.uint8)

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts
        self._ends = np.cumsum([part.shape[0] for part in parts])
        self.shape = (int(self._ends[-1]), *parts[0].shape[1:])

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape[1:]), self.dtype)
        which = np.searchsorted(self._ends, indices, side="right")
        for number in np.unique(which):
            rows = which == number
            part = self._parts[number]
            out[rows] = part[indices[rows] - (self._ends[number] - part.shape[0])]
        return out


def _read_npy(path: Path, channels: int | None) -> tuple[Any, bool]:
    """The pixels (N,C,H,W) of a .npy file, and whether they are bool."""
    with open(path, "rb") as file:
        header = _Header(file, contents.check_regular(path), str(path))
        is_bool = header.dtype == np.bool_
        if header.bytes > _IN_MEMORY and not header.fortran:
            return FileArray(path, header, channels), is_bool
        return to_nchw(header.read(file, str(path)), str(path), channels), is_bool


def _choose(names: list[str], path: Path, split: str) -> tuple[str, bool]:
    """The array of a .npz that holds the split's images, and whether it is named after the split."""
    wanted = [name for name in _KEYS[split] if name in names]
    if wanted:
        return wanted[0], True
    known = {name for keys in _KEYS.values() for name in keys}
    other = [name for name in names if name in known]
    if other:
        looked = ", ".join(_KEYS[split])
        raise contents.MissingSplit(f"{path}: no {split} images; looked for {looked}, found {names}")
    wanted = [name for name in _COMMON_KEYS if name in names] or (names if len(names) == 1 else [])
    if not wanted:
        keys = ", ".join(_KEYS[split] + _COMMON_KEYS)
        raise ValueError(f"{path}: which array holds the images? Looked for {keys}, found {names}")
    return wanted[0], False


def _start(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry that is not compressed begin in the file."""
    with open(path, "rb") as file:
        file.seek(entry.header_offset)
        head = file.read(30)
    if len(head) < 30:
        raise ValueError("damaged zip archive")
    name, extra = struct.unpack_from("<HH", head, 26)
    return int(entry.header_offset + 30 + name + extra)


def _read_npz(path: Path, split: str, channels: int | None) -> tuple[Any, bool, bool]:
    """The pixels (N,C,H,W), whether they are bool, and whether the array is named after the split."""
    with zipfile.ZipFile(path) as archive:
        arrays = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
        entries = {entry.filename.removesuffix(".npy"): entry for entry in arrays}
        if not entries:
            found = [entry.filename for entry in archive.infolist()[:4]]
            raise ValueError(f"a zip archive without .npy arrays, so not a .npz; it holds {found}")
        name, named = _choose(list(entries), path, split)
        entry, where = entries[name], f"{path}, array {name!r}"
        if entry.flag_bits & 1:
            raise ValueError(f"array {name!r} is encrypted; unpack it and save a plain .npz")
        check_expansion(entry.file_size, entry.compress_size, where)
        with archive.open(entry) as file:
            header = _Header(file, entry.file_size, where)
            is_bool = header.dtype == np.bool_
            stored = entry.compress_type == zipfile.ZIP_STORED
            if stored and header.bytes > _IN_MEMORY and not header.fortran:
                return FileArray(path, header, channels, _start(path, entry)), is_bool, named
            return to_nchw(header.read(file, where), where, channels), is_bool, named


def _read(path: Path, split: str, channels: int | None) -> tuple[Any, bool, bool]:
    """As `_read_npz`, of a .npy or .npz file. ValueError names the file and what is wrong with it."""
    with named(path, "cannot be read as a numpy file"):
        with open(path, "rb") as file:
            head = file.read(contents.HEAD)
        if head.startswith(b"\x93NUMPY"):
            return *_read_npy(path, channels), False
        if head.startswith(b"PK"):
            return _read_npz(path, split, channels)
        raise ValueError(
            f"wrong magic number {head[:6].hex() or '(empty file)'}, expected a .npy or .npz file"
            + contents.but_it_is(head)
        )


def open_array(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """The images and whether they are this split's own (False: the file knows no splits, all is given).

    A .npz gives the array named after the split (train, x_train, train_images; test, x_test, test_images,
    ...), else images, x, data or arr_0, else its only array. Layouts and sizes: `fit.to_nchw` and
    `fit.array_source`.
    """
    if not path.is_dir():
        pixels, is_bool, own_split = retry(lambda: _read(path, split, channels), str(path))
        return array_source(pixels, str(path), image_size, channels, is_bool=is_bool), own_split
    files = find_files(path, split)
    if not files:
        raise contents.MissingSplit(
            f"{path}: no {split} images; looked for {SPLIT_NAMES[split]} with .npy or .npz, and {_BATCHES[split]}"
        )
    parts = [retry(lambda file=file: _read(file, split, channels), str(file)) for file in files]  # type: ignore[misc]
    for file, (pixels, _, _) in zip(files, parts, strict=True):
        if pixels.shape[1:] != parts[0][0].shape[1:]:
            raise ValueError(
                f"{file}: images of shape {pixels.shape[1:]}, those of {files[0].name} have {parts[0][0].shape[1:]}"
            )
    together = _Parts([pixels for pixels, _, _ in parts]) if len(files) > 1 else parts[0][0]
    is_bool = all(part[1] for part in parts)
    return array_source(together, str(files[0]), image_size, channels, is_bool=is_bool), True
