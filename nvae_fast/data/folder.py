"""A folder of image files, searched recursively."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import contents
from .arrays import SPLIT_NAMES, other_splits
from .decode import (
    MAX_FILE_BYTES,
    SUFFIXES,
    DamagedImage,
    PixelRange,
    Reading,
    find_range,
    fit_image,
    looks_encoded,
    open_image,
)
from .lazy import MAX_SKIPPED, SAMPLED, LazyImages, Skipped
from .memory import CACHE_BYTES
from .retry import is_io_error, retry


def split_folder(path: Path, split: str) -> tuple[Path, bool]:
    """The subfolder named after the split and True; `path` and False when it has none of either split."""
    for name in SPLIT_NAMES[split]:
        if (path / name).is_dir():
            return path / name, True
    other = [name for name in other_splits(split) if (path / name).is_dir()]
    if other:
        looked = ", ".join(SPLIT_NAMES[split])
        raise contents.MissingSplit(
            f"{path}: no {split} images; it has a folder {other[0]}, but none of {looked}"
        )
    return path, False


def walk_images(path: Path) -> Iterator[str]:
    """Image files below `path` by their ending, hidden ones left out, links followed. OSError names a folder that
    cannot be listed: its images would be missing without a word."""
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(path)]
    while waiting:
        folder = waiting.pop()
        files, folders, own = retry(lambda folder=folder: _list(folder), folder)  # type: ignore[misc]
        if own not in seen:  # else a link back up
            seen.add(own)
            waiting.extend(reversed(folders))
            yield from files


def _list(folder: str) -> tuple[list[str], list[str], tuple[int, int]]:
    """Image files, subfolders, and (device, inode) of a folder."""
    found = os.stat(folder)
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "lost+found":
                continue
            if _is_folder(entry):
                folders.append(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                files.append(entry.path)
    return sorted(files), sorted(folders), (found.st_dev, found.st_ino)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself: its name decides, and opening it is an error
            return False
        raise


def has_images(path: Path) -> bool:
    """Whether there is any image file below `path`; stops at the first."""
    return next(walk_images(path), None) is not None


def _head(file: str) -> tuple[bytes, str]:
    """The first bytes of a file, or why it is none."""
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        return b"", f"{contents.irregular(mode) or 'a folder'}, not a file"
    with open(file, "rb") as opened:
        head = opened.read(contents.HEAD)
    if looks_encoded(head):
        return head, ""
    if not head:
        return head, "empty file"
    what = contents.describe(head)
    return head, "not an image file" + (f" but {what}" if what else "")


def read_file(file: str) -> bytes:
    """The bytes of an image file. DamagedImage when they are too many, OSError when it cannot be reached."""

    def read() -> bytes:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise DamagedImage(f"{size} bytes, more than the {MAX_FILE_BYTES} that are read")
            return opened.read()

    return retry(read, file)


class FolderImages(LazyImages):
    """Image files, centre-cropped to a square and resized; see `decode.fit_image`.

    Opening looks at the first bytes of every file: those that are not an image at all are skipped there and
    then and take no index. What fails later, when decoded, keeps its index and is replaced (see
    LazyImages). `image_size` None: the short side of the first readable image; `channels` None: 1 when that
    image is gray, else 3. max_skipped: the share of the files that may be damaged. reading: the crop and the filter.
    cache_bytes: see LazyImages.
    """

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
        root = os.fspath(path)
        files = sorted(walk_images(path), key=lambda file: file[len(root) :].split(os.sep))
        if not files:
            raise FileNotFoundError(
                f"{path}: no image files; looked for {', '.join(SUFFIXES)} in it and below"
            )
        skipped = Skipped(root, len(files), max_skipped)
        self.files = []
        for file in files:
            _, reason = retry(lambda file=file: _head(file), file)  # type: ignore[misc]
            if reason:
                skipped.add(file, reason)
            else:
                self.files.append(file)
        if not self.files:
            raise ValueError(
                f"{path}: none of the {len(files)} image files can be read; the first: {skipped.items[0]}"
            )
        skipped.check()
        if image_size is None or channels is None:
            size, bands = self._first(path, skipped.most)
            image_size, channels = image_size or size, channels or bands
        self.values = PixelRange()
        shape = (channels, image_size, image_size)
        super().__init__(root, len(self.files), shape, skipped, cache_bytes=cache_bytes)
        self.values = find_range(self.pictures(), root)
        self._one(0)  # raises when not a single file can be decoded

    def _first(self, path: Path, most_skipped: int) -> tuple[int, int]:
        """The short side and the channels of the first sound image."""
        reasons = []
        for file in self.files[: most_skipped + 1]:
            try:
                with open_image(read_file(file)) as picture:
                    gray = picture.mode in ("1", "L", "LA") or picture.mode[0] in "IF"
                    return self.reading.side(picture.size), 1 if gray else 3
            except DamagedImage as error:  # counted when it is decoded
                reasons.append(f"{file}: {error}")
        raise ValueError(
            f"{path}: none of its first {len(reasons)} image file(s) can be read; the first: {reasons[0]}"
        )

    def names(self) -> list[str]:
        """The files, by their paths below the folder."""
        return [os.path.relpath(file, self.name).replace(os.sep, "/") for file in self.files]

    def pictures(self) -> Iterator[Any]:
        """Some images, evenly spaced, as Pillow reads them; damaged ones are left out."""
        for index in np.unique(np.linspace(0, len(self.files) - 1, SAMPLED).astype(int)):
            try:
                with open_image(read_file(self.files[index])) as picture:
                    picture.load()
                    yield picture
            except ModuleNotFoundError:
                raise
            except Exception as error:  # counted when it is decoded
                if is_io_error(error):
                    raise

    def decode(self, index: int) -> np.ndarray:
        with open_image(read_file(self.files[index])) as picture:
            return fit_image(picture, self.shape[1], self.shape[0], self.values, self.reading)

    def label(self, index: int) -> str:
        return self.files[index]


def open_folder(
    path: Path,
    split: str,
    image_size: int | None,
    channels: int | None,
    max_skipped: float = MAX_SKIPPED,
    reading: Reading | None = None,
    cache_bytes: int = CACHE_BYTES,
) -> tuple[FolderImages, bool]:
    """The images and whether they come from a subfolder named after the split."""
    folder, own_split = split_folder(path, split)
    return FolderImages(folder, image_size, channels, max_skipped, reading, cache_bytes), own_split
