"""Residual cells in the style of NVAE code found elsewhere, before and after they are accelerated, and what they do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from foreign_model import Cell, FactorizedReduce, InvertedResidual, UpSkip
from harness import assert_close
from torch import nn

import nvae_fast as nf
from nvae_fast.patching import cells
from nvae_fast.patching.clone import clone

WHOLE = "whole inverted residual cell"
SEEN: list[int] = []


def make(stride: int = 1, se: bool = True, c: int = 12) -> Any:
    """A cell whose parameters are all far from what they are initialised with."""
    torch.manual_seed(1)
    out = {1: c, 2: 2 * c, -1: c // 2}[stride]
    skip = {1: nn.Identity, 2: FactorizedReduce, -1: UpSkip}[stride]
    return scrambled(
        Cell([InvertedResidual(c, out, stride)], skip() if stride == 1 else skip(c, out), out, use_se=se)
    )


def scrambled(cell: Any) -> Any:
    with torch.no_grad():
        for part in cell.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.affine:
                part.weight.normal_()
                part.bias.normal_()
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    return cell


def of_layers(*layers: nn.Module, c: int = 12, skip: nn.Module | None = None) -> Any:
    return scrambled(Cell([nn.Sequential(*layers)], skip or nn.Identity(), c, use_se=False))


def plain_layers(**options: Any) -> list[nn.Module]:
    """The layers in PyTorch's own modules."""
    return [
        nn.BatchNorm2d(12, **options), nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24), nn.SiLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.SiLU(inplace=True),
        nn.Conv2d(24, 12, 1, bias=False), nn.BatchNorm2d(12),
    ]  # fmt: skip


def observe(cell: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    cell.zero_grad()
    y = cell(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * upstream.to(y.dtype)).sum().backward()
    # In one vector: the gradient of BN0's bias is zero, and what theirs has there is rounding noise.
    grads = torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in cell.parameters()]
    )
    return {
        "y": y.detach(),
        "grad x": x.grad,
        "gradients": grads,
        **{n: b.clone() for n, b in cell.named_buffers()},
    }


def assert_same(ours: nn.Module, theirs: nn.Module, x: torch.Tensor, tolerance: float = 2e-5) -> None:
    actual, expected = observe(ours, x), observe(theirs, x)
    for name, value in expected.items():
        assert_close(actual[name], value, tolerance, name)


def accelerated(cell: Any) -> Any:
    ours = nf.accelerate(clone(cell, next(cell.parameters()).dtype))
    SEEN.clear()  # comparing calls it as well
    assert dict(nf.acceleration_report(ours).replaced)[""] == WHOLE, str(nf.acceleration_report(ours))
    return ours


@contextmanager
def counted() -> Iterator[list[int]]:
    """One entry for every whole cell that ran in one call since the last was accelerated."""
    SEEN.clear()
    together = cells._together

    def counting(*args: Any) -> torch.Tensor:
        SEEN.append(1)
        return together(*args)

    cells._together = counting
    try:
        yield SEEN
    finally:
        cells._together = together
