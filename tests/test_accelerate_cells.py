"""Whole inverted residual cells of models written elsewhere: one call computes what the layers computed, or they run."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_model import (
    Cell,
    Conv2D,
    ConvBNSwish,
    FactorizedReduce,
    InvertedResidual,
    SyncBatchNormSwish,
    UpSkip,
)
from harness import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nvae_fast as nf
from nvae_fast._accelerate import cells
from nvae_fast._accelerate.clone import clone

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2}
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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every whole cell that ran in one call since the last was accelerated."""
    SEEN.clear()
    together = cells._together

    def counting(*args: Any) -> torch.Tensor:
        SEEN.append(1)
        return together(*args)

    monkeypatch.setattr(cells, "_together", counting)
    return SEEN


def accelerated(cell: Any) -> Any:
    ours = nf.accelerate(clone(cell, next(cell.parameters()).dtype))
    SEEN.clear()  # comparing calls it as well
    assert dict(nf.acceleration_report(ours).replaced)[""] == WHOLE, str(nf.acceleration_report(ours))
    return ours


# The same


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


def plain_layers(**options: Any) -> list[nn.Module]:
    """The layers in PyTorch's own modules."""
    return [
        nn.BatchNorm2d(12, **options), nn.Conv2d(12, 24, 1, bias=False), nn.BatchNorm2d(24), nn.SiLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24), nn.SiLU(inplace=True),
        nn.Conv2d(24, 12, 1, bias=False), nn.BatchNorm2d(12),
    ]  # fmt: skip


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


# Not the same: part by part, and why


