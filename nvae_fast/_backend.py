"""Which kernel runs an op, and why.

Every op has a reference (plain PyTorch, any device). A device may have one fused kernel besides: C++ on the CPU,
Triton or CUDA C++ on the GPU. ``"auto"`` uses the fused kernel where there is one and the reference elsewhere;
``"reference"`` uses plain PyTorch everywhere. The choice is process-wide, like ``torch.backends``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

CHOICES = ("auto", "reference")
DEVICES = ("cpu", "cuda")

_choice: str = "auto"
# (op, device type) -> name of the fused kernel. Filled when an op is registered, so that asking is a dictionary
# look-up that torch.compile can trace and guard on.
_fused: dict[tuple[str, str], str] = {}
# (op, device type) -> why there is no fused kernel.
_absent: dict[tuple[str, str], str] = {}


def _validated(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source}: expected one of {', '.join(map(repr, CHOICES))}, got {choice!r}")
    return choice


_choice = _validated(
    os.environ.get("NVAE_FAST_BACKEND", "auto") or "auto", "environment variable NVAE_FAST_BACKEND"
)


def forced_reference() -> bool:
    """True while ``use_backend("reference")`` (or NVAE_FAST_BACKEND=reference) is in force."""
    return _choice == "reference"


def transforms_active() -> bool:
    """Inside torch.func.grad, jvp, vmap or jacrev, or a level of forward-mode differentiation: no kernel can follow them."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def fused(op: str, device: torch.device) -> bool:
    """True when a call of ``op`` on ``device`` goes to a fused kernel, for every operator: there is one, nothing forces the
    reference, and no functional transform or forward-mode differentiation is active."""
    return (
        (op, device.type) in _fused
        and _choice == "auto"
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def kernel(op: str, device_type: str) -> str | None:
    """Name of the fused kernel of ``op`` on ``device_type``, whatever backend is in force; None without one."""
    return _fused.get((op, device_type))


@contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Use ``"auto"`` (fused kernels where they exist) or ``"reference"`` (plain PyTorch) inside the block.

    Process-wide: other threads see it too. A backward pass follows the forward that made its graph.

    Raises:
        ValueError: ``choice`` is neither.
    """
    global _choice
    previous = _choice
    _choice = _validated(choice, "use_backend: choice")
    try:
        yield
    finally:
        _choice = previous


def record(op: str, device_type: str, kernel: str | None, reason: str = "") -> None:
    """Note that ``op`` has the fused ``kernel`` on ``device_type``, or the ``reason`` why it has none."""
    key = (op, device_type)
    _fused.pop(key, None)
    if kernel is None or reason:
        _absent[key] = reason
    else:
        _fused[key] = kernel


def triton_reason() -> str | None:
    """None when Triton can be imported, else why not. Does not import it."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # something on the import path forbids it
        found = False
    return None if found else "triton is not installed: pip install 'triton>=3.6'"


def missing() -> dict[str, str]:
    """What this installation lacks and what is lost without it: ``{part: sentence}``, empty when it is complete."""
    from nvae_fast.ops import _extension

    lost = {}
    if not _extension.load():
        lost["extension"] = f"{_extension.reason()}. {_extension.LOST}"
    elif torch.version.cuda is not None and not _extension.has_cuda():
        lost["csrc/cuda"] = (
            f"{_extension.NO_CUDA}. Lost without them: depthwise_conv2d on a GPU runs in plain PyTorch instead: the same "
            "results, slower"
        )
    if triton_reason() is not None:
        lost["triton"] = (
            f"{triton_reason()}. Lost without it: the Triton kernels. Every operation on a GPU but depthwise_conv2d runs "
            "in plain PyTorch instead: the same results, slower and with more memory. Nothing on the CPU"
        )
    return lost


def backends() -> dict[str, dict[str, str]]:
    """What runs each op on each device: ``{op: {device: kernel}}``.

    A value is the kernel's name (``"cpp"``, ``"triton"``, ``"cuda"``), or ``"reference (reason)"`` where plain
    PyTorch runs and why.
    """
    ops = sorted({op for op, _ in (*_fused, *_absent)})
    table: dict[str, dict[str, str]] = {}
    for op in ops:
        row = {}
        for device in DEVICES:
            if _choice == "reference":
                row[device] = "reference (asked for: use_backend or NVAE_FAST_BACKEND)"
            else:
                kernel = _fused.get((op, device))
                row[device] = kernel or f"reference ({_absent.get((op, device), 'no fused kernel yet')})"
        table[op] = row
    return table
