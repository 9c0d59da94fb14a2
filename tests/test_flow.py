"""Flows: causal masks tap by tap, and what an output may depend on."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness import assert_close
from torch import nn

from nvae_fast.nn import (
    AutoregressiveTransform,
    FlowCell,
    causal_mask,
)

# Cells


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("z", [1, 2, 3])
def test_causal_masks(z: int, mirrored: bool) -> None:
    """Tap by tap, from specification section 5."""
    kinds = ((6 * z, z, 3, True, False), (6 * z, 1, 5, False, True), (z, 6 * z, 1, False, False))
    for c_out, c_in, k, strict, depthwise in kinds:
        mask = causal_mask(c_out, c_in, k, strict=strict, mirrored=mirrored)
        centre = k // 2
        for o, i, u, v in itertools.product(range(c_out), range(c_in), range(k), range(k)):
            row, column = (k - 1 - u, k - 1 - v) if mirrored else (u, v)
            if (row, column) == (centre, centre):
                out_block, in_block = (o if c_out == z else o // 6), (i if c_in == z else i // 6)
                seen = depthwise or (in_block < out_block if strict else in_block <= out_block)
            else:
                seen = row < centre or (row == centre and column < centre)
            assert bool(mask[o, i, u, v]) == seen, (c_out, c_in, o, i, u, v)


def jacobian(module: nn.Module, z: torch.Tensor) -> torch.Tensor:
    """In raster order of pixels, channels of a pixel together: (H W Z, H W Z)."""
    _, channels, height, width = z.shape
    full = torch.autograd.functional.jacobian(module, z)[0, :, :, :, 0]
    n = channels * height * width
    return full.permute(1, 2, 0, 4, 5, 3).reshape(n, n)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("z", [1, 3])
def test_flow_is_autoregressive(z: int, mirrored: bool, route: str) -> None:
    """Triangular with a unit diagonal: the log-determinant is zero. And every earlier variable is seen."""
    transform = AutoregressiveTransform(z, mirrored=mirrored).double()
    with torch.no_grad():
        for conv in (transform.expand, transform.depthwise, transform.project):
            conv.log_weight_norm += 1.0
    found = jacobian(transform, torch.randn(1, z, 4, 5, dtype=torch.float64))
    pixels = 20
    if mirrored:  # the order of pixels turns round, that of channels stays
        order = torch.arange(pixels * z).view(pixels, z).flip(0).flatten()
        found = found[order][:, order]
    assert torch.equal(found.diagonal(), torch.ones(pixels * z, dtype=torch.float64))
    assert not found.triu(1).any()
    assert abs(float(torch.linalg.slogdet(found).logabsdet)) < 1e-12
    previous = found.diagonal(-z)  # the same channel of the pixel before, in the same row
    inner = torch.arange(pixels * z - z) // z % 5 != 4
    assert previous[inner].all(), "the pixel to the left is seen"
    if z > 1:
        within = found.diagonal(-1)[torch.arange(pixels * z - 1) % z != z - 1]
        assert within.all(), "earlier channels of the same pixel are seen"


def test_flow_cell_runs_both_orders(route: str) -> None:
    cell = FlowCell(2).double()
    z = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    assert_close(cell(z), cell.mirrored(cell.raster(z)), 0.0)
    found = jacobian(cell, z)
    assert found.triu(1).any()
    assert found.tril(-1).any()
    assert abs(float(torch.linalg.slogdet(found).logabsdet)) < 1e-10


def test_flow_starts_near_the_identity() -> None:
    """The last convolution's initial log_weight_norm is lowered by log 10; all norms are of the masked
    weights."""
    transform = AutoregressiveTransform(4, mirrored=False)
    for conv, shift in ((transform.expand, 0.0), (transform.depthwise, 0.0), (transform.project, 2.302585)):
        norms = (conv.weight * conv.mask).square().sum((1, 2, 3), keepdim=True).sqrt()
        assert_close(conv.log_weight_norm, torch.log(norms + 0.01) - shift, 1e-6)
    assert transform.expand.bias is None
    assert transform.depthwise.bias is None
    assert "mask" not in " ".join(transform.state_dict())
