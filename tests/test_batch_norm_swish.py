"""batch_norm_swish: fp64 truth, given and batch statistics, negative gammas, and everything an op must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    Tensors,
    assert_accurate,
    assert_close,
    assert_compiles,
    assert_empty_works,
    assert_gradcheck,
    assert_indifferent_to_layout,
    assert_no_double_backward,
    assert_opcheck,
    assert_repeatable,
    place,
)

import nvae_fast as nf

BATCH = ("x", "weight", "bias")
GIVEN = (*BATCH, "mean", "var")
ACTIVATIONS = ["swish", "elu", None]


def inputs(
    size: tuple[int, int, int, int] = (4, 6, 5, 7), given: bool = False, offset: float = 0.5
) -> Tensors:
    """Half of the gammas are negative."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    c = size[1]
    weight = normal(c).abs() + 0.5
    weight[::2] *= -1
    tensors = {"x": 1.5 * normal(*size) + offset, "weight": weight, "bias": normal(c)}
    return {**tensors, "mean": normal(c), "var": normal(c).square() + 0.1} if given else tensors


def activated(t: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation == "swish":
        return t * torch.sigmoid(t)
    return torch.where(t > 0, t, torch.expm1(t.clamp_max(0))) if activation == "elu" else t


def formula(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: Any = None,
    var: Any = None,
    activation: str | None = "swish",
    eps: float = 1e-5,
) -> tuple[torch.Tensor, ...]:
    if mean is None:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
        used = (mean.detach(), var.detach())
    else:
        used = (mean, var)
    normalized = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + eps)
    return activated(weight[:, None, None] * normalized + bias[:, None, None], activation), *used


def eager(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *statistics: Any,
    activation: str | None = "swish",
) -> Any:
    """What one would write: F.batch_norm, then the activation."""
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
    wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
    y = {"swish": F.silu, "elu": F.elu, None: torch.clone}[activation](y)
    return y, wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)


def op(
    x: Any, weight: Any, bias: Any, mean: Any = None, var: Any = None, **options: Any
) -> tuple[torch.Tensor, ...]:
    return nf.batch_norm_swish(x, weight, bias, mean, var, **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", [(4, 6, 5, 7), (2, 3, 1, 1), (1, 1, 13, 1), (3, 17, 8, 8)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype,
    size: tuple,
    activation: str | None,
    route: str,
    memory_format: torch.memory_format,
    device: torch.device,
) -> None:
    tensors = place(inputs(size), dtype, memory_format, device)
    if size[0] * size[2] * size[3] == 2:
        tensors["x"][0] += 1.0  # two values a channel: keep them apart
    assert_accurate(
        lambda **t: op(**t, activation=activation),
        lambda **t: formula(**t, activation=activation),
        tensors,
        BATCH,
        eager=lambda **t: eager(**t, activation=activation),
        factor=2.5,
        vector_floor=2 * torch.finfo(dtype).eps,
    )
    out = nf.batch_norm_swish(**tensors, activation=activation)
    assert (out.y.dtype, out.mean.dtype, out.var.dtype) == (dtype, torch.float32, torch.float32)
    assert not out.mean.requires_grad
    assert not out.var.requires_grad


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("differentiable", [BATCH, GIVEN])
def test_accuracy_with_given_statistics(
    differentiable: tuple, dtype: torch.dtype, activation: str | None, route: str, device: torch.device
) -> None:
    """As constants (evaluation) and as functions of something (merged over processes)."""
    tensors = place(inputs(given=True), dtype, torch.channels_last, device)
    assert_accurate(
        lambda **t: op(**t, activation=activation)[:1],
        lambda **t: formula(**t, activation=activation)[:1],
        tensors,
        differentiable,
        vector_floor=2 * torch.finfo(dtype).eps,
    )


def test_float64(route: str) -> None:
    for given in (False, True):
        tensors = inputs(given=given)
        for activation in ACTIVATIONS:
            actual, expected = op(**tensors, activation=activation), formula(**tensors, activation=activation)
            for a, e in zip(actual, expected, strict=True):
                assert_close(a, e, 1e-13)


def test_given_statistics_of_the_batch_give_the_same(route: str) -> None:
    """Gradients too: through the given mean and variance they add up to those of batch normalisation."""
    tensors = inputs()
    leaves = [t.requires_grad_() for t in tensors.values()]
    mean = tensors["x"].mean((0, 2, 3))
    var = tensors["x"].var((0, 2, 3), correction=0)
    upstream = torch.randn(4, 6, 5, 7, dtype=torch.float64)
    results = [
        torch.autograd.grad(nf.batch_norm_swish(*leaves, *statistics).y, leaves, upstream, retain_graph=True)
        for statistics in ((), (mean, var))
    ]
    for a, e in zip(*results, strict=True):
        assert_close(a, e, 1e-11)


