"""What tests/test_ops.py needs to know of an operator: one module for each, named after it.

A module defines ``DESCRIPTIONS``, the public functions of the operator. Each names a function of named tensors and options, the
same function in plain PyTorch, which is the truth in float64, and the arguments to call both with. An operator's own test file
may import the functions and inputs that stand there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import Tensors

INPUT = "the dtype of the first argument"


@dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    Args:
        label: of the test.
        tensors: by the names of the function's arguments, in float64.
        options: arguments that are no tensors.
        differentiable: names of the tensors whose gradients are compared; by default the description's.
        cancels: factor on the bound of gradients in float64, where terms of a gradient cancel.
        rounding: what float32 loses in such a gradient: its eps times the size of the terms over that of the gradient.
    """

    label: str
    tensors: Callable[[], Tensors]
    options: dict[str, Any] = field(default_factory=dict)
    differentiable: tuple[str, ...] | None = None
    cancels: float = 1.0
    rounding: float = 0.0


def sample(
    label: Any, tensors: Tensors, differentiable: tuple[str, ...] | None = None, **options: Any
) -> Sample:
    """A sample of these tensors."""
    return Sample(
        str(label), lambda: {name: t.clone() for name, t in tensors.items()}, options, differentiable
    )


@dataclass(frozen=True)
class Description:
    """A public function, its truth, and its arguments.

    Args:
        name: of the function, with which its error messages begin, and of its operator.
        op: ``op(**tensors, **options)``: the function.
        formula: the same in plain PyTorch. It is correct in float64, and what it loses in a dtype is what ``op`` may lose.
        samples: of various sizes and options, compared in every dtype and memory format.
        small: of a few elements, for finite differences, ``opcheck`` and, the first one, ``torch.compile``. Every kind of
            argument is given in one and missing in another.
        layouts: of a few hundred elements, for strided inputs, repeated and empty calls.
        differentiable: names of the tensors that have gradients.
        batched: names of the tensors whose first dimension is the batch; by default all four-dimensional ones.
        results: dtype of each output, INPUT or a dtype (where inputs are float64, that is float64).
        eager: the composition of PyTorch's operators that a user would write, where ``formula`` is not that.
        factor: bound of the error in units of what PyTorch loses; see ``assert_accurate``.
        vector_floor: bound of the error in one-dimensional results, in units of the dtype's precision.
        float64: bounds of the relative error in float64, of outputs and of gradients.
        errors: (arguments to change in ``good``, the exception, a pattern of the message after the name).
        good: arguments that are right.
        call: the public function itself, which ``errors`` are given to; by default ``op``.
        poison: index of one element by the tensor's name, to which ``bad_values`` are written.
        bad_values: see ``poison``.
        single: function of one batch of maps and the size of one, for functional transforms; other arguments are constants.
        drawn: function of packed parameters and a seed that draws noise.
        given: function of packed parameters and noise: ``drawn`` with the noise of that seed.
        halved: tensors that may be in half precision beside float32; by default the first.
        keeps_format: four-dimensional results have the memory format of the arguments.
        compiler: backend of ``torch.compile``.
    """

    name: str
    op: Callable[..., Any]
    formula: Callable[..., Any]
    samples: Sequence[Sample]
    small: Sequence[Sample]
    layouts: Sequence[Sample]
    differentiable: tuple[str, ...]
    results: tuple[Any, ...]
    batched: tuple[str, ...] | None = None
    eager: Callable[..., Any] | None = None
    factor: float = 2.0
    vector_floor: float = 0.0
    float64: tuple[float, float] = (1e-13, 1e-13)
    errors: Sequence[tuple[dict[str, Any], type[Exception], str]] = ()
    good: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    poison: dict[str, tuple[int, ...]] = field(default_factory=dict)
    bad_values: tuple[float, ...] = (float("nan"), float("inf"))
    single: tuple[Callable[[torch.Tensor], Any], tuple[int, ...]] | None = None
    drawn: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
    given: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    halved: tuple[str, ...] | None = None
    keeps_format: bool = True
    compiler: str = "aot_eager"

    def names(self, of: Sample) -> tuple[str, ...]:
        """The tensors of a sample whose gradients are compared."""
        known = self.differentiable if of.differentiable is None else of.differentiable
        return tuple(name for name in of.tensors() if name in known)


def every() -> dict[str, Description]:
    """All descriptions, by name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        for description in importlib.import_module(f"{__name__}.{info.name}").DESCRIPTIONS:
            assert description.name not in found, description.name
            found[description.name] = description
    return found
