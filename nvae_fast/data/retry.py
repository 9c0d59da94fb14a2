"""Reading again when a drive cannot be reached for a moment, and a clear error when it stays away."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger("nvae_fast.data")

T = TypeVar("T")

WAITS: tuple[float, ...] = (0.1, 0.4, 1.5, 4.0)  # seconds between two tries
# The process is short of something, or the path can never be opened: another try changes nothing.
_AT_ONCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)


def is_io_error(error: BaseException) -> bool:
    """Whether `error` comes from the operating system and so says nothing about what the file holds.

    Decoders raise OSError as well, without an error number.
    """
    return isinstance(error, OSError) and error.errno is not None


def retry(action: Callable[[], T], what: str) -> T:
    """The result of `action`, tried again while the operating system reports an error (ENOENT, EIO, ESTALE, ...).

    what: the file, for messages. Raises an OSError of the same number that names the file, after the last try.
    """
    for wait in (*WAITS, None):
        try:
            return action()
        except OSError as error:
            if error.errno is None:
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
