"""Affine maps with one coefficient a plane (b, c), and the sums that their gradients need.

::

    out[b,c,p] = a[b,c] x[b,c,p] + b[b,c] y[b,c,p] + c[b,c]            b missing: 1;  c missing: 0
    sum_x[b,c] = sum_p x[b,c,p]        sum_xy[b,c] = sum_p x[b,c,p] (y[b,c,p] - pivot[c])

"Batch norm, gate, 0.1 and skip" is one such pass, ``skip + 0.1 gate (scale p + shift)``; so is its gradient with respect
to p. PyTorch equivalent: broadcasting over (B, C, 1, 1), one pass an operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nvae_fast.ops import _checks
from nvae_fast.ops._register import operator, room
from nvae_fast.ops._squash import empty_map, memory_format


def plane_affine(
    x: torch.Tensor,
    a: torch.Tensor,
    y: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    c: torch.Tensor | None = None,
) -> torch.Tensor:
    """``a x + b y + c``; formula in the module's docstring.

    Args:
        x, y: (B, C, H, W); each in its own memory format, y may be None.
        a, b, c: (B, C), or (1, C) for all samples; b only with y.

    Returns:
        (B, C, H, W) in the dtype and memory format of y, or of x without y. Differentiable in all arguments.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    return _room(x, a, y, b, c)


def plane_dots(
    x: torch.Tensor, y: torch.Tensor, pivot: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``sum_x`` and ``sum_xy``, (B, C) in float32 (float64 for float64), of maps x and y (B, C, H, W) and pivot (C,) (None:
    zeros); formula in the module's docstring. Not differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device.
    """
    _checks.feature_map("plane_dots", "x", x)
    _checks.shape("plane_dots", "y", y, tuple(x.shape), x)
    if pivot is not None:
        _checks.shape("plane_dots", "pivot", pivot, (x.shape[1],), x)
    return _dots(x, y, pivot)


def _check(
    x: torch.Tensor,
    a: torch.Tensor,
    y: torch.Tensor | None,
    b: torch.Tensor | None,
    c: torch.Tensor | None,
) -> None:
    op = "plane_affine"
    _checks.feature_map(op, "x", x)
    if y is not None:
        _checks.shape(op, "y", y, tuple(x.shape), x)
    elif b is not None:
        raise ValueError(f"{op}: b must be None without y, got a tensor of shape {tuple(b.shape)}")
    coefficients: tuple[tuple[str, Any], ...] = (("a", a), ("b", b), ("c", c))
    for name, value in coefficients:
        if value is None and name != "a":
            continue
        _checks.tensor(op, name, value)
        if value.dim() != 2 or value.shape[0] not in (1, x.shape[0]) or value.shape[1] != x.shape[1]:
            raise ValueError(
                f"{op}: {name} must have shape {tuple(x.shape[:2])} or (1, {x.shape[1]}), got {tuple(value.shape)}"
            )
        _checks.device(op, name, value, x)


def _reference(
    x: torch.Tensor,
    a: torch.Tensor,
    y: torch.Tensor | None,
    b: torch.Tensor | None,
    c: torch.Tensor | None,
) -> torch.Tensor:
    like = x if y is None else y
    wide = _checks.accumulate_dtype(like.dtype)

    def column(t: torch.Tensor) -> torch.Tensor:
        return t.to(wide)[:, :, None, None]

    out = x.to(wide) * column(a)
    if c is not None:
        out = out + column(c)
    if y is not None:
        out = out + (y.to(wide) if b is None else y.to(wide) * column(b))
    return out.to(like.dtype, memory_format=memory_format(like))


def _fake(
    x: torch.Tensor,
    a: torch.Tensor,
    y: torch.Tensor | None,
    b: torch.Tensor | None,
    c: torch.Tensor | None,
) -> torch.Tensor:
    return empty_map(x if y is None else y, x.shape[1])


def _dots_formula(
    x: torch.Tensor, y: torch.Tensor, pivot: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _checks.accumulate_dtype(x.dtype)
    d = y.to(wide) if pivot is None else y.to(wide) - pivot.to(wide)[:, None, None]
    return x.to(wide).sum((2, 3)), (x.to(wide) * d).sum((2, 3))


def _dots_fake(
    x: torch.Tensor, y: torch.Tensor, pivot: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = _checks.accumulate_dtype(x.dtype)
    return x.new_empty(x.shape[:2], dtype=wide), x.new_empty(x.shape[:2], dtype=wide)


def _gpu_dots(*args: Any) -> tuple[torch.Tensor, ...]:
    if args[0].dtype == torch.float64:  # the kernels compute in float32
        return _dots_formula(*args)
    from nvae_fast.kernels import plane_affine as kernels

    return kernels.plane_dots(*args)


def _gpu(*args: Any) -> torch.Tensor:
    x, _, y, _, _ = args
    if (x if y is None else y).dtype == torch.float64:
        return _reference(*args)
    from nvae_fast.kernels import plane_affine as kernels

    return kernels.plane_affine(*args)


_dots = operator(
    "plane_dots",
    "(Tensor x, Tensor y, Tensor? pivot) -> (Tensor sum_x, Tensor sum_xy)",
    default=_dots_formula,
    fake=_dots_fake,
    gpu=_gpu_dots,
)


def _backward(
    grads: Sequence[torch.Tensor | None],
    wanted: Sequence[int],
    x: torch.Tensor,
    a: torch.Tensor,
    y: torch.Tensor | None,
    b: torch.Tensor | None,
    c: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """``dx = a g, dy = b g, da = sum g x, db = sum g y, dc = sum g``."""
    (g,) = grads
    assert g is not None
    found: list[torch.Tensor | None] = [None] * 5
    for i, (t, k) in ((0, (x, a)), (2, (y, b))):
        if i in wanted and t is not None:
            found[i] = (g if k is None else torch.ops.nvae_fast.plane_affine(g, k, None, None, None)).to(
                t.dtype
            )
    sum_g = None
    for i, t in ((1, x), (3, y)):
        if i in wanted and t is not None:
            sum_g, found[i] = _dots(g, t, None)
    if 4 in wanted:
        found[4] = _dots(g, g, None)[0] if sum_g is None else sum_g
    for i, k in ((1, a), (3, b), (4, c)):
        value = found[i]
        if value is not None and k is not None:
            found[i] = value.sum_to_size(k.shape).to(k.dtype)
    return found


_room = room(
    "plane_affine",
    "(Tensor x, Tensor a, Tensor? y, Tensor? b, Tensor? c) -> Tensor",
    check=_check,
    reference=_reference,
    differentiable=(0, 1, 2, 3, 4),
    fake=_fake,
    backward=_backward,
    gpu=_gpu,
)
