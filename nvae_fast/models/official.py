"""Official NVAE checkpoints, in and out (specification section 8).

The files; the names of their keys are in :mod:`nvae_fast.models.official_keys`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nvae_fast.io import atomic_file
from nvae_fast.models import torch_files
from nvae_fast.models.building import build
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.models.official_keys import state_dict
from nvae_fast.models.states import some


def read_checkpoint(
    path: str | os.PathLike[str], needed: tuple[str, ...] = ("state_dict", "args")
) -> dict[str, Any]:
    """The dict in an official checkpoint file, tensors on the CPU. Only data is unpickled: no code of the file runs.

    Args:
        path: the file. needed: the keys that the dict must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, is no official checkpoint, or names objects that are not data.
    """
    file = Path(path)
    if not file.exists() or file.is_dir():
        advice = ": it is a folder; a run is opened by nf.training.load_model" if file.is_dir() else ""
        raise FileNotFoundError(f"load_official: there is no file {file}{advice}")
    try:
        document = torch_files.read(file)
    except torch_files.UnreadableFile as error:
        raise ValueError(f"load_official: {file} {error}") from error
    _check_document(document, file, needed)
    return document


def _check_document(document: Any, file: Path, needed: tuple[str, ...] = ("state_dict", "args")) -> None:
    if not isinstance(document, dict) or any(key not in document for key in needed):
        keys = sorted(f"{key!s:.40}" for key in document) if isinstance(document, dict) else []
        found = keys[:12] if isinstance(document, dict) else type(document).__name__
        ours = isinstance(document, dict) and "nvae_fast" in document
        advice = ": it is a checkpoint of nvae_fast, which nf.training.load_model opens" if ours else ""
        raise ValueError(
            f"load_official: {file} must hold a dict with the keys {list(needed)}, found {found}{advice}"
        )
    for key, kinds in (("state_dict", (dict,)), ("args", (dict, argparse.Namespace))):
        if key in document and not isinstance(document[key], kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"load_official: {key!r} of {file} must be a {names}, got {type(document[key]).__name__}"
            )


def load_official(path: str | os.PathLike[str], **options: Any) -> NVAE:
    """The model of the official checkpoint in the file ``path``, on the CPU, in evaluation mode. No code of the file runs.

    Paths, namespaces, numbers of NumPy and configuration objects (OmegaConf, ml_collections and others) in the file are read as
    plain data. Prefixes of wrappers in the names of the state, such as ``module.`` and ``_orig_mod.``, are dropped.

    Options that neither the file nor ``options`` gives get defaults. A state whose names or shapes do not fit them is refused.
    ``dataset``, ``res_dist`` and ``num_x_bits`` may change results without changing a name or a shape: a warning says what was
    assumed for them.

    Args:
        path: the file.
        options: options of :class:`NVAEConfig` that the arguments in the file lack, or that shall replace them. A file without
            ``args`` needs them.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is damaged, is no official checkpoint or names objects that are
            not data, or its keys do not fit its arguments.
        TypeError: there is no option of such a name.
    """
    names = [field.name for field in dataclasses.fields(NVAEConfig)]
    unknown = sorted(options.keys() - names)
    if unknown:
        raise TypeError(f"load_official: there are no options {unknown}, expected some of {names}")
    needed = ("state_dict",) if options else ("state_dict", "args")
    return model_from(read_checkpoint(path, needed), path, **options)


def model_from(document: dict[str, Any], path: str | os.PathLike[str], **options: Any) -> NVAE:
    """The model of what :func:`read_checkpoint` returned for the file ``path``, as :func:`load_official`."""
    names = [field.name for field in dataclasses.fields(NVAEConfig)]
    _check_document(document, Path(path), ("state_dict",) if options else ("state_dict", "args"))
    state, args = document["state_dict"], document.get("args", {})
    given = {**(vars(args) if isinstance(args, argparse.Namespace) else args), **options}
    absent = [name for name in names[: names.index("image_size")] if name not in given]
    try:
        config = NVAEConfig.from_official(given)
        model = build(config, state, lambda model: model.load_official_state_dict(state)).eval()
    except (ValueError, TypeError, RuntimeError) as error:
        hint = f"; {_assumed(absent)}" if absent else ""
        raise ValueError(f"load_official: {path}: {error}{hint}") from error
    unseen = [name for name in _UNSEEN if name in absent]
    if config.likelihood_name == "bernoulli" and "num_x_bits" in unseen:
        unseen.remove("num_x_bits")  # binary pixels have one bit
    if unseen:
        warnings.warn(
            f"load_official: {path}: {_assumed(unseen)}. The state does not show whether that is right.",
            stacklevel=3,
        )
    return model


# Options that change what a model computes, but no name or shape in its state.
_UNSEEN = ("dataset", "res_dist", "num_x_bits")


def _assumed(absent: list[str]) -> str:
    values = [f"{name}={getattr(NVAEConfig, name)!r}" for name in absent]
    return (
        f"its args lack {some(absent, 6)}: assumed {some(values, 6)}; give others as "
        f"load_official(path, {absent[0]}=...)"
    )


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
