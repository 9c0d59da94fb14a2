"""The launch of a Triton kernel, for every launcher of this folder.

Triton compiles a kernel anew for every combination of what it specialises: which integers are 1, which integers and
addresses are multiples of 16. Arguments that gain nothing by it are ``do_not_specialize``: the address of a seed (which may be
one of many in a tensor), and counts that only bound a mask (the last batch of an epoch is smaller). Then a call like one
that has run before loads nothing, which a CUDA graph under capture could not do.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(op: str, dtype: torch.dtype) -> None:
    """Raise TypeError for float64, which is the reference's."""
    if dtype not in FLOATING:
        raise TypeError(f"{op}: the GPU kernel computes in float32; expected one of {FLOATING}, got {dtype}")


def launch(
    kernel: Any, programs: int, device: torch.device, *args: Any, warps: int = 4, **constants: Any
) -> None:
    """Launch a ``@triton.jit`` kernel on ``device``, which need not be the current one. Multiplications and additions fuse:
    the kernels rely on it, and Triton's default differs between versions."""
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(programs,)](*args, **constants, num_warps=warps, enable_fp_fusion=True)