@pytest.mark.parametrize("offset", [0.0, 150.0])
def test_mean_far_from_zero(
    offset: float, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    """|mean| / std = 100 in fp32: as near as the input's own rounding lets it be."""
    tensors = place(inputs((4, 5, 16, 16), offset=offset), torch.float32, memory_format, device)
    out = nf.batch_norm_swish(**tensors)
    y, mean, var = formula(**{name: t.double() for name, t in tensors.items()})
    assert_close(out.mean, mean, 2e-6, "mean")
    assert_close(out.var, var, 2e-6, "var")
    assert_close(out.y, y, 2e-7 * max(offset, 2), "y")


def test_small_and_large_variance(route: str) -> None:
    """Below eps and far above it the biased variance comes back right."""
    x = torch.randn(8, 4, 16, 16, dtype=torch.float64) * torch.tensor([1e-4, 1e-2, 1.0, 1e4])[:, None, None]
    out = nf.batch_norm_swish(x.float(), torch.ones(4), torch.zeros(4), activation=None)
    expected = x.float().double().var((0, 2, 3), correction=0)
    assert ((out.var - expected).abs() <= 1e-5 * expected + 2e-12).all()
    constant = nf.batch_norm_swish(
        torch.full((2, 1, 4, 4), 3.0), torch.ones(1), torch.full((1,), 0.25), activation=None
    )
    assert_close(constant.y, torch.full((2, 1, 4, 4), 0.25), 1e-3)
    assert float(constant.var) < 1e-10


def test_eps_is_used(route: str) -> None:
    tensors = inputs()
    assert_close(op(**tensors, eps=0.3)[0], formula(**tensors, eps=0.3)[0], 1e-13)


def test_half_precision_input_with_full_precision_parameters(
    route: str, memory_format: torch.memory_format
) -> None:
    tensors = {name: t.float() for name, t in inputs().items()}
    tensors["x"] = tensors["x"].bfloat16().contiguous(memory_format=memory_format)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    out = nf.batch_norm_swish(**leaves)
    assert out.y.dtype == torch.bfloat16
    assert out.y.is_contiguous(memory_format=memory_format), "the memory format of x is kept"
    out.y.sum().backward()
    assert {name: t.grad.dtype for name, t in leaves.items()} == {
        name: t.dtype for name, t in tensors.items()
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("given", [False, True])
def test_gradcheck(given: bool, activation: str | None, route: str) -> None:
    assert_gradcheck(
        lambda **t: op(**t, activation=activation)[:1], inputs((3, 2, 2, 2), given), GIVEN if given else BATCH
    )


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(given: bool, device: torch.device) -> None:
    t = place(inputs((3, 2, 2, 3), given), torch.float32, torch.channels_last, device)
    args = (*(t.get(name) for name in GIVEN), 1e-5, "swish")
    assert_opcheck("batch_norm_swish", *args, differentiable=range(5 if given else 3))


def test_compiles(device: torch.device) -> None:
    assert_compiles(op, place(inputs((3, 2, 2, 3)), torch.float32, torch.contiguous_format, device), BATCH)


@pytest.mark.parametrize("given", [False, True])
def test_layouts_repeats_and_empty(given: bool, route: str, device: torch.device) -> None:
    names = GIVEN if given else BATCH
    tensors = place(inputs(given=given), torch.float32, torch.contiguous_format, device)
    assert_indifferent_to_layout(op, tensors, names)
    assert_repeatable(op, tensors, names)
    found = assert_empty_works(lambda **t: op(**t)[:1], {**tensors, "x": tensors["x"][:0]}, names)
    assert found["output 0"].shape == (0, 6, 5, 7)
    assert all(torch.isfinite(t).all() for t in found.values())


def test_no_double_backward() -> None:
    t = inputs()
    leaf = t["x"].requires_grad_()
    y, _, _ = torch.ops.nvae_fast.batch_norm_swish(leaf, t["weight"], t["bias"], None, None, 1e-5, "swish")
    assert_no_double_backward("batch_norm_swish", y, leaf)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_propagates(value: float, route: str) -> None:
    """Into the whole channel through its statistics, and into no other."""
    tensors = {name: t.float() for name, t in inputs().items()}
    tensors["x"][0, 2, 1, 1] = value
    y = op(**tensors)[0]
    assert not y[:, 2].isfinite().any()
    assert y[:, [0, 1, 3, 4, 5]].isfinite().all()


X, C = torch.randn(2, 3, 4, 4), torch.ones(3)
ERRORS = [
    ({"x": "x"}, TypeError, "x must be a torch.Tensor, got str"),
    ({"x": X[0]}, ValueError, r"x must have shape \(B, C, H, W\), got \(3, 4, 4\)"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\), got \(4,\)"),
    ({"bias": torch.ones(3, 1)}, ValueError, r"bias must have shape \(3,\), got \(3, 1\)"),
    ({"bias": torch.ones(3, device="meta")}, ValueError, "bias must be on cpu .*got meta"),
    ({"mean": C}, ValueError, "mean and var must be given together, got only mean"),
    ({"var": C}, ValueError, "mean and var must be given together, got only var"),
    ({"mean": C, "var": C[:2]}, ValueError, r"var must have shape \(3,\), got \(2,\)"),
    ({"x": X[:1, :, :1, :1]}, ValueError, r"expected more than one value per channel .*got x \(1, 3, 1, 1\)"),
    ({"eps": 0.0}, ValueError, "eps must be > 0, got 0.0"),
    ({"eps": None}, ValueError, "eps must be > 0, got None"),
    ({"eps": float("nan")}, ValueError, "eps must be > 0, got nan"),
    ({"activation": "gelu"}, ValueError, r"activation must be one of \[None, 'swish', 'elu'\], got 'gelu'"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^batch_norm_swish: {message}"):
        op(**{"x": X, "weight": C, "bias": C, **bad})
