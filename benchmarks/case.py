"""What a benchmark case is: one op, declared by its shapes, inputs, calls and the bytes it must move.

A file in ``cases/`` has the name of its operator's module in ``nvae_fast/ops/`` and holds a tuple ``CASES``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = tuple[int, ...]
Inputs = dict[str, Any]
Outputs = torch.Tensor | tuple[torch.Tensor, ...]

FLOAT32 = (torch.float32,)
NETWORK_DTYPES = (torch.float32, torch.bfloat16)  # what training computes in


@dataclass(frozen=True)
class Work:
    """What one pass must do at least: bytes to and from memory, every input read once, every output written
    once (where a pass needs two sweeps over a tensor, it counts twice); multiply-adds count as two
    operations."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Library:
    """The best route that PyTorch itself offers.

    run: same inputs, same outputs as the case's ``run``; for a case with ``noise`` it uses
        ``inputs["noise"]`` when that is given (the correctness gate) and otherwise draws with
        ``torch.randn``.
    tolerance: replaces the case's where the library computes something slightly different; ``note`` says
        what.
    moments: the numbers cannot be the same (another generator): compare mean and variance with those of N(0,
        1).
    """

    name: str
    run: Callable[[Inputs], Outputs]
    tolerance: float | None = None
    note: str = ""
    moments: bool = False


@dataclass(frozen=True)
class Case:
    """One op to measure.

    name: of the case; op: the key in ``nvae_fast.backends()``; axes: names of the numbers of a shape.
    shapes: lists of shapes under "cpu", "cuda", "quick" and "tiny" (the last for tests).
    inputs: ``(shape, random) -> {name: tensor or other}``; ``random(*size)`` draws float32 standard normals.
        float32 tensors are cast to the dtype under test, except those in ``keep``.
    run: the op through the public API. differentiable: names of the inputs whose gradients are taken.
    work: ``(shape, itemsize) -> {"forward": Work, "backward": Work}``.
    dtypes: measured on GPUs; cpu_dtypes: on CPUs.
    noise: size of the noise the op draws (then ``inputs["noise"]`` exists: None to draw, or the numbers to
        use).
    tolerances: relative error norm allowed, per dtype. outliers: fraction of elements that may differ freely,
        for outputs with a discrete choice in them, where a tie may fall either way.
    uncompiled: why torch.compile is not tried (empty: it is).
    """

    name: str
    op: str
    summary: str
    axes: tuple[str, ...]
    shapes: Mapping[str, tuple[Shape, ...]]
    inputs: Callable[[Shape, Callable[..., torch.Tensor]], Inputs]
    run: Callable[[Inputs], Outputs]
    work: Callable[[Shape, int], Mapping[str, Work]]
    differentiable: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOAT32
    cpu_dtypes: tuple[torch.dtype, ...] = FLOAT32
    memory_formats: tuple[str, ...] = ("contiguous", "channels_last")
    library: Library | None = None
    noise: Callable[[Shape], Shape] | None = None
    tolerances: Mapping[torch.dtype, float] = field(
        default_factory=lambda: {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
    )
    outliers: float = 0.0
    uncompiled: str = ""
    module: str = ""

    def label(self, shape: Shape) -> str:
        """``"B32 Z20 H16"``."""
        return " ".join(f"{axis}{extent}" for axis, extent in zip(self.axes, shape, strict=True))


def randn_like(like: torch.Tensor) -> torch.Tensor:
    """``torch.randn`` in the order of ``like``'s memory: drawing into channels_last memory in logical order
    is several times slower."""
    if like.dim() == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last):
        return torch.randn_like(like.permute(0, 2, 3, 1), memory_format=torch.contiguous_format).permute(
            0, 3, 1, 2
        )
    return torch.randn_like(like, memory_format=torch.contiguous_format)


def modules() -> list[str]:
    """The operator modules that have a file in ``cases/``."""
    from benchmarks import cases

    return sorted(found.name for found in pkgutil.iter_modules(cases.__path__))


def load_cases() -> dict[str, Case]:
    """Every case by its name, in the order of operator modules."""
    found: dict[str, Case] = {}
    for name in modules():
        for case in importlib.import_module(f"benchmarks.cases.{name}").CASES:
            if case.name in found:
                raise ValueError(f"benchmarks: two cases are called {case.name!r}")
            object.__setattr__(case, "module", name)
            found[case.name] = case
    return found


def select(names: list[str], available: Mapping[str, str]) -> list[str]:
    """The cases that ``names`` (of cases or operator modules; empty for all) select. ``available``: case -> module.

    Raises:
        ValueError: a name is neither.
    """
    if not names:
        return list(available)
    known = set(available) | set(available.values())
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no such case: {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    return [case for case, module in available.items() if case in names or module in names]
