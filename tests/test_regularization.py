"""The regularisers in groups give what layer-by-layer formulas give."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from harness import assert_close
from torch import nn

import nvae_fast as nf
from nvae_fast.models.regularization import (
    FIRST_ITERATIONS,
    ITERATIONS,
    NORMALIZE_EPS,
    SpectralEstimate,
    batch_norm_regularizer,
    convolutions,
)
from nvae_fast.nn import BatchNormSwish, PlainConv2d, WeightNormConv2d
from nvae_fast.ops import spectral_norm


class Net(nn.Module):
    """Several layers of one matrix shape, some of another shape with the same matrix, all-zero weights, norms."""

    def __init__(self) -> None:
        super().__init__()
        self.a = WeightNormConv2d(4, 6, 3)
        self.b = WeightNormConv2d(4, 6, 3)
        self.c = WeightNormConv2d(36, 6, 1)  # 6 x 36, as the two above
        self.d = PlainConv2d(5, 3, 1)
        self.zero = PlainConv2d(5, 3, 1)
        nn.init.zeros_(self.zero.weight)
        self.norms = nn.ModuleList(BatchNormSwish(n) for n in (4, 1, 4, 7))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
        self.spectral = SpectralEstimate(self)


def estimate(net: Net, iterations: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The definition: power iteration layer by layer from the persistent vectors, the gradient through u^T W v only."""
    total = torch.zeros(())
    moved = {}
    for (height, width), names in net.spectral.layers.items():
        for i, name in enumerate(names):
            w = net.get_submodule(name).normalized_weight().reshape(height, width)
            u = net.spectral.get_buffer(f"u_{height}x{width}")[i].clone()
            with torch.no_grad():
                for _ in range(iterations):
                    v = F.normalize(w.t() @ u, dim=0, eps=NORMALIZE_EPS)
                    u = F.normalize(w @ v, dim=0, eps=NORMALIZE_EPS)
            total = total + u @ w @ v
            moved[name] = torch.cat((u, v))
    return total, moved


def vectors(net: Net) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([net.spectral.get_buffer(f"{x}_{h}x{w}")[i] for x in "uv"])
        for (h, w), names in net.spectral.layers.items()
        for i, name in enumerate(names)
    }


def test_spectral_estimate_is_the_layer_by_layer_one() -> None:
    net = Net()
    for iterations in (FIRST_ITERATIONS, ITERATIONS, ITERATIONS):
        expected, moved = estimate(net, iterations)
        weights = {name: conv.normalized_weight() for name, conv in convolutions(net).items()}
        actual = net.spectral(weights)
        assert_close(actual, expected, 1e-5)
        for name, value in vectors(net).items():
            assert_close(value, moved[name], 1e-4, name)
        parameters = [p for n, p in net.named_parameters() if not n.startswith("norms") and "bias" not in n]
        for a, e in zip(
            *(torch.autograd.grad(t, parameters, allow_unused=True) for t in (actual, expected)), strict=True
        ):
            assert_close(a, e, 1e-4)


