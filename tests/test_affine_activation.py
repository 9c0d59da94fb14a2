"""affine_activation, its reduction and its gradient, which batch norm and the cell are made of, on the CPU."""

from __future__ import annotations

import pytest
import torch
from plane_cases import NAMES, assert_near, calls, on_cpu, truth


@pytest.mark.parametrize("op", NAMES)
def test_operators_over_planes(op: str) -> None:
    """The calls that the Triton kernels are tested with."""
    for case, name, args in calls():
        if name == op:
            for i, (a, e) in enumerate(zip(on_cpu(op, args), truth(op, args), strict=True)):
                assert_near(a, e, torch.finfo(a.dtype).eps, args[0].numel(), f"{op} | {case} | {i}")
