"""weight_norm: one rounding, masks, and channels that are all zero."""

from __future__ import annotations

import pytest
import torch
from descriptions.weight_norm import SIZES, formula, inputs
from harness import (
    DTYPES,
    assert_close,
    evaluate,
    place,
    relative_error,
)

import nvae_fast as nf

NAMES = ("weight", "log_weight_norm")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_once(
    dtype: torch.dtype,
    size: tuple,
    masked: bool,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    tensors = place(inputs(size, masked), dtype, memory_format, device)
    out = nf.weight_norm(**tensors)
    truth = formula(**{name: t.double() for name, t in tensors.items()})
    assert_close(
        out, truth, 1.05 * relative_error(truth.to(dtype), truth) + 5e-7, "computed in fp32, rounded once"
    )


def test_norm_of_each_output_channel(route: str) -> None:
    tensors = inputs()
    norms = nf.weight_norm(**tensors, eps=0.0).square().sum((1, 2, 3)).sqrt()
    assert_close(norms, tensors["log_weight_norm"].exp().flatten(), 1e-13)


def test_channel_of_zeros(route: str) -> None:
    """Its normalised weight is zero, its gradient the finite one of ``w / eps``."""
    tensors = inputs()
    tensors["weight"][1] = 0
    found = evaluate(nf.weight_norm, tensors, NAMES)
    assert not found["output 0"][1].any()
    assert found["grad log_weight_norm"][1] == 0
    upstream = evaluate(lambda w: w, {"w": tensors["weight"]}, ("w",))[
        "grad w"
    ]  # evaluate's gradient of an output
    assert_close(found["grad weight"][1], upstream[1] * tensors["log_weight_norm"][1].exp() / 1e-5, 1e-13)


def test_masked_taps_get_no_weight_and_no_gradient(route: str) -> None:
    tensors = inputs(masked=True)
    found = evaluate(nf.weight_norm, tensors, NAMES)
    dead = tensors["mask"] == 0
    assert dead.any()
    assert not found["output 0"][dead].any()
    assert not found["grad weight"][dead].any()
    changed = {
        **tensors,
        "weight": torch.where(dead, torch.full_like(tensors["weight"], 9.0), tensors["weight"]),
    }
    assert torch.equal(nf.weight_norm(**changed), found["output 0"]), "the norm is that of the masked weight"
