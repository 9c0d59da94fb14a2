"""Triton's interpreter in the process of a test, which chose it with TRITON_INTERPRET=1 before triton was imported."""

from __future__ import annotations

from typing import Any


def prepare() -> None:
    """Lets a loop run to a number that a kernel loaded, whatever numpy: Triton 3.6 to 3.8 take ``int()`` of an array with one
    element, which is an error since numpy 2.4 unless the array has no dimensions. Triton 3.9 does what is done here.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch
