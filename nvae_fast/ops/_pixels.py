"""Checks that images are in the range that a function takes, before it computes something else of them."""

from __future__ import annotations

import warnings

import torch

from nvae_fast.ops import _backend

# Dequantisation noise of a grey level (1/256) and the rounding of half precision stay within it.
TOLERANCE = 0.01


def can_read(x: torch.Tensor) -> bool:
    """Whether the values of x can be looked at: not while compiling, tracing or transforming, nor on the meta device."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _backend.transforms_active()
        or type(x) not in (torch.Tensor, torch.nn.Parameter)  # FakeTensor, DTensor, and what is no tensor
        or not x.is_floating_point()
        or x.is_meta
        or x.numel() == 0
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def check_unit_range(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless the values of x are in [0, 1]. NaN passes; on a GPU this waits for the device."""
    outside = _outside(x, 0.0)
    if outside is not None:
        low, high = outside
        advice = (
            f"divide by 255 ({name} / 255)"
            if low >= 0 and high <= 255.5
            else f"use ({name} + 1) / 2"
            if low >= -1 - TOLERANCE and high <= 1 + TOLERANCE
            else "undo the normalisation of the images"
        )
        raise ValueError(
            f"{op}: {name} must hold images in [0, 1], got values from {low:.4g} to {high:.4g}: {advice}"
        )


def check_symmetric_range(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless the values of x are in [-1, 1]; otherwise as :func:`check_unit_range`."""
    outside = _outside(x, -1.0)
    if outside is not None:
        low, high = outside
        advice = (
            f"use {name} / 127.5 - 1"
            if low >= 0 and high <= 255.5
            else "undo the normalisation of the images"
        )
        raise ValueError(
            f"{op}: {name} must hold images in [-1, 1], got values from {low:.4g} to {high:.4g}: {advice}"
        )


def _outside(x: torch.Tensor, lowest: float) -> tuple[float, float] | None:
    """Smallest and largest value of x where one is outside [lowest, 1], beyond the tolerance."""
    if not can_read(x):
        return None
    low, high = torch.stack(torch.aminmax(x.detach())).tolist()
    return (low, high) if low < lowest - TOLERANCE or high > 1 + TOLERANCE else None


def warn_if_gray(op: str, name: str, x: torch.Tensor) -> None:
    """Warn when images for a Bernoulli likelihood have values between 0 and 1."""
    if can_read(x) and bool(((x > 0) & (x < 1)).any()):
        warnings.warn(
            f"{op}: {name} has values between 0 and 1, and the likelihood is Bernoulli, whose images are 0 and 1: the "
            "result is a cross-entropy, not a log-probability; binarise the images, or choose another likelihood",
            stacklevel=4,
        )
