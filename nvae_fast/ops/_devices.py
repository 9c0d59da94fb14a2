"""Which GPUs the fused kernels run on.

Triton supports NVIDIA GPUs of compute capability 8.0 and newer (triton issue 10918). The CUDA C++ kernels run where the
extension holds machine code for the GPU, or PTX that its driver can compile. Other GPUs run the formulas. The result is kept
per device, because the GPUs of a machine may differ. It is computed on the first call on that device, so that importing the
package does not initialise CUDA.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import cuda

OLDEST_FOR_TRITON = (8, 0)
LOST = "Lost: these kernels on this GPU. Plain PyTorch runs there instead: the same results, slower and with more memory"

# Device index -> {kind of kernel: why this GPU does not run it}; empty for a GPU that runs all of them.
_refusals: dict[int, dict[str, str]] = {}


def covers(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``architecture``, named as nvcc names it, runs on a GPU of this compute capability.

    Machine code (``sm_80``) runs on later minor versions of its major version, ``sm_90a`` on exactly its own, ``sm_100f`` on
    its family; PTX (``compute_100``) on its own version and all later ones.
    """
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", architecture)
    if parts is None:
        return False
    own = int(parts[2]), int(parts[3])
    if parts[4] == "a":
        return capability == own
    if parts[1] == "compute" and not parts[4]:
        return capability >= own
    return capability[0] == own[0] and capability >= own


def name(index: int) -> str:
    major, minor = cuda.get_device_capability(index)
    return f"{cuda.get_device_name(index)}, compute capability {major}.{minor}"


def refusals(index: int) -> dict[str, str]:
    """``{kind of kernel: why GPU number index does not run it}``. The first call for a GPU initialises CUDA."""
    known = _refusals.get(index)
    if known is None:
        known = _refusals[index] = _unsupported(cuda.get_device_capability(index))
    return known


def _unsupported(capability: tuple[int, int]) -> dict[str, str]:
    from nvae_fast.ops import _extension

    found = {}
    if capability < OLDEST_FOR_TRITON:
        found["triton"] = "Triton supports compute capability {}.{} and newer".format(*OLDEST_FOR_TRITON)
    compiled = _extension.cuda_archs()
    if compiled and not any(covers(architecture, capability) for architecture in compiled):
        found["cuda"] = f"the CUDA kernels were compiled for {', '.join(compiled)} only"
        if capability >= OLDEST_FOR_TRITON:
            found["cuda"] += "; rebuild with NVAE_FAST_CUDA_ARCHS=sm_{}{}".format(*capability)
    return found


def runs(kinds: Iterable[str], index: int | None) -> bool:
    """Whether a GPU runs every one of these kinds of kernels (``"triton"``, ``"cuda"``); warns once about one that does not.

    True where there is no GPU to ask: tensors without data are then traced for another machine.
    """
    if index is None or index not in _refusals:
        if not cuda.is_available():
            return True
        index = cuda.current_device() if index is None else index
        if index not in _refusals and refusals(index):
            reasons = "; ".join(refusals(index).values())
            warnings.warn(f"nvae_fast: cuda:{index} ({name(index)}): {reasons}. {LOST}", stacklevel=2)
    refused = _refusals[index]
    return not refused or not any(kind in refused for kind in kinds)


# torch.compile asks while it traces and takes the answer for a constant. This is what torch.compiler.assume_constant_result
# does; calling that would import the compiler, which takes seconds.
runs._dynamo_marked_constant = True  # type: ignore[attr-defined]


def visible() -> Iterator[int]:
    """The indices of the GPUs this process can use. Going through them initialises CUDA."""
    if cuda.is_available():
        yield from range(cuda.device_count())


def by_device(launcher: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for the dispatcher's CUDA key: the Triton ``launcher``, or ``formula`` on a GPU that Triton does not support."""

    def kernel(*args: Any) -> Any:
        return (launcher if runs(("triton",), _device(args)) else formula)(*args)

    return kernel


def _device(args: Iterable[Any]) -> int | None:
    """Index of the GPU that the first tensor on one is on, among the arguments or in lists of them."""
    for value in args:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                return tensor.device.index
    return None
