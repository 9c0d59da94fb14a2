"""Reading again when a drive cannot be reached for a moment, and a clear error when it stays away."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

logger = logging.getLogger("nvae_fast.data")

T = TypeVar("T")

WAITS: tuple[float, ...] = (0.1, 0.4, 1.5, 4.0)  # seconds between two tries
# The process is short of something, or the path can never be opened: another try changes nothing.
_AT_ONCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)


def is_io_error(error: BaseException) -> bool:
    """Whether `error` comes from the operating system and so says nothing about what the file holds.

    Decoders raise OSError as well, without an error number, and EINVAL follows from a wrong offset in a file.
    """
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


@contextlib.contextmanager
def named(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn any error of a reader into a ValueError ``<path>: <what>: <error>``, but for those that name the path already.

    Readers of zip archives, of headers of arrays and of MATLAB files raise many kinds. Errors of the operating system
    and a lack of memory or of a package pass.
    """
    try:
        yield
    except Exception as error:
        passes = isinstance(error, MemoryError | ModuleNotFoundError) or is_io_error(error)
        if passes or str(error).startswith(os.fspath(path)):
            raise
        raise ValueError(f"{os.fspath(path)}: {what}: {error or type(error).__name__}") from error


def retry(action: Callable[[], T], what: str) -> T:
    """The result of `action`, tried again while the operating system reports an error (ENOENT, EIO, ESTALE, ...).

    what: the file, for messages. Raises an OSError of the same number that names the file, after the last try.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except OSError as error:
            if not is_io_error(error):
                raise
            reason = error.strerror or type(error).__name__
            if error.errno in _AT_ONCE:
                raise OSError(error.errno, f"{what}: {reason}") from error
            if wait is None:
                raise OSError(
                    error.errno,
                    f"{what}: {reason} (tried {len(WAITS) + 1} times in {sum(WAITS):g} s). No image was skipped: "
                    f"an image that cannot be reached is not a damaged one. Check the drive and the permissions, "
                    f"then start again",
                ) from error
            logger.warning("%s: %s; trying again in %g s", what, reason, wait)
            time.sleep(wait)
    raise AssertionError("unreachable")
