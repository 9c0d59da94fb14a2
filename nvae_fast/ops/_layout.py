"""Memory formats of feature maps, empty maps that follow them, and raw mu and log sigma as one packed tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def memory_format(t: Tensor) -> torch.memory_format:
    """The format of maps that belong to ``t`` (B, C, H, W): channels_last when its channels are adjacent and there is more
    than one pixel (csrc/cpu/packed.h has the same rule)."""
    if t.stride(1) == 1 and t.shape[2] * t.shape[3] > 1:
        return torch.channels_last
    return torch.contiguous_format


def empty_map(like: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, channels, H, W) on the device and in the memory format of ``like``."""
    b, _, h, w = like.shape
    return torch.empty(
        (b, channels, h, w), dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(like)
    )


def _are_halves(mu: Tensor, log_sigma: Tensor) -> bool:
    """Whether log sigma's channels follow mu's in one piece of memory: then mu's strides reach both."""
    return (
        type(mu) is type(log_sigma) is Tensor
        and mu.device.type in ("cpu", "cuda")
        and mu.stride() == log_sigma.stride()
        and log_sigma.storage_offset() - mu.storage_offset() == mu.shape[1] * mu.stride(1)
        and mu.is_neg() == log_sigma.is_neg()
        and mu.untyped_storage()._cdata == log_sigma.untyped_storage()._cdata
    )


def _both(mu: Tensor) -> Tensor:
    b, channels, h, w = mu.shape
    return mu.as_strided((b, 2 * channels, h, w), mu.stride())


class _Halves(torch.autograd.Function):
    """The tensor that mu and log sigma are halves of. Its gradient goes to the halves, not past them to whatever tensor they
    were cut from, so that gradients and hooks of the halves themselves stay right."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, log_sigma: Tensor) -> Tensor:
        return _both(mu.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        to_mu, to_log_sigma = grad.chunk(2, dim=1)
        return to_mu, to_log_sigma


def pack(mu: Tensor, log_sigma: Tensor) -> Tensor:
    """Raw mu and raw log sigma, (B, Z, H, W) each, as the packed (B, 2Z, H, W) that the kernels read.

    A view where the two are halves of one tensor, as ``torch.chunk`` and slices make them; else a copy.
    """
    if (
        torch.compiler.is_compiling()  # copies are the compiler's business
        or torch._C._are_functorch_transforms_active()
        or not _are_halves(mu, log_sigma)
    ):
        return torch.cat((mu, log_sigma), dim=1)
    if torch.is_grad_enabled() and (mu.requires_grad or log_sigma.requires_grad):
        return _Halves.apply(mu, log_sigma)
    return _both(mu.detach())
