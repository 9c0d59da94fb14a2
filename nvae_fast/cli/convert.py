"""`python -m nvae_fast convert`: checkpoints of nvae_fast, official checkpoints and safetensors files into one another."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from nvae_fast.cli.common import check_writable, say_weights
from nvae_fast.models.nvae import NVAE
from nvae_fast.models.official import load_official, save_official
from nvae_fast.training import checkpoint, safetensors_files
from nvae_fast.version import __version__


def run(arguments: argparse.Namespace) -> int:
    """Write a checkpoint in another format."""
    source = checkpoint.resolve(arguments.source)
    target = Path(arguments.target)
    check_writable(target, arguments.overwrite)
    if target.exists() and target.samefile(source):
        raise ValueError(f"source and target are the same file: {source}")
    kind = "nvae_fast" if safetensors_files.is_safetensors(source) else checkpoint.sniff(source)
    if kind == "damaged":
        raise checkpoint.CheckpointError(f"checkpoint {source} is truncated or damaged")
    progress: dict[str, int] = {}
    if kind == "nvae_fast":
        document = checkpoint.load(source)
        weights = checkpoint.chosen_weights(document, source, arguments.weights)
        say_weights({"weights": weights, **document}, lambda text: print(text, file=sys.stderr))
        model = checkpoint.model_from(document, source, weights=weights)
        progress = document.get("progress", {})
    else:
        checkpoint.chosen_weights({}, source, arguments.weights)
        model = load_official(source)
    if safetensors_files.is_safetensors(target):
        safetensors_files.write(model, target)
        print(f"wrote {target} (weights and configuration; for evaluate, sample and convert)")
    elif kind == "nvae_fast" and not safetensors_files.is_safetensors(source):
        save_official(model, target, epoch=progress.get("epoch", 0), global_step=progress.get("step", 0))
        print(f"wrote {target} in the official format (weights and options; no optimizer state)")
    else:
        _save_ours(model, source, target)
        print(f"wrote {target} (for evaluate and sample)")
    return 0


def _save_ours(model: NVAE, source: Path, target: Path) -> None:
    document = {
        "nvae_fast": __version__,
        "torch": str(torch.__version__),
        "model_config": model.config.to_dict(),
        "model": model.state_dict(),
        "converted_from": source.name,
    }
    checkpoint.save(document, target.parent, name=target.name, keep_previous=False)
