"""Normalised weights are computed once a step, and in evaluation until one changes; the numbers are those of layers that
compute their own, whatever happens between."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close, assert_same_gradients
from internals import set_kernel
from torch import nn
from torch.utils.checkpoint import checkpoint

import nvae_fast as nf
from nvae_fast.nn import WeightNormConv2d, shared_weights
from nvae_fast.nn.shared_weights import checkpoint_contexts, prepare_weights
from nvae_fast.ops import weight_norm_many, wide_conv2d
from nvae_fast.training import Step, TrainingConfig

CONFIG = nf.NVAEConfig(
    dataset="cifar10", num_channels_enc=8, num_channels_dec=8, num_latent_scales=1, num_groups_per_scale=2,
    num_latent_per_group=4, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=2,
    num_postprocess_cells=2, num_cell_per_cond_enc=1, num_cell_per_cond_dec=1, num_nf=1, image_size=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scopes do their work whether or not the extension is built."""
    for op in ("weight_norm", "weight_norm_many"):
        set_kernel(monkeypatch, op, "operator")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Numbers of layers of every computation of a model's weights."""
    calls: list[int] = []
    many = shared_weights.weight_norm_many

    def counting(weights: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(weights))
        return many(weights, *args, **options)

    monkeypatch.setattr(shared_weights, "weight_norm_many", counting)
    yield calls
    assert not shared_weights._state.scopes, "a scope was left open"


class Net(nn.Module):
    """Three convolutions, one of them masked, one used twice."""

    def __init__(self, data_init: bool = False) -> None:
        super().__init__()
        mask = torch.ones(4, 4, 3, 3)
        mask[:, :, 1:, 1:] = 0
        self.first = WeightNormConv2d(3, 4, 3)
        self.masked = WeightNormConv2d(4, 4, 3, mask=mask, data_init=data_init)
        self.last = WeightNormConv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with prepare_weights(self):
            return self.body(x)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        h = F.elu(self.masked(F.elu(self.first(x))))
        return self.last(F.elu(self.last(h)))


def alone(function: Callable[[], Any]) -> Any:
    """What ``function`` gives when every layer computes its own weight."""
    nothing = pytest.MonkeyPatch()
    nothing.setattr("nvae_fast.nn.conv.prepared_layer", lambda conv: None)
    try:
        return function()
    finally:
        nothing.undo()


