"""Unpickling of arrays, strings, numbers and their containers. Nothing in a file is ever called.

CIFAR's Python version is pickled. Unpickling calls what the file names, so here a name makes a record that
keeps its arguments, and only the few names that numpy writes for an array are known.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np


class _Record:
    """What a known name was called with, and the state that was set afterwards. Equal to nothing."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments, self.state = name, arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Name:
    """A known name, which makes a record when it is called."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> Any:
        if self.name == "encode":  # how protocol 2 of Python 3 writes bytes
            text, encoding = arguments
            if isinstance(text, str) and encoding == "latin1":
                return text.encode("latin-1")
            raise pickle.UnpicklingError("encode: expected text and latin1")
        return _Record(self.name, arguments)


_KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.numeric", "_frombuffer"), ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"),
}  # fmt: skip


class _Unpickler(pickle._Unpickler):
    # The Python version: the C version reserves as much memory as an index in the file asks for.
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"the file names {module}.{name}; only arrays and strings are read")
        return _Name(name)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def _load_bytearray8(self: Any) -> None:
        """As the parent's, which makes as many bytes as the file says before it looks whether they are there."""
        (length,) = struct.unpack("<Q", self.read(8))
        data = self.read(length) if length < self._size else b""
        if len(data) != length:
            raise pickle.UnpicklingError(f"{length} bytes are announced, the file has {self._size}")
        self.append(bytearray(data))

    dispatch[pickle.BYTEARRAY8[0]] = _load_bytearray8

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._size = len(data)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("the file names an extension; only arrays and strings are read")


def _check_uint8(record: Any) -> None:
    """Raise pickle.UnpicklingError unless the record of a dtype is that of uint8; Python 2 wrote its name as bytes."""
    name = record.arguments[0] if isinstance(record, _Record) and record.arguments else None
    if name not in ("u1", b"u1"):
        raise pickle.UnpicklingError(f"an array of type {name!r}, expected u1 (uint8)")


def uint8_array(value: Any) -> np.ndarray:
    """The array of a value of :func:`loads`. Raises pickle.UnpicklingError when it is not one of uint8."""
    if not isinstance(value, _Record):
        raise pickle.UnpicklingError(f"expected an array, got {type(value).__name__}")
    if value.name == "_frombuffer":
        data, record, shape, order = value.arguments
        fortran = order == "F"
    elif value.name == "_reconstruct" and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, record, fortran, data = value.state
    else:
        raise pickle.UnpicklingError("expected an array, got another object of numpy")
    if isinstance(data, str):  # Python 2's strings
        data = data.encode("latin-1")
    _check_uint8(record)
    flat = np.frombuffer(data, dtype=np.uint8)
    return flat.reshape(shape, order="F" if fortran else "C")


def loads(data: bytes) -> Any:
    """The value that `data` pickles; arrays come as records for :func:`uint8_array`. Python 2's strings are bytes.

    Raises pickle.UnpicklingError when it names anything but an array, or is damaged.
    """
    try:
        return _Unpickler(data).load()
    except (pickle.UnpicklingError, MemoryError):
        raise
    except Exception as error:  # a damaged file may end in any kind
        raise pickle.UnpicklingError(f"damaged pickle: {type(error).__name__}: {error}") from error
