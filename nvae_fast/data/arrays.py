"""numpy files of uint8 images: .npy, .npz, or a folder that holds train.npy / test.npy (or .npz)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from .dataset import MemoryImages
from .fit import fit_pixels, to_nchw

_KEYS = {
    "train": ("train", "x_train", "train_images", "train_x"),
    "test": ("test", "x_test", "test_images", "test_x", "val", "x_val", "val_images", "validation"),
}
_COMMON_KEYS = ("images", "x", "data", "arr_0")
_MEMORY_MAP_FROM = (
    1 << 30
)  # bytes; larger .npy files are mapped, so that processes of one machine share the pages
SPLIT_NAMES = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


def find_file(folder: Path, split: str) -> Path | None:
    """train.npy or train.npz (test, val, valid, validation for the test split) in `folder`, or None."""
    for name in SPLIT_NAMES[split]:
        for ending in (".npy", ".npz"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    return None


def _read_npz(path: Path, split: str) -> tuple[np.ndarray, bool]:
    with np.load(path, allow_pickle=False) as archive:
        names = list(archive.files)
        wanted = [name for name in _KEYS[split] if name in names]
        if not wanted:
            other = [name for name in names if name in _KEYS["test" if split == "train" else "train"]]
            if other:
                raise ValueError(
                    f"{path}: no {split} images; looked for {', '.join(_KEYS[split])}, found {names}"
                )
            wanted = [name for name in _COMMON_KEYS if name in names] or (names if len(names) == 1 else [])
            if not wanted:
                keys = ", ".join(_KEYS[split] + _COMMON_KEYS)
                raise ValueError(f"{path}: which array holds the images? Looked for {keys}, found {names}")
            return archive[wanted[0]], False
        return archive[wanted[0]], True


def open_array(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """The images and whether they are this split's own (False: the file knows no splits, all is given).

    A .npz gives the array named after the split (train, x_train, train_images; test, x_test, test_images,
    ...), else images, x, data or arr_0, else its only array. Layouts and sizes: `fit.to_nchw` and
    `fit.fit_pixels`.
    """
    own_split = False
    if path.is_dir():
        found = find_file(path, split)
        if found is None:
            raise FileNotFoundError(
                f"{path}: no {split} images; looked for {SPLIT_NAMES[split]} with .npy or .npz"
            )
        path, own_split = found, True
    try:
        with open(path, "rb") as file:
            magic = file.read(6)
        if magic == b"\x93NUMPY":
            mapped = path.stat().st_size >= _MEMORY_MAP_FROM
            pixels = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        elif magic[:2] == b"PK":
            pixels, named = _read_npz(path, split)
            own_split = own_split or named
        else:
            raise ValueError(
                f"wrong magic number {magic.hex() or '(empty file)'}, expected a .npy or .npz file"
            )
    except (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, FileNotFoundError) or str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be read as a numpy file: {error}") from error
    pixels = fit_pixels(to_nchw(pixels, str(path), channels), str(path), image_size, channels)
    return MemoryImages(str(path), pixels), own_split
