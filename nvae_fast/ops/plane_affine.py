"""Affine maps with one coefficient per plane (b, c), and the sums that their gradients need.

::

    out[b,c,p] = a[b,c] x[b,c,p] + b[b,c] y[b,c,p] + c[b,c]            b missing: 1;  c missing: 0
    sum_x[b,c] = sum_p x[b,c,p]        sum_xy[b,c] = sum_p x[b,c,p] (y[b,c,p] - pivot[c])

Batch norm, gate, residual scale and skip are one such map, ``skip + 0.1 gate (scale p + shift)``; so is its gradient with
respect to p. PyTorch equivalent: broadcasting over (B, C, 1, 1), which reads and writes the map once per operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._layout import empty_map, memory_format
from nvae_fast.ops._op import Gradients, Grads, Tensors, define_kernel, define_op


def plane_affine(
    x: Tensor, a: Tensor, y: Tensor | None = None, b: Tensor | None = None, c: Tensor | None = None
) -> Tensor:
    """``a x + b y + c``; formula in the module's docstring.

    Args:
        x, y: (B, C, H, W); each in its own memory format, y may be None.
        a, b, c: (B, C), or (1, C) for all samples; b only with y.

    Returns:
        (B, C, H, W) in the dtype and memory format of y, or of x without y. Differentiable in all arguments.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    op = "plane_affine"
    _checks.feature_map(op, "x", x)
    if y is not None:
        _checks.shape(op, "y", y, x.shape, x)
    elif b is not None:
        raise ValueError(f"{op}: b must be None without y, got a tensor of shape {tuple(b.shape)}")
    _check_coefficient(op, "a", a, x)
    for name, value in (("b", b), ("c", c)):
        if value is not None:
            _check_coefficient(op, name, value, x)
    return _op(x, a, y, b, c)


def _check_coefficient(op: str, name: str, value: Tensor, x: Tensor) -> None:
    _checks.tensor(op, name, value)
    if value.dim() != 2 or value.shape[0] not in (1, x.shape[0]) or value.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(x.shape[:2])} or (1, {x.shape[1]}), got {tuple(value.shape)}"
        )
    _checks.device(op, name, value, x)


def plane_dots(x: Tensor, y: Tensor, pivot: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``sum_x`` and ``sum_xy``, (B, C) in float32 (float64 for float64), of maps x and y (B, C, H, W) and pivot (C,) (None:
    zeros); formula in the module's docstring. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    _checks.feature_map("plane_dots", "x", x)
    _checks.shape("plane_dots", "y", y, x.shape, x)
    _checks.vectors("plane_dots", x, pivot=pivot)
    return _dots(x, y, pivot)


def _reference(x: Tensor, a: Tensor, y: Tensor | None, b: Tensor | None, c: Tensor | None) -> Tensor:
    like = x if y is None else y
    acc_dtype = _checks.accumulate_dtype(like.dtype)

    def column(t: Tensor) -> Tensor:
        return t.to(acc_dtype)[:, :, None, None]

    out = x.to(acc_dtype) * column(a)
    if c is not None:
        out = out + column(c)
    if y is not None:
        out = out + (y.to(acc_dtype) if b is None else y.to(acc_dtype) * column(b))
    return out.to(like.dtype, memory_format=memory_format(like))


def _dots_formula(x: Tensor, y: Tensor, pivot: Tensor | None) -> tuple[Tensor, Tensor]:
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    d = y.to(acc_dtype) if pivot is None else y.to(acc_dtype) - pivot.to(acc_dtype)[:, None, None]
    return x.to(acc_dtype).sum((2, 3)), (x.to(acc_dtype) * d).sum((2, 3))


def _empty_sums(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    acc_dtype = _checks.accumulate_dtype(x.dtype)
    return x.new_empty(x.shape[:2], dtype=acc_dtype), x.new_empty(x.shape[:2], dtype=acc_dtype)


_dots = define_kernel("plane_dots", _dots_formula, fake=_empty_sums, triton="plane_affine")


def _affine_gradients(grad: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``a g``, and the sums of ``g`` and of ``g x`` over every plane."""
    return (torch.ops.nvae_fast.plane_affine(grad, a, None, None, None), *_dots(grad, x, None))


# On the CPU one operator, which reads the gradient once.
_gradients = define_kernel(
    "plane_affine_gradients",
    _affine_gradients,
    fake=lambda grad, x, a: (empty_map(grad, grad.shape[1]), *_empty_sums(grad)),
)


def _backward(grads: Grads, wanted: frozenset[str], k: Any, saved: Tensors) -> Gradients:
    """``dx = a g, dy = b g, da = sum g x, db = sum g y, dc = sum g``."""
    (g,) = grads
    assert g is not None
    found: Gradients = {}
    sum_g = None
    for name, t, of_factor, factor in (("x", k.x, "a", k.a), ("y", k.y, "b", k.b)):
        to_map = g
        if name in wanted and of_factor in wanted:
            to_map, sum_g, found[of_factor] = _gradients(g, t, factor)
        elif name in wanted and factor is not None:
            to_map = _op.overload(g, factor, None, None, None)
        elif of_factor in wanted:
            sum_g, found[of_factor] = _dots(g, t, None)
        if name in wanted:
            found[name] = to_map.to(t.dtype)
    if "c" in wanted:
        found["c"] = _dots(g, g, None)[0] if sum_g is None else sum_g
    for name, like in (("a", k.a), ("b", k.b), ("c", k.c)):
        value = found.get(name)
        if value is not None:
            found[name] = value.sum_to_size(like.shape).to(like.dtype)
    return found


_op = define_op(
    "plane_affine",
    _reference,
    fake=lambda x, a, y, *_: empty_map(x if y is None else y, x.shape[1]),
    differentiable=("x", "a", "y", "b", "c"),
    triton="plane_affine",
    backward=_backward,
)
