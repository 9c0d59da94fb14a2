"""The training loop: steps, metrics, checkpoints, pictures, stopping and resuming.

A run is a pure function of its configuration: every step's images, noise, learning rate and KL coefficient
follow from the seed and the step number. A checkpoint therefore holds only parameters, optimizer, step number
and running averages, and a resumed run continues bit for bit.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import warnings
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.models.states import not_finite
from nvae_fast.training import (
    checkpoint,
    metrics,
    numbered,
    pictures,
    precision,
    run_folder,
    run_state,
    schedule,
    seeds,
)
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.distributed import World, fingerprint, outlive_torchrun
from nvae_fast.training.evaluation import bits_per_dim, fitted
from nvae_fast.training.launch import processes_here
from nvae_fast.training.objective import annealed_lambda, kl_coefficient
from nvae_fast.training.progress import Progress
from nvae_fast.training.signals import StopRequest
from nvae_fast.training.step import Step, StepResult
from nvae_fast.training.validation import Validation

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

# With a time limit, the time per step is the median over this many steps. The first part of the time is left out,
# because steps are slower there.
_PACE_STEPS = 21
_PACE_AFTER = 0.03
# Steps skipped for their gradient norm that are named one by one; after them, each time there are so many more.
_NAMED_STEPS = 10


class TrainingDiverged(RuntimeError):
    """Too many steps in a row, or the weights, were not finite; the message gives advice and the last good checkpoint."""


@dataclass(frozen=True)
class RunResult:
    """Result of a run. step: optimizer steps taken; skipped: steps undone because they were not finite; signal: the signal that
    stopped it early, None when it is finished; seconds: duration of training, resumed parts included; large: steps undone
    because their gradient norm exceeds `skip_grad_norm`."""

    step: int
    skipped: int
    signal: int | None
    seconds: float
    large: int = 0


def check_batch_size(config: TrainingConfig, dataset: Any, world: World) -> None:
    """Raise ValueError when the images are too few for one step of all processes."""
    if config.batch_size * world.size > len(dataset):
        raise ValueError(
            f"batch_size (--batch-size) {config.batch_size}, times {world.size} process(es), exceeds the "
            f"{len(dataset)} images of {dataset.name}: choose a smaller one"
        )


class Trainer:
    """Trains `model` on `dataset`, writing into `folder`, which is made where there is none.

    model: an NVAE whose parameters are initialised. config: a `TrainingConfig`. dataset: an `ImageDataset` of the model's
    size and channels; or a map-style torch Dataset of such images (C,H,W) in [0,1], alone or first in a tuple; or a DataLoader
    of one, whose batch size, order and workers are not used; or a tensor (N,C,H,W). A run on a data set with random transforms
    does not resume bit for bit. world: the processes of the run, None for a single one. quiet: no progress line.
    progress: "auto", "plain" or "none", see `Progress`.
    validation: images of any of these kinds to validate on while training, see `Validation`; None for no validation.
    state: a document of `checkpoint.load` to continue from. data: (name or path, kind) to open the data
    again, kept in checkpoints. Raises ValueError when model and data do not fit, or when the data are not
    those the checkpoint was made with.
    """

    def __init__(
        self,
        model: NVAE,
        config: TrainingConfig,
        dataset: Any,
        folder: str | os.PathLike[str],
        *,
        world: World | None = None,
        validation: Any | None = None,
        state: dict[str, Any] | None = None,
        quiet: bool = False,
        progress: str = "auto",
        data: tuple[str | None, str | None] = (None, None),
    ) -> None:
        from nvae_fast.data import BatchLoader, default_workers

        self.world = world or World()
        self.config = config = precision.resolved(config, self.world.device)
        self.dataset = dataset = fitted(model.config, dataset)
        validation = None if validation is None else fitted(model.config, validation, "validation")
        self.folder = Path(folder)
        self.data = data
        self.quiet = quiet or not self.world.is_main
        self.progress = progress
        self.world.agree(
            {
                "--data (number of images)": len(dataset),
                "--data (number of validation images)": None if validation is None else len(validation),
                "the model's options": model.config.to_dict(),
                "the training options": config.to_dict(),
                "the checkpoint to resume (its step)": None if state is None else state["progress"]["step"],
                "the contents of the checkpoint": fingerprint(state) if self.world.size > 1 else None,
            }
        )
        if config.tensorboard:
            metrics.require_tensorboard()
        check_batch_size(config, dataset, self.world)
        workers = config.workers
        if workers is None:
            workers = default_workers(dataset, processes_here())
        self.loader = BatchLoader(
            dataset,
            config.batch_size,
            seed=seeds.mix_seed(config.seed, seeds.DATA),
            shuffle=True,
            flip=config.horizontal_flip,
            drop_last=True,
            workers=workers,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.steps_per_epoch = len(self.loader)
        self.total_steps = config.total_steps(self.steps_per_epoch)
        self.validation = Validation(
            config,
            validation,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            world=self.world,
        )
        memory = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model: NVAE = checkpoint.to_format(model.to(self.world.device), memory).train()
        self._memory = memory
        self.step_function = Step(self.model, config, self.world)
        self.step = 0
        self.position = 0.0
        self.elapsed = 0.0
        self.bad_in_a_row = 0
        self.skipped = 0
        self.large = 0
        self.averages = metrics.Averages()
        self._log_mark = (0, 0.0)
        if state is not None:
            run_state.restore(self, state)
        self._last_saved = self.step if state is not None else -1
        self._saved_validation = self.validation.state()
        # Whether a step has been finite since: only then is it known that its weights give a finite loss and gradient.
        self._proven = False

    @property
    def done(self) -> bool:
        """Whether the run has reached its end."""
        return self.position >= self.total_steps

    @property
    def evaluated_model(self) -> NVAE:
        """The model that pictures and evaluations are of: the averages of the weights where they are kept, else `model`."""
        averages = self.step_function.averages
        return self.model if averages is None else averages.module

    def run(self) -> RunResult:
        """Train to the end or until a stop signal to any process, then write a checkpoint.

        Raises TrainingDiverged after `max_bad_steps` non-finite steps in a row, CheckpointError or RunFolderError when a
        file cannot be written or another process trains in the folder, ProcessLost when another process of the run died. The
        checkpoints on disk are complete at all times.
        """
        with contextlib.ExitStack() as stack:
            if self.world.is_main:
                run_folder.make(self.folder)
                stack.enter_context(run_folder.lock(self.folder))
                if self._last_saved < 0:
                    run_folder.check_new(self.folder)
            stack.enter_context(
                self.world.report_lost_process(lambda: run_folder.how_to_continue(self.folder))
            )
            return self._run()

    def _run(self) -> RunResult:
        log = None
        if self.world.is_main:
            log = metrics.MetricsLog(
                self.folder,
                resume_step=self.step if self._last_saved >= 0 else None,
                keep=self.validation.unfinished(),
                tensorboard=self.config.tensorboard,
            )
        progress = Progress("train", self.total_steps, mode=self.progress, quiet=self.quiet)
        if self.world.device.type == "cuda" and not self.quiet:
            progress.message(f"step: {self.step_function.mode}")
        started = time.perf_counter() - self.elapsed
        pace: deque[float] = deque(maxlen=_PACE_STEPS)
        self._log_mark = (self.step, self.elapsed)
        try:
            # Closing the generator ends the threads that prefetch images.
            with StopRequest() as stop, contextlib.closing(self._batches()) as batches:
                if self._last_saved < 0:
                    self.save()
                # One that a signal interrupted before the run was resumed.
                number = self._validate(stop, log, progress)
                self.save()
                stopping, due = number != 0, False
                while not stopping and not self.done:
                    begun = time.perf_counter()
                    images = next(batches)
                    result, facts = self._take_step(images)
                    self._judge(result, images, progress)
                    pace.append(time.perf_counter() - begun)
                    self._advance(time.perf_counter() - started, statistics.median(pace))
                    self._report(result, facts, log, progress)
                    if self._pictures_due():
                        self._pictures(f"samples-{self.step:07d}.png")
                    if log is not None and (self.done or self._pictures_due()):
                        log.pictures(self.step, self.evaluated_model, self.dataset, seed=self.config.seed)
                    # A signal to one process stops all of them after the same step.
                    number = int(self.world.largest(float(stop.signal or 0))[0])
                    if self.done:
                        self.save()  # the last validations may take long
                    number = number or self._validate(stop, log, progress)
                    stopping = number != 0
                    due = due or self.step % self.config.checkpoint_every == 0
                    # Between bad steps nothing is written: both checkpoints would soon be of weights that diverge.
                    if self.done or stopping or (due and not self.bad_in_a_row):
                        self.save()
                        pace.clear()
                        due = False
                if stopping:
                    self.world.barrier()  # none ends before the checkpoint is written
            if stopping:
                outlive_torchrun()
        finally:
            progress.close()
            if log is not None:
                log.close()
        return RunResult(self.step, self.skipped, number or None, self.elapsed, self.large)

    def save(self) -> None:
        """Write a checkpoint of this moment (rank 0 only), unless nothing has happened since the last one.

        Raises CheckpointError when it cannot, TrainingDiverged when the weights are not finite: nothing is written then.
        """
        validated = self.validation.state()
        if self.step == self._last_saved and validated == self._saved_validation:
            return
        problem = not_finite(self.model.state_dict().items())
        if problem is not None:
            raise TrainingDiverged(self._advice(problem))
        if self.world.is_main:
            checkpoint.save(self.state(), self.folder, keep_previous=self.step != self._last_saved)
            self._keep_numbered()
        self._last_saved, self._saved_validation, self._proven = self.step, validated, False

    def _keep_numbered(self) -> None:
        """Give the newest checkpoint its number, as `keep` says."""
        with run_folder.writing(self.folder / numbered.name_of(self.step)):
            problem = numbered.keep(self.folder, self.step, self.config.keep)
        if problem is not None:
            warnings.warn(problem, stacklevel=2)

    def state(self) -> dict[str, Any]:
        """Everything needed to continue the run from here, as plain values and tensors."""
        return run_state.collect(self)

    def _batches(self) -> Generator[Tensor, None, None]:
        """Yield images from the current step on, epoch after epoch."""
        epoch, start = divmod(self.step, self.steps_per_epoch)
        while True:
            yield from self.loader.epoch(epoch, start_batch=start)
            epoch, start = epoch + 1, 0

    def _take_step(self, x: Tensor) -> tuple[StepResult, dict[str, float]]:
        config = self.config
        coefficient = kl_coefficient(
            self.position,
            self.total_steps,
            config.kl_anneal_portion,
            config.kl_const_portion,
            config.kl_const_coeff,
            config.kl_max_coeff,
        )
        weight = annealed_lambda(coefficient, config.weight_decay_norm, config.lambda_initial())
        rate = schedule.learning_rate(
            self.position,
            self.total_steps,
            peak=config.learning_rate,
            minimum=config.learning_rate_min,
            warmup_steps=config.warmup_epochs * self.steps_per_epoch,
        )
        x = x.to(self.world.device, non_blocking=True).contiguous(memory_format=self._memory)
        result = self.step_function(
            x,
            seed=seeds.mix_seed(config.seed, seeds.NOISE, self.step, self.world.rank),
            coefficient=coefficient,
            weight=weight,
            learning_rate=rate,
        )
        return result, {"kl_coefficient": coefficient, "learning_rate": rate, "lambda": weight}

    def _judge(self, result: StepResult, images: Tensor, progress: Progress) -> None:
        self.averages.add(result)
        if not result.skipped or result.large:
            self.bad_in_a_row = 0
            self._proven = True
            self.large += result.large
            if result.large and (self.large <= _NAMED_STEPS or self.large % _NAMED_STEPS == 0):
                progress.message(
                    f"step {self.step}: gradient norm {result.grad_norm:g} exceeds --skip-grad-norm "
                    f"{self.config.skip_grad_norm:g}, step skipped ({self.large} in all)"
                )
            return
        self.skipped += 1
        scaling = self.step_function.scaling
        scale = "" if scaling is None else f", loss scale {scaling.scale:g}"
        if result.rescaled:  # as often happens while the scale adapts: no sign of weights that diverge
            if not self.quiet:
                progress.message(f"step {self.step}: a gradient overflowed in fp16, step skipped{scale} now")
            return
        self.bad_in_a_row += 1
        if not self.quiet:
            progress.message(
                f"step {self.step}: loss {result.loss:g}, gradient norm {result.grad_norm:g}: not finite{scale}, "
                f"step skipped ({self.bad_in_a_row} in a row, {self.skipped} in all)"
            )
        if self.bad_in_a_row >= self.config.max_bad_steps:
            problem = f"loss or gradient was not finite {self.bad_in_a_row} times in a row"
            if self.world.largest(float(not bool(torch.isfinite(images).all())))[0]:
                raise TrainingDiverged(
                    self._advice(f"{problem}, and the images are not", blame_weights=False)
                )
            raise TrainingDiverged(self._advice(problem))

    def _advice(self, problem: str, *, blame_weights: bool = True) -> str:
        advice = [
            f"lower learning_rate (--learning-rate), {self.config.learning_rate:g} now",
            "check the images for NaN",
        ]
        if self.config.autocast:
            advice.append("try autocast (--autocast) none")
        if not self.config.grad_clip:
            advice.append("try grad_clip (--grad-clip)")
        good = None
        # A checkpoint after which no step was finite may hold the weights that made them so.
        if blame_weights and not self._proven and self._last_saved > 0:
            good = self._step_back()
        good = (
            good
            or f"The last good checkpoint is {self.folder / checkpoint.NAME} (step {max(self._last_saved, 0)})"
        )
        return f"training stopped at step {self.step}: {problem}. What may help: {', '.join(advice)}. {good}"

    def _step_back(self) -> str | None:
        """Make the previous checkpoint the newest one; returns a sentence that says so, None where there is none."""
        if not self.world.is_main:
            return "The first process says which checkpoint is the last good one"
        previous = self.folder / checkpoint.PREVIOUS
        try:
            step = checkpoint.load_training(previous)["progress"]["step"]
            kept = checkpoint.set_aside(self.folder, "diverged")
        except (checkpoint.CheckpointError, OSError):
            return None
        return (
            f"No step after the newest checkpoint (step {self._last_saved}, kept as {kept}) was finite. The last good "
            f"checkpoint is the one before, now {self.folder / checkpoint.NAME} (step {step})"
        )

    def _validate(self, stop: StopRequest, log: metrics.MetricsLog | None, progress: Progress) -> int:
        """Validate where it is due; return the signal that interrupted it, 0 for none."""
        begun = time.perf_counter()
        number = self.validation.run(self, stop, log, progress)
        seconds = time.perf_counter() - begun
        self.elapsed += seconds
        self._log_mark = (self._log_mark[0], self._log_mark[1] + seconds)  # the images per second of training
        return number

    def _advance(self, elapsed: float, pace: float) -> None:
        limit = self.config.time_limit * 60 if self.config.time_limit is not None else None
        if limit is not None:
            each, end = self.validation.reserve(pace)
            elapsed, pace, end = self.world.largest(elapsed, pace + each, end)
            limit -= end
        self.elapsed = elapsed
        self.step += 1
        judged = limit if limit is None or elapsed > _PACE_AFTER * limit else None
        self.position = schedule.advance(
            self.position, self.total_steps, elapsed=elapsed, last=pace, limit=judged
        )

    def _report(
        self, result: StepResult, facts: dict[str, float], log: metrics.MetricsLog | None, progress: Progress
    ) -> None:
        if log is None:
            return
        bits = bits_per_dim(result.reconstruction + result.kl, self.model.config.dims)
        since_step, since_time = self._log_mark
        speed = (self.step - since_step) * self._images() / max(self.elapsed - since_time, 1e-9)
        text = f"loss {result.loss:.2f}  kl {result.kl:.2f}  bits/dim {bits:.4f}  {speed:.0f} images/s"
        # With a time limit the position is ahead of the step count, and the number of steps to come is unknown.
        count = str(self.step) if self.position != self.step else None
        progress.update(min(self.position, self.total_steps), text, count=count, force=self.done)
        if self.step % self.config.log_every and not self.done:
            return
        means = self.averages.means()
        kl, reconstruction = means["kl"], means["reconstruction"]
        scaling = self.step_function.scaling
        nats = None if kl is None or reconstruction is None else reconstruction + kl
        log.write(
            {
                "step": self.step,
                "epoch": round(self.step / self.steps_per_epoch, 4),
                **means,
                **self.averages.groups(self.model.config.num_groups),
                "bits_per_dim": None if nats is None else bits_per_dim(nats, self.model.config.dims),
                **facts,
                **({} if scaling is None else {"loss_scale": scaling.scale}),
                "images_per_second": round(speed, 2),
                "skipped_steps": self.averages.skipped,
                "large_steps": self.averages.large,
                "seconds": round(self.elapsed, 3),
            }
        )
        self.averages = metrics.Averages()
        self._log_mark = (self.step, self.elapsed)

    def _images(self) -> int:
        return self.config.batch_size * self.world.size

    def _pictures_due(self) -> bool:
        return bool(self.config.sample_every) and self.step % self.config.sample_every == 0

    def _pictures(self, name: str) -> None:
        if not self.world.is_main:
            return
        with run_folder.writing(self.folder / name):
            pictures.write_samples(
                self.evaluated_model,
                self.folder / name,
                temperature=self.config.sample_temperature,
                seed=seeds.mix_seed(self.config.seed, seeds.SAMPLES),
                readjust_passes=0,
                step=self.step,
            )
        self.model.train()
