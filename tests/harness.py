"""What several test files share: recorded numbers, error measures, poisoned outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / "data"


@cache
def _archive(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


class Record:
    """Recorded official numbers under a prefix: ``record["train/logits"]`` is a tensor."""

    def __init__(self, name: str, prefix: str = "") -> None:
        self.name, self.prefix = name, prefix

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.array(_archive(self.name)[self.prefix + key]))

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """Every entry below ``prefix``, by the rest of its key."""
        full = self.prefix + prefix
        return {
            k[len(full) :]: self[k[len(self.prefix) :]] for k in _archive(self.name) if k.startswith(full)
        }

    def sub(self, prefix: str) -> Record:
        return Record(self.name, self.prefix + prefix)

    @property
    def args(self) -> dict:
        return json.loads(bytes(_archive(self.name)["args.json"]))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64 (the norm of the difference where expected is all
    zero)."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), "not finite"
    scale = expected.norm()
    return float((actual - expected).norm() / (scale if scale > 0 else 1.0))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "value") -> None:
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.3g} exceeds {tolerance:.3g}"


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The specification's two measures of training gradients: all as one vector 2e-5, each one 5e-4 of
    ``max(|g|, 1e-4 |all|)`` (some are analytically zero)."""
    assert actual.keys() == expected.keys()
    flat = torch.cat([expected[k].double().reshape(-1) for k in expected])
    flat_actual = torch.cat([actual[k].double().reshape(-1) for k in expected])
    assert_close(flat_actual, flat, 2e-5, "all gradients as one vector")
    total = flat.norm()
    for key in expected:
        error = (actual[key].double() - expected[key].double()).norm()
        bound = 5e-4 * max(expected[key].double().norm(), 1e-4 * total)
        assert error <= bound, f"gradient of {key}: error {error:.3g} exceeds {bound:.3g}"


# What the test files of operators share. An operator is given as a function of named tensors, ``function(**tensors)``.

Tensors = dict[str, torch.Tensor]
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


