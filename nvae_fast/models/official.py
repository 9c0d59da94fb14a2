"""Official NVAE checkpoints, in and out (specification section 8).

Key names are an interface: this module translates between the names of this package's modules and the official ones,
strictly (every key accounted for) and bit for bit.
"""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nvae_fast._files import atomic_file
from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.nn import (
    AutoregressiveTransform,
    ConvBlock,
    FlowCell,
    InvertedResidual,
    PlainConv2d,
    ResidualCell,
    SkipDown,
    SkipUp,
    SqueezeExcite,
)

# Where each child of a module of ours sits in the official module of the same function. Children not listed keep
# their name. A name that depends on the module's options is made in _child_names.
_NVAE = {
    "top_feature": "prior_ftr0",
    "preprocess": "pre_process",
    "encoder": "enc_tower",
    "encoder_head": "enc0.1",
    "posterior": "enc_sampler",
    "prior": "dec_sampler",
    "flows": "nf_cells",
    "decoder": "dec_tower",
    "vanilla_stem": "stem_decoder",
    "postprocess": "post_process",
    "image_head": "image_conditional.1",
}
_CHILDREN: dict[type[nn.Module], dict[str, str]] = {
    NVAE: _NVAE,
    ResidualCell: {"ops": "_ops"},
    SqueezeExcite: {"reduce": "se.0", "expand": "se.2"},
    FlowCell: {"raster": "cell1", "mirrored": "cell2"},
    AutoregressiveTransform: {"expand": "conv.convz.0", "depthwise": "conv.convz.2", "project": "mu.conv_0"},
    SkipUp: {"conv": "1"},
}
_NOT_OFFICIAL = ("spectral",)  # children of NVAE that official checkpoints do not have


def _child_names(module: nn.Module) -> dict[str, str]:
    if isinstance(module, ConvBlock):
        norm = "bn_act" if module.norm is not None and module.norm.activation == "swish" else "bn.bn"
        return {"norm": norm, "conv": "conv_0"}
    if isinstance(module, InvertedResidual):
        first = 1 if module.upsample else 0  # position 0 is the upsampling
        return {
            "norm": f"conv.{first}.bn",
            "expand": f"conv.{first + 1}.conv.0",
            "expand_norm": f"conv.{first + 1}.conv.1",
            "depthwise": f"conv.{first + 2}.conv.0",
            "depthwise_norm": f"conv.{first + 2}.conv.1",
            "project": f"conv.{first + 3}",
            "project_norm": f"conv.{first + 4}.bn",
        }
    for kind, names in _CHILDREN.items():
        if isinstance(module, kind):
            return names
    return {}


def _prefix(ours: str, theirs: str, child: str, names: Mapping[str, str]) -> tuple[str, str]:
    official = names.get(child, child)
    return (f"{ours}.{child}" if ours else child, f"{theirs}.{official}" if theirs else official)


def _walk(module: nn.Module, ours: str = "", theirs: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(our key, official key, owner) of every parameter and persistent buffer."""
    names = _child_names(module)
    for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if key not in module._non_persistent_buffers_set:
            yield (*_prefix(ours, theirs, key, names), module)
    for key, child in module.named_children():
        if isinstance(module, NVAE) and key in _NOT_OFFICIAL:
            continue
        prefix = _prefix(ours, theirs, key, names)
        if isinstance(module, NVAE) and key == "prior":
            for index, conv in child.named_children():  # behind an ELU: dec_sampler.N.1
                yield from _walk(conv, f"{prefix[0]}.{index}", f"{prefix[1]}.{index}.1")
        elif isinstance(module, SkipDown):
            for index, conv in child.named_children():
                yield from _walk(conv, f"{prefix[0]}.{index}", f"{theirs}.conv_{int(index) + 1}")
        else:
            yield from _walk(child, *prefix)


def _keys(model: NVAE) -> dict[str, tuple[str, bool]]:
    """official key -> (our key, is it the ignored second name of a plain convolution's weight)."""
    if not isinstance(model, NVAE):
        raise TypeError(f"official: model must be an nvae_fast.NVAE, got {type(model).__name__}")
    keys: dict[str, tuple[str, bool]] = {}
    for ours, theirs, owner in _walk(model):
        keys[theirs] = (ours, False)
        if isinstance(owner, PlainConv2d):
            keys[theirs + "_normalized"] = (ours, True)
    return keys


def state_dict(model: NVAE) -> dict[str, torch.Tensor]:
    """The model's state under official keys, detached; plain convolutions under both of their names."""
    own = model.state_dict()
    return {theirs: own[ours] for theirs, (ours, _) in _keys(model).items()}


def named_parameters(model: NVAE) -> Iterator[tuple[str, nn.Parameter]]:
    """(official key, parameter) of every parameter, each once."""
    parameters = dict(model.named_parameters())
    for theirs, (ours, alias) in _keys(model).items():
        if ours in parameters and not alias:
            yield theirs, parameters[ours]


def load_state_dict(model: NVAE, official: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict with official keys into ``model``; nothing is written unless everything fits.

    A prefix ``module.`` common to all keys (data-parallel wrappers) is dropped.

    Raises:
        ValueError: keys are missing or surplus, or shapes differ; they are named.
        TypeError: not a mapping of names to tensors, or not an NVAE.
    """
    keys = _keys(model)
    if not isinstance(official, Mapping):
        raise TypeError(
            f"load_official_state_dict: state_dict must be a mapping, got {type(official).__name__}"
        )
    if official and all(key.startswith("module.") for key in official):
        official = {key.removeprefix("module."): value for key, value in official.items()}
    not_tensors = [key for key, value in official.items() if not isinstance(value, torch.Tensor)]
    if not_tensors:
        raise TypeError(f"load_official_state_dict: these entries are not tensors: {_some(not_tensors)}")
    own = model.state_dict()
    missing = [key for key, (_, alias) in keys.items() if not alias and key not in official]
    surplus = [key for key in official if key not in keys]
    wrong = [
        f"{key} (expected {tuple(own[ours].shape)}, got {tuple(official[key].shape)})"
        for key, (ours, _) in keys.items()
        if key in official and official[key].shape != own[ours].shape
    ]
    problems = [
        f"{what}: {_some(found)}"
        for what, found in (
            ("missing keys", missing),
            ("surplus keys", surplus),
            ("shapes that differ", wrong),
        )
        if found
    ]
    if problems:
        raise ValueError(
            "load_official_state_dict: the state dict does not fit this configuration; " + "; ".join(problems)
        )
    model.load_state_dict(
        {ours: official[key] for key, (ours, alias) in keys.items() if not alias}, strict=False
    )


def _some(names: list[str], most: int = 12) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


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
