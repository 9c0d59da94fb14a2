"""What `train` chooses where neither a preset nor an option says it: a model that fits the images and the machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nvae_fast.cli.options import spelled
from nvae_fast.data.inspection import ImageKind
from nvae_fast.models.config import DATASETS

# Side in pixels of the finest latent variables, where the images can be halved down to it, and of the smallest ones.
_FINEST, _COARSEST = 16, 4
# Options on a CPU, for a model that makes pictures within minutes on two cores, and on a GPU, for one that trains for hours, in
# the manner of the published ones for images of 32 and 64 pixels.
_MODEL = {
    "num_channels_enc": (8, 64),
    "num_channels_dec": (8, 64),
    "num_groups_per_scale": (2, 10),
    "num_latent_per_group": (8, 20),
    "num_preprocess_cells": (1, 2),
    "num_postprocess_cells": (1, 2),
    "num_cell_per_cond_enc": (1, 2),
    "num_cell_per_cond_dec": (1, 2),
    "num_mixture_dec": (3, 10),
}
# With fewer images in a step there are more steps in the same time.
_TRAINING = {"batch_size": (16, 32), "sample_readjust_passes": (50, 50)}
# The fewest halvings of the image before the first scale, and the most scales.
_HALVINGS, _SCALES = (2, 1), (2, 3)
# The options that the line about the choice names.
_NAMED = (
    "dataset",
    "image_size",
    "image_channels",
    "likelihood",
    "num_channels_enc",
    "num_channels_dec",
    "num_latent_scales",
    "num_groups_per_scale",
    "batch_size",
)


@dataclass(frozen=True)
class Choice:
    """Fields of NVAEConfig and of TrainingConfig that were chosen, and a line that says so."""

    model: dict[str, Any]
    training: dict[str, Any]
    line: str


def choose(
    kind: ImageKind, images: int, data: str, built_in: bool, given: dict[str, Any], device: torch.device
) -> Choice:
    """Choose the options that are not given.

    kind, images: what the training images are, and their number. data: their name or path. built_in: whether they are a
    built-in set. given: options by the names of their fields. device: where the model is trained.
    """
    model: dict[str, Any] = {"dataset": data} if built_in else _format(kind, given)
    model = {**model, **{name: value for name, value in given.items() if name in (*model, "dataset")}}
    side = given.get("image_size") or model.get("image_size")
    if side is None:
        side = DATASETS[model["dataset"]].size if model["dataset"] in DATASETS else kind.size
    small = device.type == "cpu"
    column = 0 if small else 1
    model |= {name: values[column] for name, values in _MODEL.items()}
    model |= _halvings(side, given, _HALVINGS[column], _SCALES[column])
    training = {name: values[column] for name, values in _TRAINING.items()}
    training["batch_size"] = min(training["batch_size"], 2 ** (max(images, 1).bit_length() - 1))
    model, training = ({k: v for k, v in part.items() if k not in given} for part in (model, training))
    return Choice(model, training, _line(kind, data, {**model, **training}, small))


def _format(kind: ImageKind, given: dict[str, Any]) -> dict[str, Any]:
    """Size, channels and likelihood of a model of the images; nothing where a data set is given, which says all three."""
    if given.get("dataset", "custom") != "custom":
        return {}
    channels = given.get("image_channels", kind.channels)
    if channels == 1:
        likelihood = "bernoulli" if kind.binary or kind.published else "normal"
    else:
        likelihood = "normal" if given.get("num_mixture_dec") == 1 else "mixture_logistic"
    return {
        "dataset": "custom",
        "image_size": kind.size,
        "image_channels": channels,
        "likelihood": likelihood,
    }


def _halvings(side: int, given: dict[str, Any], fewest: int, most_scales: int) -> dict[str, Any]:
    """Halvings before the first scale, and scales, as far as images of this side can be halved."""
    possible = 0
    while side % 2 ** (possible + 1) == 0 and side // 2 ** (possible + 1) >= _COARSEST:
        possible += 1
    blocks = given.get("num_preprocess_blocks", given.get("num_postprocess_blocks"))
    scales = given.get("num_latent_scales")
    if blocks is None:
        most = possible if scales is None else max(possible + 1 - scales, 0)
        blocks = fewest
        while side >> blocks > _FINEST:
            blocks += 1
        blocks = min(blocks, most)
    if scales is None:
        scales = min(max(possible - blocks, 0) + 1, most_scales)
    return {
        "num_preprocess_blocks": blocks,
        "num_postprocess_blocks": blocks,
        "num_latent_scales": scales,
        "ada_groups": scales > 1,
    }


def _line(kind: ImageKind, data: str, chosen: dict[str, Any], small: bool) -> str:
    found = f"{kind.name} images of about {kind.side} pixels" if kind.resized else f"{kind.name} images"
    options = " ".join(
        f"{spelled(name)} {chosen[name]}" for name in _NAMED if name in chosen and chosen[name] != "custom"
    )
    if not options:
        return ""
    return (
        f"{data} holds {found}. Chosen for them and for {'a CPU' if small else 'a GPU'}: {options}. Options that you give "
        "win, --preset NAME takes a published model (see python -m nvae_fast presets)"
    )
