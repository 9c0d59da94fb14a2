"""One step of Adamax over all parameters in one loop over memory (Kingma and Ba, arXiv 1412.6980, algorithm 2).

::

    g = grad + weight_decay p,   m = m + (1 - beta1)(g - m),   u = max(beta2 u, |g| + eps),   p = p - rate m / u

in place, rounding as `torch.optim.Adamax(foreach=True)` does. The only operator here that writes to its arguments: a copy of
every parameter would cost as much as the step. Its caller bumps their versions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.ops import _extension
from nvae_fast.ops._op import NAMESPACE, define_kernel

Tensors = list[Tensor]


def formula(
    parameters: Tensors, grads: Tensors, averages: Tensors, norms: Tensors, rate: float, beta1: float,
    beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    size: tuple[Tensor, ...] | list[Tensor] = grads
    if weight_decay != 0:
        size = torch._foreach_add(grads, parameters, alpha=weight_decay)
    torch._foreach_lerp_(averages, size, 1 - beta1)
    torch._foreach_mul_(norms, beta2)
    if weight_decay != 0:
        torch._foreach_abs_(size)
    else:  # the gradients themselves stay as they are
        size = torch._foreach_abs(size)
    torch._foreach_add_(size, eps)
    torch._foreach_maximum_(norms, size)
    torch._foreach_addcdiv_(parameters, averages, norms, value=-rate)


adamax = define_kernel("adamax", formula, fake=lambda *_: None, mutates=("parameters", "averages", "norms"))


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are dense in the same memory format. Dimensions of size 1 may have any stride, and the
    weights of 1x1 and of depthwise convolutions are dense in both formats."""
    return any(
        a.is_contiguous(memory_format=layout) and b.is_contiguous(memory_format=layout)
        for layout in (torch.contiguous_format, *((torch.channels_last,) if a.dim() == 4 else ()))
    )


def fits(parameters: Tensors, averages: Tensors, norms: Tensors) -> bool:
    """Whether the kernel can take them: on the CPU, float32, dense, each parameter's state in its layout."""
    if not _extension.load() or not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::adamax", "CPU"
    ):
        return False
    return all(
        p.device.type == "cpu"
        and p.dtype == m.dtype == u.dtype == torch.float32
        and p.stride() == m.stride() == u.stride()
        and (p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last)))
        for p, m, u in zip(parameters, averages, norms, strict=True)
    )
