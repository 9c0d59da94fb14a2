"""Grids of samples, and of images above their reconstructions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.distributed import single_process
from nvae_fast.models.frozen import freeze
from nvae_fast.training.distributed import World, fingerprint
from nvae_fast.training.sampler import Sampler
from nvae_fast.training.seeds import mix_seed

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

GRID = 64
READJUST_BATCH = 16


@torch.no_grad()
def draw_images(
    model: NVAE,
    count: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    pixel_temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    pixels: str = "auto",
    on_batch: Callable[[int], None] | None = None,
    world: World | None = None,
) -> Tensor:
    """Draw `count` images (N,C,H,W) in [0,1] from the prior; they are returned on the CPU. The model is in evaluation mode.

    temperature: multiplies the sigma of every prior; one number, or one for each group. pixel_temperature: multiplies the
    noise of the likelihood; 1 by default, as images of NVAE are published. seed: image i depends only on
    (seed, i); another batch size gives the same images up to rounding, another number of processes exactly the same.
    pixels: "sample" draws from the likelihood, "mean" takes its mean, "auto" takes the mean of a Bernoulli likelihood and
    draws from others. on_batch(done) is called after every batch. world: processes among which the batches are divided;
    process 0 returns the images, the others an empty tensor (0,C,H,W).
    """
    pixels = chosen_pixels(model, pixels)
    world = world or World()
    batch_size = min(batch_size, max(count, 1))
    if world.size > 1:
        world.agree(
            {
                "the number of images": count,
                "temperature": temperature,
                "seed": seed,
                "batch_size": batch_size,
                "pixels": pixels,
                "the model's options": model.config.to_dict(),
                "the model's weights": fingerprint(model.state_dict()),
            }
        )
    shape = (model.config.channels, model.config.resolution, model.config.resolution)
    sampler = Sampler(model, temperature=temperature, pixel_temperature=pixel_temperature, pixels=pixels)
    parts = []
    # The batches are those of a single process, so that images do not depend on the number of processes.
    for start in range(0, count, batch_size * world.size):
        mine = start + batch_size * world.rank
        size = min(batch_size, max(count - mine, 0))
        drawn = sampler(size, seed=seed, first=mine).float() if size else None
        if world.size > 1:
            padded = torch.zeros(batch_size, *shape, device=sampler.device)
            if drawn is not None:
                padded[:size] = drawn
            drawn = torch.cat(world.gather(padded))[: count - start]
        if drawn is not None and world.is_main:
            parts.append(drawn.cpu())
        if on_batch is not None:
            on_batch(min(start + batch_size * world.size, count))
    return torch.cat(parts) if parts else torch.zeros(0, *shape)


def chosen_pixels(model: NVAE, pixels: str) -> str:
    """What :class:`Sampler` calls the choice: "auto" is the mean of a Bernoulli, and a draw of any other likelihood."""
    if pixels not in ("auto", "mean", "sample"):
        raise ValueError(f"pixels must be auto, mean or sample, got {pixels!r}")
    if pixels != "auto":
        return pixels
    return "mean" if model.config.likelihood_name == "bernoulli" else "sample"


@contextlib.contextmanager
def evaluation(model: NVAE, *, keep_buffers: bool = False) -> Iterator[NVAE]:
    """Context manager that sets evaluation mode and restores the previous mode; keep_buffers: restores the buffers too."""
    training = model.training
    saved = [(b, b.detach().clone()) for b in model.buffers()] if keep_buffers else []
    model.eval()
    try:
        yield model
    finally:
        with torch.no_grad():
            for buffer, before in saved:
                buffer.copy_(before)
        model.train(training)


def described(pixels: str, temperature: float | Sequence[float], pixel_temperature: float = 1.0) -> str:
    """How images were drawn, in words: the temperatures, and what was taken of the likelihood ("mean" or "sample")."""
    numbers = sorted(
        {float(t) for t in ([temperature] if isinstance(temperature, (int, float)) else temperature)}
    )
    text = f"temperature {numbers[0]:g}" + (f" to {numbers[-1]:g}" if len(numbers) > 1 else "")
    if pixels == "mean":
        return f"{text}, mean of the likelihood"
    return f"{text}, drawn from the likelihood" + (
        "" if pixel_temperature == 1 else f" at {pixel_temperature:g}"
    )


def write_samples(
    model: NVAE,
    path: str | os.PathLike[str] | None,
    *,
    count: int = GRID,
    temperature: float = 1.0,
    seed: int = 0,
    readjust_passes: int = 0,
    step: int | None = None,
) -> None:
    """Write a PNG grid of images from the prior. The model is unchanged afterwards, its statistics included.

    The images are means of the likelihood: the noise of a likelihood that is not trained yet would hide what the latent
    variables have learnt. The title of the grid says so, with the temperature and, where one is given, the step. Every process
    computes by itself. With path=None nothing is drawn; the statistics are re-estimated all the same.
    """
    from nvae_fast.data import save_grid

    with evaluation(model, keep_buffers=readjust_passes > 0), single_process():
        if readjust_passes > 0:
            model.readjust_batch_norm(
                temperature, passes=readjust_passes, batch=READJUST_BATCH, seed=mix_seed(seed, 2)
            )
            model.eval()
        if path is not None:
            images = draw_images(model, count, temperature=temperature, seed=seed, pixels="mean")
            title = described("mean", temperature) + ("" if step is None else f", step {step}")
            save_grid(images, path, title=title)


def write_reconstructions(
    model: NVAE, images: Tensor, path: str | os.PathLike[str], *, columns: int = 8, seed: int = 0
) -> None:
    """Write a PNG grid in which the reconstructions are below each row of images (N,C,H,W, in [0,1]), with labels."""
    from nvae_fast.data import save_grid

    grid, columns = with_reconstructions(model, images, columns=columns, seed=seed)
    rows = len(grid) // columns
    save_grid(grid, path, columns=columns, row_labels=["image", "recon-\nstruction"] * (rows // 2))


@torch.no_grad()
def with_reconstructions(
    model: NVAE, images: Tensor, *, columns: int = 8, seed: int = 0
) -> tuple[Tensor, int]:
    """(grid, columns): images (N,C,H,W) in [0,1] as they are written in rows, every row with its reconstructions below it."""
    frozen: Any = freeze(model)
    out = frozen(images.to(frozen.top_feature.device), seed=mix_seed(seed, 3))
    decoded = frozen.likelihood(out.logits).mean().float().cpu()
    rows = []
    for start in range(0, images.shape[0] - images.shape[0] % columns, columns):
        rows += [images[start : start + columns].cpu().float(), decoded[start : start + columns]]
    if not rows:
        rows, columns = [images.cpu().float(), decoded], images.shape[0]
    return torch.cat(rows), columns
