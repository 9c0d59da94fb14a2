"""weight_norm_many: every layer gets what weight_norm gives it, whatever the other layers are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from descriptions import weight_norm
from descriptions.weight_norm import MANY_SIZES, MASKED, formula, lists
from harness import DTYPES, assert_close, place, relative_error

import nvae_fast as nf

Layers = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]


def layers(
    dtype: torch.dtype = torch.float64,
    *,
    sizes: list[tuple[int, ...]] | None = None,
    device: Any = "cpu",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Layers:
    """Weights, log norms and masks; leaves where they are differentiable."""
    tensors = weight_norm.layers(MANY_SIZES if sizes is None else sizes, MASKED)
    weights, norms, masks = lists(place(tensors, dtype, memory_format, device)).values()
    for leaf in (*weights, *norms):
        leaf.requires_grad_()
    return weights, norms, masks


def upstream(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randint(-8, 9, tuple(y.shape), generator=generator) / 4).to(y) for y in outputs]


def gradients(outputs: list[torch.Tensor], weights: Any, norms: Any) -> list[torch.Tensor]:
    return list(torch.autograd.grad(outputs, [*weights, *norms], upstream(outputs)))


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


def test_empty_layers_and_gradients_of_another_format(route: str, device: torch.device) -> None:
    weights, norms, masks = layers(torch.float32, device=device)
    outputs = nf.weight_norm_many(weights, norms, masks)
    first = outputs + gradients(outputs, weights, norms)
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


def test_opcheck_of_another_dtype() -> None:
    weights, norms, masks = layers(torch.float32, sizes=[(3, 2, 3, 3), (2, 4, 1, 1)])
    norms = [g.detach() for g in norms]
    torch.library.opcheck(torch.ops.nvae_fast.weight_norm_many, (weights, norms, masks, 1e-5, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounded_once(dtype: torch.dtype, route: str, memory_format: torch.memory_format) -> None:
    weights, norms, masks = layers(dtype, memory_format=memory_format)
    wide = [[None if t is None else t.detach().double() for t in ts] for ts in (weights, norms, masks)]
    for y, *layer in zip(nf.weight_norm_many(weights, norms, masks), *wide, strict=True):
        truth = formula(*layer)
        assert_close(y, truth, 1.05 * relative_error(truth.to(dtype), truth) + 5e-7)


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