def gradients(module: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_equal(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if tolerance:
            assert_close(actual[name], value, tolerance, name)
        else:
            assert torch.equal(actual[name], value), name


X = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5)


def test_a_step_computes_once(computed: list[int]) -> None:
    """Forward pass, both regularisers, one computation; loss and gradients are those of separate layers."""
    torch.manual_seed(1)
    model = nf.NVAE(CONFIG)
    step = Step(model, TrainingConfig())
    x = torch.rand(2, 3, 16, 16)

    def run() -> dict[str, torch.Tensor]:
        model.spectral.load_state_dict(vectors)
        loss, _ = step.objective(x, 3, 0.5, 1e-2)
        return gradients(model, loss) | {"loss": loss.detach()}

    vectors = copy.deepcopy(model.spectral.state_dict())
    actual = run()
    count = sum(isinstance(m, WeightNormConv2d) for m in model.modules())
    assert computed == [count]
    expected = alone(run)
    assert_close(actual.pop("loss"), expected.pop("loss"), 1e-6)
    assert_same_gradients(actual, expected)  # sums of gradients in another order
    assert computed == [count]
    del computed[:]
    for _ in range(2):
        step(x, seed=3, coefficient=0.5, weight=1e-2, learning_rate=1e-3)
    assert computed == [count, count]


def test_training_moves_alike() -> None:
    torch.manual_seed(1)
    first = nf.NVAE(CONFIG)
    second = copy.deepcopy(first)
    x = torch.rand(2, 3, 16, 16)

    def train(model: nf.NVAE) -> list[float]:
        step = Step(model, TrainingConfig())
        return [step(x, seed=i, coefficient=0.5, weight=1e-2, learning_rate=1e-3).loss for i in range(4)]

    for a, b in zip(train(first), alone(lambda: train(second)), strict=True):
        assert abs(a - b) <= 1e-4 * abs(b)


def test_outside_a_scope_a_layer_is_alone(computed: list[int]) -> None:
    net = Net()
    net.body(X)
    assert computed == []
    with prepare_weights(Net()):
        expected = alone(lambda: net.body(X))
        assert torch.equal(net.body(X), expected), "layers of another model"
    (first,) = (net.first(X),)
    assert first.grad_fn is not None


def test_several_forwards_before_one_backward(computed: list[int]) -> None:
    net = Net()

    def accumulate(separate: bool) -> dict[str, torch.Tensor]:
        net.zero_grad()
        if separate:
            for scale in (1, 2):
                net(scale * X).square().sum().backward()
            return {n: p.grad.clone() for n, p in net.named_parameters()}
        return gradients(net, net(X).square().sum() + net(2 * X).square().sum())

    one, two = accumulate(False), accumulate(True)
    assert computed == [3] * 4
    assert_equal(one, two, 1e-6)
    with prepare_weights(net):  # one node for both
        shared = gradients(net, net(X).square().sum() + net(2 * X).square().sum())
    assert computed == [3] * 5
    assert_equal(shared, two, 1e-6)
    assert_equal(alone(lambda: accumulate(False)), two, 1e-6)


def test_a_frozen_or_unused_layer_gets_no_gradient() -> None:
    net = Net()
    net.extra = WeightNormConv2d(2, 2, 1)
    net.masked.requires_grad_(False)
    found = gradients(net, net(X).sum())
    assert not any(name.startswith(("extra", "masked")) for name in found)
    assert_equal(found, alone(lambda: gradients(net, net(X).sum())), 1e-6)


def test_data_dependent_initialisation(computed: list[int]) -> None:
    first, second = Net(data_init=True), Net()
    second.load_state_dict(first.state_dict())
    second.masked.needs_data_init = True
    y = first(X)
    assert computed == [2], "the layer that awaits data is left out"
    assert not first.masked.needs_data_init
    assert torch.equal(y, alone(lambda: second(X)))
    assert_equal(first.state_dict(), second.state_dict())
    first(X)
    assert computed == [2, 3]


def test_weights_that_change_inside_a_scope(computed: list[int]) -> None:
    net = Net()
    with prepare_weights(net), torch.no_grad():
        net.body(X)
        net.last.log_weight_norm.add_(1.0)
        net.masked.weight = nn.Parameter(torch.ones_like(net.masked.weight))
        assert torch.equal(net.body(X), alone(lambda: net.body(X)))


CHANGES: dict[str, Callable[[Net], Any]] = {
    "in place": lambda net: net.first.weight.mul_(2),
    "optimizer": lambda net: optimize(net),
    "foreach": lambda net: torch._foreach_add_(list(net.parameters()), 0.1),
    "state dict": lambda net: net.load_state_dict(Net().state_dict()),
    "state dict assigned": lambda net: net.load_state_dict(Net().state_dict(), assign=True),
    "dtype": lambda net: net.double(),
    "memory format": lambda net: net.to(memory_format=torch.channels_last),
    "another parameter": lambda net: setattr(net.last, "weight", nn.Parameter(torch.ones(4, 4, 1, 1))),
    "data": lambda net: setattr(net.last.weight, "data", torch.ones(4, 4, 1, 1)),
    "mask": lambda net: net.masked.mask.fill_(1),
    "another mask": lambda net: setattr(net.masked, "mask", torch.ones(4, 4, 3, 3)),
    "another layer": lambda net: setattr(net, "last", WeightNormConv2d(4, 4, 1)),
    "in place through data": lambda net: net.last.weight.data[0].mul_(-3),
}


def optimize(net: Net) -> None:
    with torch.enable_grad():
        net(X).square().sum().backward()
    torch.optim.Adamax(net.parameters(), lr=0.1, foreach=True).step()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_sees_every_change(change: str, mode: str, computed: list[int]) -> None:
    """Also those that move no version counter."""
    net = Net().eval()
    guard = getattr(torch, mode)
    with guard():
        before = net(X)
        net(X)
        assert computed == [3, 3], "once a forward pass"
    with torch.no_grad():
        CHANGES[change](net)
    x = X.to(net.first.weight.dtype)
    with guard():
        after = net(x)
        assert torch.equal(after, alone(lambda: net.body(x)))
        if change != "memory format":
            assert not torch.equal(after, before)


def test_address_that_returns(computed: list[int]) -> None:
    """A tensor that comes to stand where a freed one stood is not taken for it."""
    net = Net().eval()
    with torch.no_grad():
        for value in range(1, 6):
            net.last.weight.data = (
                torch.full((4, 4, 1, 1), float(value)) * torch.arange(4.0)[:, None, None, None]
            )
            net.last.log_weight_norm.data = torch.full((4, 1, 1, 1), 0.1 * value)
            assert torch.equal(net(X), alone(lambda: net.body(X)))


def test_modes_do_not_mix(computed: list[int]) -> None:
    """Evaluation with gradients gets its own graph each time."""
    net = Net().eval()
    with torch.no_grad():
        net(X)
    expected = alone(lambda: gradients(net, net(X).sum()))
    for _ in range(2):
        assert_equal(gradients(net, net(X).sum()), expected, 1e-6)
    with torch.no_grad(), prepare_weights(net):
        net.body(X)
        with torch.enable_grad():
            assert_equal(gradients(net, net(X).sum()), expected, 1e-6)
            for _ in range(2):  # without a scope of its own
                assert_equal(gradients(net, net.body(X).sum()), expected, 1e-6)
    with torch.inference_mode():
        net(X)
    with torch.no_grad():
        assert not net(X).requires_grad
    weight = net.last.normalized_weight()
    assert weight.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool, computed: list[int]) -> None:
    """Plain PyTorch checkpointing inside a scope gives the same gradients."""
    net, x = Net(), X.clone().requires_grad_()

    def run(wrapped: bool) -> dict[str, torch.Tensor]:
        with prepare_weights(net):
            h = net.first(x)
            block = lambda h: F.elu(net.masked(F.elu(h)))  # noqa: E731
            h = checkpoint(block, h, use_reentrant=reentrant) if wrapped else block(h)
            loss = net.last(h).square().sum()
        return gradients(net, loss)

    assert_equal(run(True), run(False), 1e-6)
    assert_equal(run(True), alone(lambda: run(False)), 1e-6)


