"""Repairs of Triton's interpreter, where it differs from a processor or from numpy."""

from __future__ import annotations

from typing import Any

import numpy as np


def prepare() -> None:
    """Apply them, in a process that chose the interpreter before Triton was imported.

    A loop may run to a number that a kernel loaded: Triton 3.6 to 3.8 take ``int()`` of an array with one element, which is an
    error since numpy 2.4 unless the array has no dimensions. Triton 3.9 does what is done here.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
    if hasattr(interpreter.InterpreterBuilder, "create_fma"):
        interpreter.InterpreterBuilder.create_fma = _fma


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """The interpreter multiplies and rounds; a processor's fma does not round in between, and the kernels rely on it."""
    exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return type(x)(exact.astype(x.data.dtype), x.dtype)
