"""`python -m nvae_fast presets`: what each preset sets."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from nvae_fast.cli import options
from nvae_fast.models.config import NVAEConfig
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.presets import PRESETS, preset


def run(arguments: argparse.Namespace) -> int:
    """List the presets, or print the options that one of them sets."""
    if arguments.name is None:
        for entry in PRESETS.values():
            print(f"{entry.name:<12} {entry.summary}")
        print("python -m nvae_fast presets NAME shows what one of them sets")
        return 0
    entry = preset(arguments.name)
    print(f"{entry.name}: {entry.summary}")
    print(f"  {'--data':<28} {entry.data or 'the path of the images, which must be given'}")
    for title, config in (("model", entry.model_config()), ("training", entry.training)):
        print(title)
        for name, value in _changed(config):
            print(f"  {options.spelled(name):<28} {_shown(value)}")
    print("All other options have their defaults (python -m nvae_fast train --help)")
    return 0


def _changed(config: NVAEConfig | TrainingConfig) -> list[tuple[str, Any]]:
    """The fields of a configuration whose values are not the defaults."""
    pairs = ((field, getattr(config, field.name)) for field in dataclasses.fields(config))
    return [(field.name, value) for field, value in pairs if value != field.default]


def _shown(value: Any) -> str:
    return (
        {True: "yes", False: "no", None: "none"}[value]
        if value is None or isinstance(value, bool)
        else f"{value}"
    )
