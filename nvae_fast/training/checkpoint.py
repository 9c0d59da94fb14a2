"""Checkpoints that survive: written beside the old one, moved into place whole, read without running code.

A run folder holds `checkpoint.pt` (the newest), `checkpoint-previous.pt` (the one before) and, in a run with validation,
`checkpoint-best.pt` (the one with the best validation). Writing goes to a temporary file in the same folder, is forced to
disk, and only then takes the name: a crash, a full disk or a power cut at any moment leaves at least one complete
checkpoint. Files are plain `torch.save` dictionaries of tensors, numbers, strings and lists, with a checksum of the whole
file, read with `weights_only=True`. The safetensors files of `convert` are read as checkpoints that hold a model only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from nvae_fast.io import atomic_file, keep_as, sync_folder
from nvae_fast.models import official, torch_files
from nvae_fast.models.building import build
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.models.states import not_finite
from nvae_fast.training import safetensors_files
from nvae_fast.training.config import TrainingConfig

FORMAT = "nvae_fast.checkpoint"
VERSION = 1
NAME = "checkpoint.pt"
PREVIOUS = "checkpoint-previous.pt"
BEST = "checkpoint-best.pt"

# What a checkpoint must hold: a type, or the entries of a dict.
_MODEL: dict[str, Any] = {"format": str, "version": int, "model_config": dict, "model": dict}
_TRAINING: dict[str, Any] = {
    "training_config": dict,
    "awaiting_data": list,
    "optimizer": {"state": dict, "param_groups": list},
    "progress": {
        "step": int,
        "position": float,
        "steps_per_epoch": int,
        "elapsed": float,
        "bad_in_a_row": int,
        "skipped": int,
        "world_size": int,
    },
    "metrics": {"sums": dict, "steps": int, "skipped": int},
    "data": {"images": int, "name": str},
    "rng": {"torch": torch.Tensor},
}
# What it may hold.
_PARTS: dict[str, Any] = {
    "ema": {"decay": float, "updates": int, "model": dict},
    "scaler": {
        "scale": float,
        "growth_factor": float,
        "backoff_factor": float,
        "growth_interval": int,
        "_growth_tracker": int,
    },
}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and says what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is truncated, or not what was written."""


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
            torch_files.write(document, handle)
            # On disk before the old one gives up its name: with a delayed write error both would be lost.
            handle.flush()
            os.fsync(handle.fileno())
            keep()
    except (OSError, RuntimeError) as error:
        kept = (
            f"; the checkpoint from before is intact: {target}. Free disk space, or make the folder writable, and go on "
            "with --resume"
            if target.exists()
            else "; free disk space, or make the folder writable"
        )
        raise CheckpointError(f"cannot write checkpoint {target}: {_reason(error)}{kept}") from error
    return target


