"""Writing files so that a crash or a full disk never destroys the one that was there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, sync: bool = True) -> Iterator[IO[bytes]]:
    """A binary file for writing that takes the name ``path`` only when the block ends without an error.

    The data go to a temporary file in the same folder (a rename is atomic only within one file system), are flushed and
    forced to disk, then renamed, and the rename is forced to disk. On an error the temporary file is removed and
    ``path`` is untouched. ``sync=False`` forces nothing to disk, for many files of which a lost one can be made again: after a
    power cut a file may be empty.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as handle:
            yield handle
            if sync:
                handle.flush()
                os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut, where the system can open folders."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_as(current: Path, previous: Path) -> None:
    """Give the current file a second name, so that at no moment the folder is without a whole checkpoint."""
    link = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
    with contextlib.suppress(FileNotFoundError):
        link.unlink()
    try:
        os.link(current, link)
    except OSError:
        # No hard links here (some network and FAT file systems): copy instead.
        shutil.copyfile(current, link)
        times = os.stat(current)
        with contextlib.suppress(OSError):
            os.utime(link, ns=(times.st_atime_ns, times.st_mtime_ns))
    try:
        os.replace(link, previous)
    except BaseException:
        with contextlib.suppress(OSError):
            link.unlink()
        raise
