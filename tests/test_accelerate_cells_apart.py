"""Residual cells that are not NVAE's whole cell, or not always: they run part by part, and the report says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from foreign_cells import accelerated, assert_same, counted, make, scrambled
from foreign_model import Conv2D, InvertedResidual
from torch import nn

import nvae_fast as nf


@pytest.fixture
def calls() -> Iterator[list[int]]:
    with counted() as seen:
        yield seen


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
        layers[4].bn.track_running_stats = False
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
    "shared": "is used twice",
    "gate": "se is not replaced",
    "two": "its layers are",
    "container": "the output would differ",
    "parametrization": "is not a layer",
    "spectral norm": "_ops.0.conv.3 inside has hooks",
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
    cell._ops[0].conv[4].bn.momentum = None
    return lambda: setattr(cell._ops[0].conv[4].bn, "momentum", 0.05)


def other_layer(cell: Any) -> Callable[[], None]:
    wrapper, old = cell._ops[0].conv[0], cell._ops[0].conv[0].bn
    wrapper.bn = Doubling(12, momentum=old.momentum)
    wrapper.bn.load_state_dict(old.state_dict())
    return lambda: setattr(wrapper, "bn", old)


def other_forward(cell: Any) -> Callable[[], None]:
    norm = cell._ops[0].conv[4].bn
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)
    return lambda: norm.__dict__.pop("forward") and None


def global_hook(cell: Any) -> Callable[[], None]:
    return nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def other_padding(cell: Any) -> Callable[[], None]:
    conv = cell._ops[0].conv[2].conv[0]
    conv.dilation, conv.padding = (2, 2), (4, 4)
    return lambda: conv.__dict__.update(dilation=(1, 1), padding=(2, 2))


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


@pytest.mark.parametrize("before", [True, False])
def test_data_dependent_initialisation_inside(before: bool, calls: list[int]) -> None:
    """Until it has happened the parts run, whether the cell was accelerated before or after it was asked for."""

    def ask(cell: Any) -> None:
        conv = cell._ops[0].conv[3]
        conv.data_init, conv.initialize = True, lambda x: setattr(conv, "init_done", True)

    theirs, ours = make(), make()
    if before:
        ask(ours)
    nf.accelerate(ours)
    if not before:
        ask(ours)
    ask(theirs)
    assert "waits for data" in dict(nf.acceleration_report(ours).notes)[""]
    calls.clear()
    x = torch.randn(2, 12, 8, 6)
    assert_same(ours, theirs, x)
    assert not calls
    assert ours._ops[0].conv[3].init_done
    assert_same(ours, theirs, x)
    assert calls
