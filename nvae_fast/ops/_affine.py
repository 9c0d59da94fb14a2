"""The passes over maps that batch norm with an activation is made of, as operators of their own: the residual cell uses
them too. None of them is differentiable; their arguments are trusted. Coefficients are (C,).

::

    u = scale x + shift        g = grad act'(u)

    affine_activation          act(u)
    affine_activation_reduce   sum g,  sum g (x - pivot)  over B, H, W;  g and act(u) as well where wanted, else empty
    affine_activation_grad     alpha g + beta x + gamma
"""

from __future__ import annotations

from typing import Any

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._activation import activate, activation_slope
from nvae_fast.ops._register import operator
from nvae_fast.ops._squash import empty_map


def _column(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t.to(_checks.accumulate_dtype(like.dtype))[:, None, None]


def _u(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return x.to(_checks.accumulate_dtype(x.dtype)) * _column(scale, x) + _column(shift, x)


def _like(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return empty_map(x, x.shape[1]).copy_(value)


def _forward(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: str | None
) -> torch.Tensor:
    return _like(x, activate(_u(x, scale, shift), activation))


def _forward_fake(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, activation: str | None
) -> torch.Tensor:
    return empty_map(x, x.shape[1])


def _reduce(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    pivot: torch.Tensor | None,
    activation: str | None,
    need_g: bool,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    u = _u(x, scale, shift)
    g = grad.to(u.dtype) * activation_slope(u, activation)
    d = x.to(u.dtype) if pivot is None else x.to(u.dtype) - _column(pivot, x)
    return (
        g.sum((0, 2, 3)),
        (g * d).sum((0, 2, 3)),
        _like(x, g) if need_g else x.new_empty(0),
        _like(x, activate(u, activation)) if need_y else x.new_empty(0),
    )


def _reduce_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    pivot: torch.Tensor | None,
    activation: str | None,
    need_g: bool,
    need_y: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    sums = (x.new_empty(x.shape[1], dtype=_checks.accumulate_dtype(x.dtype)) for _ in range(2))
    maps = (empty_map(x, x.shape[1]) if need else x.new_empty(0) for need in (need_g, need_y))
    return (*sums, *maps)  # type: ignore[return-value]


def _gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    alpha: torch.Tensor,
    beta: torch.Tensor,
    gamma: torch.Tensor,
    activation: str | None,
) -> torch.Tensor:
    u = _u(x, scale, shift)
    g = grad.to(u.dtype) * activation_slope(u, activation)
    return _like(x, g * _column(alpha, x) + (x.to(u.dtype) * _column(beta, x) + _column(gamma, x)))


def _gradient_fake(grad: torch.Tensor, x: torch.Tensor, *_: Any) -> torch.Tensor:
    return empty_map(x, x.shape[1])


def _gpu(name: str, formula: Any) -> Any:
    """The Triton launcher of that name; ``formula`` for float64, since the kernels compute in float32."""

    def launch(*args: Any) -> Any:
        if args[0].dtype == torch.float64:
            return formula(*args)
        from nvae_fast.kernels import batch_norm_swish as kernels

        return getattr(kernels, name)(*args)

    return launch


forward = operator(
    "affine_activation",
    "(Tensor x, Tensor scale, Tensor shift, str? activation) -> Tensor",
    default=_forward,
    fake=_forward_fake,
    gpu=_gpu("affine_activation", _forward),
)
reduce = operator(
    "affine_activation_reduce",
    "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor? pivot, str? activation, bool need_g, bool need_y)"
    " -> (Tensor sum_g, Tensor sum_gx, Tensor g, Tensor y)",
    default=_reduce,
    fake=_reduce_fake,
    gpu=_gpu("affine_activation_reduce", _reduce),
)
gradient = operator(
    "affine_activation_grad",
    "(Tensor grad, Tensor x, Tensor scale, Tensor shift, Tensor alpha, Tensor beta, Tensor gamma, str? activation)"
    " -> Tensor",
    default=_gradient,
    fake=_gradient_fake,
    gpu=_gpu("affine_activation_grad", _gradient),
)

# The same in plain PyTorch, in this order.
FORMULAS = (_forward, _reduce, _gradient)