def place(
    tensors: Tensors, dtype: torch.dtype, memory_format: torch.memory_format, device: torch.device
) -> Tensors:
    """Floating tensors in ``dtype``, the four-dimensional ones in ``memory_format``, all on ``device``."""
    placed = {}
    for name, value in tensors.items():
        value = value.to(device, dtype if value.is_floating_point() else value.dtype)
        placed[name] = value.contiguous(memory_format=memory_format) if value.dim() == 4 else value
    return placed


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with a gap after each and the dimensions stored in reverse order."""
    reverse = tuple(range(t.dim()))[::-1]
    return (
        torch.stack((t, torch.full_like(t, float("nan"))), dim=-1)
        .permute(*reverse, t.dim())
        .contiguous()[..., 0]
        .permute(*reverse)
    )


def _upstream(output: torch.Tensor, index: int) -> torch.Tensor:
    """A gradient that is exact in every dtype: quarters between -2 and 2."""
    generator = torch.Generator().manual_seed(index)
    quarters = torch.randint(-8, 9, tuple(output.shape), generator=generator)
    return (quarters / 4).to(output)


def evaluate(function: Callable[..., Any], tensors: Tensors, differentiable: Sequence[str]) -> Tensors:
    """Outputs and gradients by name: ``"output 0"``, ..., ``"grad x"``, ...; the upstream gradients are
    always the same."""
    leaves = {name: value.detach().requires_grad_(name in differentiable) for name, value in tensors.items()}
    outputs = function(**leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    roots = [(output, _upstream(output, i)) for i, output in enumerate(outputs) if output.requires_grad]
    if differentiable:
        gradients = torch.autograd.grad(
            [root for root, _ in roots],
            [leaves[n] for n in differentiable],
            [g for _, g in roots],
            allow_unused=True,
        )
        for name, gradient in zip(differentiable, gradients, strict=True):
            found[f"grad {name}"] = torch.zeros_like(leaves[name]) if gradient is None else gradient
    return found


def assert_same(actual: Tensors, expected: Tensors, tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].dtype == expected[name].dtype, name
        assert_close(actual[name], expected[name], tolerance, name)


def assert_accurate(
    function: Callable[..., Any],
    formula: Callable[..., Any],
    tensors: Tensors,
    differentiable: Sequence[str],
    *,
    eager: Callable[..., Any] | None = None,
    factor: float = 2.0,
    vector_floor: float = 0.0,
    rounding: float = 0.0,
) -> None:
    """Every output and gradient of ``function`` is as near the truth, ``formula`` in float64 on the same
    inputs, as ``factor`` times what plain PyTorch (``eager``, by default the formula) loses in the dtype of
    the inputs, or ``factor`` times what rounding the truth to that dtype loses; ``vector_floor`` allows at
    least that much in one-dimensional results, a few sums each, where plain PyTorch is sometimes right by
    luck, and ``rounding`` in gradients. Where it overflows, it does not count."""
    actual = evaluate(function, tensors, differentiable)
    native = evaluate(eager or formula, tensors, differentiable)
    wide = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    truth = evaluate(formula, wide, differentiable)
    assert actual.keys() == truth.keys()
    for name, expected in truth.items():
        unavoidable = relative_error(expected.to(actual[name].dtype), expected)
        lost = relative_error(native[name], expected) if torch.isfinite(native[name]).all() else 0.0
        floor = max(torch.finfo(torch.float32).eps, vector_floor if expected.dim() == 1 else 0.0)
        bound = factor * max(lost, unavoidable, floor, rounding if "grad" in name else 0.0)
        assert_close(actual[name], expected, bound, f"{name} in {actual[name].dtype}")


def assert_indifferent_to_layout(
    function: Callable[..., Any], tensors: Tensors, differentiable: Sequence[str]
) -> None:
    """Strided inputs give what contiguous ones give."""
    assert_same(
        evaluate(function, {name: strided(t) for name, t in tensors.items()}, differentiable),
        evaluate(function, tensors, differentiable),
        2e-6,
    )


def assert_repeatable(function: Callable[..., Any], tensors: Tensors, differentiable: Sequence[str]) -> None:
    """Two runs are equal bit for bit."""
    first, second = (evaluate(function, tensors, differentiable) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between two runs"


def assert_empty_works(
    function: Callable[..., Any], tensors: Tensors, differentiable: Sequence[str]
) -> Tensors:
    """With a batch of none, laid out densely, or with gaps in every dimension (of which PyTorch says that it is contiguous
    in every format, and makes no copy): outputs and gradients of the right shapes, zero for what is shared by the batch."""
    gaps = {name: _with_gaps(t) if not t.numel() else t for name, t in tensors.items()}
    for given in (gaps, tensors):
        found = evaluate(function, given, differentiable)
        for name in differentiable:
            assert found[f"grad {name}"].shape == tensors[name].shape
            assert not found[f"grad {name}"].any(), f"grad {name}"
    return found


def _with_gaps(t: torch.Tensor) -> torch.Tensor:
    wide = t.new_zeros([2 * n for n in t.shape])
    return wide[(slice(None, None, 2),) * t.dim()]


def assert_gradcheck(function: Callable[..., Any], tensors: Tensors, differentiable: Sequence[str]) -> None:
    """Gradients against finite differences, in float64."""

    def of_leaves(*leaves: torch.Tensor) -> Any:
        outputs = function(**{**tensors, **dict(zip(differentiable, leaves, strict=True))})
        outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return tuple(output for output in outputs if output.requires_grad)

    leaves = [tensors[name].double().requires_grad_() for name in differentiable]
    assert torch.autograd.gradcheck(of_leaves, leaves)


def assert_opcheck(op: str, *args: Any, differentiable: Sequence[int] = ()) -> None:
    """All of PyTorch's own tests of an operator, with gradients asked for where it has any."""
    leaves = [a.detach().clone().requires_grad_() if i in differentiable else a for i, a in enumerate(args)]
    torch.library.opcheck(getattr(torch.ops.nvae_fast, op), tuple(leaves))


def assert_no_double_backward(op: str, output: torch.Tensor, leaf: torch.Tensor) -> None:
    """``output`` came from the operator: ``create_graph=True`` says what to do instead of giving wrong
    numbers."""
    with pytest.raises(RuntimeError, match=f"{op}: double backward is not supported; use .*reference"):
        torch.autograd.grad(output.sum(), leaf, create_graph=True)


def assert_compiles(
    function: Callable[..., Any],
    tensors: Tensors,
    differentiable: Sequence[str],
    *,
    backend: str = "aot_eager",
) -> None:
    """``torch.compile(fullgraph=True)`` gives what eager gives. The default backend traces forward and
    backward through the operators' fakes and autograd, and leaves out the seconds that "inductor" spends in a
    C++ compiler."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_same(
        evaluate(compiled, tensors, differentiable), evaluate(function, tensors, differentiable), 2e-6
    )
