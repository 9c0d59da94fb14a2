"""freeze on accelerated models: the same results, nothing left to compute, attributes and classes kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from foreign_cells import make, scrambled
from foreign_model import Cell, Conv2D, InvertedResidual, SyncBatchNormSwish, Tower
from harness import assert_close
from torch import nn

import nvae_fast as nf

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frozen_models_compute_the_same(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    torch.manual_seed(1)
    model = scrambled(Tower()).to(dtype)
    x = torch.rand(3, 3, 12, 8, dtype=dtype)
    expected = copy_of(model).eval()(x).detach()
    nf.accelerate(model).train().to(memory_format=memory_format)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = nf.freeze(model)
    x = x.to(memory_format=memory_format)
    with torch.no_grad():
        for twin in (frozen, copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert_close(twin(x), expected, TOLERANCE[dtype])
    assert not list(frozen.parameters())
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match="frozen"):
        frozen.train()


def copy_of(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("stride", [1, 2, -1])
def test_whole_cells_are_one_frozen_cell(stride: int) -> None:
    model = make(stride, se=stride != -1).eval()
    model.cell_type = "up_dec"  # what a model may ask its cells
    x = torch.randn(2, 12, 8, 6)
    with torch.no_grad():
        expected = model(x)
        frozen = nf.freeze(nf.accelerate(model))
        assert_close(frozen(x), expected, 2e-5)
        assert_close(frozen(s=x, temb=None), expected, 2e-5)
        next(p for name, p in model.named_parameters() if "bn.bias" in name).add_(1)
        assert_close(frozen(x), expected, 2e-5)  # later changes do not reach it
        assert_close(torch.compile(frozen, backend="aot_eager", fullgraph=True)(x), expected, 2e-5)
        assert_close(frozen.double()(x.double()), expected, 2e-5)
    assert type(frozen) is Cell
    assert frozen.cell_type == "up_dec"
    names = [type(part).__name__ for part in frozen.modules()]
    assert names.count("FrozenResidualCell") == 1
    assert not any("BatchNorm" in name for name in names)


def test_weights_and_norms_are_folded() -> None:
    model = scrambled(nn.Sequential(Conv2D(3, 4, 3, padding=1, bias=True), SyncBatchNormSwish(4))).eval()
    x = torch.randn(2, 3, 6, 5)
    expected = model(x).detach()
    frozen = nf.freeze(nf.accelerate(model))
    names = [type(part).__name__ for part in frozen.modules()]
    assert "FrozenForeignConv2d" in names
    assert "FrozenBatchNorm" in names
    assert_close(frozen(x), expected, 2e-5)


def test_parts_with_hooks_are_copied_as_they_are() -> None:
    model = make().eval()
    x = torch.randn(2, 12, 8, 6)
    nf.accelerate(model)
    handle = model._ops[0].conv[1].register_forward_hook(lambda m, a, out: 2 * out)
    with torch.no_grad():
        assert_close(nf.freeze(model)(x), model(x), 2e-5)
    handle.remove()


def test_own_models_freeze_with_accelerated_parts_inside() -> None:
    """Many times: a part that is made may take the place in memory of one that was replaced."""
    for _ in range(40):
        model = nn.Sequential(
            nf.nn.InvertedResidualCell(12, 12, 3, 3),
            Cell([InvertedResidual(12, 12, 1)], nn.Identity(), 12, True),
        )
        x = torch.randn(2, 12, 8, 6)
        with torch.no_grad():
            expected = model.eval()(x)
            frozen = nf.freeze(nf.accelerate(model))
            assert_close(frozen(x), expected, 2e-5)
        assert [type(part).__name__ for part in frozen.modules()].count("FrozenResidualCell") == 2


def test_frozen_parts_have_no_other_forward() -> None:
    """Nothing asks for the forward that freeze has taken away."""
    model = make().eval()
    x, temb = torch.randn(2, 12, 8, 6), torch.randn(2, 12, 8, 6)
    with torch.no_grad():
        expected = model(x)
        frozen = nf.freeze(nf.accelerate(model))
        with pytest.raises(
            RuntimeError, match=r"Cell\.forward with arguments beside its input: the module is frozen"
        ):
            frozen(x, temb)
        with pytest.raises(RuntimeError, match="restore: the module is frozen"):
            nf.restore(frozen)
        nf.accelerate(nn.Sequential(frozen, make()), sample_input=x)
        assert_close(frozen(x), expected, 2e-5)
        assert_close(torch.export.export(frozen, (x,)).module()(x), expected, 2e-5)
