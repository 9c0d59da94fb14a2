"""Defines the operators once per process, as PyTorch demands.

Some test runners and notebooks remove a package's modules from ``sys.modules`` and import it again. The modules that defined
the operators then come back instead of being executed a second time.
"""

from __future__ import annotations

import importlib
import sys

import torch

_MODULES = torch.ops.nvae_fast.__dict__.setdefault("modules", {})  # by name; lives as long as the operators
# The operators and what they import.
_PARTS = tuple(f"nvae_fast.{part}" for part in ("ops", "kernels", "distributed", "version", "_C"))

if not _MODULES:
    importlib.import_module("nvae_fast.ops._load")
    _MODULES.update((name, module) for name, module in sys.modules.items() if name.startswith(_PARTS))
sys.modules.update(_MODULES)
for _name, _module in _MODULES.items():
    _parent, _, _child = _name.rpartition(".")
    setattr(sys.modules[_parent], _child, _module)
