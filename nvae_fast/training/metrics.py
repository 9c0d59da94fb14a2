"""Metrics of training: averages over a few steps, written as lines of JSON and optionally to TensorBoard.

A line of `metrics.jsonl`: `step` (steps done) and `epoch`; the means since the last line of `loss`,
`reconstruction` and `kl` (nats per image), `spectral` and `batch_norm` (the regularisers, without lambda) and
`grad_norm`; `bits_per_dim` of reconstruction + kl; `kl_coefficient`, `lambda` and `learning_rate` of the last
step; `skipped_steps` since the last line; `images_per_second`; `seconds` of training so far.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

from nvae_fast.io import atomic_file
from nvae_fast.training.run_folder import writing
from nvae_fast.training.step import StepResult

NAME = "metrics.jsonl"
_AVERAGED = ("loss", "reconstruction", "kl", "spectral", "batch_norm", "grad_norm")


class Averages:
    """Means of the results of the steps since the last line. Skipped steps are counted, not averaged."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {}
        self.sums: dict[str, float] = dict(state.get("sums") or dict.fromkeys(_AVERAGED, 0.0))
        self.steps: int = state.get("steps", 0)
        self.skipped: int = state.get("skipped", 0)

    def add(self, result: StepResult) -> None:
        """Add the result of one step."""
        if result.skipped:
            self.skipped += 1
            return
        self.steps += 1
        for name in _AVERAGED:
            self.sums[name] += getattr(result, name)

    def means(self) -> dict[str, float | None]:
        """The averages, None when there was no step."""
        return {name: self.sums[name] / self.steps if self.steps else None for name in _AVERAGED}

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, from which a resumed run continues the averages."""
        return {"sums": dict(self.sums), "steps": self.steps, "skipped": self.skipped}


class MetricsLog:
    """`metrics.jsonl` of a run folder: one JSON object per line, flushed after every line.

    resume_step: keep only the lines up to this step; a killed run may have written lines after its last
    checkpoint, and those steps are repeated. None starts a new file. tensorboard: also write event files under
    `tensorboard/`. Raises RunFolderError when the file cannot be written, ImportError naming the package when
    TensorBoard is requested and missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.path = Path(folder) / NAME
        with writing(self.path):
            if resume_step is not None and self.path.exists():
                _keep_up_to(self.path, resume_step)
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


def _keep_up_to(path: Path, step: int) -> None:
    kept = [line for line in _whole_lines(path) if json.loads(line).get("step", 0) <= step]
    with atomic_file(path) as handle:
        handle.write("".join(line + "\n" for line in kept).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def require_tensorboard() -> Any:
    """TensorBoard's writer class. Raises ImportError naming the package when it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard is not installed: pip install tensorboard, or leave --tensorboard out"
        ) from error
    return SummaryWriter


def _board(folder: Path, resume_step: int | None) -> Any:
    purge = resume_step + 1 if resume_step is not None else None
    return require_tensorboard()(str(folder / "tensorboard"), purge_step=purge)
