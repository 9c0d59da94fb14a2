"""A folder of image files, searched recursively."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .arrays import SPLIT_NAMES
from .decode import LazyImages, fit_image, looks_encoded, open_image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")


def split_folder(path: Path, split: str) -> tuple[Path, bool]:
    """The subfolder named after the split and True; `path` and False when it has none of either split."""
    for name in SPLIT_NAMES[split]:
        if (path / name).is_dir():
            return path / name, True
    other = [n for n in SPLIT_NAMES["test" if split == "train" else "train"] if (path / n).is_dir()]
    if other:
        looked = ", ".join(SPLIT_NAMES[split])
        raise FileNotFoundError(
            f"{path}: no {split} images; it has a folder {other[0]}, but none of {looked}"
        )
    return path, False


def walk_images(path: Path) -> Iterator[Path]:
    """Image files below `path` by their ending, hidden ones left out, links followed."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield Path(folder, name)


def has_images(path: Path) -> bool:
    """Whether there is any image file below `path`; stops at the first."""
    return next(walk_images(path), None) is not None


class FolderImages(LazyImages):
    """Image files, centre-cropped to a square and resized; see `decode.fit_image`.

    Opening looks at the first bytes of every file: those that are not an image at all are skipped there and
    then and take no index. What fails later, when decoded, keeps its index and is replaced (see
    LazyImages). `image_size` None: the short side of the first readable image; `channels` None: 1 when that
    image is gray, else 3.
    """

    def __init__(self, path: Path, image_size: int | None, channels: int | None) -> None:
        files = sorted(walk_images(path), key=lambda file: file.relative_to(path).parts)
        if not files:
            raise FileNotFoundError(
                f"{path}: no image files; looked for {', '.join(SUFFIXES)} in it and below"
            )
        readable, broken = [], []
        for file in files:
            try:
                with open(file, "rb") as opened:
                    head = opened.read(16)
                reason = "" if looks_encoded(head) else ("empty file" if not head else "not an image file")
            except OSError as error:
                reason = f"{type(error).__name__}: {error}"
            if reason:
                broken.append((str(file), reason))
            else:
                readable.append(file)
        self.files = readable
        size, bands = (
            self._first(path, broken) if image_size is None or channels is None else (image_size, channels)
        )
        size, bands = image_size or size, channels or bands
        super().__init__(str(path), len(readable), (bands, size, size))
        for label, reason in broken:
            self.record_skipped(label, reason)
        if readable:
            self._one(0)  # raises when not a single file can be decoded
        else:
            raise ValueError(
                f"{path}: none of the {len(files)} image files can be read; the first: {self.skipped[0]}"
            )

    def _first(self, path: Path, broken: list[tuple[str, str]]) -> tuple[int, int]:
        for file in self.files:
            try:
                with open_image(file) as picture:
                    return min(picture.size), 1 if picture.mode in ("1", "L", "LA") or picture.mode[
                        0
                    ] in "IF" else 3
            except ModuleNotFoundError:
                raise
            except Exception:  # counted when it is decoded
                continue
        raise ValueError(
            f"{path}: none of its image files can be read; the first: {(broken or self.files)[0]}"
        )

    def decode(self, index: int) -> np.ndarray:
        with open_image(self.files[index]) as picture:
            return fit_image(picture, self.shape[1], self.shape[0])

    def label(self, index: int) -> str:
        return str(self.files[index])


def open_folder(
    path: Path, split: str, image_size: int | None, channels: int | None
) -> tuple[FolderImages, bool]:
    """The images and whether they come from a subfolder named after the split."""
    folder, own_split = split_folder(path, split)
    return FolderImages(folder, image_size, channels), own_split
