"""Pictures from a checkpoint: reconstructions, and the way from one image to another through the latent variables.

    make demo                                               # leaves a checkpoint in runs/demo
    python examples/interpolate.py runs/demo --out pictures # reconstructions.png, interpolations.png

Takes a run folder or a checkpoint, ours or an official one. An NVAE has a latent variable for each group, dozens of them. The
point between two images is the point between their latent variables in every group at once; what the decoder makes of it is
read off with two hooks, one that listens and one that speaks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import nvae_fast as nf


def entrances(model: nf.NVAE) -> list[nn.Module]:
    """The modules through which z enters the decoder, group by group; z is their last argument."""
    combiners = [part for part in model.decoder if isinstance(part, nf.nn.DecoderCombiner)]
    return combiners or [model.vanilla_stem]


@contextmanager
def at_the_entrances(model: nf.NVAE, act: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the block ``act(group, z)`` says what enters in place of z."""

    def hook(group: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda module, arguments: (*arguments[:-1], act(group, arguments[-1]))

    handles = [part.register_forward_pre_hook(hook(i)) for i, part in enumerate(entrances(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encode(model: nf.NVAE, x: torch.Tensor) -> list[torch.Tensor]:
    """z of every group, (B, Z, H, W) each: with noise zero, the means of the posteriors."""
    found: list[torch.Tensor] = []

    def listen(group: int, z: torch.Tensor) -> torch.Tensor:
        found.append(z)
        return z

    with at_the_entrances(model, listen):
        model(x, noise=[x.new_zeros(x.shape[0], *shape) for shape in model.config.z_shapes])
    return found


def decode(model: nf.NVAE, latents: list[torch.Tensor]) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1]: the decoder runs as if it sampled, and gets these z."""
    with at_the_entrances(model, lambda group, z: latents[group]):
        logits = model.sample(latents[0].shape[0], seed=0)
    return model.likelihood(logits).mean().float()


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Reconstructions and latent interpolations from a checkpoint."
    )
    parser.add_argument("checkpoint", help="a run folder or a checkpoint, ours or an official one")
    parser.add_argument("--data", help="images to encode (default: what the checkpoint was trained on)")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the pictures (default: here)")
    parser.add_argument("--pairs", type=int, default=6, help="pairs of images to go between (default: 6)")
    parser.add_argument(
        "--steps", type=int, default=9, help="pictures on each way, ends included (default: 9)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which images (default: 0)")
    options = parser.parse_args(arguments)

    model, facts = nf.training.load_model(options.checkpoint)
    config = model.config
    data = options.data or facts.get("data", {}).get("source")
    if data is None:
        parser.error("the checkpoint does not say what it was trained on: give --data")
    dataset = nf.data.open_dataset(
        data, split="test", image_size=config.resolution, channels=config.channels, num_bits=config.num_x_bits
    )
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(options.seed))
    x = dataset.batch(chosen[: 2 * options.pairs], seed=options.seed)

    options.out.mkdir(parents=True, exist_ok=True)
    latents = encode(model, x)
    below = decode(model, latents)
    nf.data.save_grid(torch.cat([x, below]), options.out / "reconstructions.png", columns=len(x))

    rows = []
    for i in range(0, len(x), 2):
        way = torch.linspace(0, 1, options.steps).view(-1, 1, 1, 1)
        rows += [
            x[i : i + 1],
            decode(model, [torch.lerp(z[i], z[i + 1], way) for z in latents]),
            x[i + 1 : i + 2],
        ]
    nf.data.save_grid(torch.cat(rows), options.out / "interpolations.png", columns=options.steps + 2)
    print(f"wrote {options.out / 'reconstructions.png'} (images above, reconstructions below)")
    print(
        f"wrote {options.out / 'interpolations.png'} (each row from the image at its left to that at its right)"
    )


if __name__ == "__main__":
    main()
