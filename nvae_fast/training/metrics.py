"""Metrics of training: averages over a few steps, written as lines of JSON and optionally to TensorBoard.

A line of `metrics.jsonl`: `step` (steps done) and `epoch`; the means since the last line of `loss`,
`reconstruction` and `kl` (nats per image), `spectral` and `batch_norm` (the regularisers, without lambda) and
`grad_norm`; `kl_per_group`, a list, and `active_per_group`, how many channels of each group's latent variable carry more
than 0.1 nats; `bits_per_dim` of reconstruction + kl; `kl_coefficient`, `lambda` and `learning_rate` of the last
step; `loss_scale` of fp16; `skipped_steps`, which were not finite, and `large_steps`, whose gradient norm exceeded
`skip_grad_norm`, since the last line; `images_per_second`; `seconds` of training so far.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nvae_fast.io import atomic_file
from nvae_fast.training.board import require_tensorboard, show_pictures
from nvae_fast.training.evaluation import ACTIVE_CHANNEL_NATS
from nvae_fast.training.run_folder import writing
from nvae_fast.training.step import StepResult

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

NAME = "metrics.jsonl"
_AVERAGED = ("loss", "reconstruction", "kl", "spectral", "batch_norm", "grad_norm")


class Averages:
    """Means of the results of the steps since the last line. Skipped steps are counted, not averaged."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.sums: dict[str, float] = dict(state.get("sums") or dict.fromkeys(_AVERAGED, 0.0))
        self.steps: int = state.get("steps", 0)
        # Checkpoints of earlier versions have none: then the line that they began has none either.
        self.channels: list[float] | None = state.get("channels", None if self.steps else [])
        self.skipped: int = state.get("skipped", 0)
        self.large: int = state.get("large", 0)

    def add(self, result: StepResult) -> None:
        """Add the result of one step."""
        if result.skipped:
            self.large += result.large
            self.skipped += not result.large
            return
        self.steps += 1
        for name in _AVERAGED:
            self.sums[name] += getattr(result, name)
        if self.channels is not None:
            before = self.channels or [0.0] * len(result.kl_per_channel)
            self.channels = [a + b for a, b in zip(before, result.kl_per_channel, strict=True)]

    def means(self) -> dict[str, float | None]:
        """The averages, None when there was no step."""
        return {name: self.sums[name] / self.steps if self.steps else None for name in _AVERAGED}

    def groups(self, count: int) -> dict[str, list[float] | list[int] | None]:
        """The KL and the number of active channels of each of `count` groups; None where there was no step to average."""
        if not self.channels or not self.steps:
            return {"kl_per_group": None, "active_per_group": None}
        means = torch.tensor(self.channels, dtype=torch.float64).view(count, -1) / self.steps
        active = (means > ACTIVE_CHANNEL_NATS).sum(1)
        return {"kl_per_group": means.sum(1).tolist(), "active_per_group": active.tolist()}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, from which a resumed run continues the averages."""
        return {
            "sums": dict(self.sums),
            "steps": self.steps,
            "skipped": self.skipped,
            "large": self.large,
            "channels": self.channels,
        }


class MetricsLog:
    """`metrics.jsonl` of a run folder: one JSON object per line, flushed after every line.

    resume_step: keep only the lines up to this step; a killed run may have written lines after its last
    checkpoint, and those steps are repeated. None starts a new file. keep: lower limits than resume_step for the lines
    with a value whose name begins so, see `Validation.unfinished`. tensorboard: also write event files under
    `tensorboard/`. Raises RunFolderError when the file cannot be written, ImportError naming the package when
    TensorBoard is requested and missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        keep: Mapping[str, int] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(folder) / NAME
        with writing(self.path):
            if resume_step is not None and self.path.exists():
                _keep_up_to(self.path, resume_step, keep or {})
            # Stays open until `close`.
            self._file = open(self.path, "a" if resume_step is not None else "w", encoding="utf-8")  # noqa: SIM115
        self._board = _board(Path(folder), resume_step) if tensorboard else None

    def write(self, record: dict[str, Any]) -> None:
        """Append one line. inf and nan, which JSON does not have, are written as null. Raises RunFolderError."""
        with writing(self.path):
            self._file.write(json.dumps({key: _plain(value) for key, value in record.items()}) + "\n")
            self._file.flush()
        if self._board is not None:
            step = record.get("step", 0)
            for key, value in record.items():
                if isinstance(value, (int, float)) and key not in ("step", "epoch"):
                    self._board.add_scalar(key, value, step)
                for group, part in enumerate(value if isinstance(value, list) else ()):
                    self._board.add_scalar(f"{key}/{group:02d}", part, step)

    def pictures(self, step: int, model: NVAE, dataset: Any, *, seed: int = 0) -> None:
        """Show samples at four temperatures, and reconstructions of the dataset's first images, in TensorBoard if it is on."""
        if self._board is not None:
            show_pictures(self._board, step, model, dataset, seed=seed)

    def close(self) -> None:
        """Close the files. Errors are ignored, since every line has been flushed."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics file, given by its path or its run folder. Incomplete lines are left out."""
    file = Path(path)
    file = file / NAME if file.is_dir() else file
    return [json.loads(line) for line in _whole_lines(file)]


def _whole_lines(file: Path) -> list[str]:
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            json.loads(line)
        except ValueError:
            continue
        lines.append(line)
    return lines


def _keep_up_to(path: Path, step: int, limits: Mapping[str, int]) -> None:
    def wanted(record: dict[str, Any]) -> bool:
        lower = [limits[start] for start in limits if any(name.startswith(start) for name in record)]
        return bool(record.get("step", 0) <= min([step, *lower]))

    kept = [line for line in _whole_lines(path) if wanted(json.loads(line))]
    with atomic_file(path) as handle:
        handle.write("".join(line + "\n" for line in kept).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _board(folder: Path, resume_step: int | None) -> Any:
    purge = resume_step + 1 if resume_step is not None else None
    return require_tensorboard()(str(folder / "tensorboard"), purge_step=purge)
