"""plane_affine and plane_dots: sums of scaled planes, and their scalar products."""

from __future__ import annotations

from typing import Any

import torch
from harness import Tensors

from descriptions import INPUT, Description, sample
from nvae_fast.ops.plane_affine import plane_affine, plane_dots

EVERY = ("x", "a", "y", "b", "c")
GIVEN = [EVERY, ("x", "a"), ("x", "a", "y"), ("x", "a", "c"), ("x", "a", "y", "c")]
# One pixel, one channel, tiles with and without tails, rows longer than a task, more channels than a block.
SIZES = [(2, 6, 5, 7), (3, 17, 1, 1), (2, 1, 5, 5), (2, 32, 8, 8), (1, 20, 40, 57), (2, 1030, 2, 3)]


def inputs(size: tuple[int, int, int, int] = (2, 6, 5, 7), names: tuple[str, ...] = EVERY) -> Tensors:
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    every = {n: normal(*size) if n in "xy" else normal(*size[:2]) for n in EVERY}
    return {n: every[n] for n in names}


def formula(x: Any, a: Any, y: Any = None, b: Any = None, c: Any = None) -> torch.Tensor:
    out = a[:, :, None, None] * x
    if y is not None:
        out = out + (y if b is None else b[:, :, None, None] * y)
    return out if c is None else out + c[:, :, None, None]


def dots_formula(x: torch.Tensor, y: torch.Tensor, pivot: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    return x.sum((2, 3)), (x * (y if pivot is None else y - pivot[:, None, None])).sum((2, 3))


def op(x: Any, a: Any, y: Any = None, b: Any = None, c: Any = None) -> torch.Tensor:
    return plane_affine(x, a, y, b, c)


def dots_inputs(size: tuple[int, int, int, int] = (2, 6, 5, 7), pivot: bool = True) -> Tensors:
    t = inputs(size)
    return {"x": t["x"], "y": t["y"], **({"pivot": t["a"][0]} if pivot else {})}


X, K = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3)
ERRORS = [
    ({"x": 1.0}, TypeError, "x must be a torch.Tensor, got float"),
    ({"x": X[0]}, ValueError, r"x must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ({"y": X[:1]}, ValueError, r"y must have shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    ({"y": X.to("meta")}, ValueError, "y must be on cpu .*got meta"),
    ({"a": None}, TypeError, "a must be a torch.Tensor, got NoneType"),
    ({"a": K[0]}, ValueError, r"a must have shape \(2, 3\) or \(1, 3\), got \(3,\)"),
    ({"c": K[:, :2]}, ValueError, r"c must have shape \(2, 3\) or \(1, 3\), got \(2, 2\)"),
    ({"b": K.to("meta")}, ValueError, "b must be on cpu .*got meta"),
    ({"y": None}, ValueError, r"b must be None without y, got a tensor of shape \(2, 3\)"),
]

with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    COEFFICIENTS = torch.randn(1, 4, dtype=torch.float64)

DESCRIPTIONS = [
    Description(
        "plane_affine",
        op,
        formula,
        samples=[
            sample(f"{size} {' '.join(names)}", inputs(size, names))
            for size in SIZES
            for names in (GIVEN if size == SIZES[0] else GIVEN[:2])
        ],
        small=[sample(" ".join(names), inputs((2, 3, 2, 2), names)) for names in GIVEN[:3]],
        layouts=[sample("all", inputs())],
        differentiable=EVERY,
        batched=EVERY,
        results=(INPUT,),
        factor=3,
        float64=(1e-14, 1e-13),
        errors=ERRORS,
        good={"x": X, "a": K, "y": X, "b": K, "c": K},
        poison={"x": (1, 3, 2, 2), "y": (0, 5, 4, 4)},
        single=(lambda x: plane_affine(x, COEFFICIENTS, x.square()), (4, 3, 5)),
        halved=("x", "y"),
    ),
    Description(
        "plane_dots",
        plane_dots,
        dots_formula,
        samples=[sample(size, dots_inputs(size)) for size in SIZES],
        small=[sample(f"pivot={pivot}", dots_inputs((2, 3, 2, 2), pivot)) for pivot in (True, False)],
        layouts=[sample(f"pivot={pivot}", dots_inputs(pivot=pivot)) for pivot in (True, False)],
        differentiable=(),
        batched=("x", "y"),
        results=(torch.float32, torch.float32),
        factor=3,
        errors=[
            ({"y": X[..., 0]}, ValueError, r"y must have shape \(2, 3, 4, 4\), got \(2, 3, 4\)"),
            ({"pivot": K}, ValueError, r"pivot must have shape \(3,\), got \(2, 3\)"),
        ],
        good={"x": X, "y": X},
        halved=("x", "y"),
        poison={"x": (1, 3, 2, 2), "y": (0, 5, 4, 4)},
    ),
]