def test_spectral_vectors_persist() -> None:
    """State dicts carry vectors and warmth; buffers keep their names, shapes and memory."""
    net = Net()
    buffers = {name: b.data_ptr() for name, b in net.spectral.named_buffers()}
    assert {n: tuple(b.shape) for n, b in net.spectral.named_buffers()} == {
        "u_6x36": (3, 6), "v_6x36": (3, 36), "u_3x5": (2, 3), "v_3x5": (2, 5),
    }  # fmt: skip
    weights = {name: conv.weight.detach() for name, conv in convolutions(net).items()}
    net.spectral(weights)
    assert {name: b.data_ptr() for name, b in net.spectral.named_buffers()} == buffers
    other = Net()
    other.load_state_dict(net.state_dict())
    assert other.spectral.warm
    assert torch.equal(other.spectral(weights), net.spectral(weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_spectral_estimate_in_other_dtypes(dtype: torch.dtype) -> None:
    net = Net()
    wide = copy.deepcopy(net).to(dtype)
    weights = {name: conv.weight.detach() for name, conv in convolutions(wide).items()}
    actual = wide.spectral(weights)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = sum(float(torch.linalg.matrix_norm(w.double().flatten(1), 2)) for w in weights.values())
    assert abs(float(actual) - exact) <= 2e-3 * exact


def test_spectral_estimate_after_the_optimizer_moved() -> None:
    """The gradient does not depend on what happens to the vectors afterwards."""
    net = Net()
    weights = {name: conv.weight for name, conv in convolutions(net).items()}
    first = net.spectral(weights)
    expected = torch.autograd.grad(first, net.a.weight, retain_graph=True)[0]
    net.spectral({name: 2 * w.detach() + 1 for name, w in weights.items()})
    assert torch.equal(torch.autograd.grad(first, net.a.weight)[0], expected)


def test_batch_norm_regularizer() -> None:
    net = Net()
    with torch.no_grad():
        net.norms[0].weight.copy_(torch.tensor([2.0, -2.0, 1.0, 2.0]))  # ties share the gradient
        net.norms[2].weight.zero_()
    gammas = [norm.weight for norm in net.norms]
    expected = torch.stack([g.abs().max() for g in gammas]).sum()
    actual = batch_norm_regularizer(net)
    assert_close(actual, expected, 1e-6)
    for a, e in zip(torch.autograd.grad(actual, gammas), torch.autograd.grad(expected, gammas), strict=True):
        assert torch.equal(a, e)
    assert batch_norm_regularizer(nn.Linear(2, 2)) == 0
    with torch.no_grad():
        net.norms[3].weight[2] = float("nan")
    assert batch_norm_regularizer(net).isnan()


def test_few_operator_calls() -> None:
    from benchmarks.measure import operator_calls

    model = nf.NVAE(nf.NVAEConfig.preset("mnist").replace(num_channels_enc=4, num_channels_dec=4))
    model.regularization()
    shapes, layers = len(model.spectral.layers), len(convolutions(model))
    calls = operator_calls(model.regularization)
    if nf.backends()["weight_norm_many"]["cpu"] == "cpp":
        assert calls <= (4 * ITERATIONS + 8) * shapes + 150 < 6 * layers + 400


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectral_operators_against_their_formula(dtype: torch.dtype) -> None:
    """Lengths, both vectors and gradients, weights in either memory format, strided ones, and widths off the lanes."""
    shapes = [[(6, 5, 3, 3)] * 3, [(4, 37, 1, 1)] * 2, [(1, 1, 5, 5)], [(130, 3, 3, 3)]]
    weights = [torch.randn(shape, dtype=dtype) for group in shapes for shape in group]
    weights[1] = weights[1].contiguous(memory_format=torch.channels_last)
    weights[2] = weights[2].transpose(2, 3)
    weights[-1] = weights[-1].contiguous(memory_format=torch.channels_last)
    u = [torch.randn(len(group), group[0][0], dtype=dtype) for group in shapes]
    found = spectral_norm.lengths(weights, u, 4, 1e-3)
    truth = spectral_norm._lengths([w.double() for w in weights], [x.double() for x in u], 4, 1e-3)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-13
    for actual, expected in zip(
        (found[0], *found[1], *found[2]), (truth[0], *truth[1], *truth[2]), strict=True
    ):
        assert_close(actual, expected, tolerance)
    grad = torch.tensor(0.75, dtype=dtype)
    gradients = spectral_norm.gradients(grad, weights, *found[1:])
    for actual, expected in zip(gradients, spectral_norm._gradients(grad, weights, *found[1:]), strict=True):
        assert_close(actual, expected, tolerance)
    again = spectral_norm.lengths(weights, u, 4, 1e-3)
    assert all(
        torch.equal(a, b)
        for a, b in zip((again[0], *again[1], *again[2]), (found[0], *found[1], *found[2]), strict=True)
    )
