"""What tests need of the package's private modules: one file to change when those do.

Only the tests whose subject is such a module import it themselves.
"""

from __future__ import annotations

from typing import Any

import pytest

import nvae_fast as nf
from nvae_fast.ops import _backend, _extension
from nvae_fast.ops._op import DEFINITIONS as DEFINITIONS  # operator -> its formula, fake and launcher

# "loaded", and then "path", "cpu_capability", ..., else "reason".
EXTENSION: dict[str, Any] = _extension.info()
needs_extension = pytest.mark.skipif(
    not EXTENSION["loaded"], reason=f"needs the C++ extension: {EXTENSION.get('reason')}"
)


def use_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the registered operators, with their own autograd, even where no fused kernel is."""
    every = {(op, device): "operator" for op in nf.backends() for device in _backend.DEVICES}
    monkeypatch.setattr(_backend, "_fused", every)


def set_kernel(
    monkeypatch: pytest.MonkeyPatch, op: str, kernel: str | None, *, device: str = "cpu", reason: str = ""
) -> None:
    """Record that ``kernel`` runs the operator on ``device``, or that for this reason none does."""
    if kernel is None:
        monkeypatch.delitem(_backend._fused, (op, device), raising=False)
        monkeypatch.setitem(_backend._absent, (op, device), reason)
    else:
        monkeypatch.setitem(_backend._fused, (op, device), kernel)