def test_checkpointing_that_keeps_the_scope(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed by layers, neither now nor when the region runs again, also under autocast."""
    net = Net()

    def run(**options: Any) -> dict[str, torch.Tensor]:
        with prepare_weights(net), torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(net.body, X, use_reentrant=False, **options).float().square().sum()
        return gradients(net, loss)

    expected = run()
    del computed[:]
    monkeypatch.setattr("nvae_fast.nn.conv.weight_norm", None)
    assert_equal(run(context_fn=checkpoint_contexts), expected, 1e-2)
    assert computed == [3]
    monkeypatch.undo()
    outside = checkpoint(net.body, X, use_reentrant=False, context_fn=checkpoint_contexts)
    assert torch.equal(outside, net.body(X))


@pytest.mark.parametrize("slow", [False, True])
def test_autocast(slow: bool, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights come in the dtype of the products, the numbers are those of autocast's own cast."""
    monkeypatch.setattr(wide_conv2d, "fast_bfloat16", lambda: not slow)
    net = Net()

    def run() -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = net(X)
        assert y.dtype == torch.bfloat16
        return gradients(net, y.float().square().sum()) | {"y": y.detach().float()}

    actual, expected = run(), alone(run)
    assert torch.equal(actual["y"], expected["y"])
    assert_equal(actual, expected, 2e-2)
    with prepare_weights(net):
        with torch.autocast("cpu", torch.bfloat16):
            assert net.first.normalized_weight().dtype == (torch.float32 if slow else torch.bfloat16)
        assert net.first.normalized_weight().dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert net.double().first.normalized_weight().dtype == torch.float64


def test_nothing_of_it_is_in_the_module() -> None:
    net = Net().eval()
    keys = set(net.state_dict())
    with torch.no_grad():
        y = net(X)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(X), y)
            other.last.weight.mul_(-1)
            assert not torch.equal(other(X), y)
            assert torch.equal(net(X), y)
    with prepare_weights(net):
        net.body(X)
        clone = copy.deepcopy(net)
        pickle.dumps(net)
        assert torch.equal(clone.body(X), net.body(X))
    assert set(net.state_dict()) == keys
    gone = weakref.ref(net)
    del net, other, clone
    gc.collect()
    assert gone() is None, "what evaluation keeps does not keep the model"


