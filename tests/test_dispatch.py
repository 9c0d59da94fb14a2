"""What every operator has from define_op: where a call goes under functional transforms and forward-mode differentiation, and
which of its results carry gradients. A fused kernel cannot follow a transform; the formula can."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import nvae_fast as nf
from nvae_fast.ops.channel_statistics import channel_statistics
from nvae_fast.ops.elu import elu
from nvae_fast.ops.plane_affine import plane_affine

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGE = str(Path(nf.__file__).parent)
B, C, H, W = 2, 4, 3, 5


def positive(*size: int) -> torch.Tensor:
    return torch.rand(size, dtype=torch.float64) + 0.5


def normal(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.float64)


def first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


# Name -> (function of one map, the size of a sample of that map). What else it takes is the same for every sample.
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(5)
    PARAMETERS = [normal(C), positive(C), normal(C), positive(C)]
    LAYERS = (normal(2, C), 3 + positive(2), normal(C, 2), normal(C))  # the gate's hidden units are active
FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...]]] = {
    "residual_normal": (lambda x: sum(t.sum() for t in nf.residual_normal(x, 0.5 * x, seed=3)), (C, H, W)),
    "normal_sample": (lambda x: nf.normal_sample(x, seed=3), (C, H, W)),
    "normal_log_prob": (lambda x: nf.normal_log_prob(x[:, : C // 2], x), (C, H, W)),
    "mixture_logistic_log_prob": (
        lambda x: nf.mixture_logistic_log_prob(x, torch.full((x.shape[0], 3, 2, 2), 0.2).double(), num_mixtures=1),
        (10, 2, 2),
    ),
    "mixture_logistic_mean": (lambda x: nf.mixture_logistic_mean(x, num_mixtures=1), (10, 2, 2)),
    "depthwise_conv2d": (
        lambda x: nf.depthwise_conv2d(
            x, PARAMETERS[0].view(C, 1, 1, 1).expand(C, 1, 3, 3), scale=PARAMETERS[1], shift=PARAMETERS[2], activation="swish"
        ),
        (C, H, W),
    ),
    "batch_norm_swish": (lambda x: nf.batch_norm_swish(x, *PARAMETERS).y, (C, H, W)),
    "channel_statistics": (lambda x: sum(t.sum() for t in channel_statistics(x, True)[:2]), (C, H, W)),
    "elu": (elu, (C, H, W)),
    "plane_affine": (lambda x: plane_affine(x, PARAMETERS[0][None], x.square()), (C, H, W)),
    "squeeze_excite": (lambda x: nf.squeeze_excite(x, *LAYERS, skip=x, residual_scale=0.1), (C, H, W)),
    "weight_norm": (lambda x: nf.weight_norm(x, PARAMETERS[0][: x.shape[0]].view(-1, 1, 1, 1)), (C, 3, 3)),
    "weight_norm_many": (
        lambda x: nf.weight_norm_many([x, 2 * x], [PARAMETERS[0][: x.shape[0]].view(-1, 1, 1, 1)] * 2)[1],
        (C, 3, 3),
    ),
}  # fmt: skip


def forward_mode(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Without torch.func: dual numbers."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


TRANSFORMS: dict[str, Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor], torch.Tensor]] = {
    "grad": lambda f, x: grad(lambda t: f(t).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "dual numbers": forward_mode,
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "gradients of samples": lambda f, x: vmap(grad(lambda t: f(t[None]).sum()))(x),
    "hessian": lambda f, x: hessian(lambda t: f(torch.cat([t, x[:, :, :, 1:]], 3)).sum())(x[:, :, :, :1]),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_give_what_the_reference_gives(name: str, transform: str, route: str) -> None:
    function, size = FUNCTIONS[name]
    x = normal(B, *size)

    def of(t: torch.Tensor) -> torch.Tensor:
        return first(function(t))

    found = TRANSFORMS[transform](of, x)
    with nf.use_backend("reference"):
        expected = TRANSFORMS[transform](of, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert expected.count_nonzero() > 0 or name == "normal_sample"


# (PyTorch's own batch norm fails there.)
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "batch_norm_swish"])
def test_a_derivative_inside_a_compiled_function(name: str) -> None:
    function, size = FUNCTIONS[name]
    x = normal(B, *size)

    def derivative(t: torch.Tensor) -> torch.Tensor:
        return jvp(lambda s: first(function(s)), (t,), (torch.ones_like(t),))[1]

    torch._dynamo.reset()
    compiled = torch.compile(derivative, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), derivative(x), rtol=1e-9, atol=1e-9)


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
