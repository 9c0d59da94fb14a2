"""The kernels over maps that batch norm with an activation and the residual cell share, as internal operators.

None of them is differentiable. Coefficients are (C,).

::

    u = scale x + shift        g = grad act'(u)

    affine_activation          act(u)
    affine_activation_reduce   sum g,  sum g (x - pivot)  over B, H, W;  g and act(u) as well where wanted, else empty
    affine_activation_grad     alpha g + beta x + gamma
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._activation import activate, activation_derivative
from nvae_fast.ops._layout import empty_map
from nvae_fast.ops._op import define_kernel


def _column(t: Tensor, like: Tensor) -> Tensor:
    return t.to(_checks.accumulate_dtype(like.dtype))[:, None, None]


def _u(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x.to(_checks.accumulate_dtype(x.dtype)) * _column(scale, x) + _column(shift, x)


def _like(x: Tensor, value: Tensor) -> Tensor:
    return empty_map(x, x.shape[1]).copy_(value)


def _forward(x: Tensor, scale: Tensor, shift: Tensor, activation: str | None) -> Tensor:
    return _like(x, activate(_u(x, scale, shift), activation))


def _reduce(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, pivot: Tensor | None, activation: str | None,
    need_g: bool, need_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    u = _u(x, scale, shift)
    g = grad.to(u.dtype) * activation_derivative(u, activation)
    d = x.to(u.dtype) if pivot is None else x.to(u.dtype) - _column(pivot, x)
    return (
        g.sum((0, 2, 3)),
        (g * d).sum((0, 2, 3)),
        _like(x, g) if need_g else x.new_empty(0),
        _like(x, activate(u, activation)) if need_y else x.new_empty(0),
    )


def _gradient(
    grad: Tensor, x: Tensor, scale: Tensor, shift: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor,
    activation: str | None,
) -> Tensor:  # fmt: skip
    u = _u(x, scale, shift)
    g = grad.to(u.dtype) * activation_derivative(u, activation)
    return _like(x, g * _column(alpha, x) + (x.to(u.dtype) * _column(beta, x) + _column(gamma, x)))


def _empty_sums_and_maps(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    sums = (x.new_empty(x.shape[1], dtype=_checks.accumulate_dtype(x.dtype)) for _ in range(2))
    maps = (empty_map(x, x.shape[1]) if need else x.new_empty(0) for need in args[-2:])
    return *sums, *maps


forward = define_kernel(
    "affine_activation", _forward, fake=lambda x, *_: empty_map(x, x.shape[1]), triton="affine_activation"
)
reduce = define_kernel(
    "affine_activation_reduce", _reduce, fake=_empty_sums_and_maps, triton="affine_activation"
)
gradient = define_kernel(
    "affine_activation_grad",
    _gradient,
    fake=lambda grad, x, *_: empty_map(x, x.shape[1]),
    triton="affine_activation",
)
