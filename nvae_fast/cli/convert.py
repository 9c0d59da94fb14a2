"""`python -m nvae_fast convert`: an official checkpoint to ours, or ours to official."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from nvae_fast.cli.common import check_writable, say_weights
from nvae_fast.models.official import load_official, save_official
from nvae_fast.training import checkpoint
from nvae_fast.version import __version__


def run(arguments: argparse.Namespace) -> int:
    """Rewrite a checkpoint in the other format."""
    source = checkpoint.resolve(arguments.source)
    target = Path(arguments.target)
    check_writable(target, arguments.overwrite)
    if target.exists() and target.samefile(source):
        raise ValueError(f"source and target are the same file: {source}")
    kind = checkpoint.sniff(source)
    if kind == "damaged":
        raise checkpoint.CheckpointError(f"checkpoint {source} is truncated or damaged")
    if kind == "nvae_fast":
        document = checkpoint.load(source)
        weights = checkpoint.chosen_weights(document, source, arguments.weights)
        say_weights({"weights": weights, **document}, lambda text: print(text, file=sys.stderr))
        model = checkpoint.model_from(document, source, weights=weights)
        progress = document.get("progress", {})
        save_official(model, target, epoch=progress.get("epoch", 0), global_step=progress.get("step", 0))
        print(f"wrote {target} in the official format (weights and options; no optimizer state)")
        return 0
    checkpoint.chosen_weights({}, source, arguments.weights)
    model = load_official(source)
    document = {
        "nvae_fast": __version__,
        "torch": str(torch.__version__),
        "model_config": model.config.to_dict(),
        "model": model.state_dict(),
        "converted_from": source.name,
    }
    checkpoint.save(document, target.parent, name=target.name, keep_previous=False)
    print(f"wrote {target} (for evaluate and sample)")
    return 0
