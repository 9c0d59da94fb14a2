"""accelerate on blocks of EfficientNets and MobileNets: in evaluation in one call, with batch norms in the convolutions."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_cells import scrambled
from harness import assert_close
from test_accelerate_gates import (
    BatchNormAct2d,
    ConvNormActivation,
    MBConv,
    SqueezeExcitation,
    TimmInvertedResidual,
)
from torch import nn

import nvae_fast as nf
from nvae_fast.patching import mbconv
from nvae_fast.patching.bound import bound_forward

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}


class InvertedResidual(nn.Module):
    """As torchvision's MobileNets have it."""

    def __init__(
        self, channels: int, out: int, act: Any, kernel: int = 3, stride: int = 1, gate: bool = False
    ) -> None:
        super().__init__()
        hidden = 3 * channels
        layers = [ConvNormActivation(channels, hidden, 1, act=act)]
        layers += [ConvNormActivation(hidden, hidden, kernel, stride, hidden, act)]
        layers += [SqueezeExcitation(hidden, 4, scale=nn.Hardsigmoid)] if gate else []
        self.block = nn.Sequential(*layers, ConvNormActivation(hidden, out, 1, act=None))
        self.use_res_connect = stride == 1 and channels == out
        self.stochastic_depth = nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block(x)
        if self.use_res_connect:
            y = self.stochastic_depth(y)
            y += x
        return y


