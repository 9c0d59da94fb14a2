"""The folder of a run: it is created, resumed, or renamed to make place for a new one; nothing in it is overwritten."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvae_fast.io import atomic_file
from nvae_fast.training import checkpoint

fcntl: Any
try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_locked: set[Path] = set()  # by this process


class RunFolderError(RuntimeError):
    """A run folder cannot be used as requested; the message says what to do."""


def prepare(
    path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> tuple[Path, str | None]:
    """Prepare a run folder and return (folder, note); the note says what was renamed, None when nothing was.

    resume: it must hold a checkpoint; where the newest is damaged, the previous one takes its place and the damaged one is
    kept under another name. overwrite: what is there is renamed to `<name>.replaced-<time>`,
    nothing is deleted. Neither: it must not exist, or be empty. Raises RunFolderError before anything is
    changed.
    """
    folder = Path(path)
    if resume and overwrite:
        raise RunFolderError("--resume and --overwrite exclude each other: give one of them")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; give a folder for the run")
    occupied = folder.is_dir() and any(file.name != LOCK for file in folder.iterdir())
    if resume:
        if not has_checkpoint(folder):
            raise RunFolderError(
                f"nothing to resume: no {checkpoint.NAME} in {folder}; start without --resume, or check --out"
            )
        _check_writable(folder)
        checkpoint.remove_leftovers(folder)
        return folder, checkpoint.recover(folder)
    note = None
    if occupied:
        if not overwrite:
            raise RunFolderError(
                f"run folder {folder} is not empty: --resume continues that run, --overwrite moves it aside "
                "first, --out names another folder"
            )
        note = move_aside(folder)
    make(folder)
    _check_writable(folder)
    return folder, note


def make(folder: Path) -> None:
    """Make a run folder where there is none. Raises RunFolderError when it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"cannot make run folder {folder}: {error.strerror}; give another folder (--out)"
        ) from error


def check_new(folder: Path) -> None:
    """Raise RunFolderError when a folder for a new run holds the checkpoint of another one."""
    if has_checkpoint(folder):
        raise RunFolderError(
            f"run folder {folder} holds the checkpoint of another run: give another folder, or state="
            "nvae_fast.training.checkpoint.load_training(folder) to continue that run"
        )


def move_aside(folder: Path) -> str:
    """Rename a folder to `<name>.replaced-<time>`, and return a sentence that says so.

    Raises RunFolderError when another process is training there.
    """
    with lock(folder):
        pass
    aside = _free_name(folder)
    os.rename(folder, aside)
    return f"moved the old {folder} to {aside}"


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a checkpoint to resume from."""
    return (folder / checkpoint.NAME).exists() or (folder / checkpoint.PREVIOUS).exists()


@contextlib.contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of a run folder, which one process at a time can do; the system releases it when the process ends.

    The lock is that of the file `.lock`, which is removed afterwards and means nothing by itself: one that a crash left
    behind is not locked. Has no effect inside another such block of this process. Where the file system has no locks, a
    warning says so. Raises RunFolderError when another process has the lock, or when the file cannot be written.
    """
    file = Path(path).resolve() / LOCK
    if file in _locked:
        yield
        return
    descriptor = _take(file)
    _locked.add(file)
    try:
        yield
    finally:
        _locked.discard(file)
        # Removed while it is locked, so that no other process loses the file that it has locked.
        if _is_at(descriptor, file):
            with contextlib.suppress(OSError):
                file.unlink()
        os.close(descriptor)


def _take(file: Path) -> int:
    """A descriptor of ``file`` that holds its lock."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunFolderError(
                f"cannot write to run folder {file.parent}: {error.strerror}; make it writable, free space, or give another "
                "one with --out"
            ) from error
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise RunFolderError(
                    f"another process{f' ({owner})' if owner else ''} is training in {file.parent}: wait until it has "
                    "ended, stop it, or give another folder with --out"
                ) from error
            warnings.warn(
                f"{file.parent} is on a file system without locks ({error.strerror}): take care that no other process "
                "trains in it",
                stacklevel=4,
            )
        if _is_at(descriptor, file):
            break
        os.close(descriptor)  # its owner has removed it since
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    return descriptor


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether ``file`` is the file that is open as ``descriptor``."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context manager that turns an OSError while writing ``path`` into a RunFolderError that says how to continue."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write {path}: {error.strerror or error}. Free disk space, or make it writable, and continue. "
            f"{how_to_continue(Path(path).parent)}"
        ) from error


def how_to_continue(folder: Path) -> str:
    """A sentence with the newest whole checkpoint of a run folder and the options that go on from it."""
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        file = folder / name
        try:
            step = checkpoint.load(file)["progress"]["step"]
        except (checkpoint.CheckpointError, KeyError, TypeError):
            continue
        copy = f" (copy it over {checkpoint.NAME} first)" if name == checkpoint.PREVIOUS else ""
        return f"The newest whole checkpoint is {file}, step {step}: --resume --out {folder} goes on from it{copy}"
    return f"There is no checkpoint in {folder} yet: start again with --overwrite"


def _check_writable(folder: Path) -> None:
    """Raise RunFolderError unless files can be written in ``folder``."""
    try:
        with atomic_file(folder / ".write-test"):
            pass
        (folder / ".write-test").unlink()
    except OSError as error:
        raise RunFolderError(
            f"cannot write to run folder {folder}: {error.strerror}; make it writable, free disk space, or give another one "
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
