"""Images from a model in a folder of files: any number of them in constant memory, resumable.

Image i depends on the model, the settings and (seed, i) alone. The folder holds the settings in `samples.json`, and the images
as `000000.png` and so on, or as `00000.npz` and so on with up to 1000 images each (array `arr_0`, uint8 (N,H,W,C)).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nvae_fast.data.png import encode_png, to_pixels
from nvae_fast.io import atomic_file
from nvae_fast.models.inputs import group_temperatures
from nvae_fast.ops import _checks
from nvae_fast.training import run_folder
from nvae_fast.training.distributed import World
from nvae_fast.training.pictures import chosen_pixels
from nvae_fast.training.sampler import Sampler
from nvae_fast.version import __version__

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

FORMATS = ("png", "npz")
SETTINGS = "samples.json"
_FORMAT = "nvae_fast.samples"
_SHARD_IMAGES = 1000
_SHARD_BYTES = 64 << 20
# The rest of the settings: what made the images, not what they are.
_NOT_COMPARED = ("nvae_fast",)
_ADVICE = "give another folder, or overwrite (--overwrite), which moves this one aside"


@dataclass(frozen=True)
class SampledFolder:
    """What :func:`sample_to_folder` did.

    written: images made now, by all processes. kept: images that were complete. note: what was moved aside, or None.
    """

    written: int
    kept: int
    note: str | None = None


@torch.no_grad()
def sample_to_folder(
    model: NVAE,
    folder: str | os.PathLike[str],
    count: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    pixel_temperature: float = 1.0,
    pixels: str = "auto",
    seed: int = 0,
    batch_size: int = 32,
    format: str = "png",
    overwrite: bool = False,
    on_batch: Callable[[int], None] | None = None,
    world: World | None = None,
) -> SampledFolder:
    """Write `count` images from the prior into a folder; the memory needed does not grow with `count`.

    Image i depends on the model, the settings and (seed, i) alone: another batch size gives the same image but for rounding.
    Files that are complete are kept, missing and partial ones are made: the same call continues after an interruption, and one
    with a larger `count` adds images. Files beyond `count` are left alone.

    temperature, pixel_temperature, pixels, seed: as in :func:`nvae_fast.training.Sampler`; pixels "auto" takes the mean of a
    Bernoulli and draws from other likelihoods. batch_size: images drawn together. format: "png", a file for each image, or
    "npz", up to 1000 in a file (fewer where they would take more than 64 MiB). overwrite: rename a folder that is there to
    `<name>.replaced-<time>` and start anew. on_batch(done) is called after every batch. world: several processes share the
    images out and write into the same folder.

    Raises ValueError for options that do not fit and for a folder that holds other files, or images of other settings, before
    anything is written; OSError when a file cannot be written.
    """
    folder, world = Path(folder), world or World()
    if format not in FORMATS:
        raise ValueError(f"sample_to_folder: format must be one of {', '.join(FORMATS)}, got {format!r}")
    op = "sample_to_folder"
    seed, count = _checks.whole(op, "seed", seed), _checks.whole(op, "count", count)
    for name, value in (("count", count), ("batch_size", _checks.whole(op, "batch_size", batch_size))):
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    pixels = chosen_pixels(model, pixels)
    sampler = Sampler(model, temperature=temperature, pixel_temperature=pixel_temperature, pixels=pixels)
    temperatures = group_temperatures(op, temperature, model.config.num_groups)
    shape = (model.config.resolution, model.config.resolution, model.config.channels)
    settings = {
        "kind": _FORMAT,
        "version": 1,
        "nvae_fast": __version__,
        "weights": weights_hash(model),
        "seed": seed,
        "temperature": [float(t) for t in temperatures],
        "pixels": pixels,
        "pixel_temperature": float(pixel_temperature) if pixels == "sample" else None,
        "format": format,
        "shape": list(shape),
    }
    files = _Files(folder, format, shape)
    note = None
    if world.is_main:
        note = _prepare(folder, settings, overwrite)
    world.barrier()
    block = files.per_file if format == "npz" else batch_size
    batch_size = min(batch_size, block, count)
    # One array for all shards: new ones fragment the heap.
    shard = np.empty((block if format == "npz" else 0, *shape), dtype=np.uint8)
    written = kept = 0
    # A block is a shard, or a batch of images. It is computed in the same batches by any process and after any interruption.
    for start in range(block * world.rank, count, block * world.size):
        stop = min(start + block, count)
        missing = files.missing(start, stop)
        kept += stop - start - len(missing)
        written += len(missing)
        for first in range(start, stop, batch_size) if missing else ():
            # Whole batches also at the end: one capture, and the same rounding whatever `count` is.
            drawn = to_pixels(sampler(batch_size, seed=seed, first=first).float())
            if format == "png":
                files.write_images(first, drawn, missing)
            else:
                shard[first - start : first - start + batch_size] = drawn[: block - (first - start)]
            if on_batch is not None and world.is_main:
                on_batch(min(first + batch_size, stop))
        if missing and format == "npz":
            files.write_shard(start, shard[: stop - start])
    totals = world.sum(torch.tensor([written, kept], dtype=torch.int64, device=sampler.device))
    written, kept = totals.tolist()
    return SampledFolder(written, kept, note)


def weights_hash(model: NVAE) -> str:
    """SHA-256 of names, shapes and values of a model's state, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, torch.Tensor):  # extra state
            digest.update(f"{name} {value!r}\n".encode())
            continue
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


