"""Pictures from a checkpoint: reconstructions, and the way from one image to another through the latent variables.

    make demo                                               # leaves a checkpoint in runs/demo
    python examples/interpolate.py runs/demo --out pictures # reconstructions.png, interpolations.png

Takes a run folder or a checkpoint, ours or an official one. An NVAE has a latent variable for each group, dozens of them. The
point between two images is the point between their latent variables in every group at once. `python -m nvae_fast interpolate`
and `reconstruct` do the same with labels and more options.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import nvae_fast as nf


def encode(model: nf.NVAE, x: torch.Tensor) -> list[torch.Tensor]:
    """z of every group, (B, Z, H, W) each: the means of the posteriors."""
    return model.encode(x, sample=False)


def decode(model: nf.NVAE, latents: list[torch.Tensor]) -> torch.Tensor:
    """Images (B, C, H, W) in [0, 1], the mean of the likelihood."""
    return model.likelihood(model.decode(latents)).mean().float()


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
        start, end = ([z[k : k + 1] for z in latents] for k in (i, i + 1))
        way = [nf.interpolate_latents(start, end, float(t)) for t in torch.linspace(0, 1, options.steps)]
        rows += [x[i : i + 1], *(decode(model, z) for z in way), x[i + 1 : i + 2]]
    nf.data.save_grid(torch.cat(rows), options.out / "interpolations.png", columns=options.steps + 2)
    print(f"wrote {options.out / 'reconstructions.png'} (images above, reconstructions below)")
    print(
        f"wrote {options.out / 'interpolations.png'} (each row from the image at its left to that at its right)"
    )


if __name__ == "__main__":
    main()