class DepthwiseSeparable(nn.Module):
    """As timm has it: the activation in the batch norm, the first convolution depthwise, biases."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=True)
        self.bn1 = BatchNormAct2d(8, act)
        self.se = nn.Identity()
        self.conv_pw, self.bn2 = nn.Conv2d(8, 8, 1), BatchNormAct2d(8)
        self.has_skip = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv_pw(self.se(self.bn1(self.conv_dw(x)))))
        return y + x if self.has_skip else y


class FusedMBConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(ConvNormActivation(8, 24, 3, 2), ConvNormActivation(24, 8, 1, act=None))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: InvertedResidual(8, 8, nn.ReLU),
    "relu6, stride 2": lambda: InvertedResidual(8, 12, nn.ReLU6, 5, 2),
    "hardswish, gate": lambda: InvertedResidual(8, 8, nn.Hardswish, 5, gate=True),
    "same channels, stride 2": lambda: InvertedResidual(8, 8, nn.ReLU, 3, 2),
    "torchvision": lambda: MBConv(8, nn.SiLU),
    "timm": lambda: TimmInvertedResidual(8, nn.SiLU(inplace=True)),
    "separable": lambda: DepthwiseSeparable(nn.ReLU()),
    "fused": FusedMBConv,
    "gelu": lambda: InvertedResidual(8, 8, lambda inplace: nn.GELU()),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return scrambled(BLOCKS[name]()).to(dtype).eval()


def foldings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows whenever a convolution gets a folded weight."""
    seen: list[int] = []
    fold = mbconv.folded
    monkeypatch.setattr(mbconv, "folded", lambda *args: seen.append(1) or fold(*args))
    return seen


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 8, 7, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_results(
    name: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    x: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = make(name, dtype).to(memory_format=memory_format)
    ours = nf.accelerate(copy.deepcopy(theirs))
    assert dict(nf.acceleration_report(ours).replaced)[""] == mbconv.MBCONV
    seen = foldings(monkeypatch)
    x = x.to(dtype).to(memory_format=memory_format)
    before = x.clone()
    with torch.no_grad():
        expected = theirs(x)
        for twin in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert_close(twin(x), expected, TOLERANCE[dtype])
            assert twin(x).stride() == expected.stride()
    assert torch.equal(x, before)
    assert len(seen) in (12, 18)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", BLOCKS)
def test_frozen(name: str, memory_format: torch.memory_format, x: torch.Tensor) -> None:
    theirs = make(name).to(memory_format=memory_format)
    frozen = nf.freeze(nf.accelerate(copy.deepcopy(theirs)))
    x = x.to(memory_format=memory_format)
    with torch.no_grad():
        for twin in (frozen, pickle.loads(pickle.dumps(frozen))):
            assert_close(twin(x), theirs(x), TOLERANCE[x.dtype])
    assert not list(frozen.parameters())
    assert not any("running_mean" in key for key in frozen.state_dict())
    with pytest.raises(RuntimeError, match="frozen"):
        frozen(x.clone().requires_grad_())


def test_bfloat16(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the folded weight is rounded instead of the weight: as exact as the block's own forward."""
    seen = foldings(monkeypatch)
    for name in BLOCKS:
        theirs = make(name)
        ours = nf.accelerate(copy.deepcopy(theirs))
        with torch.no_grad():
            truth = theirs.double()(x.double())
            theirs.float()
            for given in (x, x.bfloat16()):
                with torch.autocast("cpu", torch.bfloat16):
                    actual, expected = ours(given), theirs(given)
                assert actual.dtype == expected.dtype
        assert seen
        errors = [float((y.double() - truth).norm() / truth.norm()) for y in (actual, expected)]
        assert errors[0] <= 1.5 * errors[1], name
        half = nf.accelerate(make(name).bfloat16())  # its batch norms are in half precision: not folded
        seen.clear()
        with torch.no_grad():
            assert half(x.bfloat16()).dtype == torch.bfloat16
        assert not seen


def test_changes_of_parameters_count(x: torch.Tensor) -> None:
    theirs = make("torchvision")
    ours = nf.accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        for model in (theirs, ours):
            model(x)
            model.block[0][1].running_var.mul_(3)
            model.block[1][0].weight.mul_(2)
        assert_close(ours(x), theirs(x), TOLERANCE[x.dtype])


def _hook(block: Any) -> None:
    block.block[0][1].register_forward_hook(lambda module, args, y: y + 1)


def _sequential_hook(block: Any) -> None:
    block.block[1].register_forward_hook(lambda module, args, y: y + 1)


def _one_in_training(block: Any) -> None:
    block.block[1][1].train()


def _other_layer(block: Any) -> None:
    block.block[0][2] = nn.Tanh()


def _other_geometry(block: Any) -> None:
    block.block[1][0].dilation, block.block[1][0].padding = (2, 2), (4, 4)


def _attribute(block: Any) -> None:
    block.use_res_connect = False


def _without_statistics(block: Any) -> None:
    norm = block.block[0][1]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None


CHANGES = [
    _hook,
    _sequential_hook,
    _one_in_training,
    _other_layer,
    _other_geometry,
    _attribute,
    _without_statistics,
]


@pytest.mark.parametrize("change", CHANGES)
def test_its_own_forward_where_something_changed(
    change: Callable[[Any], None], x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make("hardswish, gate")
    ours = nf.accelerate(copy.deepcopy(theirs))
    seen = foldings(monkeypatch)
    change(theirs)
    change(ours)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), TOLERANCE[x.dtype])
    assert not seen


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_and_training_take_the_parts(
    name: str, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make(name, torch.float64)
    ours = nf.accelerate(copy.deepcopy(theirs))
    seen = foldings(monkeypatch)
    x = x.double()
    for training in (False, True):
        outputs = []
        for model in (theirs, ours):
            torch.manual_seed(1)
            y = model.train(training)(x)
            y.square().sum().backward()
            outputs += [y.detach()]
        assert_close(outputs[1], outputs[0], 1e-10)
        for (key, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
            error = float((p.grad - q.grad).norm()) / max(float(p.grad.norm()), 1.0)
            # PyTorch's float64 gradient of hardsigmoid has a factor of 1/6 in float32.
            assert error <= (1e-7 if "gate" in name else 1e-9), key
    assert not seen


def test_compiled(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler joins layers itself; the frozen block has nothing else to run."""
    theirs = make("timm")
    ours = nf.accelerate(copy.deepcopy(theirs))
    frozen = nf.freeze(ours)
    seen = foldings(monkeypatch)
    with torch.no_grad():
        for model in (ours, frozen):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            assert_close(compiled(x), theirs(x), TOLERANCE[x.dtype])
    assert not seen


def test_synchronised_batch_norms(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = make("relu")
    ours = nn.SyncBatchNorm.convert_sync_batchnorm(nf.accelerate(copy.deepcopy(theirs)))
    seen = foldings(monkeypatch)
    with torch.no_grad():
        assert_close(ours(x), theirs(x), TOLERANCE[x.dtype])
    assert len(seen) == 3


class Scaled(InvertedResidual):
    """Does more than its layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class TwoInputs(InvertedResidual):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) + y


def left(block: nn.Module) -> str | None:
    ours = nf.accelerate(block.eval())
    assert bound_forward(ours) is None
    return dict(nf.acceleration_report(ours).left).get("")


def test_blocks_that_are_something_else_are_left() -> None:
    assert "the output would differ" in str(left(Scaled(8, 8, nn.ReLU)))
    assert "its forward takes y without defaults" in str(left(TwoInputs(8, 8, nn.ReLU)))
    without = InvertedResidual(8, 8, nn.ReLU)
    without.block[0][1] = nn.Identity()
    assert left(without) is None
    assert mbconv.read(without) == "a convolution has no batch norm"
    assert "does not follow a convolution" in mbconv.read(
        nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    )


def test_a_model_of_blocks(x: torch.Tensor) -> None:
    theirs = nn.Sequential(*(make(name) for name in ("relu", "timm", "hardswish, gate", "fused")))
    ours = nf.accelerate(copy.deepcopy(theirs))
    kinds = [kind for _, kind in nf.acceleration_report(ours).replaced]
    assert kinds.count(mbconv.MBCONV) == 4
    with torch.no_grad():
        assert_close(ours(x), theirs(x), TOLERANCE[x.dtype])
        assert_close(nf.freeze(ours)(x), theirs(x), TOLERANCE[x.dtype])
        assert torch.equal(nf.restore(ours)(x), theirs(x))
