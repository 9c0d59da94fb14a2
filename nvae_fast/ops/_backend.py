"""Which kernel runs an op, and why.

Every op has a reference (plain PyTorch, any device). A device may have one fused kernel besides: C++ on the CPU,
Triton or CUDA C++ on the GPU. ``"auto"`` uses the fused kernel where there is one and the reference elsewhere;
``"reference"`` uses plain PyTorch everywhere. The choice is process-wide, like ``torch.backends``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad

from nvae_fast.ops import _devices

CHOICES = ("auto", "reference")
DEVICES = ("cpu", "cuda")

_in_transform = torch._C._are_functorch_transforms_active
_choice: str = "auto"
# (op, device type) -> name of the fused kernel. Filled when an op is registered: the query is then a dictionary
# look-up that torch.compile can trace and guard on.
_fused: dict[tuple[str, str], str] = {}
# Op -> the kinds of kernels a call of it on a GPU launches. Not every GPU runs every kind.
_kinds: dict[str, tuple[str, ...]] = {}
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
    """True inside torch.func.grad, jvp, vmap or jacrev, or a level of forward-mode differentiation. Kernels support none of
    them."""
    return _in_transform() or forward_ad._current_level >= 0


def fused(op: str, device: torch.device) -> bool:
    """True when a call of ``op`` on ``device`` goes to a fused kernel, for every operator: the device runs one, nothing forces
    the reference, and no functional transform or forward-mode differentiation is active."""
    kind = device.type
    if _choice != "auto" or (op, kind) not in _fused or _in_transform() or forward_ad._current_level >= 0:
        return False
    return kind != "cuda" or _devices.runs(_kinds.get(op, ()), device.index)


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


def record(
    op: str, device_type: str, kernel: str | None, reason: str = "", kinds: Sequence[str | None] = ()
) -> None:
    """Note that ``op`` has the fused ``kernel`` on ``device_type``, or with None the ``reason`` why it has none.

    ``kinds``: the kinds of kernels that the op launches, where there are others than ``kernel``.
    """
    key = (op, device_type)
    if device_type == "cuda":
        _kinds[op] = tuple(dict.fromkeys(kind for kind in (kernel, *kinds) if kind is not None))
    if kernel is None:
        _fused.pop(key, None)
        _absent[key] = reason
    else:
        _absent.pop(key, None)
        _fused[key] = kernel


def triton_reason() -> str | None:
    """None when Triton can be imported, else why not. Does not import it."""
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # something on the import path forbids it
        found = False
    return None if found else "triton is not installed: pip install 'triton>=3.6'"


def missing() -> dict[str, str]:
    """What this installation lacks and the effect of each missing part: ``{part: sentence}``, empty when it is complete."""
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
    for index in _devices.visible():
        if reasons := _devices.refusals(index):
            lost[f"cuda:{index}"] = f"{_devices.name(index)}: {'; '.join(reasons.values())}. {_devices.LOST}"
    return lost


def _refusal(op: str, index: int) -> str | None:
    """Why GPU number ``index`` does not run the kernels of ``op``, None where it does."""
    reasons = _devices.refusals(index)
    found = [reasons[kind] for kind in _kinds.get(op, ()) if kind in reasons]
    return f"{_devices.name(index)}: {'; '.join(found)}" if found else None


def backends() -> dict[str, dict[str, str]]:
    """What runs each op on each device: ``{op: {device: kernel}}``.

    A value is the kernel's name (``"cpp"``, ``"triton"``, ``"cuda"``), or ``"reference (reason)"`` where plain
    PyTorch runs and why. Devices are ``"cpu"`` and ``"cuda"``; among unlike GPUs those that do not run the kernel that
    ``"cuda"`` names have entries of their own, such as ``"cuda:1"``. Where there is a GPU, asking initialises CUDA.
    """
    ops = sorted({op for op, _ in (*_fused, *_absent)})
    gpus = list(_devices.visible())
    table: dict[str, dict[str, str]] = {}
    for op in ops:
        row = {}
        for device in DEVICES:
            if _choice == "reference":
                row[device] = "reference (asked for: use_backend or NVAE_FAST_BACKEND)"
            else:
                kernel = _fused.get((op, device))
                row[device] = kernel or f"reference ({_absent.get((op, device), 'no fused kernel yet')})"
        if _choice == "auto" and (op, "cuda") in _fused:
            refused = {i: reason for i in gpus if (reason := _refusal(op, i))}
            if refused and len(refused) == len(gpus):
                row["cuda"] = f"reference ({'; '.join(dict.fromkeys(refused.values()))})"
            else:
                row |= {f"cuda:{i}": f"reference ({reason})" for i, reason in refused.items()}
        table[op] = row
    return table
