"""CIFAR-10, binary version: records of one label byte and 3x32x32 pixel bytes (red, green, blue planes)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from . import contents
from .dataset import MemoryImages
from .fit import array_source

logger = logging.getLogger("nvae_fast.data")

RECORD = 1 + 3 * 32 * 32
FILE_NAMES = "data_batch_*.bin and test_batch.bin"


def find_folder(path: Path) -> Path | None:
    """`path` or its subfolder cifar-10-batches-bin, whichever holds batches; None when neither does."""
    for folder in (path, path / "cifar-10-batches-bin"):
        if any(folder.glob("data_batch_*.bin")) or (folder / "test_batch.bin").is_file():
            return folder
    return None


def read_batch(path: Path) -> np.ndarray:
    """uint8 (N,3,32,32) of one batch file. ValueError names the file and what is wrong with it."""
    contents.check_regular(path)
    data = np.fromfile(path, dtype=np.uint8)
    if data.size == 0 or data.size % RECORD:
        hint = " (3074 a record: CIFAR-100?)" if data.size and data.size % (RECORD + 1) == 0 else ""
        raise ValueError(
            f"{path}: expected records of {RECORD} bytes (label, 3x32x32), got {data.size} bytes, "
            f"which is {data.size // RECORD} records and {data.size % RECORD} bytes over{hint}"
            + contents.but_it_is(data[: contents.HEAD].tobytes())
        )
    records = data.reshape(-1, RECORD)
    if records[:, 0].max() > 9:
        bad = int(np.argmax(records[:, 0] > 9))
        raise ValueError(
            f"{path}: record {bad} has label {records[bad, 0]}, expected 0 to 9; not a CIFAR-10 batch"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32)


def open_cifar10(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[MemoryImages, bool]:
    """A folder of the binary version (train: data_batch_*.bin in order) and True, or one file and False."""
    if path.is_file():
        files = [path]
    else:
        folder = find_folder(path)
        if folder is None:
            raise FileNotFoundError(f"{path}: no CIFAR-10 batches; looked for {FILE_NAMES}")
        files = sorted(folder.glob("data_batch_*.bin")) if split == "train" else [folder / "test_batch.bin"]
        if not files or not files[0].is_file():
            name = "data_batch_*.bin" if split == "train" else "test_batch.bin"
            raise FileNotFoundError(f"{folder}: no {split} images; looked for {name}")
        if split == "train" and len(files) != 5:
            logger.warning("%s: found %d of the 5 training batches of CIFAR-10", folder, len(files))
    pixels = np.concatenate([read_batch(file) for file in files])
    return array_source(pixels, str(path), image_size, channels), path.is_dir()
