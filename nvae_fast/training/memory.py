"""Memory of the C library, from which PyTorch takes that of tensors on the CPU."""

from __future__ import annotations

import ctypes
import os

# Options of glibc's mallopt: how much freed memory is kept (-1: all), and the size from which on a block is mapped by itself.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
OPTIONS = {M_TRIM_THRESHOLD: -1, M_MMAP_THRESHOLD: 2**30}
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> None:
    """Have the C library keep the memory that tensors on the CPU free, where it is glibc and its user has not set it up.

    By default it gives large blocks back to the system and then pays page faults for the next ones: about a tenth of a training
    step. The process takes as much memory as before, but holds it until it ends.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(name in os.environ for name in _VARIABLES) or "threshold" in tunables:
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None:
        for option, value in OPTIONS.items():
            set_option(option, value)
