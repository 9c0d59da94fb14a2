"""Memory that decoded images may take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

CACHE_BYTES = 1 << 30
"""The default bound of a cache of decoded images."""
_SHARE = 0.5  # of the memory that is free, in all processes of this machine together


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process could take without swapping or exceeding its container's bound; None where it is not known.

    root: where /proc and /sys are.
    """
    free: list[int] = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    group = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no bound
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(min(free), 0) if free else None


def fits(size: int, most: int) -> bool:
    """Whether a cache of ``size`` bytes is within the bound ``most``, and within half of the memory that is free.

    The processes that torchrun starts on a machine have a cache each.
    """
    if size > most:
        return False
    free = available_memory()
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return free is None or size * (int(processes) if processes.isdigit() else 1) <= _SHARE * free


def check_cache_bytes(value: int) -> int:
    """``value`` when it is a number of bytes, else ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"cache_bytes (--cache): expected a number of bytes of at least 0, got {value!r}")
    return value
