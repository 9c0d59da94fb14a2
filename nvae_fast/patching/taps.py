"""Which taps of a masked depthwise convolution exist for any of its channels: the kernel need not multiply the others."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

# Mask -> its version counter when it was read, and the taps. By identity: masks are compared nowhere.
_known: Any = WeakIdKeyDictionary()


def live_taps(mask: torch.Tensor, weight: torch.Tensor) -> list[int] | None:
    """Positions ``u * K + v`` of the taps of a depthwise ``weight`` (C, 1, K, K) that ``mask`` leaves; None: all of them.

    The mask is read once, and again when its version counter moved. A compiled model has the taps that it was compiled with
    and raises when the mask has others later.
    """
    if weight.shape[1] != 1 or mask.device.type == "meta":
        return None
    if torch.compiler.is_compiling():
        taps = _as_compiled(mask)
        if taps is not None:
            dark = [tap for tap in range(weight.shape[2] * weight.shape[3]) if tap not in taps]
            same = (mask.flatten(2)[:, :, dark] == 0).all()
            torch._assert_async(
                same, "the mask of a convolution has changed since it was compiled: compile it again"
            )
        return taps
    if mask.is_inference():  # counts no versions
        return None
    found = _known.get(mask)
    if found is None or found[0] != mask._version:
        found = _known[mask] = (mask._version, _read(mask))
    return found[1]


def _read(mask: torch.Tensor) -> list[int] | None:
    if mask.dim() != 4 or mask.shape[-1] != mask.shape[-2]:
        return None
    with torch.no_grad():
        alive = (mask != 0).flatten(0, 1).any(0).flatten()
    taps: list[int] = alive.nonzero().flatten().tolist()
    return taps if 0 < len(taps) < alive.numel() else None


def _as_compiled(mask: torch.Tensor) -> list[int] | None:
    return _read(mask)


# torch.compiler.assume_constant_result(_as_compiled), without importing the compiler (and with it Triton) to say so.
_as_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
