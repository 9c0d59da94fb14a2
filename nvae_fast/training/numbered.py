"""Numbered checkpoints: the last few of a run, beside the newest and the previous one.

A numbered checkpoint is a second name (a hard link, or a copy where there are none) of the newest checkpoint of a run folder.
`.numbered.json` lists those that the run has made, with their size and time of modification. Only files that are in
this list and unchanged are ever removed or replaced.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from nvae_fast.io import atomic_file, keep_as
from nvae_fast.training import checkpoint

RECORD = ".numbered.json"


def name_of(step: int) -> str:
    """The name of the numbered checkpoint of a step."""
    return f"checkpoint-{step:07d}.pt"


def keep(folder: Path, step: int, count: int) -> str | None:
    """Keep the newest checkpoint of a run folder, that of `step`, under its number, and the last `count` numbered ones.

    Removes those that the run has made before the last `count`. Does nothing for a count or step of 0. Returns a sentence
    where the name is taken by a file that the run has not made, which is left alone. Raises OSError when a file cannot be
    written.
    """
    if not count or not step:
        return None
    newest, target = folder / checkpoint.NAME, folder / name_of(step)
    made = _made(folder)
    if target.exists() and step not in made:
        return f"{target} was not made by this run and is left alone: step {step} gets no numbered checkpoint"
    # The order is that of making: a run that was set back may have made later steps before.
    made.pop(step, None)
    # Recorded first: a crash after it leaves a record without a file, which is dropped.
    made[step] = _facts(newest)
    _record(folder, made)
    keep_as(newest, target)
    made[step] = _facts(target)
    for old in list(made)[:-count]:
        with contextlib.suppress(FileNotFoundError):
            (folder / name_of(old)).unlink()
        del made[old]
    _record(folder, made)
    return None


def _made(folder: Path) -> dict[int, list[int] | None]:
    """{step: facts} of the numbered checkpoints that the run has made and that are unchanged."""
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        made = {int(step): facts for step, facts in recorded.items()}
    except (OSError, ValueError, AttributeError):
        return {}  # without a record no file is known to be the run's
    return {step: facts for step, facts in made.items() if _facts(folder / name_of(step)) == facts}


def _facts(file: Path) -> list[int] | None:
    """Size and time of modification of a file, None when there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _record(folder: Path, made: dict[int, list[int] | None]) -> None:
    with atomic_file(folder / RECORD) as handle:
        handle.write(json.dumps(made).encode())
