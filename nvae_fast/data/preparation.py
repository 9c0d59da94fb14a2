"""Data sets as they are downloaded into LMDB databases that :func:`nvae_fast.data.open_dataset` reads.

A target folder holds train.lmdb, validation.lmdb and test.lmdb, whichever the data set has, with the keys '0' to 'N-1' and raw
pixels; beside each a text file that names the source of every key, a line each; and prepared.json with the
options, the number of images and those that were skipped. A preparation that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nvae_fast.io import atomic_file

from .decode import DamagedImage, Reading, fit_image, open_image
from .extras import require
from .folder import FolderImages, read_file
from .lazy import MAX_SKIPPED, Skipped, check_max_skipped
from .retry import is_io_error
from .tfrecord import read_record, records

KINDS = ("celeba", "ffhq", "imagenet", "folder", "tfrecord")
"""What :func:`prepare` knows to read."""
SUMMARY = "prepared.json"
_STARTED = "preparing.json"
_BATCH = 256  # images of a transaction
_SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
_PARTITION = "list_eval_partition.txt"
_FACE = (178, 218)


class Part(Protocol):
    """The images of one split."""

    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What to call an image."""

    def pixels(self, index: int) -> np.ndarray:
        """uint8 (H,W,3); raises when it is damaged."""


class _Files:
    """Some of the images of a folder, by their positions."""

    def __init__(self, source: FolderImages, positions: range) -> None:
        self.source, self.positions = source, positions
        self.skipped = list(source.skipped) if positions.start == 0 else []

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        return self.source.label(self.positions[index])

    def pixels(self, index: int) -> np.ndarray:
        return self.source.decode(self.positions[index]).transpose(1, 2, 0)


class _Faces:
    """Aligned faces of CelebA, whole: the crop that is published is taken when they are read."""

    def __init__(self, files: list[str]) -> None:
        self.files = files
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index]

    def pixels(self, index: int) -> np.ndarray:
        with open_image(read_file(self.files[index])) as picture:
            if picture.size != _FACE:
                raise DamagedImage(f"{picture.width}x{picture.height} pixels, expected {_FACE[0]}x{_FACE[1]}")
            return np.asarray(picture.convert("RGB"))


class _Records:
    """Images of TFRecord files."""

    def __init__(self, files: list[Path], size: int | None, reading: Reading) -> None:
        self.items = [(file, number, *at) for file in files for number, at in enumerate(records(file))]
        self.size, self.reading = size, reading
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return f"{self.items[index][0]}, record {self.items[index][1]}"

    def pixels(self, index: int) -> np.ndarray:
        file, _, offset, length = self.items[index]
        pixels = read_record(file, offset, length)
        if self.size is None or pixels.shape[:2] == (self.size, self.size):
            return pixels
        picture = require("PIL.Image", "Pillow", "resizing images").fromarray(np.ascontiguousarray(pixels))
        return fit_image(picture, self.size, 3, reading=self.reading).transpose(1, 2, 0)


def _parts(
    kind: str, source: Path, size: int | None, reading: Reading, validation: float, max_skipped: float
) -> dict[str, Part]:
    if not source.is_dir():
        raise FileNotFoundError(f"SRC: expected a folder, got {source}")
    if kind == "celeba":
        if size is not None or reading != Reading():
            raise ValueError(
                "size, crop, resample (--size, --crop, --resample): faces of celeba are kept whole"
            )
        return _celeba(source)
    if kind == "tfrecord":
        return _tfrecords(source, size, reading)
    if size is None:
        raise ValueError(f"size (--size): {kind} images have many sizes, give the one they are to get")
    folders = {
        _SPLITS[sub.name]: sub for sub in sorted(source.iterdir()) if sub.name in _SPLITS and sub.is_dir()
    }
    if kind == "imagenet" and set(folders) < {"train", "validation"}:
        raise FileNotFoundError(
            f"{source}: expected the folders train and val of ImageNet, found {sorted(folders)}"
        )
    if folders:
        opened = {name: FolderImages(sub, size, 3, max_skipped, reading) for name, sub in folders.items()}
        return {name: _Files(images, range(len(images))) for name, images in opened.items()}
    images = FolderImages(source, size, 3, max_skipped, reading)
    train = len(images) - round(validation * len(images))
    cut = {"train": range(train), "validation": range(train, len(images))}
    return {name: _Files(images, positions) for name, positions in cut.items() if len(positions)}


def _celeba(source: Path) -> dict[str, Part]:
    partition = next(iter(sorted(source.rglob(_PARTITION))), None)
    folder = next((sub for sub in sorted(source.rglob("img_align_celeba")) if any(sub.glob("*.jpg"))), None)
    if partition is None or folder is None:
        raise FileNotFoundError(
            f"{source}: expected {_PARTITION} and the folder img_align_celeba of .jpg files"
        )
    names: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for number, line in enumerate(partition.read_text().split("\n"), 1):
        if not line.strip():
            continue
        words = line.split()
        if len(words) != 2 or words[1] not in ("0", "1", "2"):
            raise ValueError(
                f"{partition}: line {number}: expected a file name and 0, 1 or 2, got {line[:60]!r}"
            )
        names[list(names)[int(words[1])]].append(str(folder / words[0]))
    return {name: _Faces(files) for name, files in names.items() if files}


def _tfrecords(source: Path, size: int | None, reading: Reading) -> dict[str, Part]:
    found: dict[str, list[Path]] = {}
    for file in sorted([*source.rglob("*.tfrecord"), *source.rglob("*.tfrecords")]):
        words = "/".join(file.relative_to(source).parts).lower()
        split = "validation" if "val" in words else "test" if "test" in words else "train"
        found.setdefault(split, []).append(file)
    if not found:
        raise FileNotFoundError(f"{source}: no files *.tfrecord or *.tfrecords in it or below")
    return {split: _Records(files, size, reading) for split, files in found.items()}


