"""Argument checks that operators share. Each raises an error that names the operator, the argument, what was expected and
what was given, before any output exists. A check that passes costs one Python call: a model makes thousands per step."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(op: str, name: str, value: Any, *, dtypes: tuple[torch.dtype, ...] = FLOATING) -> None:
    """``value`` is a dense tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}{how_to_convert(value)}"
        )
    if value.dtype not in dtypes:
        raise TypeError(
            f"{op}: {name} must have one of the dtypes {[str(d) for d in dtypes]}, got {value.dtype}"
        )
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")


def how_to_convert(value: Any) -> str:
    """What to do with an array of NumPy that is given in place of a tensor, as the end of a message; else empty."""
    return ": torch.from_numpy makes a tensor of it" if type(value).__module__ == "numpy" else ""


def feature_map(op: str, name: str, value: Any) -> None:
    """``value`` is a floating tensor (B, C, H, W)."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATING or value.layout is not torch.strided:
        tensor(op, name, value)
    if value.dim() != 4:
        raise ValueError(f"{op}: {name} must have shape (B, C, H, W), got {tuple(value.shape)}")


def channels(op: str, name: str, value: Any, expected: int) -> None:
    """``value`` is a floating tensor (B, C, H, W) with C ``expected`` channels."""
    feature_map(op, name, value)
    if value.shape[1] != expected:
        raise ValueError(f"{op}: {name} must have {expected} channels, got {tuple(value.shape)}")


def shape(op: str, name: str, value: Any, expected: tuple[int, ...], like: Tensor | None = None) -> None:
    """``value`` is a floating tensor of ``expected`` shape, on the device of ``like``."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATING or value.layout is not torch.strided:
        tensor(op, name, value)
    if value.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {tuple(expected)}, got {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        device(op, name, value, like)


def shapes(op: str, like: Tensor, values: Iterable[tuple[str, Any, tuple[int, ...]]]) -> None:
    """:func:`shape` of several values, each with its name and size."""
    for name, value, expected in values:
        if not isinstance(value, Tensor) or value.shape != expected or value.device != like.device:
            shape(op, name, value, expected, like)
        if value.dtype not in FLOATING or value.layout is not torch.strided:
            tensor(op, name, value)


def vectors(op: str, like: Tensor, **values: Tensor | None) -> None:
    """Each of ``values`` is None, or a floating tensor (C,), C the channels of ``like``, on its device."""
    expected = like.shape[1:2]
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != expected or value.device != like.device:
            shape(op, name, value, tuple(expected), like)
        if value.dtype not in FLOATING or value.layout is not torch.strided:
            tensor(op, name, value)


def together(op: str, **values: Tensor | None) -> None:
    """All of ``values`` are None, or none is."""
    given = [name for name, value in values.items() if value is not None]
    if given and len(given) < len(values):
        raise ValueError(f"{op}: {' and '.join(values)} must be given together, got only {', '.join(given)}")


def device(op: str, name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device} like the first argument, got {value.device}")


def packed(op: str, name: str, value: Any) -> None:
    """``value`` is packed raw parameters (B, 2Z, H, W)."""
    feature_map(op, name, value)
    if value.shape[1] % 2:
        raise ValueError(
            f"{op}: {name} must have an even number of channels 2Z (raw mu, then raw log sigma), got {value.shape[1]}"
        )


def shown(value: Any) -> str:
    """``value`` as an error message gives it: plain values as they are written, of anything else the type."""
    return (
        repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
    )


def squashing(op: str, clamp: float | None, sigma_floor: float) -> None:
    """``clamp`` is None or a positive number, ``sigma_floor`` a finite number >= 0."""
    if clamp is not None and not (isinstance(clamp, (int, float)) and 0 < clamp < math.inf):
        raise ValueError(f"{op}: clamp must be None or a finite number > 0, got {shown(clamp)}")
    if not (isinstance(sigma_floor, (int, float)) and 0 <= sigma_floor < math.inf):
        raise ValueError(f"{op}: sigma_floor must be a finite number >= 0, got {shown(sigma_floor)}")


def temperature(op: str, value: float, *, zero: bool, name: str = "temperature") -> None:
    """``value`` is a finite number > 0 (>= 0 when ``zero`` is allowed)."""
    if not (isinstance(value, (int, float)) and 0 <= value < math.inf) or (value == 0 and not zero):
        raise ValueError(
            f"{op}: {name} must be a finite number {'>=' if zero else '>'} 0, got {shown(value)}"
        )


def noise_or_seed(op: str, packed: Tensor, noise: Tensor | None, given: int | Tensor | None) -> Tensor | None:
    """The seed tensor to draw the noise of ``packed`` (B, 2Z, H, W) from, or None where ``noise`` (B, Z, H, W) is given."""
    if noise is None:
        return seed(op, given, packed.device)
    if given is not None:
        raise ValueError(f"{op}: give either noise or seed, not both")
    b, channels, h, w = packed.shape
    shape(op, "noise", noise, (b, channels // 2, h, w), packed)
    return None


def seed(op: str, value: Any, device: torch.device | str | None) -> Tensor:
    """``value`` as a 0-d int64 tensor on ``device``: an int is taken mod 2^64, None draws a fresh one from the device's default
    generator, so that ``torch.manual_seed`` governs it."""
    if value is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{op}: a seed tensor must be int64, got {value.dtype}")
        if value.dim() != 0:
            raise ValueError(f"{op}: a seed tensor must be 0-d, got shape {tuple(value.shape)}")
        if device is not None and device != value.device:
            wanted = torch.device(device)
            if wanted.type != value.device.type or wanted.index not in (None, value.device.index):
                raise ValueError(
                    f"{op}: the seed tensor must be on {device}, got {value.device}; moving it would synchronise"
                )
        return value
    if isinstance(value, (bool, float)):
        raise TypeError(f"{op}: seed must be an int or a 0-d int64 tensor, got {type(value).__name__}")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)  # NumPy integers
        except TypeError:
            message = f"{op}: seed must be an int or a 0-d int64 tensor, got {type(value).__name__}"
            raise TypeError(message) from None
    if not -(2**63) <= value < 2**63:
        value = (value + 2**63) % 2**64 - 2**63  # the int64 with the same bits
    return torch.full((), value, dtype=torch.int64, device=device)


def whole(op: str, name: str, value: Any) -> int:
    """``value`` as an int. NumPy integers are accepted; a bool or a float is not."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{op}: {name} must be an int, got {shown(value)}")


def choices(op: str, allowed: tuple[int, ...], **values: int) -> tuple[int, ...]:
    """Each of ``values`` as an int (see :func:`whole`) of those ``allowed``."""
    for name, value in values.items():
        if value.__class__ is not int:
            values[name] = whole(op, name, value)
        if values[name] not in allowed:
            one_of(op, name, values[name], allowed)
    return tuple(values.values())


def size(op: str, name: str, value: Any) -> int:
    """``value`` as an int >= 0."""
    value = plain(value)
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    return value  # type: ignore[return-value]


def plain(value: Any) -> Any:
    """A NumPy integer as an int; anything else as it is, for the caller to judge."""
    # setup.py imports this module where NumPy may be missing; NumPy registers its integers as Integral.
    return int(value) if isinstance(value, Integral) and not isinstance(value, int) else value


def flag(op: str, name: str, value: Any) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {shown(value)}")


def one_of(op: str, name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {list(allowed)}, got {shown(value)}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and transcendental functions are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
