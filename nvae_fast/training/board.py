"""Pictures in TensorBoard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.distributed import single_process
from nvae_fast.training.pictures import draw_images, evaluation, with_reconstructions
from nvae_fast.training.seeds import DATA, SAMPLES, mix_seed

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
COUNT = 16


def require_tensorboard() -> Any:
    """TensorBoard's writer class. Raises ImportError saying what to install when it is not there."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard is not installed: pip install tensorboard, or leave --tensorboard out"
        ) from error
    return SummaryWriter


def show_pictures(board: Any, step: int, model: NVAE, dataset: Any, *, seed: int = 0) -> None:
    """Add samples at four temperatures, and the first images of a dataset above their reconstructions, at a step.

    Samples are means of the likelihood. board: a `SummaryWriter`. seed: of the samples and of the images' binarisation, the
    same at every step. The model comes out as it went in.
    """
    from nvae_fast.data.png import make_grid

    def add(name: str, grid: Tensor, columns: int | None = None) -> None:
        pixels = make_grid(grid, columns)
        board.add_image(name, pixels, step, dataformats="HWC" if pixels.ndim == 3 else "HW")

    with evaluation(model), single_process():
        for temperature in TEMPERATURES:
            drawn = draw_images(
                model, COUNT, temperature=temperature, seed=mix_seed(seed, SAMPLES), pixels="mean"
            )
            add(f"samples/temperature {temperature}", drawn)
        images = dataset.batch(torch.arange(min(COUNT, len(dataset))), mix_seed(seed, DATA))
        add("reconstructions", *with_reconstructions(model, images, seed=seed))
