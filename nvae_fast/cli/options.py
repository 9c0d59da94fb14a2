"""Command-line options from the fields of the configuration classes, each with its unit and default."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nvae_fast.models.config import NVAEConfig
from nvae_fast.training.config import TrainingConfig, check_bounds

# Upper bound of the number of images to draw.
MOST_IMAGES = 1_000_000_000

# The model's options in the order in which the help shows them.
MODEL_HELP: dict[str, str] = {
    "dataset": "kind of images: sets size, channels and likelihood",
    "image_size": "side of the images, in pixels, when it is not the dataset's",
    "image_channels": "channels of the images (1 or 3), when they are not the dataset's",
    "likelihood": "bernoulli, mixture_logistic or normal, when it is not the dataset's",
    "num_channels_enc": "channels of the encoder at full resolution; doubled at every halving of the image",
    "num_channels_dec": "channels of the decoder at full resolution; doubled at every halving of the image",
    "num_latent_scales": "number of spatial scales with latent variables",
    "num_groups_per_scale": "latent groups at the finest scale",
    "ada_groups": "halve the number of groups from each scale to the next coarser one",
    "min_groups_per_scale": "fewest groups of a scale, with --ada-groups",
    "num_latent_per_group": "channels of the latent variable of a group",
    "num_preprocess_blocks": "halvings of the image before the first scale",
    "num_preprocess_cells": "cells in each of those blocks",
    "num_postprocess_blocks": "doublings of the image after the last scale (as many as preprocess blocks)",
    "num_postprocess_cells": "cells in each of those blocks",
    "num_cell_per_cond_enc": "encoder cells per group",
    "num_cell_per_cond_dec": "decoder cells per group",
    "num_nf": "normalising-flow cells per group; 0 for none",
    "use_se": "squeeze-and-excitation in every cell",
    "res_dist": "posterior relative to the prior (residual normal distributions)",
    "num_mixture_dec": "components of the mixture of logistics; 1 for a normal distribution",
    "num_x_bits": "bits per colour, 1 to 8",
    "arch_instance": "cell architecture, such as res_mbconv",
}


def add_dataclass_options(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup,
    cls: type,
    texts: dict[str, str],
    *,
    units: dict[str, str] | None = None,
    note: str = "",
) -> None:
    """Add one option per field. Options that are not given are absent from the parsed namespace.

    texts: help by field name; other fields get no option. note: appended to every default in the help.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, text in texts.items():
        if name not in fields:
            continue
        field = fields[name]
        default = field.default if field.default is not dataclasses.MISSING else None
        unit = (units or {}).get(name, "")
        help_text = f"{text}{f' [{unit}]' if unit else ''} (default: {_show(default)}{note})"
        option = spelled(name)
        kind = str(field.type).split("|")[0].strip()
        optional = "None" in str(field.type)
        # argparse formats help with %, as in "100 %".
        common: dict[str, Any] = {
            "dest": name,
            "default": argparse.SUPPRESS,
            "help": help_text.replace("%", "%%"),
        }
        if kind == "bool":
            parser.add_argument(option, action=argparse.BooleanOptionalAction, **common)
            continue
        convert = _optional(_CONVERTERS[kind]) if optional else _CONVERTERS[kind]
        metavar = {"int": "N", "float": "X", "str": "NAME"}[kind]
        parser.add_argument(option, type=convert, metavar=metavar, **common)


def add_val_fraction(parser: argparse._ActionsContainer) -> None:
    """Add `--val-fraction`, None where it is not given."""
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=None,
        metavar="X",
        help="share of the images that is kept for validation where the data have no parts of their own, chosen by a hash of "
        "their names (default: 0.1, or that of the run to resume; 0 trains on all of them)",
    )


def add_preset_name(parser: argparse.ArgumentParser) -> None:
    """Add the argument of `presets`."""
    parser.add_argument("name", nargs="?", default=None, help="the preset to show in full")


def training_texts() -> tuple[dict[str, str], dict[str, str]]:
    """Help texts and units of every TrainingConfig field."""
    fields = dataclasses.fields(TrainingConfig)
    texts = {field.name: field.metadata["help"] for field in fields}
    units = {field.name: field.metadata["unit"] for field in fields}
    return texts, units


def given(arguments: argparse.Namespace, names: Any) -> dict[str, Any]:
    """The options of these names that were given on the command line."""
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def spelled(name: str) -> str:
    """The option of a field: `batch_size` is `--batch-size`."""
    return "--" + name.replace("_", "-")


@contextmanager
def errors_name_options() -> Iterator[None]:
    """In errors of the configuration classes, name the options instead of the fields."""
    names = {field.name for cls in (TrainingConfig, NVAEConfig) for field in dataclasses.fields(cls)}

    def option(match: re.Match[str]) -> str:
        first, name = match[1], match[2]
        return spelled(name) if name in names and (first or "_" in name) else match[0]

    try:
        yield
    except (TypeError, ValueError) as error:
        text = re.sub(r"((?:TrainingConfig|NVAEConfig): )?\b([a-z][a-z_]*)\b", option, str(error))
        raise type(error)(re.sub(r"^(TrainingConfig|NVAEConfig): ", "", text)) from error


def check_numbers(
    arguments: argparse.Namespace, *names: str, least: int = 1, most: int | None = None
) -> None:
    """Raise ValueError naming the option unless the arguments of these names are None or within the bounds."""
    for name in names:
        check_bounds(spelled(name), getattr(arguments, name), least=least, most=most)


def whole_number(text: str) -> int:
    """Parse an integer, which may be written as 1_000 or 1e6."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():  # nor are inf and nan
            raise
        return int(number)


whole_number.__name__ = "whole number"


def temperature(text: str) -> float | tuple[float, float]:
    """A number, or two for the coarsest and the finest group, as in 0.6:1.0."""
    first, colon, last = text.partition(":")
    return (float(first), float(last)) if colon else float(first)


temperature.__name__ = "number or FIRST:LAST"


def add_image_options(parser: argparse._ActionsContainer) -> None:
    """Add how images of a folder or LMDB are read."""
    parser.add_argument(
        "--crop",
        type=whole_number,
        default=None,
        metavar="N",
        help="centre crop of the images of a folder or LMDB [pixels] (default: the short side; 148 for the aligned faces "
        "of celeba_64; a checkpoint's own)",
    )
    parser.add_argument(
        "--resample",
        choices=["bilinear", "lanczos"],
        default=None,
        help="filter that resizes the images of a folder or LMDB (default: lanczos; bilinear for celeba_64; a "
        "checkpoint's own)",
    )
    parser.add_argument(
        "--max-skipped-images",
        type=float,
        default=0.01,
        metavar="X",
        help="share of a folder's or LMDB's images that may be damaged and are skipped; more are an error, and so is a "
        "file that cannot be reached (default: 0.01; 0 skips none)",
    )


def add_cache_option(parser: argparse._ActionsContainer) -> None:
    """Add how much memory decoded images may take."""
    parser.add_argument(
        "--cache",
        type=float,
        default=1.0,
        metavar="X",
        help="decoded images of a folder or LMDB are kept in memory when all of them fit into so much, and into half of the "
        "free memory; else none are [GiB] (default: 1.0; 0 keeps none)",
    )


def _optional(convert: Any) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    parse.__name__ = f"{convert.__name__} or none"
    return parse


_CONVERTERS: dict[str, Any] = {"int": whole_number, "float": float, "str": str}


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
