"""squeeze_excite: saturated gates, activations, layers without biases, blocks of the CPU kernel, a skip of another dtype."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from descriptions.squeeze_excite import formula, inputs
from harness import assert_close, evaluate, relative_error

import nvae_fast as nf


def test_saturated_gates(route: str) -> None:
    """Gates at exactly 0 and 1: x is dropped or kept whole, and no gradient is NaN."""
    tensors = {name: t.float() for name, t in inputs((2, 4, 3, 3), skip=False).items()}
    tensors["expand_bias"] = torch.tensor([-1e4, 1e4, -1e4, 1e4])
    found = evaluate(nf.squeeze_excite, tensors, tuple(tensors))
    expected = tensors["x"] * torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]
    assert torch.equal(found["output 0"], expected)
    assert all(torch.isfinite(t).all() for t in found.values())


OTHERS = [(a, g) for a in ("relu", "silu", "swish") for g in ("sigmoid", "hardsigmoid")][1:]


def definition(
    x: Any, w1: Any, b1: Any, w2: Any, b2: Any, skip: Any, activation: str, gate: str, scale: float = 0.1
) -> torch.Tensor:
    hidden = F.linear(x.mean((2, 3)), w1, b1)
    hidden = hidden.clamp_min(0) if activation == "relu" else hidden * torch.sigmoid(hidden)
    logits = F.linear(hidden, w2, b2)
    factor = torch.sigmoid(logits) if gate == "sigmoid" else (logits + 3).clamp(0, 6) / 6
    y = scale * factor[:, :, None, None] * x
    return y if skip is None else skip + y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(("activation", "gate"), OTHERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_other_activations(
    activation: str,
    gate: str,
    skip: bool,
    bias: bool,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    route: str,
) -> None:
    tensors = inputs((3, 20, 5, 3))
    exact = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    given = {
        n: (t.to(dtype) if n in ("x", "skip") or dtype != torch.bfloat16 else t.float())
        for n, t in tensors.items()
    }
    for name in ("x", "skip"):
        given[name] = given[name].to(memory_format=memory_format)
    given = {name: t.requires_grad_() for name, t in given.items()}
    for t in (exact, given):
        if not bias:
            t["reduce_bias"] = t["expand_bias"] = None
        if not skip:
            t["skip"] = None
    expected = definition(*exact.values(), activation, gate)
    *args, added = given.values()
    actual = nf.squeeze_excite(*args, skip=added, residual_scale=0.1, activation=activation, gate=gate)
    assert actual.dtype == dtype
    tolerance = {
        torch.float64: 1e-7 if route == "reference" else 1e-12,
        torch.float32: 1e-5,
        torch.bfloat16: 2e-2,
    }[dtype]
    assert_close(actual.double(), expected, tolerance)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(upstream)
    actual.backward(upstream.to(dtype))
    for name, t in exact.items():
        if t is not None:
            assert_close(given[name].grad.double(), t.grad, tolerance, name)


def test_other_activations_compile_and_refuse_double_backward() -> None:
    x = torch.randn(2, 6, 4, 3, requires_grad=True)
    layers = [torch.randn(s) for s in ((4, 6), (4,), (6, 4), (6,))]

    def gated(x: torch.Tensor) -> torch.Tensor:
        return nf.squeeze_excite(x, *layers, activation="silu")

    assert_close(torch.compile(gated, backend="aot_eager", fullgraph=True)(x), gated(x), 1e-5)
    with pytest.raises(RuntimeError, match="squeeze_excite: double backward is not supported"):
        torch.autograd.grad(gated(x).sum(), x, create_graph=True)
    jacobian = torch.func.jacrev(lambda t: gated(t).sum())(x.detach())
    assert_close(torch.autograd.grad(gated(x).sum(), x)[0], jacobian, 1e-5)


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("activation", "elu", "'relu', 'silu', 'swish'"),
        ("gate", "tanh", "'sigmoid', 'hardsigmoid'"),
        ("gate", None, "sigmoid"),
    ],
)
def test_unknown_activations(argument: str, value: Any, allowed: str) -> None:
    tensors = [t.float() for t in list(inputs((2, 4, 3, 3)).values())[:-1]]
    with pytest.raises(ValueError, match=f"squeeze_excite: {argument} must be one of .*{allowed}"):
        nf.squeeze_excite(*tensors, **{argument: value})


# Of the CPU kernel's blocks of 256 KiB: several samples each, the last one fewer; one sample each, of several spans.
@pytest.mark.parametrize("shape", [(70, 24, 9, 9), (3, 40, 60, 50)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.usefixtures("one_thread")
def test_blocks(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    exact = inputs(shape, skip=True)
    given = {
        name: t.float().contiguous(memory_format=memory_format) if t.dim() == 4 else t.float()
        for name, t in exact.items()
    }
    expected, found = (
        evaluate(f, t, tuple(exact)) for f, t in ((formula, exact), (nf.squeeze_excite, given))
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < 2e-6, name


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_skip_of_float64(activation: str) -> None:
    exact = inputs((2, 8, 4, 4), skip=True)
    given = {name: t if name == "skip" else t.float() for name, t in exact.items()}

    def reference(**tensors: torch.Tensor) -> torch.Tensor:
        return definition(*tensors.values(), activation, "sigmoid", scale=1.0)

    function = functools.partial(nf.squeeze_excite, activation=activation)
    expected, found = (evaluate(f, t, tuple(exact)) for f, t in ((reference, exact), (function, given)))
    for name, value in expected.items():
        assert relative_error(found[name], value) < 2e-6, name
