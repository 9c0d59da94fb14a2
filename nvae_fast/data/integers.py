"""Integers of NumPy as arguments."""

from __future__ import annotations

from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """``value`` as an int when it is a NumPy integer; anything else as it is, for the caller to judge."""
    return int(value) if isinstance(value, np.integer) else value
