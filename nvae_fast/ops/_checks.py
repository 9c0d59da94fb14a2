"""The checks that several rooms share. Each raises an error that names the op, the argument, what was expected and
what came, before any output exists."""

from __future__ import annotations

import math
from typing import Any

import torch

from nvae_fast.ops.philox import as_seed

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(op: str, name: str, value: Any, *, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """``value`` is a dense tensor of one of ``dtypes``."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(
            f"{op}: {name} must have one of the dtypes {[str(d) for d in dtypes]}, got {value.dtype}"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")


def feature_map(op: str, name: str, value: Any) -> None:
    """``value`` is a floating tensor (B, C, H, W)."""
    tensor(op, name, value)
    if value.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape (B, C, H, W), got {tuple(value.shape)}")


def map_of(op: str, name: str, value: Any, channels: int) -> None:
    """``value`` is a floating tensor (B, ``channels``, H, W)."""
    feature_map(op, name, value)
    if value.shape[1] != channels:
        raise ValueError(f"{op}: {name} must have {channels} channels, got {tuple(value.shape)}")


def shape(
    op: str, name: str, value: Any, expected: tuple[int, ...], like: torch.Tensor | None = None
) -> None:
    """``value`` is a floating tensor of ``expected`` shape, on the device of ``like``."""
    tensor(op, name, value)
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(value.shape)}")
    if like is not None:
        device(op, name, value, like)


def device(op: str, name: str, value: torch.Tensor, like: torch.Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the first argument, got {value.device}")


def packed(op: str, name: str, value: Any) -> None:
    """``value`` is packed raw parameters (B, 2Z, H, W)."""
    feature_map(op, name, value)
    if value.shape[1] % 2:
        raise ValueError(
            f"{op}: {name} must have an even number of channels 2Z (raw mu, then raw log sigma), got {value.shape[1]}"
        )


def squashing(op: str, clamp: float | None, sigma_floor: float) -> None:
    """``clamp`` is None or a positive number, ``sigma_floor`` a finite number >= 0."""
    if clamp is not None and not (isinstance(clamp, (int, float)) and 0 < clamp < math.inf):
        raise ValueError(f"{op}: clamp must be None or a finite number > 0, got {clamp!r}")
    if not (isinstance(sigma_floor, (int, float)) and 0 <= sigma_floor < math.inf):
        raise ValueError(f"{op}: sigma_floor must be a finite number >= 0, got {sigma_floor!r}")


def temperature(op: str, value: float, *, zero: bool) -> None:
    """``value`` is a finite number > 0 (>= 0 when ``zero`` is allowed)."""
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf) or (value == 0 and not zero):
        raise ValueError(
            f"{op}: temperature must be a finite number {'>=' if zero else '>'} 0, got {value!r}"
        )


def seed(op: str, value: Any, device: torch.device) -> torch.Tensor:
    """``value`` as a 0-d int64 tensor on ``device``; None takes a fresh one from its default generator."""
    try:
        return as_seed(value, device)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{op}: {str(error).removeprefix('seed: ')}") from None


def one_of(op: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {list(allowed)}, got {value!r}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and transcendental functions are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
