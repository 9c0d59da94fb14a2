"""Weights with their configuration as safetensors files; the configuration is JSON in the metadata of the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from nvae_fast.data.extras import require
from nvae_fast.io import atomic_file
from nvae_fast.models.nvae import NVAE
from nvae_fast.models.pickle_structure import UnreadableFile
from nvae_fast.models.torch_files import DamagedFile
from nvae_fast.version import __version__

SUFFIX = ".safetensors"
_CONFIG = "nvae_fast.model_config"


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether a path has the extension of a safetensors file."""
    return Path(path).suffix.lower() == SUFFIX


def write(model: NVAE, path: str | os.PathLike[str]) -> None:
    """Write the state of a model and its configuration, whole or not at all."""
    library = _library()
    metadata = {
        "format": "pt",
        "nvae_fast": __version__,
        _CONFIG: json.dumps(model.config.to_dict()),
    }
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    data = library.torch.save(state, metadata)
    with atomic_file(path) as handle:
        handle.write(data)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """{"model_config": options, "model": state} of a file that :func:`write` wrote.

    Raises:
        DamagedFile: it is truncated or no safetensors file. UnreadableFile: it does not hold the options of a model.
        OSError: it cannot be read. ModuleNotFoundError: safetensors is not installed.
    """
    library = _library()
    with open(path, "rb"):  # its errors name the file
        pass
    try:
        with library.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except library.SafetensorError as error:
        raise DamagedFile(f"is truncated or no safetensors file: {error}") from error
    try:
        config = json.loads(metadata[_CONFIG])
        if not isinstance(config, dict):
            raise ValueError(type(config).__name__)
    except (KeyError, ValueError) as error:
        raise UnreadableFile(
            f"holds tensors without the options of a model: {_CONFIG} is missing from its metadata or damaged; "
            "`python -m nvae_fast convert` writes it"
        ) from error
    return {"model_config": config, "model": state}


def _library() -> Any:
    require("safetensors.torch", "safetensors", "a safetensors file")
    return require("safetensors", "safetensors", "a safetensors file")