def load(path: str | os.PathLike[str], *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint written by `save`; `path` may be the file or its run folder.

    Raises CheckpointError naming the file when it is missing, not one of ours or lacks a part, DamagedCheckpoint when it is
    truncated or not what was written. Nothing in the file can run code: it is read with `weights_only=True`.
    """
    file = resolve(path)
    document = _ours(_read(file), file)
    return document if str(map_location) == "cpu" else _moved(document, map_location)


def load_training(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As `load`, for a checkpoint to resume from. Raises CheckpointError when it holds a model only, or lacks a part."""
    file = resolve(path)
    document = load(file)
    if "optimizer" not in document:
        raise CheckpointError(
            f"checkpoint {file} holds a model only (from convert): evaluate and sample take it, "
            "resuming needs one that training wrote"
        )
    _require(document, _TRAINING, f"checkpoint {file}")
    _require(document.get("validation", {}), dict, f"checkpoint {file}: validation")
    try:
        TrainingConfig.from_dict(document["training_config"])
        NVAEConfig(**document["model_config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {file} does not fit this nvae_fast: {error}") from error
    return document


def _read(file: Path) -> Any:
    try:
        if safetensors_files.is_safetensors(file):
            return {"format": FORMAT, "version": VERSION, **safetensors_files.read(file)}
        return torch_files.read(file)
    except torch_files.DamagedFile as error:
        raise DamagedCheckpoint(f"checkpoint {file} {error}{_advice(file)}") from error
    except torch_files.UnreadableFile as error:
        raise CheckpointError(f"checkpoint {file} {error}{_advice(file)}") from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {file} cannot be read: {_reason(error)}{_advice(file)}") from error


def _ours(document: Any, file: Path) -> dict[str, Any]:
    """`document`, read from `file`, when it is one of ours and holds a model."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not a checkpoint of nvae_fast")
    _require(document, _MODEL, f"checkpoint {file}")
    _require(document, {key: part for key, part in _PARTS.items() if key in document}, f"checkpoint {file}")
    if document["version"] > VERSION:
        raise CheckpointError(
            f"checkpoint {file} has format version {document['version']}, this nvae_fast reads up to "
            f"{VERSION}: use a newer nvae_fast"
        )
    return document


def _require(found: Any, wanted: Any, where: str) -> None:
    """Raise CheckpointError unless `found` is of the type `wanted`, or has its entries, of their types."""
    kind = dict if isinstance(wanted, dict) else wanted
    fits = isinstance(found, (int, float) if kind is float else kind)
    if not fits or (isinstance(found, bool) and kind in (int, float)):
        raise CheckpointError(f"{where} must be of type {kind.__name__}, got {type(found).__name__}")
    if kind is int and found < 0:
        raise CheckpointError(f"{where} must be >= 0, got {found}")
    if isinstance(wanted, dict):
        missing = [key for key in wanted if key not in found]
        if missing:
            raise CheckpointError(f"{where} lacks {', '.join(missing)}")
        for key, part in wanted.items():
            _require(found[key], part, f"{where}: {key}" if ":" not in where else f"{where}[{key!r}]")


def _moved(value: Any, device: str | torch.device) -> Any:
    """`value` with its tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value


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
    """What a file is: "nvae_fast", "other" (perhaps official), or "damaged". No code of the file runs."""
    try:
        document = _read(Path(path))
    except DamagedCheckpoint:
        return "damaged"
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return "other"
    return "nvae_fast" if isinstance(document, dict) and document.get("format") == FORMAT else "other"


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
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device = "cpu",
    weights: str | None = None,
) -> tuple[NVAE, dict[str, Any]]:
    """A model in evaluation mode, in channels_last, from our checkpoint or an official one.

    Returns (model, what is known about it); that is "path", "kind" ("nvae_fast" or "official"), "weights" ("model" or "ema")
    and, for ours, "data" (what it was trained on), "step", "epoch", "awaiting_data" (layers whose data-dependent initialisation
    has not happened yet), and "ema" ("decay" and "updates") where it has averages.

    path: a checkpoint, or the folder of a run. map_location: the device to put the model on. weights: "model" for the weights
    of the last step, "ema" for their averages, with batch-norm statistics that belong to them; None for "ema" where the
    checkpoint has it, else "model". Raises CheckpointError or ValueError for a file that is missing, damaged or something else,
    has no averages where they are asked for, or whose weights are not finite; the message says which.
    """
    file = resolve(path)
    document = _read(file)
    facts: dict[str, Any] = {"path": str(file), "kind": "nvae_fast"}
    if isinstance(document, dict) and document.get("format") == FORMAT:
        facts["weights"] = chosen_weights(_ours(document, file), file, weights)
        model = model_from(document, file, weights=facts["weights"])
        if "ema" in document:
            facts["ema"] = {key: document["ema"][key] for key in ("decay", "updates")}
        for key, kind in (("progress", dict), ("data", dict), ("awaiting_data", list)):
            _require(document.get(key, kind()), kind, f"checkpoint {file}: {key}")
        progress = document.get("progress", {})
        facts.update({key: progress[key] for key in ("step", "epoch") if key in progress})
        facts["data"] = document.get("data", {})
        facts["awaiting_data"] = document.get("awaiting_data", [])
    else:
        facts.update(kind="official", weights=chosen_weights({}, file, weights))
        model = official.model_from(document, file)
    problem = not_finite(model.state_dict().items())
    if problem is not None:
        raise CheckpointError(
            f"checkpoint {file}: {problem}, so nothing can be computed with it{_advice(file)}"
        )
    return to_format(model.to(map_location), torch.channels_last).eval(), facts


def chosen_weights(document: dict[str, Any], file: str | os.PathLike[str], weights: str | None) -> str:
    """Which weights of a checkpoint are meant, as `load_model` has it: "model" or "ema". Raises as it does."""
    if weights not in (None, "model", "ema"):
        raise ValueError(f"weights must be 'model', 'ema' or None, got {weights!r}")
    if weights == "ema" and "ema" not in document:
        raise CheckpointError(
            f"checkpoint {file} has no averages of the weights, which weights (--weights) ema asks for: leave it out, or "
            "train with ema (--ema)"
        )
    return weights or ("ema" if "ema" in document else "model")


def model_from(document: dict[str, Any], file: str | os.PathLike[str], *, weights: str = "model") -> NVAE:
    """The model a checkpoint describes, its state loaded. Raises CheckpointError naming what differs.

    weights: "model" or "ema", which the checkpoint must have."""
    try:
        state = document["model"] if weights == "model" else document["ema"]["model"]
        return build(
            NVAEConfig(**document["model_config"]), state, lambda model: model.load_state_dict(state)
        )
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {file} does not fit this nvae_fast: {error}") from error


def check_optimizer(state: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
    """Raise CheckpointError unless the optimizer's `state` is that of Adamax for `parameters`."""
    groups = state["param_groups"]
    places = groups[0].get("params") if len(groups) == 1 and isinstance(groups[0], dict) else None
    if places != list(range(len(parameters))):
        raise CheckpointError("its optimizer state is not of this model's parameters")
    for place, entry in state["state"].items():
        known = isinstance(place, int) and 0 <= place < len(parameters) and isinstance(entry, dict)
        if not known or entry.keys() != {"step", "exp_avg", "exp_inf"}:
            raise CheckpointError(f"its optimizer state has an unknown entry {place!r:.40}")
        for name, value in entry.items():
            shape = () if name == "step" else parameters[place].shape
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
                raise CheckpointError(
                    f"its optimizer state has a {name} for parameter {place} that does not fit: expected a floating "
                    f"tensor of shape {tuple(shape)}, got {_summary(value)}"
                )


def _summary(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


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


def set_aside(folder: Path, label: str) -> Path:
    """Make the previous checkpoint of a run folder the newest; the newest one is kept as `checkpoint-<label>.pt`.

    Returns where it is kept. A crash in between leaves the previous checkpoint, which `resolve` then finds.
    """
    count, kept = 1, folder / f"checkpoint-{label}.pt"
    while kept.exists():
        count += 1
        kept = folder / f"checkpoint-{label}-{count}.pt"
    os.replace(folder / NAME, kept)
    keep_as(folder / PREVIOUS, folder / NAME)
    sync_folder(folder)
    return kept


def recover(folder: Path) -> str | None:
    """Make sure that the newest checkpoint of a run folder is whole: where it is damaged and the previous one is not, the
    previous one takes its place. Returns what was done, None when nothing was."""
    newest = folder / NAME
    if not newest.exists():
        return None
    try:
        torch_files.read(newest)
        return None
    except torch_files.UnreadableFile as error:
        problem = f"checkpoint {newest} {error}"
    except OSError:
        return None  # loading says what is wrong
    try:
        step = load_training(folder / PREVIOUS)["progress"]["step"]
    except CheckpointError:
        return None
    kept = set_aside(folder, "damaged")
    return f"{problem}; it is kept as {kept}, and {folder / PREVIOUS} (step {step}) takes its place"


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
