"""Raw mu and raw log sigma, (B, Z, H, W) each, as the packed tensor (B, 2Z, H, W) that the kernels read.

Usually they are its two halves already (``torch.chunk``, slices); then it is read where it is.
"""

from __future__ import annotations

from typing import Any

import torch


def _are_halves(mu: torch.Tensor, log_sigma: torch.Tensor) -> bool:
    """Whether log sigma's channels follow mu's in one piece of memory: then mu's strides reach both."""
    return (
        type(mu) is type(log_sigma) is torch.Tensor
        and mu.device.type in ("cpu", "cuda")
        and mu.stride() == log_sigma.stride()
        and log_sigma.storage_offset() - mu.storage_offset() == mu.shape[1] * mu.stride(1)
        and mu.is_neg() == log_sigma.is_neg()
        and mu.untyped_storage()._cdata == log_sigma.untyped_storage()._cdata
    )


def _both(mu: torch.Tensor) -> torch.Tensor:
    b, channels, h, w = mu.shape
    return mu.as_strided((b, 2 * channels, h, w), mu.stride())


class _Halves(torch.autograd.Function):
    """The tensor that mu and log sigma are halves of. Its gradient goes to the halves, not past them to whatever tensor they
    were cut from, so that gradients and hooks of the halves themselves stay right."""

    @staticmethod
    def forward(ctx: Any, mu: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        return _both(mu.detach())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        to_mu, to_log_sigma = grad.chunk(2, dim=1)
        return to_mu, to_log_sigma


def pack(mu: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
    """(B, 2Z, H, W): a view where the two are halves of one tensor, else a copy."""
    if (
        torch.compiler.is_compiling()  # copies are the compiler's business
        or torch._C._are_functorch_transforms_active()
        or not _are_halves(mu, log_sigma)
    ):
        return torch.cat((mu, log_sigma), dim=1)
    if torch.is_grad_enabled() and (mu.requires_grad or log_sigma.requires_grad):
        return _Halves.apply(mu, log_sigma)
    return _both(mu.detach())
