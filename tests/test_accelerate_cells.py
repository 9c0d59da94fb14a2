"""Whole inverted residual cells of models written elsewhere: one call computes what the layers computed."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from foreign_cells import accelerated, assert_same, counted, make, observe, of_layers, plain_layers
from foreign_model import Conv2D, ConvBNSwish, UpSkip
from harness import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nvae_fast as nf

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


@pytest.fixture
def calls() -> Iterator[list[int]]:
    with counted() as seen:
        yield seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stride", "se"), [(1, True), (1, False), (2, True), (-1, False)])
def test_same_as_the_layers(
    stride: int,
    se: bool,
    training: bool,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    calls: list[int],
) -> None:
    theirs = make(stride, se).to(dtype).train(training)
    ours = accelerated(theirs).to(memory_format=memory_format)
    x = torch.randn(3, 12, 8, 6, dtype=dtype) * 2 + 1
    actual, expected = observe(ours, x.to(memory_format=memory_format)), observe(theirs, x)
    assert len(calls) == 1
    for name, value in expected.items():
        assert_close(actual[name], value, TOLERANCE[dtype], name)
    with torch.no_grad():
        assert_close(ours.eval()(x), theirs.eval()(x), TOLERANCE[dtype])
    assert len(calls) == 2


@pytest.mark.parametrize("place", [0, 1, 2])
def test_upsampling_before_any_of_the_layers(place: int, calls: list[int]) -> None:
    """The running variance counts the pixels that a batch norm saw: before or after upsampling."""
    layers: list[nn.Module] = [
        nn.BatchNorm2d(4), ConvBNSwish(4, 12, 1), ConvBNSwish(12, 12, 3, groups=12), Conv2D(12, 4, 1, weight_norm=False),
        nn.BatchNorm2d(4),
    ]  # fmt: skip
    layers.insert(place, nn.Upsample(scale_factor=2))
    theirs = of_layers(*layers, c=4, skip=UpSkip(4, 4)).double()
    assert_same(accelerated(theirs), theirs, torch.randn(2, 4, 3, 2, dtype=torch.float64), 1e-10)
    assert calls


@pytest.mark.parametrize("options", [{}, {"momentum": 0.3}, {"momentum": 0}])
def test_layers_of_pytorch_and_different_momenta(options: dict[str, Any], calls: list[int]) -> None:
    theirs = of_layers(*plain_layers(**options)).double()
    assert_same(accelerated(theirs), theirs, torch.randn(3, 12, 5, 4, dtype=torch.float64), 1e-10)
    assert calls


def test_synchronised_batch_norms_of_pytorch(calls: list[int]) -> None:
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(of_layers(*plain_layers()))
    assert_same(accelerated(theirs), theirs, torch.randn(3, 12, 5, 4))
    assert calls


class Maps(TorchDispatchMode):
    """Counts the calls that write a map of the size of the cell's input or more."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.count = least, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        outputs = found if isinstance(found, (tuple, list)) else (found,)
        is_view = any(word in str(func) for word in ("view", "permute", "detach", "expand", "empty"))
        self.count += not is_view and any(
            isinstance(t, torch.Tensor) and t.numel() >= self.least for t in outputs
        )
        return found


@pytest.mark.parametrize(("training", "at_most"), [(True, 0.6), (False, 0.8)])
def test_fewer_maps_are_written_than_part_by_part(training: bool, at_most: float) -> None:
    theirs = make().train(training)
    ours, x = accelerated(theirs), torch.randn(8, 12, 16, 16)
    counts = []
    for model, apart in ((ours, False), (ours, True), (theirs, False)):
        if apart:
            model._ops[0].register_forward_hook(lambda *_: None)
        with Maps(x.numel()) as maps, torch.set_grad_enabled(training):
            y = model(x)
            if training:
                y.sum().backward()
        counts.append(maps.count)
    whole, parts, own = counts
    assert whole < at_most * own, (whole, parts, own)
    assert whole < parts, (whole, parts, own)


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_run_whole_with_their_own_parameters(how: str, calls: list[int]) -> None:
    model, x = accelerated(make()).eval(), torch.randn(2, 12, 6, 6)
    with torch.no_grad():
        before = model(x)
        file = io.BytesIO()
        if how == "deepcopy":
            twin = copy.deepcopy(model)
        else:
            torch.save(model, file)
            twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        calls.clear()
        assert torch.equal(twin(x), before)
        assert calls
        twin._ops[0].conv[4].bn.bias.data.add_(1)  # no version counter moves
        assert not torch.equal(twin(x), before)
        assert torch.equal(model(x), before)
        calls.clear()
        nf.restore(twin)(x)
        assert not calls
        assert all("forward" not in part.__dict__ for part in twin.modules())


def test_restoring_a_layer_takes_the_whole_cell_apart(calls: list[int]) -> None:
    theirs = make()
    ours, x = accelerated(theirs), torch.randn(2, 12, 6, 6)
    nf.restore(ours.se)
    calls.clear()
    assert_same(ours, theirs, x)
    assert not calls


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(training: bool) -> None:
    theirs = make(2).train(training)
    ours, x = accelerated(theirs), torch.randn(2, 12, 6, 6)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    actual, expected = (compiled(x), theirs(x))
    assert_close(actual, expected, 2e-5)
    actual.square().sum().backward()
    expected.square().sum().backward()
    for name, p in theirs.named_parameters():
        if name != "_ops.0.conv.0.bn.bias":  # zero in training
            assert_close(ours.get_parameter(name).grad, p.grad, 5e-5, name)
