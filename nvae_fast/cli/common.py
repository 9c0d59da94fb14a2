"""What several commands do."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvae_fast.data import open_dataset
from nvae_fast.training import distributed
from nvae_fast.training.progress import Progress
from nvae_fast.version import __version__


def run_on_processes(
    arguments: argparse.Namespace,
    work: Callable[[argparse.Namespace, distributed.World], int],
    advice: str = "Nothing was written: start all of them again",
) -> int:
    """Run `work` on this process, or on each of those torchrun started."""
    world = distributed.start_world(arguments.device)
    with world.report_lost_process(lambda: advice):
        code = work(arguments, world)
    world.close()
    return code


def open_images(data: str, kind: str | None, split: str, model_config: Any) -> Any:
    """The dataset of ``data``, its images as the model takes them."""
    return open_dataset(
        data,
        split=split,
        image_size=model_config.resolution,
        channels=model_config.channels,
        num_bits=model_config.num_x_bits,
        kind=kind,
    )


def versions() -> dict[str, str]:
    """{package: version} of what results depend on."""
    versions = {
        "nvae_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or "not in this PyTorch",
        "numpy": np.__version__,
    }
    for name in ("triton", "pillow", "scikit-learn", "lmdb", "matplotlib", "tensorboard", "torch-fidelity"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def check_writable(path: str | Path, overwrite: bool) -> None:
    """Raise ValueError unless a file can be written at ``path``; only ``overwrite`` replaces one."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder, a file name is needed")
    if not file.parent.is_dir():
        raise ValueError(f"the folder of {file} does not exist")
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists already: --overwrite replaces it")


def set_threads(arguments: argparse.Namespace) -> None:
    """Apply --threads."""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)


def reporter(quiet: bool) -> Any:
    """A function that prints a line to stderr, or nothing when ``quiet``."""

    def say(text: str) -> None:
        if not quiet:
            print(text, file=sys.stderr)

    return say


def progress_of(arguments: argparse.Namespace, world: distributed.World, label: str, total: int) -> Progress:
    """The progress of ``total`` images as --progress and --quiet ask for it, on the first process alone."""
    quiet = arguments.quiet or not world.is_main
    return Progress(label, total, unit="image", mode=arguments.progress, quiet=quiet)


def report_skipped(dataset: Any, say: Any) -> None:
    """Say how many images of ``dataset`` could not be read."""
    if dataset.skipped:
        file, reason = dataset.skipped[0]
        say(f"{len(dataset.skipped)} unreadable image(s) skipped, the first: {file}: {reason}")
