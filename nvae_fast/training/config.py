"""Options of a training run. Every field has the help text that the command line shows."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from nvae_fast.training.precision import DTYPES


def _option(
    default: Any,
    text: str,
    *,
    unit: str = "",
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> Any:
    """A dataclass field with its default, meaning and unit, and the bounds of its value: at least, at most, greater than."""
    return dataclasses.field(
        default=default,
        metadata={"help": text, "unit": unit, "least": least, "most": most, "above": above},
    )


@dataclass(frozen=True)
class TrainingConfig:
    """Options of training. Immutable and checked on construction; `replace` returns a changed copy.

    Raises ValueError or TypeError naming the field, the expected value and the value given.
    """

    epochs: int = _option(
        200, "length of the run; --max-steps takes its place when given", unit="epochs", least=1
    )
    max_steps: int | None = _option(
        None, "length of the run in optimizer steps, in place of --epochs", unit="steps", least=1
    )
    time_limit: float | None = _option(
        None,
        "training time, resumed parts included; when it is too short for all steps the schedules run "
        "faster, so that they still end where they should (such a run depends on the machine's pace)",
        unit="minutes",
        above=0,
    )
    batch_size: int = _option(32, "images in a step, on every process", unit="images", least=1)
    accumulate: int = _option(
        1,
        "parts in which a process computes its images of a step, one after another, adding their gradients up: "
        "memory of one part; batch norm and KL balancing see a part at a time, so numbers change a little",
        unit="parts",
        least=1,
    )
    learning_rate: float = _option(
        1e-2, "largest learning rate of Adamax, reached after the warm-up", above=0
    )
    learning_rate_min: float = _option(1e-4, "learning rate at the end of the cosine", least=0)
    warmup_epochs: float = _option(5.0, "linear warm-up of the learning rate", unit="epochs", least=0)
    weight_decay: float = _option(3e-4, "weight decay of Adamax", least=0)
    weight_decay_norm: float = _option(
        1e-2, "lambda: weight of the spectral and batch-norm regularisers", least=0
    )
    weight_decay_norm_anneal: bool = _option(
        False, "let lambda fall geometrically from --weight-decay-norm-init while the KL coefficient rises"
    )
    weight_decay_norm_init: float = _option(1.0, "lambda at the start, when annealed", above=0)
    kl_anneal_portion: float = _option(
        0.3,
        "part of the run over which the KL coefficient rises to --kl-max-coeff",
        unit="fraction of the run",
        least=0,
        most=1,
    )
    kl_const_portion: float = _option(
        1e-4,
        "part of the run before the KL coefficient starts to rise",
        unit="fraction of the run",
        least=0,
        most=1,
    )
    kl_const_coeff: float = _option(
        1e-4, "smallest KL coefficient, which is that of --kl-const-portion", least=0, most=1
    )
    kl_max_coeff: float = _option(
        1.0,
        "largest KL coefficient, which is that of the rest of the run; below 1 the KL stays balanced to the end",
        above=0,
        most=1,
    )
    kl_balance: bool = _option(True, "balance the KL over the groups while its coefficient is below 1")
    autocast: str | None = _option(
        None,
        "precision of the network: none (fp32), bf16, fp16 (with a gradient scaler), or auto: on a GPU bf16 where it computes "
        "in it and fp16 elsewhere, on a CPU none",
    )
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
        None, "largest norm of the gradient, longer ones are scaled down; none clips nothing", above=0
    )
    skip_grad_norm: float | None = _option(
        None,
        "skip a step whose gradient has a larger norm (before --grad-clip): it changes nothing and is counted; none skips none",
        above=0,
    )
    ema: float | None = _option(
        None,
        "decay of an exponential moving average of the weights, such as 0.9999, kept beside them and evaluated in their place; "
        "none keeps no average",
    )
    horizontal_flip: bool = _option(False, "mirror every second image, at random")
    seed: int = _option(
        0, "seed of initialisation, noise and data order (0 to 2^63-1)", least=0, most=2**63 - 1
    )
    workers: int | None = _option(
        None,
        "extra threads that read images; none takes 1 to 4, by the CPUs, for images that are decoded, and 0 for arrays",
        unit="threads",
        least=0,
        most=1024,
    )
    threads: int | None = _option(
        None,
        "CPU threads of PyTorch; none leaves PyTorch's choice. Resuming keeps it",
        unit="threads",
        least=1,
    )
    max_bad_steps: int = _option(
        10,
        "steps in a row with a non-finite loss or gradient before training stops",
        unit="steps",
        least=1,
    )
    checkpoint_every: int = _option(
        500, "a checkpoint every so many steps, and one at the end of the run", unit="steps", least=1
    )
    keep: int = _option(
        0,
        "numbered checkpoints (checkpoint-<step>.pt) to keep beside the newest, the last so many of this run; 0 for none",
        unit="checkpoints",
        least=0,
    )
    log_every: int = _option(10, "a line in metrics.jsonl every so many steps", unit="steps", least=1)
    validate_every: int | None = _option(
        None,
        "a validation every so many epochs and at the end, on the validation part of the data or else the test part, which "
        "keeps checkpoint-best.pt; 0 for none. none does it every epoch in runs of up to 50 epochs, every 20 epochs in "
        "longer ones, and not at all in runs shorter than an epoch",
        unit="epochs",
        least=0,
    )
    validate_images: int | None = _option(
        1000,
        "images of a validation, at equal distances over the part; none takes all",
        unit="images",
        least=1,
    )
    validate_samples: int = _option(
        10, "draws of the importance-weighted bound in a validation", unit="draws", least=1
    )
    validate_final_samples: int = _option(
        50,
        "draws of one more evaluation at the end of a run with validation; 0 for none",
        unit="draws",
        least=0,
    )
    sample_every: int = _option(
        0,
        "a grid of samples (samples-<step>.png) every so many steps; 0 only at the end",
        unit="steps",
        least=0,
    )
    sample_temperature: float = _option(
        1.0, "temperature of the samples drawn while training and at the end", least=0
    )
    sample_readjust_passes: int = _option(
        0,
        "batch-norm readjustment passes before samples are drawn; 0 for none",
        unit="passes of 16 images",
        least=0,
    )
    tensorboard: bool = _option(False, "also write TensorBoard event files (needs the tensorboard package)")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if isinstance(value, numpy.generic):
                value = value.item()
                object.__setattr__(self, field.name, value)
            self._check_type(field.name, value, str(field.type))
            check_bounds(
                f"TrainingConfig: {field.name}",
                value,
                least=limits["least"],
                most=limits["most"],
                above=limits["above"],
            )
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"TrainingConfig: accumulate ({self.accumulate}) must not exceed batch_size ({self.batch_size})"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"TrainingConfig: ema must be greater than 0 and less than 1, got {self.ema}")
        if self.learning_rate_min > self.learning_rate:
            raise ValueError(
                f"TrainingConfig: learning_rate_min ({self.learning_rate_min}) must not exceed "
                f"learning_rate ({self.learning_rate})"
            )
        if self.kl_const_coeff > self.kl_max_coeff:
            raise ValueError(
                f"TrainingConfig: kl_const_coeff ({self.kl_const_coeff}) must not exceed "
                f"kl_max_coeff ({self.kl_max_coeff})"
            )
        if self.autocast not in (None, "auto", *DTYPES):
            raise ValueError(
                f"TrainingConfig: autocast must be None, 'auto', 'bf16' or 'fp16', got {self.autocast!r}"
            )
        if self.weight_decay_norm_anneal and self.weight_decay_norm <= 0:
            raise ValueError(
                "TrainingConfig: weight_decay_norm_anneal needs weight_decay_norm greater than 0, "
                f"got {self.weight_decay_norm}"
            )

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


def check_bounds(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
) -> None:
    """Raise ValueError starting with ``name`` unless ``value`` is None, no number, or finite and within the bounds."""
    if value is None or isinstance(value, (bool, str)):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if (least, most) == (0, 1) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above}, got {value!r}")
