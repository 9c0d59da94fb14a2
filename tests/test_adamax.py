"""Adamax is PyTorch's, bit for bit, with one number read by the host."""

from __future__ import annotations

import copy

import pytest
import torch
from internals import needs_extension
from test_step import NoWaiting
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.training.adamax import Adamax

OPTIONS = {"lr": 1e-2, "eps": 1e-3, "foreach": True}


def parameters() -> list[torch.nn.Parameter]:
    shapes = ((3, 4), (), (5,), (2, 3, 3, 3), (0,))
    found = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    found.append(torch.nn.Parameter(torch.randn(4, 6, 3, 3).to(memory_format=torch.channels_last)))
    return found


class Counting(TorchDispatchMode):
    """The operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def both(decay: float) -> list[tuple[list[torch.nn.Parameter], torch.optim.Optimizer]]:
    ours = parameters()
    theirs = copy.deepcopy(ours)
    return [
        (ours, Adamax(ours, weight_decay=decay, **OPTIONS)),
        (theirs, torch.optim.Adamax(theirs, weight_decay=decay, **OPTIONS)),
    ]


def step(pair: list, without: tuple[int, ...] = (), scale: float = 1.0) -> None:
    grads = [torch.randn_like(p) * scale for p in pair[0][0]]
    for own, optimizer in pair:
        for index, (p, grad) in enumerate(zip(own, grads, strict=True)):
            p.grad = None if index in without else grad.clone()
        optimizer.step()
        assert all(p.grad is None or torch.equal(p.grad, g) for p, g in zip(own, grads, strict=True))


def same(pair: list) -> None:
    for a, b in zip(pair[0][0], pair[1][0], strict=True):
        assert torch.equal(a, b)
    states = [optimizer.state_dict()["state"] for _, optimizer in pair]
    assert states[0].keys() == states[1].keys()
    for index, entry in states[0].items():
        assert all(torch.equal(value, states[1][index][name]) for name, value in entry.items())


@pytest.mark.parametrize("shape", [(6, 1, 5, 5), (8, 4, 1, 1), (1, 1, 3, 3)])
def test_gradients_that_lie_alike_are_not_copied(shape: tuple[int, ...]):
    """Weights of depthwise and 1x1 convolutions are dense in both formats, whatever their strides say."""
    formats = (torch.contiguous_format, torch.channels_last)
    for own, other in (formats, formats[::-1]):
        ours = torch.nn.Parameter(torch.randn(shape).contiguous(memory_format=own))
        theirs = torch.nn.Parameter(ours.detach().clone())
        optimizers = Adamax([ours], **OPTIONS), torch.optim.Adamax([theirs], **OPTIONS)
        for _ in range(2):
            grad = torch.empty(shape, memory_format=other).normal_()
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            with Counting() as calls:
                optimizers[0].step()
            optimizers[1].step()
        assert "aten.copy_.default" not in calls.names
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("decay", [0.0, 3e-4])
def test_bit_for_bit(decay: float):
    pair = both(decay)
    for number in range(12):
        step(pair, scale=10.0 ** (number - 6))
        for _, optimizer in pair:
            optimizer.param_groups[0]["lr"] = 1e-2 / (number + 1)
    same(pair)


def test_counts_that_differ_are_pytorchs_own_business():
    """Parameters that join late, leave, and come back keep counts of their own; so does a loaded state."""
    pair = both(3e-4)
    for without in ((1, 2), (1, 2), (), (0,), (), (), (0, 1), ()):
        step(pair, without)
        same(pair)
    saved = [copy.deepcopy(optimizer.state_dict()) for _, optimizer in pair]
    for state, (_, optimizer) in zip(saved[::-1], pair, strict=True):
        optimizer.load_state_dict(state)
    for _ in range(3):
        step(pair)
    same(pair)


def test_one_number_is_read():
    pair = both(3e-4)
    step(pair)
    ours, optimizer = pair[0]
    reads = []

    class Count(NoWaiting):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            reads.append("_local_scalar_dense" in str(func))
            return func(*args, **(kwargs or {}))

    with Count("cpu"):
        optimizer.step()
    assert sum(reads) == 1
    assert len(reads) < 15
    assert len(ours) == 6


@needs_extension
@pytest.mark.parametrize("decay", [0.0, 3e-4])
def test_one_pass_over_memory_is_the_same_bits(decay: float):
    """More than a task long, gradients of another layout, NaN and infinities; versions move."""

    def make() -> list[torch.nn.Parameter]:
        torch.manual_seed(2)
        return [
            torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 16, 700, 1), (50_001,), (4, 6, 3, 3))
        ]

    ours, theirs = make(), make()
    optimizer = Adamax(ours, weight_decay=decay, **OPTIONS)
    other = torch.optim.Adamax(theirs, weight_decay=decay, **OPTIONS)
    for number in range(4):
        grads = [torch.randn_like(p) for p in ours]
        grads[2] = grads[2].to(memory_format=torch.channels_last)
        if number == 2:
            grads[1][:4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0])
        for own in (ours, theirs):
            for p, grad in zip(own, grads, strict=True):
                p.grad = grad.clone()
        versions = [p._version for p in ours]
        optimizer.step()
        other.step()
        assert optimizer._fits
        assert all(p._version > v for p, v in zip(ours, versions, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        for name in ("exp_avg", "exp_inf"):
            torch.testing.assert_close(
                optimizer.state[a][name], other.state[b][name], rtol=0, atol=0, equal_nan=True
            )


def test_what_the_kernel_does_not_take_is_pytorchs():
    p = torch.nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    q = torch.nn.Parameter(p.detach().clone())
    ours, theirs = Adamax([p], **OPTIONS), torch.optim.Adamax([q], **OPTIONS)
    for _ in range(3):
        p.grad = q.grad = torch.randn(4, 5, dtype=torch.float64)
        ours.step()
        theirs.step()
    assert not ours._fits
    assert torch.equal(p, q)
