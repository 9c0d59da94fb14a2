"""Where the kernels of accelerate are known to be faster than PyTorch: tables of measurements, made by
``python -m benchmarks.parts`` and kept in the folder ``measured`` beside this file, one for each machine.

A row says how much faster a part was than its own forward, for one device, mode, dtype, layout and size. Kernels lose on
small inputs, where calls take the time. So only rows with about as many elements as the input or fewer count, and of those
the ones whose channels and pixels are nearest: the kernel runs where all of them say that it is faster by enough, in every
table that has rows of the part for that device, dtype, mode and layout. Where no table has the device and dtype, nothing is
known, and the kernel runs.
"""

from __future__ import annotations

import json
import math
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nvae_fast.ops import _backend

LEAST = 1.05  # of a speed-up: measurements on a busy machine are wrong by a few hundredths
# Microseconds. In a model the interpreter's part of a call costs tens of microseconds more than in the loop that measures it:
# other kernels evict its data from the caches. What remains of a smaller gain is nothing, or less.
SAVED = 50.0
OFTEN = 0.5
FOLDER = Path(__file__).with_name("measured")

FEWER = 1.25  # rows may have that many times the elements of the input

Sizes = tuple[float, float, float]  # logarithms to base 2 of elements, channels and pixels


class Speedup(NamedTuple):
    """What was measured of a part."""

    ratio: float  # the time of its own forward over that of the kernel
    microseconds: float = math.inf  # of its own forward; some tables do not say

    def is_enough(self) -> bool:
        """Return whether the kernel shall run."""
        return self.ratio >= LEAST and self.microseconds * (1 - 1 / self.ratio) >= SAVED


class Key(NamedTuple):
    """What rows are grouped by."""

    device: str
    dtype: str
    part: str
    mode: str  # "training": forward and backward; "evaluation": forward
    layout: str  # "contiguous" or "channels_last"


Table = dict[Key, list[tuple[Sizes, bool]]]  # at each size, whether the kernel is faster


@cache
def _tables() -> list[Table]:
    """One for each machine."""
    return [_table(json.loads(path.read_text())["rows"]) for path in sorted(FOLDER.glob("*.json"))]


def _table(rows: list[list[Any]]) -> Table:
    found: Table = {}
    for row in rows:
        key, (batch, channels, pixels), measured = row[:5], row[5:8], Speedup(*row[8:])
        found.setdefault(Key(*key), []).append((_sizes(batch, channels, pixels), measured.is_enough()))
    return found


@cache
def _measured(device: str, dtype: str) -> list[Table]:
    """The tables with rows for that device and dtype."""
    return [table for table in _tables() if any(key[:2] == (device, dtype) for key in table)]


def _sizes(batch: int, channels: int, pixels: int) -> Sizes:
    b, c, p = max(batch, 1), max(channels, 1), max(pixels, 1)
    return math.log2(b * c * p), math.log2(c), math.log2(p)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layout_name(x: torch.Tensor) -> str:
    """``"channels_last"`` or ``"contiguous"``."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return "contiguous"
    return "channels_last"


def wins(part: str, mode: str, x: torch.Tensor) -> bool:
    """Return whether the kernel of ``part`` runs for input ``x`` (B, C, H, W)."""
    kind, dtype = (
        "cpu" if x.is_cpu else x.device.type,
        x.dtype,
    )  # the type of a device is a new string each time
    if kind in _backend.DEVICES and dtype != torch.float64 and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return _wins(part, mode, kind, dtype, layout_name(x), x.shape)


# Every part asks in every call, so that only a look-up may remain. Inputs of many sizes do not fill the memory.
@lru_cache(maxsize=1 << 14)
def _wins(part: str, mode: str, device: str, dtype: torch.dtype, layout: str, shape: torch.Size) -> bool:
    name = _name(dtype)
    key = Key(device, name, part, mode, layout)
    batch, channels, height, width = shape
    size = _sizes(batch, channels, height * width)
    tables = _measured(device, name)
    voting = [table[key] for table in tables if key in table]
    return not tables or (bool(voting) and all(_wins_by(rows, size) for rows in voting))


def _wins_by(rows: list[tuple[Sizes, bool]], size: Sizes) -> bool:
    distances = [
        (sum(abs(a - s) for a, s in zip(at, size, strict=True)), is_faster)
        for at, is_faster in rows
        if at[0] <= size[0] + math.log2(FEWER)
    ]
    if not distances:
        return False
    nearest = min(distance for distance, _ in distances)
    return all(is_faster for distance, is_faster in distances if distance <= nearest + 1)


@cache
def often(part: str, device: str, dtype: torch.dtype, mode: str) -> bool:
    """Return whether the kernel of ``part`` runs for at least :data:`OFTEN` of the sizes measured in one of the layouts.

    Otherwise nothing is gained that would make up for asking in every call.
    """
    name = _name(dtype)
    tables = _measured(device, name)
    if not part or not tables:
        return True
    # A size that was measured on several machines must win on all of them.
    found: dict[Key, dict[Sizes, bool]] = {}
    for table in tables:
        for key, rows in table.items():
            if key[:4] == (device, name, part, mode):
                sizes = found.setdefault(key, {})
                for size, is_faster in rows:
                    sizes[size] = is_faster and sizes.get(size, True)
    return any(sum(sizes.values()) >= OFTEN * len(sizes) for sizes in found.values())


def mode_of(module: Any, x: torch.Tensor, normalises: bool) -> str:
    """``"training"`` where a backward pass may follow, or batch statistics are taken; else ``"evaluation"``."""
    backward = torch.is_grad_enabled() and (module.training or x.requires_grad)
    return "training" if backward or (normalises and module.training) else "evaluation"
