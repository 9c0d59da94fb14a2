"""squeeze_excite: gates that are saturated, maps of several blocks, a skip of another dtype."""

from __future__ import annotations

import pytest
import torch
from descriptions.squeeze_excite import formula, inputs
from harness import evaluate, relative_error

import nvae_fast as nf


def test_saturated_gates(route: str) -> None:
    """Gates at exactly 0 and 1: x is dropped or kept whole, and no gradient is NaN."""
    tensors = {name: t.float() for name, t in inputs((2, 4, 3, 3), skip=False).items()}
    tensors["expand_bias"] = torch.tensor([-1e4, 1e4, -1e4, 1e4])
    found = evaluate(nf.squeeze_excite, tensors, tuple(tensors))
    expected = tensors["x"] * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]
    assert torch.equal(found["output 0"], expected)
    assert all(torch.isfinite(t).all() for t in found.values())


# Of the CPU kernel's blocks of 256 KiB: several samples each, the last one fewer; one sample each, of several spans.
@pytest.mark.parametrize("shape", [(70, 24, 9, 9), (3, 40, 60, 50)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("one_thread")
def test_blocks(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    exact = inputs(shape, skip=True)
    given = {
        name: t.float().contiguous(memory_format=memory_format) if t.dim() == 4 else t.float()
        for name, t in exact.items()
    }
    expected, found = (
        evaluate(f, t, tuple(exact)) for f, t in ((formula, exact), (nf.squeeze_excite, given))
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < 2e-6, name


def test_skip_of_float64() -> None:
    exact = inputs((2, 8, 4, 4), skip=True)
    given = {name: t if name == "skip" else t.float() for name, t in exact.items()}
    expected, found = (
        evaluate(f, t, tuple(exact)) for f, t in ((formula, exact), (nf.squeeze_excite, given))
    )
    for name, value in expected.items():
        assert relative_error(found[name], value) < 2e-6, name
