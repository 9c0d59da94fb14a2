"""Validation while a model trains: when it is due, and which weights were the best so far.

A validation is an :func:`evaluate` of the model on images that it is not trained on. It draws its noise from seeds of its own
and works on a frozen copy of the model, so that training goes on exactly as it would have without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.data.contents import MissingSplit
from nvae_fast.data.held_out import validation_part
from nvae_fast.training import checkpoint
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.distributed import World
from nvae_fast.training.evaluation import Evaluation, evaluate
from nvae_fast.training.progress import Progress
from nvae_fast.training.signals import StopRequest

if TYPE_CHECKING:
    from nvae_fast.training.loop import Trainer
    from nvae_fast.training.metrics import MetricsLog

# Without --validate-every: every epoch in runs of up to so many epochs, every 20 epochs in longer ones.
SHORT_RUN = 50
LONG_RUN_EVERY = 20
# The seed of `evaluate` where none is given: the same draws at every step, in every run and in the command `evaluate`.
SEED = 0
# Values of an Evaluation that are written to metrics.jsonl under their own names.
_WRITTEN = (
    "negative_log_likelihood",
    "negative_elbo",
    "negative_elbo_bits_per_dim",
    "reconstruction",
    "kl",
    "kl_per_group",
    "active_channels",
    "images",
    "samples",
)


class _Interrupted(Exception):
    """A process of the run received a stop signal during a validation. number: of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Validation:
    """Evaluates the model of a run every few epochs and at the end, and remembers the best value.

    config: the options of the run. dataset: images as the model takes them, None for no validation. steps_per_epoch,
    total_steps: of the run. world: processes that share the images.

    Attributes: `interval`, steps between two validations, 0 for none; `best` and `best_step`, the lowest bits per dimension so
    far and its step; `step` and `final_step`, the step of the last validation and of the last evaluation of a finished run.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Any | None,
        *,
        steps_per_epoch: int,
        total_steps: int,
        world: World,
    ) -> None:
        self.config = config
        self.world = world
        self.steps_per_epoch = steps_per_epoch
        self.interval = 0 if dataset is None else _interval(config, steps_per_epoch, total_steps)
        self.images = 0 if dataset is None else len(dataset)
        self.dataset = None if dataset is None else _spread(dataset, config.validate_images)
        self.best: float | None = None
        self.best_step = self.step = self.final_step = 0
        self._seconds_per_draw = 0.0  # for all images, in the latest validation

    def run(self, trainer: Trainer, stop: StopRequest, log: MetricsLog | None, progress: Progress) -> int:
        """Validate the model of `trainer` where that is due; return the signal that interrupted it, 0 for none.

        What was interrupted is due again when the run is resumed.
        """
        step = trainer.step
        try:
            if self._due(trainer):
                result = self._evaluate(trainer, self.config.validate_samples, stop, progress)
                self._keep(result, trainer)
                self._write("val", result, trainer, log)
                best = ", the best so far" if self.best_step == step else ""
                progress.message(f"step {step}: validation {_summary(result)}{best}")
            if self._final_due(trainer):
                result = self._evaluate(trainer, self.config.validate_final_samples, stop, progress)
                self.final_step = step
                self._write("final", result, trainer, log)
                progress.message(
                    f"final evaluation, {result.samples} draws for each image: {_summary(result)}"
                )
        except _Interrupted as interrupted:
            return interrupted.number
        return 0

    def reserve(self, pace: float) -> tuple[float, float]:
        """Seconds that validation takes for every step of training, and seconds that it takes at the end of the run.

        pace: seconds of a training step. Before the first validation was timed, a draw is taken to cost a third of the training
        of the image, since it has no backward pass.
        """
        if not self.interval or self.dataset is None:
            return 0.0, 0.0
        steps = len(self.dataset) / (self.config.batch_size * self.world.size)
        draw = self._seconds_per_draw or pace * steps / 3
        once = draw * self.config.validate_samples
        return once / self.interval, once + draw * self.config.validate_final_samples

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "step": self.step,
            "final_step": self.final_step,
            "images": self.images,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned. Raises ValueError for other images, KeyError or TypeError for other values."""
        steps = [state[name] for name in ("best_step", "step", "final_step", "images")]
        best = state["best"]
        if not all(type(value) is int and value >= 0 for value in steps):
            raise TypeError(f"validation has {steps}, expected whole numbers from 0 on")
        if best is not None and not isinstance(best, float):
            raise TypeError(f"the best value of validation is {type(best).__name__}, expected float")
        self.best, (self.best_step, self.step, self.final_step, images) = best, steps
        if self.interval and images not in (0, self.images):
            raise ValueError(
                f"the run was validated on {images} images, the data given now have {self.images} for it: give the same "
                "data (--data), or switch validation off: validate_every=0 (--validate-every 0)"
            )
        self.images = images or self.images

    def unfinished(self) -> dict[str, int]:
        """The step up to which lines of metrics.jsonl are kept on resuming, by the beginning of the names of their values.

        A process that was killed may have written the line of a validation that the checkpoint does not know.
        """
        return {"val/": self.step, "final/": self.final_step}

    def describe(self) -> str:
        """When validation takes place and on how many images."""
        assert self.dataset is not None
        epochs = self.interval // self.steps_per_epoch
        part = getattr(self.dataset, "split", "validation")
        return f"validation on {len(self.dataset)} {part} images every {epochs} epoch(s) and at the end"

    def pending(self, trainer: Trainer) -> bool:
        """Whether `run` would evaluate the model of ``trainer`` now."""
        return self._due(trainer) or self._final_due(trainer)

    def _due(self, trainer: Trainer) -> bool:
        now = self.interval > 0 and (trainer.done or trainer.step % self.interval == 0)
        return now and trainer.step > self.step

    def _final_due(self, trainer: Trainer) -> bool:
        now = self.interval > 0 and trainer.done and self.config.validate_final_samples > 0
        return now and trainer.step > self.final_step

    def _evaluate(self, trainer: Trainer, samples: int, stop: StopRequest, progress: Progress) -> Evaluation:
        begun = time.perf_counter()
        total = len(self.dataset) if self.dataset is not None else 0

        def on_batch(done: int, bound: float) -> None:
            number = int(self.world.largest(float(stop.signal or 0))[0])
            if number:
                raise _Interrupted(number)
            place = min(trainer.position, trainer.total_steps)
            progress.update(place, f"validation {done}/{total} images", count=str(trainer.step))

        result = evaluate(
            trainer.evaluated_model,
            self.dataset,
            samples=samples,
            # As many as a step of training holds in memory at a time. In full precision, as the command computes.
            batch_size=-(-self.config.batch_size // self.config.accumulate),
            seed=SEED,
            on_batch=on_batch,
            world=self.world,
        )
        self._seconds_per_draw = (time.perf_counter() - begun) / samples
        return result

    def _keep(self, result: Evaluation, trainer: Trainer) -> None:
        """Write `checkpoint-best.pt` when the result is the best one so far."""
        self.step = trainer.step
        value = result.negative_log_likelihood_bits_per_dim
        if not math.isfinite(value) or (self.best is not None and value >= self.best):
            return
        self.best, self.best_step = value, trainer.step
        if self.world.is_main:
            checkpoint.save(trainer.state(), trainer.folder, name=checkpoint.BEST, keep_previous=False)

    def _write(self, prefix: str, result: Evaluation, trainer: Trainer, log: MetricsLog | None) -> None:
        if log is None:
            return
        values = result.to_dict()
        log.write(
            {
                "step": trainer.step,
                "epoch": round(trainer.step / self.steps_per_epoch, 4),
                f"{prefix}/bits_per_dim": result.negative_log_likelihood_bits_per_dim,
                **{f"{prefix}/{name}": values[name] for name in _WRITTEN},
                "seconds": round(trainer.elapsed, 3),
            }
        )


def held_out(training: Any, open_part: Callable[[str], Any]) -> Any | None:
    """The images that a run is validated on: the validation part of its data, else the test part; None where there is none.

    training: the training images. open_part: opens the part of that name, of data that have parts of their own.
    """
    if training.held_out is not None:
        return validation_part(training)
    if not training.own_split:
        return None
    for part in ("validation", "test"):
        try:
            return open_part(part)
        except MissingSplit:
            continue
    return None


class _Spread:
    """`count` images at equal distances of a dataset, which may be sorted by class."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset = dataset
        self.indices = torch.arange(count) * len(dataset) // count
        self.name, self.split = dataset.name, getattr(dataset, "split", "validation")
        self.channels, self.image_size = dataset.channels, dataset.image_size

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor, seed: int) -> Tensor:
        """The images of these numbers, (N,C,H,W)."""
        images: Tensor = self.dataset.batch(self.indices[indices], seed)
        return images


def _spread(dataset: Any, count: int | None) -> Any:
    return dataset if count is None or count >= len(dataset) else _Spread(dataset, count)


def _interval(config: TrainingConfig, steps_per_epoch: int, total_steps: int) -> int:
    every = config.validate_every
    if every is None:
        epochs = total_steps / steps_per_epoch
        every = 0 if epochs < 1 else 1 if epochs <= SHORT_RUN else LONG_RUN_EVERY
    return every * steps_per_epoch


def _summary(result: Evaluation) -> str:
    return (
        f"{result.negative_log_likelihood_bits_per_dim:.4f} bits/dim, negative ELBO {result.negative_elbo:.2f} nats, "
        f"{result.active_channels} of {result.latent_channels} latent channels active"
    )