class Doubling(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def altered(kind: str) -> Any:
    cell, ir = make(se=kind == "gate"), InvertedResidual(12, 12, 1)
    layers = cell._ops[0].conv
    depthwise = layers[2].conv
    if kind == "weight norm":
        layers[3] = Conv2D(36, 12, 1)
    elif kind == "bias":
        layers[3] = Conv2D(36, 12, 1, bias=True, weight_norm=False)
    elif kind == "dilation":
        depthwise[0] = Conv2D(36, 36, 5, padding=4, dilation=2, groups=36, weight_norm=False)
    elif kind == "groups":
        depthwise[0] = Conv2D(36, 36, 5, padding=2, groups=18, weight_norm=False)
    elif kind == "reflection":
        layers[3] = nn.Conv2d(36, 12, 3, padding=1, bias=False)
    elif kind == "momentum":
        layers[0] = nn.BatchNorm2d(12, momentum=None)
    elif kind == "eps":
        layers[0] = nn.BatchNorm2d(12, eps=1e-3)
    elif kind == "statistics":
        layers[4].track_running_stats = False
    elif kind == "affine":
        layers[0] = nn.BatchNorm2d(12, affine=False)
    elif kind == "subclass":
        layers[4] = Doubling(12)
    elif kind == "activation":
        depthwise[1] = nn.Sequential(nn.BatchNorm2d(36), nn.ReLU())
    elif kind == "dropout":
        layers.append(nn.Dropout(0.0))
    elif kind == "shared":
        layers[4] = layers[0]
    elif kind == "gate":
        cell.se.se[1] = nn.ReLU6()
    elif kind == "two":
        cell._ops.append(ir)
        cell._num_nodes = 2
    elif kind == "container":
        ir.conv, ir.factor = layers, nn.Parameter(torch.ones(()))
        ir.forward = None  # type: ignore[assignment]
        del ir.forward
        ir.__class__ = type(
            "InvertedResidual", (InvertedResidual,), {"forward": lambda m, x: m.factor * m.conv(x)}
        )
        cell._ops[0] = ir
    elif kind == "parametrization":
        depthwise[0] = nn.Conv2d(36, 36, 5, padding=2, groups=36, bias=False)
        torch.nn.utils.parametrizations.weight_norm(depthwise[0], "weight")
    elif kind == "spectral norm":
        layers[3] = torch.nn.utils.spectral_norm(nn.Conv2d(36, 12, 1, bias=False))
    return scrambled(cell)


REASONS = {
    "weight norm": "has weight norm",
    "bias": "has a bias before a batch norm",
    "dilation": "is dilated",
    "groups": "with 18 groups is not depthwise",
    "reflection": "is not a plain 1x1 convolution",
    "momentum": "momentum is None",
    "eps": "not one eps",
    "statistics": "track_running_stats was switched off",
    "affine": "it has no weight, bias",
    "subclass": "Doubling is not a layer",
    "activation": "ReLU is not a layer",
    "dropout": "Dropout is not a layer",
    "shared": "stands in it twice",
    "gate": "se is not replaced",
    "two": "its layers are",
    "container": "the output would differ",
    "parametrization": "is not a layer",
    "spectral norm": "hooks wait on _ops.0.conv.3",
}


@pytest.mark.parametrize("kind", REASONS)
def test_altered_cells_run_part_by_part(kind: str, calls: list[int]) -> None:
    theirs = altered(kind)
    x = torch.randn(2, 12, 8, 6)
    ours = nf.accelerate(altered(kind))
    ours.load_state_dict(theirs.state_dict())
    calls.clear()  # comparing calls it as well
    assert_same(ours, theirs, x)
    assert not calls
    report = nf.acceleration_report(ours)
    note = dict(report.notes).get("", dict(report.left).get("", ""))
    assert REASONS[kind] in note, str(report)


def hook(cell: Any) -> Callable[[], None]:
    return cell._ops[0].conv[1].register_forward_hook(lambda *_: None).remove


def hook_in_gate(cell: Any) -> Callable[[], None]:
    return cell.se.se[2].register_full_backward_hook(lambda *_: None).remove


def frozen(cell: Any) -> Callable[[], None]:
    cell._ops[0].conv[0].eval()
    return cell._ops[0].conv[0].train


def other_momentum(cell: Any) -> Callable[[], None]:
    cell._ops[0].conv[4].momentum = None
    return lambda: setattr(cell._ops[0].conv[4], "momentum", 0.05)


def other_layer(cell: Any) -> Callable[[], None]:
    layers, old = cell._ops[0].conv, cell._ops[0].conv[0]
    layers[0] = Doubling(12)
    layers[0].load_state_dict(old.state_dict())
    return lambda: layers.__setitem__(0, old)


def other_forward(cell: Any) -> Callable[[], None]:
    norm = cell._ops[0].conv[4]
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    return lambda: norm.__dict__.pop("forward") and None


def global_hook(cell: Any) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def other_padding(cell: Any) -> Callable[[], None]:
    conv = cell._ops[0].conv[2].conv[0]
    conv.dilation, conv.padding = (2, 2), (4, 4)
    return lambda: (setattr(conv, "dilation", (1, 1)), setattr(conv, "padding", (2, 2))) and None


CHANGES = [hook, hook_in_gate, frozen, other_momentum, other_layer, other_forward, global_hook, other_padding]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_later_is_seen(change: Callable[[Any], Callable[[], None]], calls: list[int]) -> None:
    theirs = make()
    ours, x = accelerated(theirs), torch.randn(2, 12, 8, 6)
    undo = [change(theirs), change(ours)]
    assert_same(ours, theirs, x)
    assert not calls
    assert dict(nf.acceleration_report(ours).notes)[""].startswith("for now part by part: ")
    for undone in undo:
        undone()
    assert "" not in dict(nf.acceleration_report(ours).notes)
    assert_same(ours, theirs, x)
    assert calls


def test_data_dependent_initialisation_inside(calls: list[int]) -> None:
    theirs = make()
    ours = accelerated(theirs)
    for cell in (theirs, ours):
        cell._ops[0].conv[3].data_init = True
        cell._ops[0].conv[3].initialize = lambda x, conv=cell._ops[0].conv[3]: setattr(
            conv, "init_done", True
        )
    x = torch.randn(2, 12, 8, 6)
    assert_same(ours, theirs, x)
    assert not calls
    assert ours._ops[0].conv[3].init_done


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
        twin._ops[0].conv[4].bias.data.add_(1)  # no version counter moves
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
        if name != "_ops.0.conv.0.bias":  # zero in training
            assert_close(ours.get_parameter(name).grad, p.grad, 5e-5, name)
