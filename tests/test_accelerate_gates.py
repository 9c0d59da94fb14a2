"""accelerate on squeeze-and-excitation and inverted residuals in the style of the mobile nets of torchvision and timm, in
miniatures of our own writing; and the taps of masked depthwise convolutions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from foreign_cells import observe, scrambled
from foreign_model import MaskedConv2d
from harness import assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import nvae_fast as nf
from nvae_fast.patching import forwards
from nvae_fast.patching.taps import live_taps


class SqueezeExcitation(nn.Module):
    """As torchvision names its parts."""

    def __init__(
        self, channels: int, squeeze: int, activation: type = nn.ReLU, scale: type = nn.Sigmoid
    ) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeeze, 1)
        self.fc2 = nn.Conv2d(squeeze, channels, 1)
        self.activation, self.scale_activation = activation(), scale()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.activation(self.fc1(self.avgpool(x)))
        return x * self.scale_activation(self.fc2(s))


class ConvNormActivation(nn.Sequential):
    def __init__(
        self, c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, act: Any = nn.SiLU
    ) -> None:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(c_out), *([] if act is None else [act(inplace=True)]))


class MBConv(nn.Module):
    def __init__(self, channels: int, activation: type) -> None:
        super().__init__()
        hidden = 4 * channels
        self.block = nn.Sequential(
            ConvNormActivation(channels, hidden, 1),
            ConvNormActivation(hidden, hidden, 5, groups=hidden),
            SqueezeExcitation(hidden, channels, activation),
            ConvNormActivation(hidden, channels, 1, act=None),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: batch norm that holds its activation."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.drop(super().forward(x)))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.conv_reduce, self.act1 = nn.Conv2d(channels, reduced, 1), act
        self.conv_expand, self.gate = nn.Conv2d(reduced, channels, 1), gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = self.act1(self.conv_reduce(x.mean((2, 3), keepdim=True)))
        return x * self.gate(self.conv_expand(s))


class TimmInvertedResidual(nn.Module):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__()
        hidden = 4 * channels
        self.conv_pw, self.bn1 = (
            nn.Conv2d(channels, hidden, 1, bias=False),
            BatchNormAct2d(hidden, nn.SiLU(True)),
        )
        self.conv_dw = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False)
        self.bn2 = BatchNormAct2d(hidden, nn.SiLU(True))
        self.se = SqueezeExcite(hidden, channels, act, nn.Sigmoid())
        self.conv_pwl, self.bn3 = nn.Conv2d(hidden, channels, 1, bias=False), BatchNormAct2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.bn2(self.conv_dw(self.bn1(self.conv_pw(x))))
        return self.bn3(self.conv_pwl(self.se(h))) + x


def compare(theirs: nn.Module, training: bool = True) -> dict[str, str]:
    """Before and after are the same; the report as a dictionary."""
    theirs.double().train(training)
    ours = nf.accelerate(copy.deepcopy(theirs))
    x = torch.randn(3, 8, 7, 6, dtype=torch.float64)
    actual, expected = observe(ours, x), observe(theirs, x)
    for name, value in expected.items():
        assert_close(actual[name], value, 1e-10, name)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    report = nf.acceleration_report(ours)
    return {**dict(report.replaced), **{name: f"left: {why}" for name, why in report.left}}


@pytest.mark.parametrize("training", [True, False])
def test_torchvision_style(training: bool) -> None:
    found = compare(scrambled(MBConv(8, nn.ReLU)), training)
    assert found == {
        "": "MBConv block in evaluation",
        "block.0": "batch norm + SiLU in a Sequential",
        "block.1": "batch norm + SiLU in a Sequential",
        "block.1.0": "depthwise convolution",
        "block.2": "squeeze and excitation",
    }


@pytest.mark.parametrize("training", [True, False])
def test_timm_style(training: bool) -> None:
    found = compare(scrambled(TimmInvertedResidual(8, nn.ReLU(inplace=True))), training)
    norms = {"bn1": "batch norm + swish", "bn2": "batch norm + swish", "bn3": "batch norm"}
    parts = {
        "": "MBConv block in evaluation",
        "conv_dw": "depthwise convolution",
        "se": "squeeze and excitation",
    }
    assert found == {**norms, **parts}


class Offset(SqueezeExcitation):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


class Swapped(SqueezeExcitation):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.activation(self.fc2(self.scale_activation(self.fc1(self.avgpool(x)))))


def gate(kind: str) -> nn.Module:
    name = "SqueezeExcitation"
    if kind == "ReLU6":
        return SqueezeExcitation(8, 4, nn.ReLU6)
    if kind == "Tanh":
        return SqueezeExcitation(8, 4, scale=nn.Tanh)
    if kind == "groups":
        found = SqueezeExcitation(8, 4)
        found.fc1 = nn.Conv2d(8, 4, 1, groups=2)
        return found
    if kind == "pool":
        found = SqueezeExcitation(8, 4)
        found.avgpool = nn.AdaptiveMaxPool2d(1)
        return found
    if kind == "hook":
        found = SqueezeExcitation(8, 4)
        found.activation.register_forward_hook(lambda *_: None)
        return found
    return type(name, ({"offset": Offset, "swapped": Swapped}[kind],), {})(8, 4)


REASONS = {
    "ReLU6": "ReLU6 inside: the kernel has Linear, ReLU or SiLU, Linear, Sigmoid or Hardsigmoid",
    "Tanh": "Tanh inside", "groups": "Conv2d inside", "pool": "AdaptiveMaxPool2d inside",
    "hook": "activation inside has hooks or a forward of its own", "offset": "the output would differ",
    "swapped": "the output would differ",
}  # fmt: skip


@pytest.mark.parametrize("kind", REASONS)
def test_gates_that_are_something_else_are_left(kind: str) -> None:
    report = nf.acceleration_report(nf.accelerate(gate(kind)))
    assert not report.replaced
    assert REASONS[kind] in dict(report.left)[""]
    if kind != "hook":  # which deepcopy takes along
        compare(gate(kind))


# Taps of masked depthwise convolutions


@pytest.fixture
def taps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each call of the depthwise kernel was given."""
    seen: list[Any] = []
    real = forwards.depthwise_conv2d

    def listening(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["taps"])
        return real(*args, **kwargs)

    monkeypatch.setattr(forwards, "depthwise_conv2d", listening)
    return seen


