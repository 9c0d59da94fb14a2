"""The folder of a run: made, resumed or moved aside, never silently written over."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from nvae_fast.io import atomic_file
from nvae_fast.training import checkpoint


class RunFolderError(RuntimeError):
    """The run folder is not in the state the command needs; the message says what to do."""


def prepare(
    path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> tuple[Path, str | None]:
    """Make a run folder ready and return (folder, note), the note saying what was moved aside, or None.

    resume: it must hold a checkpoint. overwrite: what is there is renamed to `<name>.replaced-<time>`,
    nothing is deleted. Neither: it must not exist, or be empty. Raises RunFolderError before anything is
    changed.
    """
    folder = Path(path)
    if resume and overwrite:
        raise RunFolderError("--resume and --overwrite exclude each other: give one of them")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; give a folder for the run")
    occupied = folder.is_dir() and any(folder.iterdir())
    if resume:
        if not (folder / checkpoint.NAME).exists() and not (folder / checkpoint.PREVIOUS).exists():
            raise RunFolderError(
                f"nothing to resume: no {checkpoint.NAME} in {folder}; start without --resume, or check --out"
            )
        _check_writable(folder)
        checkpoint.remove_leftovers(folder)
        return folder, None
    note = None
    if occupied:
        if not overwrite:
            raise RunFolderError(
                f"run folder {folder} is not empty: --resume continues that run, --overwrite moves it aside "
                "first, --out names another folder"
            )
        note = move_aside(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"cannot make run folder {folder}: {error.strerror}; give another one with --out"
        ) from error
    _check_writable(folder)
    return folder, note


def move_aside(folder: Path) -> str:
    """Rename a folder to `<name>.replaced-<time>`, and return a sentence that says so."""
    aside = _free_name(folder)
    os.rename(folder, aside)
    return f"moved the old {folder} to {aside}"


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """A file of a run that cannot be written becomes a RunFolderError that says what is safe and how to go on."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}. Make room there, or make it writable, and continue. "
            f"{how_to_continue(Path(path).parent)}"
        ) from error


def how_to_continue(folder: Path) -> str:
    """A sentence with the newest whole checkpoint of a run folder and the options that go on from it."""
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        file = folder / name
        try:
            step = checkpoint.load(file)["progress"]["step"]
        except (checkpoint.CheckpointError, KeyError):
            continue
        copy = f" (copy it over {checkpoint.NAME} first)" if name == checkpoint.PREVIOUS else ""
        return f"The newest whole checkpoint is {file}, step {step}: --resume --out {folder} goes on from it{copy}"
    return f"There is no checkpoint in {folder} yet: start again with --overwrite"


def _check_writable(folder: Path) -> None:
    """Find out now, not at the first checkpoint an hour later."""
    try:
        with atomic_file(folder / ".write-test"):
            pass
        (folder / ".write-test").unlink()
    except OSError as error:
        raise RunFolderError(
            f"cannot write to run folder {folder}: {error.strerror}; make it writable, make room, or give another one "
            "with --out (nothing in it was changed)"
        ) from error


def _free_name(folder: Path) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = folder.resolve()
    candidate = base.with_name(f"{base.name}.replaced-{stamp}")
    count = 1
    while candidate.exists():
        count += 1
        candidate = base.with_name(f"{base.name}.replaced-{stamp}-{count}")
    return candidate
