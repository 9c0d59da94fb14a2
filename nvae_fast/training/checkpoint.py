"""Checkpoints that survive: written beside the old one, moved into place whole, read without running code.

A run folder holds `checkpoint.pt` (the newest) and `checkpoint-previous.pt` (the one before). Writing goes to
a temporary file in the same folder, is forced to disk, and only then takes the name: a crash, a full disk or
a power cut at any moment leaves at least one complete checkpoint. Files are plain `torch.save` dictionaries
of tensors, numbers, strings and lists, read with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from nvae_fast.io import atomic_file, keep_as
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.models.official import load_official

FORMAT = "nvae_fast.checkpoint"
VERSION = 1
NAME = "checkpoint.pt"
PREVIOUS = "checkpoint-previous.pt"

_REQUIRED = ("format", "version", "model_config", "model")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and says what to do."""


def save(
    state: dict[str, Any],
    folder: str | os.PathLike[str],
    *,
    name: str = NAME,
    keep_previous: bool = True,
) -> Path:
    """Write `state` as the newest checkpoint of a run folder; the one there becomes `checkpoint-previous.pt`.

    state: plain values and tensors; `format` and `version` are added. Returns the path written.
    Raises TypeError for a value that `load` would refuse, CheckpointError when it cannot be written; the
    newest one that was there is then still there, unchanged.
    """
    target = Path(folder) / name
    document = {"format": FORMAT, "version": VERSION, **state}
    _check_plain(document, "checkpoint")

    def keep() -> None:
        if keep_previous and target.exists():
            keep_as(target, target.with_name(PREVIOUS))

    try:
        with atomic_file(target) as handle:
            torch.save(document, handle)
            # On disk before the old one gives up its name: with a delayed write error both would be lost.
            handle.flush()
            os.fsync(handle.fileno())
            keep()
    except (OSError, RuntimeError) as error:
        kept = (
            f"; the checkpoint from before is intact: {target}. Make room, or make the folder writable, and go on from it "
            "with --resume"
            if target.exists()
            else "; make room, or make the folder writable"
        )
        raise CheckpointError(f"cannot write checkpoint {target}: {_reason(error)}{kept}") from error
    return target


def load(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint written by `save`; `path` may be the file or its run folder.

    Raises CheckpointError naming the file when it is missing, truncated, damaged or not one of ours. Nothing
    in the file can run code: it is read with `weights_only=True`.
    """
    file = resolve(path)
    advice = _advice(file)
    kind = sniff(file)
    if kind == "damaged":
        raise CheckpointError(f"checkpoint {file} is truncated or damaged{advice}")
    if kind != "nvae_fast":
        raise CheckpointError(f"{file} is not a checkpoint of nvae_fast")
    try:
        document = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {file} holds more than tensors and plain values, which could run code: refused"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"checkpoint {file} cannot be read: {_reason(error)}{advice}") from error
    missing = [key for key in _REQUIRED if key not in document] if isinstance(document, dict) else _REQUIRED
    if missing:
        raise CheckpointError(f"checkpoint {file} lacks {', '.join(missing)}{advice}")
    if document["version"] > VERSION:
        raise CheckpointError(
            f"checkpoint {file} has format version {document['version']}, this nvae_fast reads up to "
            f"{VERSION}: use a newer nvae_fast"
        )
    return document


def load_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As `load`, for a checkpoint to resume from. Raises CheckpointError when it holds a model only."""
    document = load(path)
    if "optimizer" not in document:
        raise CheckpointError(
            f"checkpoint {resolve(path)} holds a model only (from convert): evaluate and sample take it, "
            "resuming needs one that training wrote"
        )
    return document


def resolve(path: str | os.PathLike[str]) -> Path:
    """The checkpoint file meant by a file or run-folder path. Raises CheckpointError when there is none."""
    file = Path(path)
    if file.is_dir():
        folder, file = file, file / NAME
        if not file.exists() and (folder / PREVIOUS).exists():
            # Only a crash between the two renames on a file system without hard links leaves it so.
            file = folder / PREVIOUS
    if not file.exists():
        raise CheckpointError(f"no checkpoint at {file}")
    return file


def sniff(path: str | os.PathLike[str]) -> str:
    """What a file is, without unpickling anything: "nvae_fast", "other" (perhaps official), or "damaged"."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(4)
        if not head:
            return "damaged"
        if head[:2] != b"PK":
            return "other"
        with zipfile.ZipFile(path) as archive:
            pickled = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            if pickled is None:
                return "other"
            return "nvae_fast" if FORMAT.encode() in archive.read(pickled) else "other"
    except (zipfile.BadZipFile, EOFError):
        return "damaged"
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {_reason(error)}") from error


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files of interrupted writes. Only for a folder that no run is writing to."""
    for file in Path(folder).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            file.unlink()


def file_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_model(
    path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu"
) -> tuple[NVAE, dict[str, Any]]:
    """A model in evaluation mode, in channels_last, from our checkpoint or an official one.

    Returns (model, what is known about it); that is "path", "kind" ("nvae_fast" or "official") and, for ours,
    "data" (what it was trained on), "step" and "epoch".

    path: a checkpoint, or the folder of a run. map_location: the device to put the model on. Raises CheckpointError,
    FileNotFoundError or ValueError for a file that is missing, damaged or something else; the message says which.
    """
    file = resolve(path)
    if sniff(file) == "other":
        model = load_official(file)
        return to_format(model.to(map_location), torch.channels_last).eval(), {
            "path": str(file),
            "kind": "official",
        }
    document = load(file, map_location="cpu")
    model = model_from(document, file)
    progress = document.get("progress", {})
    facts: dict[str, Any] = {"path": str(file), "kind": "nvae_fast"}
    facts.update({key: progress[key] for key in ("step", "epoch") if key in progress})
    facts["data"] = document.get("data", {})
    return to_format(model.to(map_location), torch.channels_last).eval(), facts


def model_from(document: dict[str, Any], file: str | os.PathLike[str]) -> NVAE:
    """The model a checkpoint describes, its state loaded. Raises CheckpointError naming what differs."""
    try:
        model = NVAE(NVAEConfig(**document["model_config"]))
        model.load_state_dict(document["model"])
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {file} does not fit this nvae_fast: {error}") from error
    return model


def to_format(model: NVAE, memory: torch.memory_format) -> NVAE:
    """The model with its weights in a memory format."""
    # PyTorch accepts memory_format alone, its type hints do not know that.
    return model.to(memory_format=memory)  # type: ignore[call-overload]


def _check_plain(value: Any, where: str) -> None:
    """Find out when writing, not when the run must be resumed, that something cannot be read back."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"key {key!r} of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str, torch.Tensor, torch.nn.Parameter):
        raise TypeError(f"{where} must be a tensor or a plain value, got {type(value).__name__}")


def _advice(file: Path) -> str:
    previous = file.with_name(PREVIOUS)
    if file.name == NAME and previous.exists():
        return f"; use the previous one, {previous} (copy it over {NAME} to resume from it)"
    return "; there is no previous one beside it"


def _reason(error: BaseException) -> str:
    # torch.save stumbles over the consequences of a failed write: what came first says more.
    first: BaseException | None = error
    while first is not None:
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        first = first.__cause__ or first.__context__
    return str(error).strip().split("\n")[0] or type(error).__name__
