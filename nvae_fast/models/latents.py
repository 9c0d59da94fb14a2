"""Latent variables between two images, and temperatures from the coarsest group to the finest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nvae_fast.ops import _checks

MODES = ("spherical", "linear")
# Below this sine of the angle between two vectors, the straight line and the arc are the same in float64.
_PARALLEL = 1e-7


def linear_temperatures(first: float, last: float, groups: int) -> list[float]:
    """Temperatures from ``first`` at the coarsest group to ``last`` at the finest, in equal steps."""
    return [first + (last - first) * i / max(groups - 1, 1) for i in range(groups)]


def interpolate_latents(
    start: Sequence[torch.Tensor],
    end: Sequence[torch.Tensor],
    fraction: float,
    *,
    mode: str = "spherical",
) -> list[torch.Tensor]:
    """Latents at ``fraction`` of the way from ``start`` to ``end``, in every group of every image.

    With ``w`` the angle between the latents a and b of an image in a group, seen as vectors of Z H W numbers::

        spherical:  z = (sin((1 - t) w) a + sin(t w) b) / sin(w)       linear:  z = (1 - t) a + t b

    A draw of a normal distribution of many dimensions has nearly always the same length, and two draws are nearly orthogonal.
    The middle of the straight line between them is shorter by sqrt(1/2), as if drawn at temperature 0.7. The arc keeps the
    length. Where a and b are parallel both are the same. At 0 and 1 the result is ``start`` and ``end`` exactly.

    Args:
        start, end: latents (B, Z, H, W) of every group, as :meth:`NVAE.encode` returns them; for
            :meth:`NVAE.decode`. Computed in float64, returned in the dtype of ``start``.
        fraction: t, 0 to 1.
        mode: "spherical" or "linear".

    Raises:
        TypeError, ValueError: groups, shapes, dtypes or devices do not fit, or ``fraction`` or ``mode`` is something else.
    """
    op = "interpolate_latents"
    _checks.one_of(op, "mode", mode, MODES)
    if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise ValueError(f"{op}: fraction must be a number from 0 to 1, got {fraction!r}")
    for name, value in (("start", start), ("end", end)):
        if isinstance(value, torch.Tensor) or not isinstance(value, Sequence):
            raise TypeError(
                f"{op}: {name} must be a sequence with one tensor per group, got {type(value).__name__}"
            )
    if len(start) != len(end):
        raise ValueError(f"{op}: end must have as many groups as start ({len(start)}), got {len(end)}")
    for i, (a, b) in enumerate(zip(start, end, strict=True)):
        _checks.feature_map(op, f"start[{i}]", a)
        _checks.shape(op, f"end[{i}]", b, tuple(a.shape), a)
        if b.dtype != a.dtype:
            raise TypeError(f"{op}: end[{i}] must have start[{i}]'s dtype {a.dtype}, got {b.dtype}")
    return [_between(a, b, fraction, mode) for a, b in zip(start, end, strict=True)]


def _between(a: torch.Tensor, b: torch.Tensor, fraction: float, mode: str) -> torch.Tensor:
    x, y = a.double(), b.double()
    left: Any = 1 - fraction
    right: Any = fraction
    if mode == "spherical":
        lengths = [t.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for t in (x, y)]
        u, v = x / lengths[0], y / lengths[1]
        # The angle by its half: exact also where the cosine is nearly 1.
        apart, together = ((u + sign * v).flatten(1).norm(dim=1) for sign in (-1, 1))
        angle = 2 * torch.atan2(apart, together).view(-1, 1, 1, 1)
        sine = torch.sin(angle)
        arc = sine > _PARALLEL  # neither for parallel vectors nor for zeros, whose angle is NaN
        left = torch.where(arc, torch.sin(left * angle) / sine, left)
        right = torch.where(arc, torch.sin(right * angle) / sine, right)
    return (left * x + right * y).to(a.dtype)
