"""What `interpolate` and `reconstruct` share: the images that are chosen, and their latent variables."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nvae_fast.cli import options
from nvae_fast.models.frozen import freeze
from nvae_fast.models.nvae import NVAE
from nvae_fast.training.seeds import mix_seed

# Images in a row or a column of a picture, which is kept in memory.
MOST = 10_000
# Purposes of --seed.
_CHOICE, _BITS, _POSTERIOR, _PRIOR = range(4)


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """Raise ValueError for a number out of bounds, and for a number of images that are also named."""
    options.check_numbers(arguments, *names, most=MOST)
    if arguments.images is not None and getattr(arguments, names[0]) is not None:
        raise ValueError(f"--{names[0]} and --images exclude each other: give one of them")


def choose(arguments: argparse.Namespace, dataset: Any, where: str, count: int) -> list[int]:
    """The numbers of the images: those of `--images`, or ``count`` of the dataset chosen by `--seed`.

    where: the dataset, in error messages.
    """
    if arguments.images is not None:
        for index in arguments.images:
            if not 0 <= index < len(dataset):
                raise ValueError(f"--images must be from 0 to {len(dataset) - 1} for {where}, got {index}")
        chosen: list[int] = arguments.images
        return chosen
    if count > len(dataset):
        raise ValueError(f"{count} images are needed, {where} has {len(dataset)}: ask for fewer")
    order = torch.Generator().manual_seed(mix_seed(arguments.seed, _CHOICE))
    return torch.randperm(len(dataset), generator=order)[:count].tolist()


class Encoded:
    """Images of a dataset and their latent variables; an image has the same ones whatever else is chosen."""

    def __init__(self, arguments: argparse.Namespace, model: Any, dataset: Any, chosen: list[int]) -> None:
        frozen: Any = freeze(model)
        device = frozen.top_feature.device
        self.model: NVAE = frozen
        self.images = dataset.batch(torch.tensor(chosen), mix_seed(arguments.seed, _BITS))
        self.prior_seeds = _seeds(arguments.seed, _PRIOR, chosen, device)
        drawn = arguments.posterior == "sample"
        self.latents: list[torch.Tensor] = self.model.encode(
            self.images.to(device),
            seed=_seeds(arguments.seed, _POSTERIOR, chosen, device) if drawn else None,
            sample=drawn,
        )

    def pictures(self, latents: Any, **options: Any) -> torch.Tensor:
        """Mean images of the decoder for ``latents``, on the CPU; options as of :meth:`nvae_fast.NVAE.decode`."""
        logits = self.model.decode(latents, **options)
        mean: torch.Tensor = self.model.likelihood(logits).mean()
        return mean.float().cpu()


def _seeds(seed: int, purpose: int, chosen: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([mix_seed(seed, purpose, index) for index in chosen], device=device)
