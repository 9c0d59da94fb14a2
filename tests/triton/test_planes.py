"""The Triton kernels over planes (channel_statistics, affine_activation, plane_affine) against the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from internals import DEFINITIONS
from plane_cases import SIZES, assert_near, calls, on_cpu, outputs_of, truth

from nvae_fast.kernels import planes

CALLS = list(calls())
SEVERAL_TILES = [call for call in CALLS if call[0].startswith(str(SIZES[3]))]


def check(op: str, args: list[Any]) -> None:
    """Values, dtypes and strides."""
    found = outputs_of(DEFINITIONS[op].launch(*args))
    for i, (actual, expected, like) in enumerate(zip(found, truth(op, args), on_cpu(op, args), strict=True)):
        assert (actual.dtype, actual.stride()) == (like.dtype, like.stride())
        # bfloat16 is truncated by the interpreter; the others are rounded.
        slack = 2 if like.dtype == torch.bfloat16 else 1
        assert_near(actual, expected, slack * torch.finfo(like.dtype).eps, args[0].numel(), f"{op} {i}")


@pytest.mark.parametrize("case, op, args", CALLS, ids=[f"{op}-{case}" for case, op, _ in CALLS])
def test_kernels(case: str, op: str, args: list[Any]) -> None:
    check(op, args)


@pytest.mark.parametrize(
    "case, op, args", SEVERAL_TILES, ids=[f"{op}-{case}" for case, op, _ in SEVERAL_TILES]
)
def test_one_program(case: str, op: str, args: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which adds up many tiles, with 64-bit offsets."""
    monkeypatch.setattr(planes, "PROGRAMS", 1)
    monkeypatch.setattr(planes, "_INT32_LIMIT", 0)
    check(op, args)