def prepare(
    kind: str,
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    size: int | None = None,
    reading: Reading | None = None,
    validation: float = 0.1,
    max_skipped: float = MAX_SKIPPED,
    workers: int = 4,
    on_images: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Write the images of a data set into LMDB databases; called again after a stop it goes on where it was.

    kind: "celeba" (img_align_celeba and list_eval_partition.txt; faces are kept whole), "ffhq" and "folder" (image files,
    with folders named after splits or without), "imagenet" (folders train and val), "tfrecord" (raw images).
    source: the folder that holds it. target: a folder to make, or one that a stopped preparation left. size: pixels a
    side. reading: crop and filter. validation: the share of images, the last by name, of a folder without
    splits. max_skipped: the share of damaged images that are skipped. workers: threads that decode.
    on_images(split, done, all) is called after every transaction.

    Returns what prepared.json holds. Raises ValueError, FileNotFoundError or FileExistsError before anything is
    written, OSError when a file cannot be reached.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation (--validation): expected a share from 0 to below 1, got {validation!r}")
    reading, max_skipped = reading or Reading(), check_max_skipped(max_skipped)
    options = {
        "kind": kind, "source": str(Path(source).resolve()), "size": size, "crop": reading.crop,
        "resample": reading.resample, "validation": validation,
    }  # fmt: skip
    folder = Path(target)
    _check_target(folder, options)
    parts = _parts(kind, Path(source).absolute(), size, reading, validation, max_skipped)
    require("lmdb", "lmdb", "writing an LMDB database")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / _STARTED, options)
    summary: dict[str, Any] = {**options, "splits": {}}
    for split, part in parts.items():
        skipped = _write(folder, split, part, max_skipped, workers, on_images)
        summary["splits"][split] = {
            "images": len(part) + len(part.skipped) - len(skipped),
            "skipped": skipped,
        }
    _write_json(folder / SUMMARY, summary)
    (folder / _STARTED).unlink()
    return summary


def _check_target(folder: Path, options: dict[str, Any]) -> None:
    if (folder / SUMMARY).exists():
        raise FileExistsError(f"DST: {folder} is prepared already (see {SUMMARY}); give another folder")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"DST: {folder} is a file, expected a folder to make")
    if (folder / _STARTED).exists():
        before = json.loads((folder / _STARTED).read_text())
        changed = [
            f"{name}: {before.get(name)!r} then, {value!r} now"
            for name, value in options.items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(f"DST: {folder} was begun with other options ({'; '.join(changed)})")
    elif folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"DST: {folder} is not empty; give a new folder")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def _written(record: Path) -> list[str]:
    """The whole lines of the record of a split; a line that a crash cut off is removed."""
    if not record.exists():
        return []
    text = record.read_text("utf-8", "surrogateescape")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with atomic_file(record) as file:
            file.write(whole.encode("utf-8", "surrogateescape"))
    return whole.split("\n")[:-1]


def _write(
    folder: Path,
    split: str,
    part: Part,
    max_skipped: float,
    workers: int,
    on_images: Callable[[str, int, int], None] | None,
) -> list[tuple[str, str]]:
    """Write the rest of a split; returns the images that were skipped.

    A line of the record follows after its images are in the database. After a crash between the two, the same images
    are written under the same keys again.
    """
    lmdb = require("lmdb", "lmdb", "writing an LMDB database")
    record = folder / f"{split}.txt"
    lines = _written(record)
    skipped = Skipped(f"{folder}, {split}", len(part) + len(part.skipped), max_skipped)
    skipped.items += part.skipped
    skipped.items += [
        (name, reason) for name, _, reason in (line.partition("\tskipped: ") for line in lines) if reason
    ]
    skipped.check()
    key = sum("\tskipped: " not in line for line in lines)
    with (
        lmdb.open(str(folder / f"{split}.lmdb"), map_size=1 << 30) as environment,
        ThreadPoolExecutor(max(workers, 1)) as pool,
        open(record, "a", encoding="utf-8", errors="surrogateescape") as names,
    ):
        for start in range(len(lines), len(part), _BATCH):
            indices = range(start, min(start + _BATCH, len(part)))
            values, text = [], []
            for index, (value, reason) in zip(
                indices, pool.map(lambda i: _value(part, i), indices), strict=True
            ):
                name = part.name(index).replace("\n", "\\n").replace("\t", "\\t")
                if value is None:
                    skipped.add(name, reason)
                    skipped.check()
                else:
                    values.append(value)
                text.append(f"{name}\tskipped: {reason}\n" if value is None else f"{name}\n")
            _put(lmdb, environment, key, values)
            key += len(values)
            names.write("".join(text))
            names.flush()
            os.fsync(names.fileno())
            if on_images is not None:
                on_images(split, indices.stop, len(part))
    return skipped.items


def _value(part: Part, index: int) -> tuple[bytes | None, str]:
    """The bytes of an image, or None and why there are none."""
    try:
        return np.ascontiguousarray(part.pixels(index)).tobytes(), ""
    except (ModuleNotFoundError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        if is_io_error(error):
            raise
        return None, " ".join(f"{type(error).__name__}: {error}".split())


def _put(lmdb: Any, environment: Any, key: int, values: Sequence[bytes]) -> None:
    """Write values under the keys from `key` on; the map grows when it is full."""
    while True:
        try:
            with environment.begin(write=True) as transaction:
                for number, value in enumerate(values, key):
                    transaction.put(str(number).encode("ascii"), value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
