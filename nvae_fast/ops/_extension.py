"""Loads the compiled extension ``nvae_fast._C``, and keeps the reason where there is none.

Importing ``nvae_fast._C`` registers the C++ kernels with PyTorch's dispatcher; the schemas are defined in
Python. A binary made for other schemas is not loaded: its kernels would crash. Without the extension every
operator runs its formula, so nothing here raises. A missing extension is reported once, in a warning, unless it
was disabled on purpose.

Environment:
    NVAE_FAST_DISABLE_EXTENSION=1: behave as if the extension had not been built.
    NVAE_FAST_CPU_CAPABILITY=baseline|avx2|avx512: the highest vector instructions the C++ kernels may use.
        Read once; a level the processor lacks is lowered to what it has.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

CAPABILITIES = ("baseline", "avx2", "avx512")
NO_CUDA = (
    "the C++ extension was built without its CUDA sources (nvcc was not found, the PyTorch it was built for has no CUDA, or "
    "NVAE_FAST_NO_CUDA)"
)
REBUILD = (
    "`python setup.py build_ext --inplace` in the sources, or reinstall with a C++ compiler at hand "
    "(pip install --force-reinstall --no-deps --no-cache-dir)"
)
# What is lost without it.
LOST = (
    "Lost without it: the C++ kernels. Every operation on the CPU, and depthwise_conv2d on the GPU, runs in plain PyTorch "
    "instead: the same results, slower and with more memory"
)

# setup.py writes this file beside the package when it could not build the extension.
_BUILD_REPORT = Path(__file__).resolve().parent.parent / "_build.json"

_module: ModuleType | None = None
_reason: str | None = None
_tried = False


def load() -> bool:
    """Import the extension once; True when its kernels are registered. Never raises."""
    global _module, _reason, _tried
    if _tried:
        return _module is not None
    _tried = True
    if os.environ.get("NVAE_FAST_DISABLE_EXTENSION", "") not in ("", "0"):
        _reason = "the C++ extension is disabled by NVAE_FAST_DISABLE_EXTENSION"
        return False
    asked = os.environ.get("NVAE_FAST_CPU_CAPABILITY", "")
    if asked and asked not in CAPABILITIES:
        warnings.warn(
            f"NVAE_FAST_CPU_CAPABILITY: expected one of {', '.join(CAPABILITIES)}, got {asked!r}; ignored",
            stacklevel=2,
        )
    try:
        _reason = _outdated()
        if _reason is None:
            _module = importlib.import_module("nvae_fast._C")
    except ImportError as error:
        _reason = _why(error)
    except Exception as error:  # a broken binary must not take the package down: the reference still works
        _reason = f"the C++ extension failed to load: {type(error).__name__}: {error}"
    if _module is None and os.environ.get("NVAE_FAST_BACKEND", "") != "reference":
        warnings.warn(f"nvae_fast: {_reason}. {LOST}. NVAE_FAST_DISABLE_EXTENSION=1 hides this", stacklevel=2)
    return _module is not None


def _outdated() -> str | None:
    """Why the binary there is must not be loaded, None when it may be or there is none."""
    spec = importlib.util.find_spec("nvae_fast._C")
    if spec is None or spec.origin is None:
        return None
    from nvae_fast.ops import _schemas

    if _schemas.compiled_into(spec.origin) == _schemas.fingerprint():
        return None
    return (
        "the C++ extension was built from other sources than this Python code and might crash, so it is not loaded; "
        f"rebuild it: {REBUILD}"
    )


def _why(error: ImportError) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return f"the C++ extension failed to load: {error}"
    try:
        failure = json.loads(_BUILD_REPORT.read_text(encoding="utf-8"))["reason"]
        return f"the C++ extension was not built: {failure}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"the C++ extension is not built; run {REBUILD}"


def reason() -> str | None:
    """Why the extension is absent, or None when it is loaded."""
    load()
    return _reason


def has_cuda() -> bool:
    """Whether the extension is loaded and holds the CUDA sources; unlike :func:`info` it never initialises CUDA."""
    return bool(cuda_archs())


def cuda_archs() -> list[str]:
    """What the CUDA sources were compiled for: ``sm_80`` is machine code, ``compute_100`` PTX. Empty without them."""
    return list(_module.info()["cuda_archs"]) if load() and _module is not None else []


def report_bus_errors() -> None:
    """Name the file when a read of a memory-mapped file ends this process with SIGBUS. Nothing without the extension."""
    if load() and _module is not None:
        _module.report_bus_errors()


def info() -> dict[str, Any]:
    """What was built and what is in use.

    Returns a dict with ``loaded``, ``reason`` (None when loaded) and, when loaded: ``path``,
    ``cpu_capability`` (in use), ``cpu_capabilities`` (compiled in), ``fast_bfloat16`` (bool: the processor multiplies bfloat16
    numbers faster than float32 ones), ``amx`` (bool), ``fast_library_products`` (bool: PyTorch's float32 matrix products reach
    the processor's rate, as MKL's do on Intel's processors), ``cuda`` (bool: CUDA sources compiled in), ``cuda_archs`` (list:
    ``sm_80`` is machine code, ``compute_100`` PTX), ``torch_target`` (the oldest PyTorch the binary is made for) and, with CUDA
    sources and a visible GPU, ``cuda_device`` (whether the binary holds code for the current GPU; asking initialises CUDA).
    """
    if not load() or _module is None:
        return {"loaded": False, "reason": _reason}
    facts: dict[str, Any] = {"loaded": True, "reason": None, "path": _module.__file__, **_module.info()}
    if facts["cuda"]:
        import torch

        facts["cuda_device"] = _module.device_check() if torch.cuda.is_available() else "no visible GPU"
    return facts