def masked(centre: bool) -> tuple[MaskedConv2d, MaskedConv2d]:
    """A masked depthwise convolution of a flow, its centre visible or not, and the same with our kernels."""
    torch.manual_seed(3)
    theirs, ours = MaskedConv2d(8, 8, 5, groups=8), MaskedConv2d(8, 8, 5, groups=8)
    if centre:
        theirs.mask[:, :, 2, 2] = 1
    ours.load_state_dict(theirs.state_dict())
    return theirs.double(), nf.accelerate(ours.double())


@pytest.mark.parametrize("centre", [True, False])
def test_taps_that_the_mask_leaves(centre: bool, taps: list[Any]) -> None:
    theirs, ours = masked(centre)
    taps.clear()
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    for name, value in observe(theirs, x).items():
        assert_close(observe(ours, x)[name], value, 1e-10, name)
    assert all(found == list(range(12 + centre)) for found in taps)
    assert taps


def test_a_mask_that_changes_is_read_again(taps: list[Any]) -> None:
    theirs, ours = masked(True)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    ours(x)
    for conv in (theirs, ours):
        conv.mask.fill_(1)
        conv.mask[3:] = 0
    assert_close(ours(x), theirs(x), 1e-10)
    assert taps[-1] is None
    ours.mask = theirs.mask = theirs.mask.flip(2, 3) * masked(False)[0].mask
    assert_close(ours(x), theirs(x), 1e-10)
    assert taps[-1] == list(range(12))
    for conv in (theirs, ours):
        conv.mask = torch.zeros_like(conv.mask)
    assert_close(ours(x), theirs(x), 1e-10)  # no tap at all


def test_a_mask_written_through_data_is_read_again(taps: list[Any]) -> None:
    """Which moves no version counter."""
    theirs, ours = masked(True)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    ours(x)
    for conv in (theirs, ours):
        conv.mask.data[:, :, 2, 2:] = 1
        conv.mask.data[:, :, 0] = 0
    assert_close(ours(x), theirs(x), 1e-10)
    assert taps[-1] == list(range(5, 15))
    with torch.inference_mode():
        for conv in (theirs, ours):
            conv.mask = torch.ones_like(conv.mask).triu()
        assert_close(ours(x), theirs(x), 1e-10)
        ours.mask.data[:, :, 4, 0] = theirs.mask.data[:, :, 4, 0] = 1
        assert_close(ours(x), theirs(x), 1e-10)


def test_a_mask_on_another_device_is_not_read() -> None:
    """Reading it would wait for the device; a FakeTensor cannot be read at all."""
    with FakeTensorMode():
        mask, weight = (torch.ones(8, 1, 5, 5, device="cuda") for _ in range(2))
        assert live_taps(mask, weight) is None


def test_a_compiled_mask_may_not_change() -> None:
    theirs, ours = masked(True)
    x = torch.randn(2, 8, 7, 6, dtype=torch.float64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), theirs(x), 1e-10)
    ours.mask.data.fill_(1)
    with pytest.raises(RuntimeError, match="mask of a convolution has changed since it was compiled"):
        compiled(x)
