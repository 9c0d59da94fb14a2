"""Keys of official NVAE checkpoints (specification section 8).

Key names are an interface: this module translates between the names of this package's modules and the official ones,
strictly (every key accounted for) and bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from nvae_fast.models.states import check_values, misfits, plain_name, plain_names
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

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

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
    whole = not ours  # the NVAE itself, not a part of it
    names = _NVAE if whole else _child_names(module)
    for key, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if key not in module._non_persistent_buffers_set:
            yield (*_prefix(ours, theirs, key, names), module)
    for key, child in module.named_children():
        if whole and key in _NOT_OFFICIAL:
            continue
        prefix = _prefix(ours, theirs, key, names)
        if whole and key == "prior":
            for index, conv in child.named_children():  # behind an ELU: dec_sampler.N.1
                yield from _walk(conv, f"{prefix[0]}.{index}", f"{prefix[1]}.{index}.1")
        elif isinstance(module, SkipDown):
            for index, conv in child.named_children():
                yield from _walk(conv, f"{prefix[0]}.{index}", f"{theirs}.conv_{int(index) + 1}")
        else:
            yield from _walk(child, *prefix)


def _keys(model: NVAE) -> dict[str, tuple[str, bool]]:
    """official key -> (our key, is it the ignored second name of a plain convolution's weight)."""
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

    Prefixes of wrappers (``module.`` of data parallelism, ``_orig_mod.`` of torch.compile) are dropped.

    Raises:
        ValueError: keys are missing or surplus, or shapes differ; they are named.
        TypeError: not a mapping of names to tensors, or a value is not floating where a weight is.
    """
    op = "load_official_state_dict"
    official = plain_names(op, official)
    own = model.state_dict()
    keys = {plain_name(theirs): names for theirs, names in _keys(model).items()}
    check_values(op, official, {theirs: own[ours] for theirs, (ours, _) in keys.items()})
    missing = [key for key, (_, alias) in keys.items() if not alias and key not in official]
    surplus = [key for key in official if key not in keys]
    pairs = {key: (own[ours], official[key]) for key, (ours, _) in keys.items() if key in official}
    problems = misfits(missing, surplus, pairs)
    if problems:
        raise ValueError(f"{op}: the state dict does not fit this configuration; {problems}")
    model.load_state_dict(
        {ours: official[key] for key, (ours, alias) in keys.items() if not alias}, strict=False
    )
