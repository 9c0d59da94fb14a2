"""The options of a training run. Every field carries its help text, which the command line shows as it is."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy


def _option(default: Any, text: str, *, unit: str = "") -> Any:
    """A dataclass field with its default, what it means and in which unit it is counted."""
    return dataclasses.field(default=default, metadata={"help": text, "unit": unit})


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Immutable and checked on construction; `replace` gives a changed copy.

    Raises ValueError or TypeError naming the field, what it must be and what it was.
    """

    epochs: int = _option(200, "length of the run; --max-steps takes its place when given", unit="epochs")
    max_steps: int | None = _option(
        None, "length of the run in optimizer steps, in place of --epochs", unit="steps"
    )
    time_limit: float | None = _option(
        None,
        "training time, resumed parts included; when it is too short for all steps the schedules run "
        "faster, so that they still end where they should (such a run depends on the machine's pace)",
        unit="minutes",
    )
    batch_size: int = _option(32, "images in a step, on every process", unit="images")
    accumulate: int = _option(
        1,
        "parts in which a process computes its images of a step, one after another, adding their gradients up: "
        "memory of one part; batch norm and KL balancing see a part at a time, so numbers change a little",
        unit="parts",
    )
    learning_rate: float = _option(1e-2, "largest learning rate of Adamax, reached after the warm-up")
    learning_rate_min: float = _option(1e-4, "learning rate at the end of the cosine")
    warmup_epochs: float = _option(5.0, "linear warm-up of the learning rate", unit="epochs")
    weight_decay: float = _option(3e-4, "weight decay of Adamax")
    weight_decay_norm: float = _option(1e-2, "lambda: weight of the spectral and batch-norm regularisers")
    weight_decay_norm_anneal: bool = _option(
        False, "let lambda fall geometrically from --weight-decay-norm-init while the KL coefficient rises"
    )
    weight_decay_norm_init: float = _option(1.0, "lambda at the start, when annealed")
    kl_anneal_portion: float = _option(
        0.3, "part of the run over which the KL coefficient rises to 1", unit="fraction of the run"
    )
    kl_const_portion: float = _option(
        1e-4, "part of the run before the KL coefficient starts to rise", unit="fraction of the run"
    )
    kl_balance: bool = _option(True, "balance the KL over the groups while its coefficient is below 1")
    autocast: str | None = _option(None, "mixed precision of the network: none or bf16")
    cuda_graph: bool | None = _option(
        None,
        "capture the whole step in one CUDA graph; none does where it can be done (one process on a GPU)",
    )
    checkpoint_cells: bool = _option(
        False,
        "keep only the input of every cell for the backward pass and compute the cell again there: "
        "less memory, about a third more time, same numbers",
    )
    channels_last: bool = _option(True, "keep images and feature maps in the channels_last memory format")
    grad_clip: float | None = _option(
        None, "largest norm of the gradient, longer ones are scaled down; none clips nothing"
    )
    horizontal_flip: bool = _option(False, "mirror every second image, at random")
    seed: int = _option(0, "seed of initialisation, noise and data order (0 to 2^63-1)")
    workers: int = _option(0, "extra threads that read images", unit="threads")
    threads: int | None = _option(
        None, "CPU threads of PyTorch; none leaves PyTorch's choice. Resuming keeps it", unit="threads"
    )
    max_bad_steps: int = _option(
        10, "steps in a row with a non-finite loss or gradient before training stops", unit="steps"
    )
    checkpoint_every: int = _option(
        500, "a checkpoint every so many steps, and one at the end of the run", unit="steps"
    )
    log_every: int = _option(10, "a line in metrics.jsonl every so many steps", unit="steps")
    sample_every: int = _option(
        0, "a grid of samples (samples-<step>.png) every so many steps; 0 only at the end", unit="steps"
    )
    sample_temperature: float = _option(1.0, "temperature of the samples drawn while training and at the end")
    sample_readjust_passes: int = _option(
        0, "batch-norm readjustment passes before samples are drawn; 0 for none", unit="passes of 16 images"
    )
    tensorboard: bool = _option(False, "also write TensorBoard event files (needs the tensorboard package)")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, numpy.generic):
                object.__setattr__(self, field.name, value.item())
            self._check_type(field.name, getattr(self, field.name), str(field.type))
        for name in (
            "epochs",
            "max_steps",
            "batch_size",
            "accumulate",
            "threads",
            "max_bad_steps",
            "checkpoint_every",
            "log_every",
        ):
            self._check_least(name, 1)
        for name in (
            "warmup_epochs",
            "weight_decay",
            "weight_decay_norm",
            "workers",
            "sample_every",
            "seed",
            "sample_readjust_passes",
            "learning_rate_min",
        ):
            self._check_least(name, 0)
        for name in (
            "time_limit",
            "learning_rate",
            "weight_decay_norm_init",
            "grad_clip",
            "sample_temperature",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"TrainingConfig: {name} must be greater than 0, got {value!r}")
        for name in ("kl_anneal_portion", "kl_const_portion"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"TrainingConfig: {name} must be between 0 and 1, got {value!r}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"TrainingConfig: accumulate ({self.accumulate}) must not exceed batch_size ({self.batch_size})"
            )
        if self.learning_rate_min > self.learning_rate:
            raise ValueError(
                f"TrainingConfig: learning_rate_min ({self.learning_rate_min}) must not exceed "
                f"learning_rate ({self.learning_rate})"
            )
        if self.autocast not in (None, "bf16"):
            raise ValueError(f"TrainingConfig: autocast must be None or 'bf16', got {self.autocast!r}")
        if self.weight_decay_norm_anneal and self.weight_decay_norm <= 0:
            raise ValueError(
                "TrainingConfig: weight_decay_norm_anneal needs weight_decay_norm greater than 0, "
                f"got {self.weight_decay_norm}"
            )
        if self.seed >= 2**63:
            raise ValueError(f"TrainingConfig: seed must be below 2^63, got {self.seed}")

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with ``changes``, field by field, checked again. Raises ValueError for names that are none."""
        known = {field.name for field in dataclasses.fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ValueError(f"TrainingConfig: unknown option(s) {', '.join(unknown)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `TrainingConfig.from_dict` reads them back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """From the values that `to_dict` wrote; fields missing there (an older version's) get their defaults."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})

    def total_steps(self, steps_per_epoch: int) -> int:
        """The length of the run in optimizer steps: max_steps, or `epochs * steps_per_epoch`."""
        if self.max_steps is not None:
            return self.max_steps
        return self.epochs * steps_per_epoch

    def lambda_initial(self) -> float | None:
        """The lambda to anneal from, None when lambda is constant."""
        return self.weight_decay_norm_init if self.weight_decay_norm_anneal else None

    def _check_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ValueError(f"TrainingConfig: {name} must be at least {least}, got {value!r}")

    def _check_type(self, name: str, value: Any, annotation: str) -> None:
        if value is None and "None" in annotation:
            return
        kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str}
        kind = annotation.split("|")[0].strip()
        wrong_bool = isinstance(value, bool) and kind != "bool"
        if wrong_bool or not isinstance(value, kinds[kind]):
            raise TypeError(
                f"TrainingConfig: {name} must be {annotation}, got {type(value).__name__} ({reprlib.repr(value)})"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"TrainingConfig: {name} must be finite, got {value!r}")
