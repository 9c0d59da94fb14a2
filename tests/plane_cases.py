"""Calls of the operators over planes (channel_statistics, affine_activation, plane_affine), and their truth in float64."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from internals import DEFINITIONS

FORMATS = {"rows": torch.contiguous_format, "channels": torch.channels_last}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# One pixel, one channel, prime extents, several parts a plane (in the interpreter a program adds up a few tiles).
SIZES = [(2, 6, 5, 7), (3, 17, 1, 1), (2, 1, 9, 9), (1, 20, 40, 57), (2, 130, 4, 4), (0, 3, 4, 4)]


def draws(size: tuple[int, ...], number: int, dtype: torch.dtype, offset: float = 0.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(size) + number)
    return [(torch.randn(size, generator=generator) + offset).to(dtype) for _ in range(number)]


def calls() -> Iterator[tuple[str, str, list[Any]]]:
    """Name of the case, operator, arguments."""
    for size, (layout, memory_format) in itertools.product(SIZES, FORMATS.items()):
        for dtype in FLOATS if size in SIZES[:2] else FLOATS[:1]:
            x, grad, other = (t.contiguous(memory_format=memory_format) for t in draws(size, 3, dtype))
            far = draws(size, 1, dtype, 100.0)[0].contiguous(memory_format=memory_format)
            rows = draws(size[:2], 3, torch.float32)
            vectors = draws(size[1:2], 5, torch.float32)
            name = f"{size} {layout} {dtype}"
            for per_sample in (False, True):
                yield f"{name} {per_sample}", "channel_statistics", [far, per_sample]
            for activation in ("swish", "elu", None)[: 3 if size in SIZES[:2] else 1]:
                case = f"{name} {activation}"
                yield case, "affine_activation", [x, *vectors[:2], activation]
                need = activation == "swish"
                pivot = vectors[2] if activation != "elu" else None
                args = [grad, x, *vectors[:2], pivot, activation, need, not need]
                yield case, "affine_activation_reduce", args
                yield case, "affine_activation_grad", [grad, x, *vectors, activation]
            turned = other.contiguous(memory_format=FORMATS["rows" if layout == "channels" else "channels"])
            for y, which in ((other, "same"), (turned, "mixed")):
                case = f"{name} {which}"
                yield f"{case} all", "plane_affine", [x, rows[0], y, rows[1][:1], rows[2]]
                yield f"{case} sum", "plane_affine", [x, rows[0], y, None, None]
                yield f"{case} pivot", "plane_dots", [x, y, vectors[0]]
                yield case, "plane_dots", [x, y, None]
            yield name, "plane_affine", [x, rows[0], None, None, rows[1]]


NAMES = (
    "channel_statistics",
    "affine_activation",
    "affine_activation_reduce",
    "affine_activation_grad",
    "plane_affine",
    "plane_dots",
)
TRUTH = {name: DEFINITIONS[name].formula for name in NAMES}


def outputs_of(found: Any) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)


def truth(op: str, args: list[Any]) -> list[torch.Tensor]:
    return outputs_of(TRUTH[op](*(a.double() if isinstance(a, torch.Tensor) else a for a in args)))


def assert_near(actual: torch.Tensor, expected: torch.Tensor, unit: float, count: int, name: str) -> None:
    """As vectors. A sum of n numbers about 0 is no larger than sqrt(n), and may be nearly 0."""
    scale = expected.norm().clamp_min(max(count, 1) ** 0.5) if expected.dim() < 3 else expected.norm()
    error = (actual.double() - expected).norm()
    assert error <= max(4e-7, unit) * scale, f"{name}: {float(error / scale):.3g}"


def on_cpu(op: str, args: list[Any]) -> list[torch.Tensor]:
    return outputs_of(getattr(torch.ops.nvae_fast, op)(*args))
