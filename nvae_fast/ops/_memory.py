"""Running out of memory in a C++ kernel as PyTorch's own class of error.

The stable ABI lets a C++ kernel raise RuntimeError only (csrc/memory.h). Programs that retry with a smaller batch catch
``torch.OutOfMemoryError``, which is also ``torch.cuda.OutOfMemoryError``, a subclass of RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def reraise(error: RuntimeError) -> None:
    """Raise ``torch.OutOfMemoryError`` with the text of a kernel's ``error`` that says so; return for any other error."""
    if type(error) is RuntimeError and "out of memory" in str(error):
        raise torch.OutOfMemoryError(str(error)) from None


def translated(kernel: Callable[P, R]) -> Callable[P, R]:
    """``kernel`` with its errors translated by :func:`reraise`."""

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return kernel(*args, **kwargs)
        except RuntimeError as error:
            reraise(error)
            raise

    return call
