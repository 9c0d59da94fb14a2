"""Optional packages, imported when first needed."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, package: str, purpose: str) -> ModuleType:
    """Import `module`; ModuleNotFoundError says what needs it and what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != top:
            raise  # installed, but something it needs itself is missing: its own message is the useful one
        raise ModuleNotFoundError(
            f"{purpose} needs the package {package}: pip install {package}", name=error.name
        ) from error
