"""A tiny model, its trainer and its fixtures, for the tests of training."""

from __future__ import annotations

from pathlib import Path

import torch

import nvae_fast as nf
from nvae_fast.training import Step, Trainer, TrainingConfig

TINY = {
    "dataset": "digits",
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 2,
    "num_preprocess_blocks": 1,
    "num_postprocess_blocks": 1,
    "num_preprocess_cells": 1,
    "num_postprocess_cells": 1,
}
TINY_TRAINING = TrainingConfig(batch_size=4, max_steps=6, log_every=2, checkpoint_every=3, warmup_epochs=0.01)


def tiny_model(seed: int = 0, **changes) -> nf.NVAE:
    torch.manual_seed(seed)
    return nf.NVAE(nf.NVAEConfig(**{**TINY, **changes}))


def trainer(folder: Path, dataset, config: TrainingConfig = TINY_TRAINING, *, state=None, **model) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(tiny_model(**model), config, dataset, folder, state=state, quiet=True)


def everything(step: Step) -> dict[str, torch.Tensor]:
    """Copies of the tensors that a step changes: those of its model and of its optimizer."""
    state = {name: value.clone() for name, value in step.model.state_dict().items() if torch.is_tensor(value)}
    for index, entry in step.optimizer.state_dict()["state"].items():
        state.update({f"optimizer {index} {name}": value.clone() for name, value in entry.items()})
    return state


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def digits_of(dataset, count: int):
    class Few:
        name, split, image_size, channels, skipped = "few", "train", dataset.image_size, dataset.channels, []
        binarize = True

        def __len__(self):
            return count

        def batch(self, indices, seed):
            return dataset.batch(indices, seed)

    return Few()
