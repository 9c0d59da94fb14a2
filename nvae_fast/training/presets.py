"""Training presets: the six published settings and the small one of `make demo`.

A preset has a model configuration, which is `NVAEConfig.preset` of the same name, a training configuration and the data it
expects.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nvae_fast.training.config import TrainingConfig

if TYPE_CHECKING:
    from nvae_fast.models.config import NVAEConfig


@dataclass(frozen=True)
class TrainingPreset:
    """A model and training configuration. name: as in `preset(name)`; summary: one line for the command line's help;
    training: the `TrainingConfig`; data: a built-in set of images, None when a path must be given; model: options of the
    NVAEConfig, None for those of `NVAEConfig.preset` of that name."""

    name: str
    summary: str
    training: TrainingConfig
    data: str | None = None
    model: dict[str, Any] | None = None

    def model_config(self) -> NVAEConfig:
        """The NVAEConfig of this preset."""
        from nvae_fast.models.config import NVAEConfig

        return NVAEConfig.preset(self.name) if self.model is None else NVAEConfig(**self.model)


def preset(name: str) -> TrainingPreset:
    """The preset called ``name``. Raises ValueError listing the names when there is no such one."""
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown preset {name!r}; {hint}there are: {', '.join(PRESETS)}")
    return PRESETS[name]


_training = partial(TrainingConfig, autocast="auto")

PRESETS: dict[str, TrainingPreset] = {
    entry.name: entry
    for entry in (
        TrainingPreset(
            "digits_demo",
            "a small model on the built-in digits, about two minutes on two CPU cores",
            _training(
                # 600 steps take two minutes on one thread of a current CPU; a slower one ends after two
                # minutes all the same, with fewer steps and its schedules complete.
                max_steps=600,
                time_limit=2.0,
                batch_size=32,
                # Layers this small gain nothing from a second thread and lose much when cores are shared.
                threads=1,
                warmup_epochs=1.0,
                # Seven validations and the final evaluation take about ten of the 120 seconds.
                validate_every=2,
                validate_images=100,
                sample_temperature=0.8,
                sample_readjust_passes=50,
                checkpoint_every=250,
            ),
            data="digits",
        ),
        TrainingPreset(
            "mnist",
            "MNIST, 28x28 binarised; published on 2 GPUs",
            _training(epochs=400, batch_size=200, weight_decay_norm=1e-2),
        ),
        TrainingPreset(
            "cifar10",
            "CIFAR-10; published on 8 GPUs",
            _training(epochs=400, batch_size=32, weight_decay_norm=1e-2, horizontal_flip=True),
        ),
        TrainingPreset(
            "celeba_64",
            "CelebA at 64x64; published on 8 GPUs",
            _training(epochs=90, batch_size=16, weight_decay_norm=1e-1, horizontal_flip=True),
        ),
        TrainingPreset(
            "imagenet_32",
            "ImageNet at 32x32; published on 24 GPUs",
            _training(
                epochs=45,
                batch_size=24,
                warmup_epochs=1.0,
                weight_decay_norm=1e-2,
                weight_decay_norm_anneal=True,
                weight_decay_norm_init=1.0,
                horizontal_flip=True,
            ),
        ),
        TrainingPreset(
            "celeba_256",
            "CelebA-HQ at 256x256, 5 bits; published on 24 GPUs",
            _training(
                epochs=300,
                batch_size=4,
                weight_decay_norm=1e-2,
                weight_decay_norm_anneal=True,
                weight_decay_norm_init=1.0,
                horizontal_flip=True,
            ),
        ),
        TrainingPreset(
            "ffhq",
            "FFHQ at 256x256, 5 bits; published on 24 GPUs",
            _training(
                epochs=200,
                batch_size=4,
                learning_rate=8e-3,
                weight_decay_norm=1e-1,
                weight_decay_norm_anneal=True,
                weight_decay_norm_init=1.0,
                horizontal_flip=True,
            ),
        ),
    )
}
"""Every :class:`TrainingPreset` by name: the published settings, and the small one of `make demo`."""