class _Files:
    """The files of images in a folder."""

    def __init__(self, folder: Path, format: str, shape: tuple[int, int, int]) -> None:
        self.folder, self.format, self.shape = folder, format, shape
        self.per_file = (
            1 if format == "png" else max(1, min(_SHARD_IMAGES, _SHARD_BYTES // int(np.prod(shape))))
        )

    def path(self, index: int) -> Path:
        """The file that image ``index`` is in."""
        if self.format == "png":
            return self.folder / f"{index:06d}.png"
        return self.folder / f"{index // self.per_file:05d}.npz"

    def missing(self, start: int, stop: int) -> list[int]:
        """The images from ``start`` to ``stop`` (not included) that no complete file holds."""
        if self.format == "png":
            return [index for index in range(start, stop) if not self._is_png(self.path(index))]
        return [] if self._images_in(self.path(start)) >= stop - start else list(range(start, stop))

    def write_images(self, first: int, pixels: np.ndarray, missing: Sequence[int]) -> None:
        for index in missing:
            picture = pixels[index - first]
            with self._writing(self.path(index)) as handle:
                handle.write(encode_png(picture if self.shape[2] == 3 else picture[..., 0]))

    def write_shard(self, start: int, pixels: np.ndarray) -> None:
        with self._writing(self.path(start)) as handle:
            np.savez_compressed(handle, pixels)

    @contextlib.contextmanager
    def _writing(self, path: Path) -> Iterator[Any]:
        try:
            with atomic_file(path, sync=False) as handle:
                yield handle
        except OSError as error:
            raise OSError(
                f"cannot write {path}: {error.strerror or error}; the images written before are complete, the same command "
                "goes on from them"
            ) from error

    def _is_png(self, path: Path) -> bool:
        """Whether a file begins as a PNG of this size and kind and ends as one."""
        height, width, channels = self.shape
        header = struct.pack(">IIBB", width, height, 8, 2 if channels == 3 else 0)
        try:
            with open(path, "rb") as file:
                head = file.read(26)
                file.seek(-8, os.SEEK_END)
                return head[:8] == b"\x89PNG\r\n\x1a\n" and head[16:26] == header and file.read(4) == b"IEND"
        except OSError:
            return False

    def _images_in(self, path: Path) -> int:
        """How many images of this shape a shard holds, 0 for a file that is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                pixels = archive["arr_0"]  # reads and checks all of it
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return 0
        return len(pixels) if pixels.dtype == np.uint8 and pixels.shape[1:] == self.shape else 0


def check_folder(folder: Path, overwrite: bool) -> dict[str, Any] | None:
    """The settings of a folder of samples, None where there are none to keep. Raises ValueError for anything else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, a folder is needed")
    if overwrite or not folder.is_dir() or not any(folder.iterdir()):
        return None
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not empty and has no {SETTINGS}: {_ADVICE}") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("kind") != _FORMAT:
        raise ValueError(f"{path} is damaged or something else: {_ADVICE}")
    return found


def _prepare(folder: Path, settings: dict[str, Any], overwrite: bool) -> str | None:
    """Make the folder and write its settings, or check those that it has. Returns what was moved aside, or None."""
    found = check_folder(folder, overwrite)
    for name, value in settings.items():
        if found is not None and name not in _NOT_COMPARED and found.get(name) != value:
            there, now = _short(found.get(name)), _short(value)
            raise ValueError(
                f"{folder} holds images of other settings: {name} is {there} there, {now} now; {_ADVICE}"
            )
    occupied = folder.is_dir() and any(folder.iterdir())
    note = run_folder.move_aside(folder) if overwrite and occupied else None
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".[0-9]*.tmp"):  # of an interrupted write
        leftover.unlink(missing_ok=True)
    if not (folder / SETTINGS).exists():
        with atomic_file(folder / SETTINGS) as handle:
            handle.write((json.dumps(settings, indent=2) + "\n").encode())
    return note


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
