"""accelerate on what models of the family do in practice: counters, constants, arguments, gates, other names, other tools."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_cells import WHOLE, assert_same, counted, make, of_layers, plain_layers, scrambled
from foreign_model import (
    SE,
    Cell,
    Conv2D,
    ConvBNSwish,
    InvertedResidual,
    SyncBatchNorm,
    SyncBatchNormSwish,
    Tower,
)
from harness import assert_close
from torch import nn

import nvae_fast as nf
from nvae_fast.patching import recognise
from nvae_fast.patching.clone import clone

SHAPE = (2, 12, 8, 6)


@pytest.fixture
def calls() -> Iterator[list[int]]:
    with counted() as seen:
        yield seen


def kinds(model: nn.Module) -> dict[str, str]:
    return dict(nf.acceleration_report(model).replaced)


def reason(model: nn.Module) -> str:
    report = nf.acceleration_report(nf.accelerate(model))
    assert not report.replaced, str(report)
    return dict(report.left)[""]


def compared(theirs: nn.Module, tolerance: float = 1e-10) -> nn.Module:
    """Accelerate a copy in float64, compare both, and return the copy."""
    theirs = theirs.double()
    ours = nf.accelerate(clone(theirs, torch.float64))
    assert_same(ours, theirs, torch.randn(SHAPE, dtype=torch.float64), tolerance)
    return ours


@pytest.mark.parametrize("training", [True, False])
def test_every_cell_of_the_family_runs_in_one_call(training: bool, calls: list[int]) -> None:
    ours = nf.accelerate(Tower(8)).train(training)
    calls.clear()
    ours(torch.rand(2, 3, 8, 8))
    assert len(calls) == 2
    assert [name for name, kind in kinds(ours).items() if kind == WHOLE] == ["enc.1", "enc.2"]


# Counters and constants


def test_a_counter_that_is_rebound() -> None:
    ours = compared(SyncBatchNormSwish(12))
    assert kinds(ours) == {"": "batch norm + swish"}
    assert ours.num_batches_tracked == 1


class CountsTwice(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
        return F.silu(super().forward(x))


def test_a_counter_that_differs_is_the_reason() -> None:
    part = type("SyncBatchNormSwish", (CountsTwice,), {})(12)
    assert "buffer num_batches_tracked would differ in training mode" in reason(part)


class WrongAndUncounted(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        args = (self.running_mean, self.running_var, self.weight, self.bias, self.training)
        y = F.batch_norm(x, *args, 0.5, self.eps)
        return F.silu(y)


def test_the_reason_is_what_differs_and_not_what_was_tried() -> None:
    part = type("SyncBatchNormSwish", (WrongAndUncounted,), {})(12)
    assert "buffer running_mean would differ" in reason(part)


def test_a_constant_that_a_wrapper_sets(calls: list[int]) -> None:
    ours = nf.accelerate(make())
    wrapper = ours._ops[0].conv[0]
    assert not hasattr(wrapper.bn, "ddp_gpu_size")
    calls.clear()
    ours(torch.randn(SHAPE))
    assert calls
    assert wrapper.bn.ddp_gpu_size == 1
    wrapper.bn.ddp_gpu_size = 4
    twin = copy.deepcopy(ours)
    ours(torch.randn(SHAPE))
    assert wrapper.bn.ddp_gpu_size == 1
    torch.compile(twin, backend="aot_eager", fullgraph=True)(torch.randn(SHAPE))
    assert twin._ops[0].conv[0].bn.ddp_gpu_size == 1


class Remembers(SyncBatchNorm):
    what = "batch"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "batch":
            self.bn.seen = x.shape[0]
        elif self.what == "calls":
            self.bn.seen = getattr(self.bn, "seen", 0) + 1
        elif self.what == "mode":
            self.bn.seen = self.training
        else:
            self.bn.seen = x
        return self.bn(x)


@pytest.mark.parametrize("what", ["batch", "calls", "mode", "tensor"])
def test_attributes_that_are_not_constants(what: str) -> None:
    cell = make()
    for i in (0, 4):
        wrapper = Remembers(12)
        wrapper.what = what
        cell._ops[0].conv[i] = wrapper
    cell._ops[0].conv[0].bn.seen = cell._ops[0].conv[4].bn.seen = 2  # as the model has left it
    note = dict(nf.acceleration_report(nf.accelerate(cell)).notes)[""]
    assert "part by part" in note
    assert "attribute _ops.0.conv.0.bn.seen" in note


# Arguments


def test_arguments_of_the_own_forward(calls: list[int]) -> None:
    theirs = make().eval()
    ours, x, temb = nf.accelerate(clone(theirs)), torch.randn(SHAPE), torch.randn(12, 8, 6)
    calls.clear()
    for args, named in (
        ((x,), {}),
        ((x, None), {}),
        ((), {"s": x}),
        ((x,), {"temb": None}),
        ((), {"temb": None, "s": x}),
    ):
        assert_close(ours(*args, **named), theirs(*args, **named), 2e-5)
    assert len(calls) == 5
    for args, named in (((x, temb), {}), ((x,), {"temb": temb})):
        assert_close(ours(*args, **named), theirs(*args, **named), 2e-5)
    assert len(calls) == 5
    for args, named in (((), {}), ((x,), {"s": x}), ((x, None, 1), {}), ((x,), {"other": 1})):
        messages = []
        for cell in (theirs, ours):
            with pytest.raises(TypeError) as caught:
                cell(*args, **named)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert_close(torch.compile(ours, backend="aot_eager", fullgraph=True)(x, temb=None), theirs(x), 2e-5)


@pytest.mark.parametrize(
    "part", [nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Sequential(nn.BatchNorm2d(12), nn.SiLU())]
)
def test_keywords_of_layers_of_pytorch(part: nn.Module) -> None:
    x = torch.randn(SHAPE)
    expected = part(input=x)
    assert_close(nf.accelerate(part)(input=x), expected, 2e-5)


def test_a_forward_that_needs_more_inputs() -> None:
    two = type("SE", (SE,), {"forward": lambda self, x, y: SE.forward(self, x) + y})
    assert "its forward takes y without defaults" in reason(two(12))


def test_copies_know_the_arguments(calls: list[int]) -> None:
    file = io.BytesIO()
    torch.save(nf.accelerate(make()).eval(), file)
    twin, x = torch.load(io.BytesIO(file.getvalue()), weights_only=False), torch.randn(SHAPE)
    calls.clear()
    assert torch.equal(twin(s=x, temb=None), twin(x))
    assert len(calls) == 2


# Gates


class Pasted(nn.Module):
    """Squeeze and excitation with activations that are modules or functions, with or without biases."""

    def __init__(self, activation: str, gate: str, bias: bool, functional: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 5, bias=bias), nn.Linear(5, 12, bias=bias)
        if functional:
            self.act = {"relu": F.relu, "silu": F.silu}[activation]
            self.gate = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}[gate]
        else:
            self.act = {"relu": nn.ReLU, "silu": nn.SiLU}[activation]()
            self.gate = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}[gate]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate(self.second(self.act(self.first(x.mean((2, 3))))))[:, :, None, None]


class SELayer(Pasted):
    pass


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gate", ["sigmoid", "hardsigmoid"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gates_as_they_are_pasted(activation: str, gate: str, bias: bool, functional: bool) -> None:
    # The derivative of the hard sigmoid in PyTorch is 1 / 6 rounded to float32.
    ours = compared(SELayer(activation, gate, bias, functional), 2**-24 if gate == "hardsigmoid" else 1e-10)
    assert kinds(ours) == {"": "squeeze and excitation"}
    assert ours.forward.settings == {"activation": activation, "gate": gate}


def test_an_activation_that_is_exchanged_later() -> None:
    theirs = SELayer("relu", "sigmoid", True, False)
    ours, x = nf.accelerate(clone(theirs)), torch.randn(SHAPE)
    theirs.act = ours.act = nn.SiLU()
    assert_close(ours(x), theirs(x), 2e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_whole_cells_with_a_pasted_gate(bias: bool, calls: list[int]) -> None:
    cell = make()
    cell.se = SELayer("relu", "sigmoid", bias, True)
    ours = compared(cell)
    assert calls
    assert kinds(ours)[""] == WHOLE


# Batch norms that are synchronised


@pytest.mark.parametrize("when", ["before", "after"])
def test_converted_batch_norms(when: str, calls: list[int]) -> None:
    theirs = nn.Sequential(of_layers(*plain_layers()), nn.Sequential(nn.BatchNorm2d(12), nn.SiLU()))
    convert, ours = nn.SyncBatchNorm.convert_sync_batchnorm, clone(theirs)
    theirs = convert(theirs)
    ours = nf.accelerate(convert(ours)) if when == "before" else convert(nf.accelerate(ours))
    assert {"0": WHOLE, "1": "batch norm + SiLU in a Sequential"}.items() <= kinds(ours).items()
    calls.clear()
    assert_same(ours, theirs, torch.randn(SHAPE))
    assert calls
    assert "0" not in dict(nf.acceleration_report(ours).notes)


def test_the_kind_is_what_was_replaced() -> None:
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, act: nn.Module) -> None:
            super().__init__(12)
            self.act = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(super().forward(x))

    assert kinds(compared(BatchNormAct2d(nn.Identity()))) == {"": "batch norm"}
    assert kinds(compared(BatchNormAct2d(nn.SiLU()))) == {"": "batch norm + swish"}


# Cells by other names


class ResidualBlock(nn.Module):
    """The same cell with other names, a Sequential and another factor."""

    def __init__(self, scale: float, gate: bool) -> None:
        super().__init__()
        self.body, self.squeeze = (
            InvertedResidual(12, 12, 1).conv,
            SELayer("relu", "sigmoid", True, False) if gate else None,
        )
        self.shortcut, self.scale = nn.Identity(), scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.body(x)
        return self.shortcut(x) + self.scale * (h if self.squeeze is None else self.squeeze(h))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_cells_of_other_names(scale: float, gate: bool, calls: list[int]) -> None:
    theirs = scrambled(ResidualBlock(scale, gate))
    ours = compared(theirs)
    assert calls
    assert kinds(ours)[""] == WHOLE
    x = torch.randn(SHAPE, dtype=torch.float64)
    theirs.scale = ours.scale = 0.5  # read by their forward
    calls.clear()
    assert_close(ours(x), theirs(x), 1e-10)
    assert not calls
    assert "attributes" in dict(nf.acceleration_report(ours).notes)[""]


def test_subclasses_of_cells_and_other_attributes(calls: list[int]) -> None:
    cell = make()
    cell.__class__ = type("CellWithAnotherName", (Cell,), {})
    cell.cell_type, cell.step = "normal_enc", 3
    ours = compared(cell)
    ours.step = 4  # not read by its forward
    calls.clear()
    ours(torch.randn(SHAPE, dtype=torch.float64))
    assert calls


def test_residual_modules_of_another_kind_are_not_listed() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.skip = nn.Conv2d(12, 12, 3, padding=1), nn.Identity()

    assert nf.acceleration_report(nf.accelerate(Block())).left == []


# Nothing is changed by a comparison


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap", [torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.spectral_norm]
)
def test_reports_and_failed_attempts_change_no_buffer(wrap: Any) -> None:
    norm = type("SyncBatchNormSwish", (WrongAndUncounted,), {})(12)
    cell = make()
    cell._ops[0].conv[3] = wrap(nn.Conv2d(36, 12, 1, bias=False))
    gate = SE(12)
    gate.se[0] = wrap(gate.se[0])
    named = Conv2D(12, 12, 3, padding=1, weight_norm=False)
    model = nn.ModuleList([
        wrap(nn.Conv2d(12, 12, 3, padding=1, groups=12)), wrap(nn.Conv2d(12, 12, 4, padding=1, groups=12)), norm, cell, gate,
        nn.Sequential(wrap(nn.Conv2d(12, 12, 1)), nn.BatchNorm2d(12), nn.SiLU()), named,
    ])  # fmt: skip
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for function in (nf.acceleration_report, nf.accelerate, nf.acceleration_report):
        function(model)
        assert [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])] == []


# Export, tracing and scripting


def test_exported_and_traced_programs_are_those_of_the_model() -> None:
    model, x = of_layers(*plain_layers()).eval(), torch.randn(SHAPE)
    expected = model(x)
    ours = nf.accelerate(model)
    program = torch.export.export(ours, (x,))
    assert not [node for node in program.graph.nodes if "nvae_fast" in str(node.target)]
    assert_close(program.module()(x), expected, 2e-5)
    traced = torch.jit.trace(ours, (x,))
    assert "nvae_fast" not in str(traced.inlined_graph)
    assert_close(traced(x), expected, 2e-5)


def test_scripting_says_what_to_do() -> None:
    model = nf.accelerate(nn.Conv2d(12, 12, 3, padding=1, groups=12))
    with pytest.raises(AttributeError, match=r"call nvae_fast\.restore\(model\) before torch\.jit\.script"):
        torch.jit.script(model)
    torch.jit.script(nf.restore(model))


# Equal parts are compared once


def test_equal_parts_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = recognise.disagreement

    def counting(bound: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(bound.kind)
        return real(bound, *args, **kwargs)

    monkeypatch.setattr(recognise, "disagreement", counting)
    nf.accelerate(make())
    one = len(seen)
    model = nf.accelerate(nn.Sequential(*[make() for _ in range(4)]))
    assert len(seen) == 2 * one
    assert [kinds(model)[str(i)] for i in range(4)] == [WHOLE] * 4
    assert all(model[i].forward.module is model[i] for i in range(4))
    seen.clear()
    masked = nn.Sequential(Tower(8).flow[0], Tower(8).flow[0])
    masked[1].mask[:, :, 1, 1] = 1  # not equal
    nf.accelerate(masked)
    assert len(seen) == 2
    other = nn.Sequential(ConvBNSwish(12, 12, 1), ConvBNSwish(12, 12, 1))
    other[1].conv[1].eps = 1e-3
    seen.clear()
    nf.accelerate(other)
    assert len(seen) == 2
