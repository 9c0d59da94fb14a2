"""From a name or a path to an `ImageDataset`: `open_dataset`, and the detection of what a path holds."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import arrays, builtin, cifar, contents, folder, idx, lmdb_images, omniglot
from .dataset import ImageDataset, Source
from .decode import PUBLISHED, RESAMPLE, SUFFIXES, Reading, looks_encoded
from .held_out import HeldOut, check_fraction, split_off
from .integers import plain
from .lazy import MAX_SKIPPED, check_max_skipped
from .memory import CACHE_BYTES, check_cache_bytes

logger = logging.getLogger("nvae_fast.data")

Opener = Callable[..., "tuple[Source, bool]"]
_BUILTIN = {"digits": builtin.digits, "photos": builtin.photos}
_OPENERS: dict[str, Opener] = {
    "folder": folder.open_folder,
    "npy": arrays.open_array,
    "idx": idx.open_idx,
    "cifar10": cifar.open_cifar10,
    "cifar100": cifar.open_cifar100,
    "lmdb": lmdb_images.open_lmdb,
    "omniglot": omniglot.open_omniglot,
}
SPLITS = ("train", "validation", "test")
_TWO_SPLITS = ("idx", "cifar10", "cifar100", "omniglot")
_LAZY = ("folder", "lmdb")  # sources whose images are decoded one by one, so that one may be damaged
KINDS = (*_BUILTIN, *_OPENERS)
"""What :func:`open_dataset` knows to open: the values of its ``kind``."""


def open_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int | None = None,
    num_bits: int | None = None,
    kind: str | None = None,
    binarize: bool | None = None,
    likelihood: str | None = None,
    max_skipped: float = MAX_SKIPPED,
    crop: int | None = None,
    resample: str | None = None,
    dataset: str | None = None,
    cache_bytes: int = CACHE_BYTES,
    val_fraction: float | None = None,
    held_out: HeldOut | None = None,
) -> ImageDataset:
    """Open a built-in set by name or images from a path.

    name_or_path: "digits", "photos" (built in; where there is a folder of that name here, write "./digits" for it or give
        kind="digits" for the built-in set), or a path to
        "folder"   a folder of images, searched recursively, cropped to a square and resized (needs Pillow)
        "npy"      a .npy or .npz of uint8 or bool (N,H,W), (N,H,W,C) or (N,C,H,W), a folder of train.npy, test.npy,
                   or the batches of ImageNet at 32 or 64 pixels (train_data_batch_*.npz, val_data.npz)
        "idx"      MNIST's IDX files, raw or .gz, one file or their folder
        "cifar10"  CIFAR-10, the binary or the Python version: their folder, .tar.gz, or one batch
        "cifar100" CIFAR-100, the same
        "lmdb"     an LMDB, or a folder with train.lmdb and validation.lmdb (needs lmdb)
        "omniglot" chardata.mat, or its folder (needs scipy)
    split: "train", "validation" or "test". Where there is a validation part and no test part, that is the test part. A
    path that knows no splits gives all its images for each, and says so in the log for the last two, unless val_fraction
    holds some of them out.
    image_size: pixels a side; None: what the source has. channels: 1 or 3; None: what the source has.
    num_bits: 1..8 bits a pixel. kind: None detects it from the content.
    binarize: a Bernoulli draw at every load. likelihood: that of the model, "bernoulli" binarises and any other does not.
    What is not given here follows from the model in `Trainer` and `evaluate`; in a loop of your own, num_bits is
    8, and one-channel images are binarised.
    max_skipped: the share of images of a folder or LMDB that may be damaged. Those are skipped and named; more of them
    are an error, and so is a file that cannot be reached.
    crop, resample: of the images of a folder or LMDB: pixels a side of the centre crop (None: the short side), and the
    filter that resizes it, "lanczos" (None) or "bilinear". dataset: the name of a published data set, whose crop and
    filter are taken where none is given: "celeba_64" is a 148x148 crop of aligned faces (178x218), bilinear.
    cache_bytes: the decoded images of a folder or LMDB are kept in memory when all of them fit into so many bytes and into half
    of the free memory; else none are, and 0 keeps none.
    val_fraction: of a path that knows no splits, the share of the images that is the validation and the test split; the others
    are the train split. The names of the files decide, or the numbers of images that have none, by a hash: every opening
    makes the same split. None or 0 holds nothing out. held_out: the attribute of that name of a data set that was opened with
    val_fraction, to make its split again after images were added; it takes the place of val_fraction.

    One-channel 28x28 arrays are padded by 2 to 32x32 unless image_size is 28. Pixels that are 0 and 1 only become 0 and
    255, with a warning. Other types than uint8 and bool in arrays are refused. Raises FileNotFoundError or
    ValueError that names the file, what was expected and what came; ModuleNotFoundError that says what to
    install when a needed package is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split (--split): expected {', '.join(map(repr, SPLITS))}, got {split!r}")
    image_size, channels, num_bits = plain(image_size), plain(channels), plain(num_bits)
    for argument, value in (("image_size", image_size), ("channels", channels)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{argument}: expected a positive integer or None, got {value!r}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels: expected 1, 3 or None, got {channels}")
    if num_bits is not None and (
        isinstance(num_bits, bool) or not isinstance(num_bits, int) or not 1 <= num_bits <= 8
    ):
        raise ValueError(f"num_bits: expected an integer from 1 to 8, got {num_bits!r}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind (--data-kind): expected one of {', '.join(KINDS)} or None, got {kind!r}")

    if binarize is None and likelihood is not None:
        binarize = likelihood == "bernoulli"
    fraction = check_fraction(val_fraction)
    max_skipped, cache_bytes = check_max_skipped(max_skipped), check_cache_bytes(plain(cache_bytes))
    reading = _reading(crop, resample, dataset)

    name = os.fspath(name_or_path)
    source: Source
    if kind is None and name in _BUILTIN and Path(name).exists():
        raise ValueError(
            f"name_or_path (--data): {name} is a built-in data set, and also a folder or file in {Path.cwd()}: write "
            f"./{name} for what is there, or give kind (--data-kind) {name} for the built-in set"
        )
    if split == "validation" and (kind or name) in _BUILTIN:
        raise contents.MissingSplit(
            f"split (--split): {kind or name} has train and test images, no validation images"
        )
    if kind in _BUILTIN or (kind is None and name in _BUILTIN):
        kind = kind or name
        _check_lazy(kind, name, crop, resample)
        source = _BUILTIN[kind](split, image_size, channels)
        own_split = True
    else:
        path = Path(name).expanduser()
        if not path.exists():
            raise FileNotFoundError(
                f"name_or_path (--data): no file or folder {name!r}; built in are {', '.join(_BUILTIN)}"
            )
        if not path.is_dir():
            contents.check_regular(path)
        kind = kind or detect(path)
        if split == "validation" and kind in _TWO_SPLITS:
            raise contents.MissingSplit(
                f"split (--split): {path} has train and test images, no validation images"
            )
        _check_lazy(kind, name, crop, resample)
        options: dict[str, Any] = {}
        if kind in _LAZY:
            options = {"max_skipped": max_skipped, "reading": reading, "cache_bytes": cache_bytes}
        source, own_split = _OPENERS[kind](path, split, image_size, channels, **options)
    images = ImageDataset(source, split=split, num_bits=num_bits, binarize=binarize)
    images.own_split = own_split
    if not own_split and (fraction or held_out is not None):
        return split_off(images, held_out or HeldOut(fraction), training=split == "train")
    if split != "train" and not own_split:
        logger.warning(
            "%s has no splits: all of its %d images are given as the %s split; "
            "if you train on it too, keep a %s set apart",
            name,
            len(source),
            split,
            split,
        )
    return images


def _check_lazy(kind: str, name: str, crop: int | None, resample: str | None) -> None:
    if kind not in _LAZY and (crop is not None or resample is not None):
        raise ValueError(
            f"crop, resample (--crop, --resample): {name} holds images that are taken as they are ({kind}); "
            f"expected a folder of images or an LMDB"
        )


def _reading(crop: int | None, resample: str | None, dataset: str | None) -> Reading:
    if crop is not None and (isinstance(crop, bool) or not isinstance(crop, int) or crop < 1):
        raise ValueError(f"crop (--crop): expected a positive integer or None, got {crop!r}")
    if resample not in (None, *RESAMPLE):
        raise ValueError(f"resample (--resample): expected one of {', '.join(RESAMPLE)}, got {resample!r}")
    published = PUBLISHED.get(dataset or "", Reading())
    if crop is not None:
        published = replace(published, crop=crop, only=None)
    return published if resample is None else replace(published, resample=resample)


def detect(path: Path) -> str:
    """The kind of source an existing path holds, by content. ValueError says what was looked for."""
    return _detect_folder(path) if path.is_dir() else _detect_file(path)


def _detect_folder(path: Path) -> str:
    if any(lmdb_images.find_database(path, split) for split in ("train", "test")):
        return "lmdb"
    found = [name for name in ("cifar10", "cifar100") if cifar.find(path, name) is not None]
    if any(idx.find_file(path / sub, split) for sub in idx.FOLDERS for split in ("train", "test")):
        found.append("idx")
    if len(found) > 1:
        raise ValueError(
            f"{path}: several data sets are in this folder ({', '.join(found)}): kind (--data-kind) chooses one"
        )
    if found:
        return found[0]
    if (path / omniglot.FILE_NAME).is_file():
        return "omniglot"
    if any(arrays.find_files(path, split) for split in SPLITS):
        return "npy"
    if folder.has_images(path):
        return "folder"
    raise ValueError(
        f"{path}: nothing recognised in this folder. Looked for an LMDB (data.mdb, "
        f"train.lmdb, validation.lmdb), MNIST ({idx.FILE_NAMES}), CIFAR ({cifar.FILE_NAMES}), "
        f"numpy files (train.npy, test.npy, .npz, {omniglot.FILE_NAME}) and images "
        f"({', '.join(SUFFIXES)}), these also in folders below"
    )


def _detect_file(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(contents.HEAD)
    if head.startswith((b"\x93NUMPY", b"PK")):
        return "npy"
    if cifar.is_archive(path):
        return "cifar100" if "100" in path.name else "cifar10"
    if head.startswith((b"\0\0\x08", b"\x1f\x8b")) or "idx3-ubyte" in path.name:
        return "idx"
    if head.startswith(b"MATLAB"):
        return "omniglot"
    if lmdb_images.is_database_file(head):
        return "lmdb"
    if path.suffix == ".bin" or head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "cifar10"  # a file of either data set
    if path.suffix in (".npy", ".npz"):
        return "npy"
    hint = " (a single image: give the folder it is in)" if looks_encoded(head) else ""
    raise ValueError(
        f"{path}: not recognised{hint}. Looked for the first bytes of a .npy or .npz, an IDX file (raw or "
        f".gz), an LMDB file, or a CIFAR batch; "
        f"it starts with {head[:8].hex() or 'nothing: the file is empty'}{contents.but_it_is(head) if head else ''}"
    )
