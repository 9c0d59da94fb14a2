"""The taps of a masked depthwise convolution that exist for any of its channels: the kernel need not multiply the others."""

from __future__ import annotations

import torch

from nvae_fast.ops import _backend


def live_taps(mask: torch.Tensor, weight: torch.Tensor) -> list[int] | None:
    """Return the positions ``u * K + v`` of the taps of a depthwise ``weight`` (C, 1, K, K) that ``mask`` leaves; None: all.

    The mask is read in every call on the CPU. On other devices all taps are computed, masked ones as zeros: reading the
    mask would wait for the device, which the capture of a CUDA graph forbids. A compiled model has the taps of its mask
    when it was compiled, and raises when the mask has others later.
    """
    if weight.shape[1] != 1 or mask.dim() != 4 or mask.shape[-1] != mask.shape[-2] or mask.is_meta:
        return None
    if torch.compiler.is_compiling():
        taps = _as_compiled(mask)
        if taps is not None:
            hidden = [tap for tap in range(weight.shape[2] * weight.shape[3]) if tap not in taps]
            same = (mask.flatten(2)[:, :, hidden] == 0).all()
            torch._assert_async(
                same, "the mask of a convolution has changed since it was compiled: compile it again"
            )
        return taps
    return None if mask.device.type != "cpu" or _backend.transforms_active() else _read(mask)


def _read(mask: torch.Tensor) -> list[int] | None:
    alive: list[bool] = mask.detach().any(dim=(0, 1)).flatten().tolist()
    taps = [tap for tap, live in enumerate(alive) if live]
    return taps if 0 < len(taps) < len(alive) else None


def _as_compiled(mask: torch.Tensor) -> list[int] | None:
    return _read(mask)


# torch.compiler.assume_constant_result(_as_compiled), without importing the compiler and Triton with it.
_as_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
