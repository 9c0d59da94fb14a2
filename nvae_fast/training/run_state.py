"""What a checkpoint holds of a run besides its weights, and how a run continues from it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch

from nvae_fast.training import checkpoint, metrics
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.step import layers_needing_data_init, mark_needing_data_init
from nvae_fast.version import __version__

if TYPE_CHECKING:
    from nvae_fast.training.loop import Trainer

# Options on which it depends whether a step is finite.
_DECIDES_STEPS = (
    "learning_rate",
    "learning_rate_min",
    "warmup_epochs",
    "grad_clip",
    "autocast",
    "accumulate",
)


def collect(trainer: Trainer) -> dict[str, Any]:
    """Everything needed to continue the run from here, as plain values and tensors."""
    source = _absolute(trainer)
    return {
        "nvae_fast": __version__,
        "torch": str(torch.__version__),
        "model_config": trainer.model.config.to_dict(),
        "training_config": trainer.config.to_dict(),
        "model": trainer.model.state_dict(),
        "awaiting_data": layers_needing_data_init(trainer.model),
        "optimizer": trainer.step_function.optimizer_state(),
        **trainer.step_function.extra_state(),
        "progress": {
            "step": trainer.step,
            "epoch": trainer.step // trainer.steps_per_epoch,
            "batch": trainer.step % trainer.steps_per_epoch,
            "position": trainer.position,
            "total_steps": trainer.total_steps,
            "steps_per_epoch": trainer.steps_per_epoch,
            "elapsed": trainer.elapsed,
            "bad_in_a_row": trainer.bad_in_a_row,
            "skipped": trainer.skipped,
            "large": trainer.large,
            "world_size": trainer.world.size,
        },
        "metrics": trainer.averages.state(),
        "validation": trainer.validation.state(),
        "data": {
            "source": source,
            # From the run folder: the data are found when both have moved together.
            "beside": os.path.relpath(source, trainer.folder.resolve()) if os.path.isabs(source) else None,
            "kind": trainer.data[1],
            "name": trainer.dataset.name,
            "images": len(trainer.dataset),
            "image_size": trainer.dataset.image_size,
            "channels": trainer.dataset.channels,
            "reading": getattr(trainer.dataset, "reading", None),
            "held_out": None
            if (held_out := getattr(trainer.dataset, "held_out", None)) is None
            else held_out.to_dict(),
        },
        "rng": {"torch": torch.get_rng_state()},
    }


def _absolute(trainer: Trainer) -> str:
    """The path of the data of a run, or the name of a built-in set as it is."""
    source, kind = trainer.data
    source = source or trainer.dataset.name
    built_in = source in ("digits", "photos") or kind in ("digits", "photos")
    return source if built_in or not os.path.exists(source) else os.path.abspath(source)


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Continue from what `collect` returned.

    Raises ValueError for other data, CheckpointError for a state that does not fit.
    """
    images = state["data"]["images"]
    if images != len(trainer.dataset):
        raise ValueError(
            f"the run to resume was trained on {images} images ({state['data']['name']}), "
            f"the data given now ({trainer.dataset.name}) have {len(trainer.dataset)}: give the same data (--data)"
        )
    progress = state["progress"]
    if progress["steps_per_epoch"] != trainer.steps_per_epoch:
        raise ValueError(
            f"the run to resume has {progress['steps_per_epoch']} steps an epoch, now there would be "
            f"{trainer.steps_per_epoch}: use the same batch_size (--batch-size) with the same number of processes "
            f"({progress['world_size']}), or one that makes as many images a step"
        )
    try:
        trainer.model.load_state_dict(state["model"])
        mark_needing_data_init(trainer.model, state["awaiting_data"])
        checkpoint.check_optimizer(state["optimizer"], trainer.step_function.parameters)
        trainer.step_function.restore(state["optimizer"])
        trainer.step_function.restore_extra(state)
        trainer.averages = metrics.Averages(state["metrics"])
        if "validation" in state:  # checkpoints of 0.1.0 have none
            trainer.validation.restore(state["validation"])
        torch.set_rng_state(state["rng"]["torch"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise checkpoint.CheckpointError(
            f"the checkpoint to resume from, in {trainer.folder}, does not fit: {error}"
        ) from error
    trainer.step = progress["step"]
    trainer.position = progress["position"]
    trainer.elapsed = progress["elapsed"]
    # With other rates the steps that failed say nothing about those to come.
    before = TrainingConfig.from_dict(state["training_config"])
    changed = any(getattr(before, name) != getattr(trainer.config, name) for name in _DECIDES_STEPS)
    trainer.bad_in_a_row = 0 if changed else progress["bad_in_a_row"]
    trainer.skipped = progress["skipped"]
    trainer.large = progress.get("large", 0)
