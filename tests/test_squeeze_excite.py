"""squeeze_excite: gates that are saturated."""

from __future__ import annotations

import torch
from descriptions.squeeze_excite import inputs
from harness import (
    evaluate,
)

import nvae_fast as nf


def test_saturated_gates(route: str) -> None:
    """Gates at exactly 0 and 1: x is dropped or kept whole, and no gradient is NaN."""
    tensors = {name: t.float() for name, t in inputs((2, 4, 3, 3), skip=False).items()}
    tensors["expand_bias"] = torch.tensor([-1e4, 1e4, -1e4, 1e4])
    found = evaluate(nf.squeeze_excite, tensors, tuple(tensors))
    expected = tensors["x"] * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]
    assert torch.equal(found["output 0"], expected)
    assert all(torch.isfinite(t).all() for t in found.values())
