"""The tests in this folder run Triton kernels in Triton's interpreter, on the CPU.

The interpreter must be chosen before Triton is imported, and afterwards nothing can be compiled. So these tests are a run of
their own: ``python -m pytest tests/triton``.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/triton needs a run of its own: python -m pytest tests/triton")
os.environ["TRITON_INTERPRET"] = "1"

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import interpreter

    interpreter.prepare()


def pytest_configure(config: pytest.Config) -> None:
    """numpy warns where the interpreter computes with infinities and NaN, which some of the tests are about."""
    for module in ("triton.runtime.interpreter", "interpreter"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse other tests beside these: they would meet the interpreter."""
    others = [item.nodeid for item in items if HERE not in item.path.parents]
    if others:
        raise pytest.UsageError(f"tests/triton needs a run of its own, without {others[0]}")
