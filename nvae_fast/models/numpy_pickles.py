"""NumPy scalars, arrays and dtypes in pickles, whichever major version of NumPy wrote them.

NumPy's own constructors take sizes and states from the pickle without limit. Those here take numbers and strings alone,
and no more of them than there are bytes.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

import numpy as np

_CODE = re.compile(r"\?|[biufc]\d{1,2}|[SU]\d{1,6}")
_SCALARS = (
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64", "bool_",
)  # fmt: skip


class StandIn:
    """Takes the place of a class in a pickle; ``value`` is what :func:`unwrap` puts in its place."""

    value: Any = None


class Dtype(StandIn):
    """Takes the place of numpy.dtype in a pickle; ``value`` is the dtype."""

    def __init__(self, code: Any, *flags: Any) -> None:
        if not isinstance(code, str) or not _CODE.fullmatch(code):
            raise ValueError(f"NumPy values of type {code!r:.40} are not plain numbers or strings")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a NumPy dtype has an unknown state")
        if any(part is not None for part in state[2:5]):
            raise ValueError("structured NumPy dtypes are not plain numbers or strings")
        self.value = self.value.newbyteorder(state[1])


class Array(StandIn):
    """Takes the place of numpy.ndarray in a pickle; ``value`` is the array."""

    value: np.ndarray = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran, data = state[-4:]
        if not isinstance(dtype, Dtype) or not isinstance(data, bytes):
            raise ValueError("a NumPy array does not hold plain numbers or strings")
        flat = np.frombuffer(data, dtype.value).copy()
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def scalar(dtype: Dtype, data: bytes) -> Any:
    """Take the place of numpy.core.multiarray.scalar."""
    if not isinstance(dtype, Dtype) or not isinstance(data, bytes) or len(data) != dtype.value.itemsize:
        raise ValueError("a NumPy scalar does not hold a plain number or string")
    return np.frombuffer(data, dtype.value)[0]


def reconstruct(kind: Any, *shape_and_code: Any) -> Array:
    """Take the place of numpy.core.multiarray._reconstruct, without memory of the size asked for."""
    return Array()


GLOBALS: dict[str, Any] = {
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    **{f"numpy.{core}.multiarray.scalar": scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": reconstruct for core in ("core", "_core")},
    **{f"numpy.{name}": getattr(np, name) for name in _SCALARS},
    "numpy.bool": np.bool_,
}


def unwrap(value: Any) -> Any:
    """``value`` with their values in place of all stand-ins, in containers too, each changed in place."""
    return _unwrap(value, {})


def _unwrap(value: Any, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, StandIn):
        done[id(value)] = None  # where it holds itself
        done[id(value)] = _unwrap(value.value, done)
        return done[id(value)]
    if isinstance(value, tuple) and type(value) is tuple:
        done[id(value)] = value
        parts = [_unwrap(item, done) for item in value]
        changed = any(new is not old for new, old in zip(parts, value, strict=True))
        done[id(value)] = tuple(parts) if changed else value
        return done[id(value)]
    items: dict[Any, Any] | None = None
    if isinstance(value, argparse.Namespace):
        items = vars(value)
    elif isinstance(value, dict):
        items = value
    done[id(value)] = value
    if items is not None:
        for key, item in list(items.items()):
            items[key] = _unwrap(item, done)
    elif isinstance(value, list):
        value[:] = [_unwrap(item, done) for item in value]
    return value
