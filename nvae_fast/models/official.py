"""Official NVAE checkpoints, in and out (specification section 8).

The files; the names of their keys are in :mod:`nvae_fast.models.official_keys`.
"""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nvae_fast.io import atomic_file
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.models.official_keys import state_dict


# Globals that an official checkpoint may name besides tensors: its arguments, and NumPy scalars among its counters.
def _allowed_globals() -> list[Any]:
    import numpy

    scalar = numpy.float64(0).__reduce__()[0]
    dtypes = [type(numpy.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]
    return [argparse.Namespace, collections.OrderedDict, scalar, numpy.dtype, *dtypes]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dict in an official checkpoint file, tensors on the CPU. Only data is unpickled: no code of the file runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, is no official checkpoint, or names objects that are not data.
    """
    file = Path(path)
    if not file.is_file():
        advice = ": it is a folder; a run is opened by nf.training.load_model" if file.is_dir() else ""
        raise FileNotFoundError(f"load_official: there is no file {file}{advice}")
    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            document = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own text advises weights_only=False, which would run the file's code: only the name is taken from it.
        foreign = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        if foreign is None:
            reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            raise ValueError(
                f"load_official: {file} is damaged or no checkpoint: {reason or 'not a pickle'}"
            ) from None
        raise ValueError(
            f"load_official: {file} holds objects that are not plain data ({foreign[1]}), so it was not opened: "
            "a checkpoint needs tensors, numbers and an argparse.Namespace only"
        ) from None
    except Exception as error:  # torch.load has no error of its own: damage shows as whatever breaks first
        raise ValueError(f"load_official: {file} is damaged or no checkpoint: {error}") from error
    needed = ("state_dict", "args")
    if not isinstance(document, dict) or any(key not in document for key in needed):
        found = sorted(map(str, document)) if isinstance(document, dict) else type(document).__name__
        ours = isinstance(document, dict) and "nvae_fast" in document
        advice = ": it is a checkpoint of nvae_fast, which nf.training.load_model opens" if ours else ""
        raise ValueError(
            f"load_official: {file} must hold a dict with the keys {list(needed)}, found {found}{advice}"
        )
    return document


def load_official(path: str | os.PathLike[str]) -> NVAE:
    """The model of the official checkpoint in the file ``path``, on the CPU, in evaluation mode. No code of the file runs.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_checkpoint`, or its keys do not fit its arguments.
    """
    document = read_checkpoint(path)
    model = NVAE(NVAEConfig.from_official(document["args"]))
    try:
        model.load_official_state_dict(document["state_dict"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"load_official: {path}: {error}") from error
    return model.eval()


def save_official(
    model: NVAE,
    path: str | os.PathLike[str],
    *,
    epoch: int = 0,
    global_step: int = 0,
    optimizer: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    grad_scalar: dict[str, Any] | None = None,
    args: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model`` as an official checkpoint, atomically: a failure leaves an older file of that name whole.

    Args:
        model: an NVAE. path: the file to write.
        epoch, global_step: counters to record. optimizer, scheduler, grad_scalar: state dicts to record, {} when None.
        args: further entries of the argument Namespace (training options); the model's own options are always there.

    Raises:
        TypeError: ``model`` is no NVAE. OSError: the file cannot be written.
    """
    if not isinstance(model, NVAE):
        raise TypeError(f"save_official: model must be an nvae_fast.NVAE, got {type(model).__name__}")
    options = {key: value for key, value in model.config.to_dict().items() if value is not None}
    document = {
        "epoch": epoch,
        "state_dict": {key: value.cpu() for key, value in state_dict(model).items()},
        "optimizer": optimizer or {},
        "global_step": global_step,
        "args": argparse.Namespace(**{**(args or {}), **options}),
        "arch_instance": model.config.arch_instance,
        "scheduler": scheduler or {},
        "grad_scalar": grad_scalar or {},
    }
    with atomic_file(path) as handle:
        torch.save(document, handle)
