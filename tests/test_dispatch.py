"""What define_op gives: which results carry gradients, little Python in a call, and derivatives where PyTorch's own are wrong.

Functional transforms of every operator: tests/test_ops.py."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import jvp

import nvae_fast as nf

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = str(Path(nf.__file__).parent)
B, C, H, W = 2, 4, 3, 5


def positive(*size: int) -> torch.Tensor:
    return torch.rand(size, dtype=torch.float64) + 0.5


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    PARAMETERS = [normal(C), positive(C), normal(C), positive(C)]
    LAYERS = (normal(2, C), 3 + positive(2), normal(C, 2), normal(C))  # the gate's hidden units are active


def test_results_that_carry_no_gradient_claim_none(route: str) -> None:
    """The compiler's autograd says the same."""
    x = normal(B, C, H, W).requires_grad_()
    weight, bias = positive(C).requires_grad_(), normal(C)
    kernel = normal(C, 1, 3, 3)
    for function in (
        nf.batch_norm_swish,
        torch.compile(nf.batch_norm_swish, backend="aot_eager", fullgraph=True),
    ):
        out = function(x, weight, bias)
        assert [t.requires_grad for t in out] == [True, False, False]
        mean, var = normal(C).requires_grad_(), positive(C).requires_grad_()
        assert [t.requires_grad for t in function(x, weight, bias, mean, var)] == [True, True, True]
    ops = torch.ops.nvae_fast
    for stats in (False, True):
        y, mean, m2 = ops.depthwise_conv2d(x, kernel, None, None, 1, 1, 1, None, stats, None)
        assert [t.requires_grad for t in (y, mean, m2)] == [True, stats, stats]
    _, pooled = ops.squeeze_excite(x, *LAYERS, None, 1.0)
    assert not pooled.requires_grad


@pytest.mark.parametrize("name", ["residual_normal", "depthwise_conv2d"])
def test_little_python_is_between_a_call_and_its_kernel(name: str) -> None:
    """A reader follows a call through few functions and fewer files, and so does the interpreter."""
    if nf.backends()[name]["cpu"] != "cpp":
        pytest.skip("the kernels are not in use")
    x, w = torch.randn(B, C, H, W, requires_grad=True), torch.randn(C, 1, 3, 3, requires_grad=True)
    scale = torch.ones(C)
    call = {
        "residual_normal": lambda: nf.residual_normal(x, x, seed=3),
        "depthwise_conv2d": lambda: nf.depthwise_conv2d(
            x, w, scale=scale, shift=scale, activation="swish", stats=True
        ),
    }[name]
    files: list[str] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and PACKAGE in frame.f_code.co_filename:
            files.append(frame.f_code.co_filename)

    call()
    sys.setprofile(note)
    call()
    sys.setprofile(None)
    assert len(files) <= 12
    assert sum(a != b for a, b in itertools.pairwise(files)) <= 4


def test_a_weight_with_gaps_has_the_gradients_of_a_dense_one(route: str) -> None:
    """PyTorch's own batch norm reads it wrongly in channels_last."""
    x = normal(B, C, H, W).contiguous(memory_format=torch.channels_last)
    upstream, weight, bias = torch.randn_like(x), normal(2 * C)[::2], normal(2 * C)[::2]

    def gradient(*vectors: torch.Tensor) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(nf.batch_norm_swish(leaf, *vectors, activation=None).y, leaf, upstream)[0]

    torch.testing.assert_close(gradient(weight, bias), gradient(weight.contiguous(), bias.contiguous()))


def test_given_statistics_are_differentiated_in_forward_mode(route: str) -> None:
    """PyTorch's own batch norm takes them for constants."""
    x, (weight, var, bias, _) = normal(B, C, H, W), PARAMETERS
    mean = normal(C)

    def formula(mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        column = [t[:, None, None] for t in (mean, var, weight, bias)]
        return (x - column[0]) / (column[1] + 1e-5).sqrt() * column[2] + column[3]

    def ours(mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return nf.batch_norm_swish(x, weight, bias, mean, var, activation=None).y

    tangents = normal(C), normal(C)
    for found, expected in zip(
        jvp(ours, (mean, var), tangents), jvp(formula, (mean, var), tangents), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_statistics_over_processes_refuse_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    from nvae_fast import distributed

    monkeypatch.setattr(distributed, "world_size", lambda group=None: 2)
    norm = nf.nn.BatchNormSwish(C).double().train()
    with pytest.raises(RuntimeError, match="batch_norm_swish: statistics over several processes"):
        jvp(norm, (normal(B, C, H, W),), (normal(B, C, H, W),))