def test_reference_backend(computed: list[int]) -> None:
    net = Net()
    with nf.use_backend("reference"):
        expected = net(X)
    assert computed == []
    with prepare_weights(net):
        net.body(X)
        del computed[:]
        with nf.use_backend("reference"):
            y = net.body(X)
    assert computed == []
    assert torch.equal(y, expected)
    assert_close(net(X), expected, 1e-6)


def test_compile(computed: list[int]) -> None:
    """A compiler sees layer by layer calls, in a whole model and in a part of one that runs in a scope."""
    torch._dynamo.reset()
    net = Net()
    expected = gradients(net, net(X).square().sum())
    whole = torch.compile(net, fullgraph=True, backend="aot_eager")
    del computed[:]
    assert_equal(gradients(net, whole(X).square().sum()), expected, 1e-5)
    assert computed == []
    net = copy.deepcopy(net)
    net.masked.compile(fullgraph=True, backend="aot_eager")
    assert_equal(gradients(net, net(X).square().sum()), expected, 1e-5)
    assert computed == [2], "what is compiled is left out"


def test_an_error_closes_the_scope() -> None:
    with pytest.raises(ZeroDivisionError), prepare_weights(Net()):
        raise ZeroDivisionError
    assert not shared_weights._state.scopes


def test_one_call_a_pass() -> None:
    """Two operators, forward and backward, for all layers of a model."""
    pytest.importorskip("torch.utils._python_dispatch")
    from benchmarks.measure import operator_calls

    model = nf.NVAE(CONFIG)
    convs = [m for m in model.modules() if isinstance(m, WeightNormConv2d)]
    w, g, m = ([getattr(c, name) for c in convs] for name in ("weight", "log_weight_norm", "mask"))
    assert operator_calls(lambda: nf.weight_norm_many(w, g, m)) == 1
    assert weight_norm_many._op.name == "weight_norm_many"


def test_checkpointed_cells_share_the_weights(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """``checkpoint_cells``: one computation a step, the gradients of a step that keeps everything."""
    monkeypatch.setattr("nvae_fast.nn.conv.weight_norm", None)  # no layer computes its own
    torch.manual_seed(1)
    model = nf.NVAE(CONFIG)
    for part in model.modules():
        part.needs_data_init = False
    x = torch.rand(2, 3, 16, 16)

    def run(recompute: bool) -> dict[str, torch.Tensor]:
        model.checkpoint_cells = recompute
        return gradients(model, nf.training.balanced_kl(model(x, seed=3).kl, 0.5, model.config).sum())

    assert_same_gradients(run(True), run(False))
    assert len(computed) == 2
