"""accelerate, acceleration_report, restore: a model written elsewhere computes the same, with our kernels."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_model import SE, BNSwishConv, Cell, Conv2D, MaskedConv2d, SyncBatchNormSwish, Tower
from harness import assert_close
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nvae_fast as nf

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


def tower(dtype: torch.dtype = torch.float32) -> Tower:
    torch.manual_seed(1)
    model = Tower().to(dtype)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.weight.normal_()
                part.bias.normal_()
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    return model


def observe(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients, statistics and left weights of one pass."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * upstream.to(y.dtype)).sum().backward()
    flat = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    left = {
        f"{name} weight": part.weight_normalized.detach().clone()
        for name, part in model.named_modules()
        if hasattr(part, "weight_normalized")
    }
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return {"y": y.detach(), "grad x": x.grad, "all gradients": flat, **buffers, **left}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_as_before(
    training: bool, dtype: torch.dtype, memory_format: torch.memory_format, route: str
) -> None:
    theirs, ours = tower(dtype).train(training), nf.accelerate(tower(dtype)).train(training)
    x = torch.rand(4, 3, 12, 8, dtype=dtype)
    expected = observe(theirs, x)  # in the default format: theirs would crash oneDNN in channels_last
    actual = observe(ours.to(memory_format=memory_format), x.to(memory_format=memory_format))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, TOLERANCE[dtype], name)


def test_everything_is_replaced() -> None:
    model = tower()
    before = nf.acceleration_report(model)
    assert not before.replaced
    assert all(
        reason.endswith("has not been called") for name, reason in before.left if name in ("dec", "stem")
    )
    keys = list(model.state_dict())
    assert nf.accelerate(model) is model
    report = nf.acceleration_report(model)
    kinds = dict(report.replaced)
    assert {
        name: kinds.get(name) for name in ("stem", "dec", "dec.3", "flow.2", "enc.0", "enc.0.se", "enc.2")
    } == {
        "stem": "weight-normed convolution",
        "dec": "batch norm + SiLU in a Sequential",
        "dec.3": "depthwise convolution",
        "flow.2": "weight-normed depthwise convolution",
        "enc.0": "residual cell",
        "enc.0.se": "squeeze and excitation",
        "enc.2": "whole inverted residual cell",
    }
    assert kinds["enc.1._ops.0.conv.2.conv.0"] == "depthwise convolution that keeps its weight"
    assert kinds["enc.1._ops.0.conv.2.conv.1"] == "batch norm + swish"
    assert not report.left
    assert [line.split(None, 2)[1:] for line in str(report).splitlines() if " enc.0.se " in line] == [
        ["enc.0.se", "squeeze and excitation"]
    ]
    assert list(model.state_dict()) == keys


class Calls(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("training", [True, False])
def test_fewer_operator_calls(training: bool) -> None:
    x = torch.rand(2, 3, 8, 8)
    counts = []
    for model in (tower(), nf.accelerate(tower())):
        with Calls() as calls:
            observe(model.train(training), x)
        counts.append(calls.count)
    assert counts[1] < 0.9 * counts[0], counts


def test_accelerating_disturbs_nothing() -> None:
    model = tower()
    model.enc[0].train(False)
    model(torch.rand(2, 3, 8, 8))  # leaves weights that deepcopy would refuse
    state = {key: (value.clone(), value._version) for key, value in model.state_dict().items()}
    modes = {name: part.training for name, part in model.named_modules()}
    attributes = {name: dict(part.__dict__) for name, part in model.named_modules()}
    random = torch.get_rng_state()
    nf.accelerate(model)
    nf.acceleration_report(model)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == {name: part.training for name, part in model.named_modules()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key][0])
        assert value._version == state[key][1], key
    assert all(p.grad is None for p in model.parameters())
    assert nf.restore(model) is model
    for name, part in model.named_modules():
        assert part.__dict__.keys() == attributes[name].keys()
        assert all(part.__dict__[key] is value for key, value in attributes[name].items())
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), load(tower(), model.state_dict()).eval()(x))


def load(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    model.load_state_dict(state)
    return model


def test_twice_is_once() -> None:
    model = nf.accelerate(tower())
    bound = {name: part.__dict__.get("forward") for name, part in model.named_modules()}
    nf.accelerate(model)
    assert bound == {name: part.__dict__.get("forward") for name, part in model.named_modules()}


# Hooks


def names_of_hooked(model: nn.Module, x: torch.Tensor) -> list[str]:
    seen: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, part in model.named_modules()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def test_hooks_fire_everywhere() -> None:
    model, x = tower().eval(), torch.rand(2, 3, 8, 8)
    expected = names_of_hooked(model, x)
    y = model(x)
    nf.accelerate(model)
    assert names_of_hooked(model, x) == expected
    with torch.no_grad():  # a hook that changes what a passed-by module gives
        assert_close(model(x), y, 2e-5)
        handle = model.enc[0].se.se[3].register_forward_hook(lambda m, a, out: out * 0)
        changed = model(x)
        handle.remove()
    nf.restore(model)
    model.enc[0].se.se[3].register_forward_hook(lambda m, a, out: out * 0)
    assert_close(changed, model(x), 2e-5)


# Copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "data parallel"])
def test_copies_compute_with_their_own_parameters(how: str) -> None:
    model, x = nf.accelerate(nn.Sequential(SyncBatchNormSwish(4), SE(4))).eval(), torch.rand(2, 4, 5, 5)
    before = model(x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    else:
        twin = model[0]._replicate_for_data_parallel()
        assert twin.forward.module is twin
        assert model[0].forward.module is model[0]
        return
    assert len(nf.acceleration_report(twin).replaced) == 2
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        twin[0].bias.add_(1)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)
    nf.restore(twin)
    assert len(nf.acceleration_report(model).replaced) == 2


# Refusals


def altered(kind: str) -> tuple[nn.Module, str]:
    """A part whose forward is not what its name says, and a piece of the reason."""

    def of(base: type, forward: Any) -> type:
        return type(base.__name__, (base,), {"forward": forward})

    plain = nn.BatchNorm2d.forward
    if kind == "relu":
        return of(SyncBatchNormSwish, lambda m, x: F.relu(plain(m, x)))(4), "the output would differ"
    if kind == "eps":

        def other_eps(m: Any, x: torch.Tensor) -> torch.Tensor:
            return F.silu(
                F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, m.training, 0.1, 1e-3)
            )

        return of(SyncBatchNormSwish, other_eps)(4), "the output would differ in evaluation mode"
    if kind == "raises":
        return of(SyncBatchNormSwish, lambda m, x: x.nothing)(4), "its own forward raises"
    if kind == "statistics":  # only training shows it: the gradient goes another way
        return of(SyncBatchNormSwish, lambda m, x: F.silu(plain(m, x.detach()) + 0 * x))(
            4
        ), "gradient of the input"
    if kind == "momentum":
        return SyncBatchNormSwish(4, momentum=None), "momentum is None"
    if kind == "affine":
        return SyncBatchNormSwish(4, affine=False), "it has no weight, bias"
    if kind == "gate":
        gate = SE(4)
        gate.se[1] = nn.ReLU6()
        return gate, "Linear, ReLU or SiLU, Linear"
    if kind == "scale":
        cell = of(Cell, lambda m, x: m.skip(x) + 0.2 * m._ops[0](x))
        return cell([BNSwishConv(4, 4, 1)], nn.Identity(), 4, use_se=False), "the output would differ"
    if kind == "attribute":

        def remembers(m: Any, x: torch.Tensor) -> torch.Tensor:
            m.seen = x.shape
            return Conv2D.forward(m, x)

        return of(Conv2D, remembers)(4, 4, 3, padding=1), "sets attribute seen"
    if kind == "mask":
        unmasked = of(MaskedConv2d, lambda m, x: F.conv2d(x, m.weight, m.bias, padding=1))
        return unmasked(4, 4, 3), "the output would differ"
    if kind == "instance":
        norm = SyncBatchNormSwish(4)
        norm.forward = lambda x: x
        return norm, "the forward of the instance was replaced"
    conv = nn.Conv2d(4, 4, 3, groups=4, padding=0)
    return conv, 'is not "same"'


KINDS = [
    "relu", "eps", "raises", "statistics", "momentum", "affine", "gate", "scale", "attribute", "mask", "instance", "padding",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_altered_parts_are_left(kind: str) -> None:
    part, reason = altered(kind)
    before = dict(part.__dict__)
    model = nf.accelerate(nn.ModuleDict({"part": part}))
    report = nf.acceleration_report(model)
    assert "part" not in dict(report.replaced)
    assert reason in dict(report.left)["part"]
    assert part.__dict__ == before
    nf.restore(model)
    assert part.__dict__ == before


def test_repair_replaces_what_no_longer_runs() -> None:
    broken, _ = altered("raises")
    good = SyncBatchNormSwish(4)
    nf.accelerate(broken, repair=True)
    x = torch.rand(3, 4, 5, 5)
    for training in (True, False):
        assert_close(broken.train(training)(x), good.train(training)(x), 2e-5)
    assert_close(broken.running_var, good.running_var, 2e-5)
    assert broken.num_batches_tracked == 1


def test_unknown_parts_are_not_listed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    nf.accelerate(model)
    report = nf.acceleration_report(model)
    assert report.replaced == report.left == []


def test_attribute_pairs_are_left() -> None:
    block = nn.Module()
    block.bn1, block.act1 = nn.BatchNorm2d(4), nn.SiLU()
    ((name, reason),) = nf.acceleration_report(nf.accelerate(block)).left
    assert name == ""
    assert "attributes" in reason


# Inputs and modes


def test_data_dependent_initialisation_stays_its_own() -> None:
    theirs, ours = (Conv2D(4, 4, 3, padding=1, bias=True) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    theirs.data_init = ours.data_init = True
    nf.accelerate(ours)
    assert nf.acceleration_report(ours).replaced
    x = torch.rand(2, 4, 5, 5)
    assert_close(ours(x), theirs(x), 2e-5)
    assert ours.init_done
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("shape", [(4, 5, 5), (0, 4, 5, 5)])
def test_other_inputs_run_as_before(shape: tuple[int, ...]) -> None:
    theirs, ours = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4)) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    nf.accelerate(ours)
    x = torch.rand(shape)
    assert_close(ours(x), theirs(x), 2e-5)


def test_under_autocast() -> None:
    theirs, ours = tower().eval(), nf.accelerate(tower()).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        x = torch.rand(2, 3, 8, 8)
        expected, actual = theirs(x), ours(x)
    assert actual.dtype == expected.dtype
    assert_close(actual, expected, 2e-2)


def test_strided_pointwise_in_channels_last_does_not_crash() -> None:
    """8 channels: theirs would write out of bounds in the weight gradient (oneDNN issue 6035)."""
    theirs, ours = Conv2D(8, 8, 1, stride=2, bias=True), Conv2D(8, 8, 1, stride=2, bias=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(4, 8, 16, 16)
    theirs(x).sum().backward()
    nf.accelerate(ours.to(memory_format=torch.channels_last))
    ours(x.to(memory_format=torch.channels_last)).sum().backward()
    assert_close(ours.weight.grad, theirs.weight.grad, 2e-5)


def test_compiled() -> None:
    model, x = nf.accelerate(Tower(8)).eval(), torch.rand(2, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), model(x), 2e-5)


def test_reference_backend() -> None:
    model, x = nf.accelerate(tower()).eval(), torch.rand(2, 3, 8, 8)
    with nf.use_backend("reference"):
        y = model(x)
        nf.accelerate(tower())
    assert_close(y, tower().eval()(x), 2e-5)


@pytest.mark.parametrize("function", [nf.accelerate, nf.acceleration_report, nf.restore])
def test_wrong_argument(function: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        function(3)
