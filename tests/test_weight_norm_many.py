"""weight_norm_many: every layer is what weight_norm gives it, whatever stands beside it; everything an op must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import DTYPES, assert_close, assert_no_double_backward, relative_error, strided
from test_weight_norm import formula

import nvae_fast as nf

SIZES = [(4, 3, 3, 3), (9, 2, 1, 1), (7, 5, 1, 1), (17, 1, 5, 5), (3, 130, 3, 3), (40, 33, 1, 1)]
MASKED = (1, 3, 4)  # positions in SIZES
Layers = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]


def layers(
    dtype: torch.dtype = torch.float64,
    *,
    sizes: list[tuple[int, ...]] | None = None,
    device: Any = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Layers:
    """Weights, log norms and masks; leaves where they are differentiable."""
    generator = torch.Generator().manual_seed(7)
    weights, norms, masks = [], [], []
    for i, size in enumerate(SIZES if sizes is None else sizes):
        weight = torch.randn(size, generator=generator, dtype=torch.float64)
        norm = 0.5 * torch.randn((size[0], 1, 1, 1), generator=generator, dtype=torch.float64)
        mask = (torch.rand(size, generator=generator) < 0.6).to(device, dtype)
        mask[:, :1, :1, :1] = 1
        weights.append(weight.to(device, dtype).contiguous(memory_format=memory_format).requires_grad_())
        norms.append(norm.to(device, dtype).requires_grad_())
        masks.append(mask.contiguous(memory_format=memory_format) if i in MASKED else None)
    return weights, norms, masks


def upstream(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randint(-8, 9, tuple(y.shape), generator=generator) / 4).to(y) for y in outputs]


def gradients(outputs: list[torch.Tensor], weights: Any, norms: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(outputs, [*weights, *norms], upstream(outputs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy(
    dtype: torch.dtype, route: str, memory_format: torch.memory_format, device: torch.device
) -> None:
    """Against float64, each result as near as rounding allows or plain PyTorch comes."""
    weights, norms, masks = layers(dtype, device=device, memory_format=memory_format)
    outputs = nf.weight_norm_many(weights, norms, masks)
    native = [formula(*layer) for layer in zip(weights, norms, masks, strict=True)]
    wide = [[None if t is None else t.detach().double() for t in ts] for ts in (weights, norms, masks)]
    leaves = [[t.requires_grad_() for t in ts] for ts in wide[:2]]
    truth = [formula(*layer) for layer in zip(*leaves, wide[2], strict=True)]
    for y, e in zip(outputs, truth, strict=True):
        assert y.dtype == dtype
        assert_close(y, e, 1.05 * relative_error(e.to(dtype), e) + 5e-7)
    actual, plain, expected = (
        gradients(ys, *ts)
        for ys, ts in ((outputs, (weights, norms)), (native, (weights, norms)), (truth, leaves))
    )
    for a, p, e in zip(actual, plain, expected, strict=True):
        lost = relative_error(p, e) if torch.isfinite(p).all() else 0.0
        assert_close(a, e, 2.5 * max(lost, relative_error(e.to(dtype), e), 1.2e-7))


def test_equals_single_layers(route: str, device: torch.device) -> None:
    """Bit for bit: one kernel computes both. Strides are the weight's."""
    weights, norms, masks = layers(torch.float32, device=device, memory_format=torch.channels_last)
    outputs = nf.weight_norm_many(weights, norms, masks)
    single = [nf.weight_norm(*layer) for layer in zip(weights, norms, masks, strict=True)]
    for a, b, w in zip(outputs, single, weights, strict=True):
        assert torch.equal(a, b)
        assert a.stride() == w.stride()
    for a, b in zip(gradients(outputs, weights, norms), gradients(single, weights, norms), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_dtype_is_rounded_once(dtype: torch.dtype, route: str) -> None:
    """What casting the float32 results gives, and gradients that arrive in half precision."""
    weights, norms, masks = layers(torch.float32)
    outputs = nf.weight_norm_many(weights, norms, masks, dtype=dtype)
    expected = [y.to(dtype) for y in nf.weight_norm_many(weights, norms, masks)]
    for y, e in zip(outputs, expected, strict=True):
        assert y.dtype == dtype
        assert torch.equal(y, e)
    for a, e in zip(gradients(outputs, weights, norms), gradients(expected, weights, norms), strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e, 1e-6)


def test_float64_and_mixed_dtypes(route: str) -> None:
    weights, norms, masks = layers()
    single = [formula(*layer) for layer in zip(weights, norms, masks, strict=True)]
    outputs = nf.weight_norm_many(weights, norms, masks)
    for a, e in zip(
        outputs + gradients(outputs, weights, norms), single + gradients(single, weights, norms), strict=True
    ):
        assert_close(a, e, 1e-10)
    assert [y.dtype for y in nf.weight_norm_many(weights, norms, masks, dtype=torch.float32)] == [
        torch.float32
    ] * len(weights)
    mixed = [w.detach().to(d) for w, d in zip(weights, 2 * [*DTYPES], strict=True)]
    for y, w, g, m in zip(nf.weight_norm_many(mixed, norms, masks), mixed, norms, masks, strict=True):
        assert y.dtype == w.dtype
        assert_close(y, formula(w.double(), g, m), 1e-2 if w.dtype != torch.float32 else 1e-6)


def test_gradcheck(route: str) -> None:
    weights, norms, masks = layers(sizes=[(2, 3, 1, 1), (3, 2, 3, 1), (2, 1, 2, 2), (1, 2, 2, 1)])
    n = len(weights)
    assert torch.autograd.gradcheck(
        lambda *t: tuple(nf.weight_norm_many(t[:n], t[n:], masks)), (*weights, *norms)
    )


@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_opcheck(masked: str, device: torch.device) -> None:
    weights, norms, masks = layers(
        torch.float32, sizes=[(3, 2, 3, 3), (2, 4, 1, 1)], device=device, memory_format=torch.channels_last
    )
    ones = [torch.ones_like(w).detach() for w in weights]
    masks = {"none": [None, None], "some": [None, ones[1]], "all": ones}[masked]
    operator = torch.ops.nvae_fast.weight_norm_many
    torch.library.opcheck(operator, (weights, norms, masks, 1e-5, None))
    torch.library.opcheck(operator, (weights, [g.detach() for g in norms], masks, 1e-5, torch.bfloat16))


def test_compiles(device: torch.device) -> None:
    torch._dynamo.reset()
    weights, norms, masks = layers(torch.float32, device=device)
    compiled = torch.compile(
        lambda w, g: nf.weight_norm_many(w, g, masks), fullgraph=True, backend="aot_eager"
    )
    outputs, expected = compiled(weights, norms), nf.weight_norm_many(weights, norms, masks)
    for a, e in zip(
        outputs + gradients(outputs, weights, norms),
        expected + gradients(expected, weights, norms),
        strict=True,
    ):
        assert_close(a, e, 1e-6)


def test_unused_results_get_no_gradient(route: str) -> None:
    """None, not zeros: an optimizer with weight decay would move such a weight."""
    weights, norms, masks = layers(torch.float32)
    norms[2].requires_grad_(False)
    outputs = nf.weight_norm_many(weights, norms, masks)
    (outputs[1].sum() + outputs[2].square().sum()).backward()
    given = [w.grad is not None for w in weights]
    assert given == [False, True, True, False, False, False]
    assert [g.grad is not None for g in norms] == [False, True, False, False, False, False]
    expected = formula(weights[2].detach().requires_grad_(), norms[2])
    assert_close(outputs[2], expected, 1e-6)


def test_only_some_gradients(route: str) -> None:
    weights, norms, masks = layers(torch.float32)
    full = gradients(nf.weight_norm_many(weights, norms, masks), weights, norms)
    n = len(weights)
    frozen = [w.detach() for w in weights]
    outputs = nf.weight_norm_many(frozen, norms, masks)
    for a, e in zip(torch.autograd.grad(outputs, norms, upstream(outputs)), full[n:], strict=True):
        assert torch.equal(a, e)
    frozen = [g.detach() for g in norms]
    outputs = nf.weight_norm_many(weights, frozen, masks)
    for a, e in zip(torch.autograd.grad(outputs, weights, upstream(outputs)), full[:n], strict=True):
        assert torch.equal(a, e)


def test_strided_repeats_and_empty(route: str, device: torch.device) -> None:
    weights, norms, masks = layers(torch.float32, device=device)
    first, second = (
        (outputs := nf.weight_norm_many(weights, norms, masks)) + gradients(outputs, weights, norms)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    gaps = [[strided(t.detach()).requires_grad_() for t in ts] for ts in (weights, norms)]
    outputs = nf.weight_norm_many(*gaps, [None if m is None else strided(m) for m in masks])
    for a, e in zip(outputs + gradients(outputs, *gaps), first, strict=True):
        assert_close(a, e, 1e-6)
    # Upstream gradients in another order than the weight.
    outputs = nf.weight_norm_many(weights, norms, masks)
    other = [g.contiguous(memory_format=torch.channels_last) for g in upstream(outputs)]
    found = torch.autograd.grad(outputs, [*weights, *norms], other)
    for a, e in zip(found, first[len(weights) :], strict=True):
        assert_close(a, e, 1e-6)

    assert nf.weight_norm_many([], [], []) == []
    assert nf.weight_norm_many([], []) == []
    weights, norms, _ = layers(torch.float32, sizes=[(0, 3, 3, 3), (2, 0, 3, 3), (2, 3, 1, 1)], device=device)
    outputs = nf.weight_norm_many(weights, norms)
    assert [tuple(y.shape) for y in outputs] == [(0, 3, 3, 3), (2, 0, 3, 3), (2, 3, 1, 1)]
    assert not gradients(outputs, weights, norms)[4].any()


def test_many_threads_give_the_same() -> None:
    sizes = [(64, 300, 3, 3), (5, 3, 3, 3), (200, 200, 1, 1), (100, 1, 5, 5)] * 2
    weights, norms, masks = layers(torch.float32, sizes=sizes)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            outputs = nf.weight_norm_many(weights, norms, masks)
            found.append(outputs + gradients(outputs, weights, norms))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_double_backward() -> None:
    weights, norms, masks = layers()
    for out in (
        torch.ops.nvae_fast.weight_norm_many(weights, norms, masks, 1e-5, None)[0],
        *(
            [nf.weight_norm_many(weights, norms, masks)[0]]
            if nf.backends()["weight_norm"]["cpu"] == "cpp"
            else []
        ),
    ):
        assert_no_double_backward("weight_norm_many", out, weights[0])


W, N = torch.ones(4, 3, 3, 3), torch.zeros(4, 1, 1, 1)
ERRORS = [
    ({"log_weight_norms": [N]}, ValueError, r"log_weight_norms must have one entry per weight \(2\), got 1"),
    ({"masks": [None]}, ValueError, r"masks must have one entry per weight \(2\), got 1"),
    ({"weights": [W, None]}, TypeError, "layer 1: weight must be a torch.Tensor, got NoneType"),
    (
        {"weights": [W, W[0]]},
        ValueError,
        r"layer 1: weight must have shape \(C_out, C_in, K, K\), got \(3, 3, 3\)",
    ),
    (
        {"log_weight_norms": [N, N[:3]]},
        ValueError,
        r"layer 1: log_weight_norm must have shape \(4, 1, 1, 1\)",
    ),
    ({"masks": [None, W.bool()]}, TypeError, "layer 1: mask must have one of the dtypes .*got torch.bool"),
    (
        {"weights": [W, W.to("meta")], "log_weight_norms": [N, N.to("meta")]},
        ValueError,
        "layer 1: weight must be on cpu like the first argument, got meta",
    ),
    ({"weights": None}, TypeError, "weights must be a sequence with one entry a layer, got NoneType"),
    ({"masks": 3}, TypeError, "masks must be a sequence with one entry a layer, got int"),
    ({"eps": None}, ValueError, "eps must be >= 0, got None"),
    ({"eps": -1e-5}, ValueError, "eps must be >= 0, got -1e-05"),
    ({"dtype": torch.int32}, TypeError, r"dtype must be None or one of .*got torch.int32"),
]


@pytest.mark.parametrize("bad, kind, message", ERRORS)
def test_errors(bad: dict, kind: type, message: str, route: str) -> None:
    with pytest.raises(kind, match=f"^weight_norm_many: {message}"):
        nf.weight_norm_many(**{"weights": [W, W], "log_weight_norms": [N, N], **bad})
