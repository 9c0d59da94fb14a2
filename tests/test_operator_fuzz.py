"""C++ operators given anything: random calls, wrong shapes and lengths, more memory than there is."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sanitize import fuzz
from torch import Tensor

import nvae_fast as nf
from nvae_fast.ops import _extension, _memory

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not _extension.load(), reason=str(_extension.reason())),
]
OPS = torch.ops.nvae_fast
z = torch.zeros


@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_calls_agree_with_the_formulas_or_raise(first: int) -> None:
    problems: list[str] = []
    counts = fuzz.fuzz(100, seed=1, first=first, report=problems.append)
    assert not problems, "\n".join(problems)
    assert counts["ran"] >= 50


def test_every_operator_with_a_kernel_is_called() -> None:
    for name in fuzz.operators():
        assert fuzz.run(name, 2, 0) == ("ran", None)


def test_a_wrong_result_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = OPS.elu.default
    monkeypatch.setattr(OPS, "elu", lambda x: kernel(x) * 1.1)
    problems = [fuzz.run("elu", 0, number)[1] for number in range(0, 20, 2)]
    assert any(problem is not None and "error" in problem for problem in problems)


# Each call indexes outside of the argument that the message names, unless that is checked.
SMALL = z(2, 24)
WRONG: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (OPS.gate_coefficients, (SMALL, None, None, z(6, 24), z(0), z(24, 6), z(24), 1.0), r"b1 must have shape \(6,\)"),
    (OPS.gate_coefficients, (SMALL, None, None, z(6, 24), z(6), z(24, 5), z(24), 1.0), "w2 must have shape"),
    (OPS.gate_coefficients, (SMALL, z(24), None, z(6, 24), z(6), z(24, 6), z(24), 1.0), "scale and shift must be given"),
    (OPS.gate_coefficients, (SMALL, None, None, z(6, 24).double(), z(6), z(24, 6), z(24), 1.0), "w1 must be Float"),
    (OPS.gate_coefficients, (z(24), None, None, z(6, 24), z(6), z(24, 6), z(24), 1.0), "mean must have two dimensions"),
    (
        OPS.gate_gradients,
        (SMALL, SMALL, *[None] * 5, SMALL, z(2, 6), z(1, 24), z(6, 24), z(24, 6), 1.0),
        r"gate must have shape \(2, 24\), got \(1, 24\)",
    ),
    (
        OPS.gate_gradients,
        (SMALL, SMALL, None, None, z(24), None, None, SMALL, z(2, 6), SMALL, z(6, 24), z(24, 6), 1.0),
        "plane_mean, mean, rstd, weight and bias must be given together",
    ),
    (OPS.batch_norm_coefficients, (z(3), z(9), None, None, 2.0, 1e-3), r"mean must have shape \(9,\), got \(3,\)"),
    (OPS.batch_norm_corrections, (z(9), z(9), None, z(9), z(1), 2.0), r"scale must have shape \(9,\), got \(1,\)"),
    (
        OPS.squeeze_excite_gradients,
        (z(2, 24, 3, 3), z(2, 24, 3, 3), z(2, 23), z(6, 24), z(6), z(24, 6), z(24), 1.0),
        r"pooled must have shape \(2, 24\), got \(2, 23\)",
    ),
    (
        OPS.squeeze_excite_gradients,
        (z(2, 24, 3, 4), z(2, 24, 3, 3), SMALL, z(6, 24), z(6), z(24, 6), z(24), 1.0),
        r"grad must have",
    ),
    (OPS.plane_affine_gradients, (z(2, 24, 3, 3), z(2, 24, 3, 3), z(3, 24)), r"a must have shape \(B, C\)"),
    (OPS.plane_affine_gradients, (z(2, 24, 3, 3), z(2, 24, 3, 4), SMALL), "x must have"),
    (OPS.merge_planes, (z(4, 9), z(2, 9), 4), r"m2 must have shape \(4, 9\), got \(2, 9\)"),
    (OPS.merge_planes, (z(4), z(4), 4), "mean must have two dimensions"),
    (
        OPS.squeeze_excite,
        (z(2, 24, 4, 4), z(6, 24), z(0), z(24, 6), z(24), None, 1.0),
        r"reduce_bias must have shape \(6,\), got \(0,\)",
    ),
    (OPS.squeeze_excite, (z(2, 24, 4, 4), z(24), z(6), z(24, 6), z(24), None, 1.0), "reduce_weight must have shape"),
    (OPS.squeeze_excite, (z(1, 2, 4, 4), z(1, 2), z(1), z(2, 1), z(2), z(1, 2, 1, 1), 1.0), "skip must have the shape of x"),
    (
        OPS.residual_normal_backward,
        (None, z(1, 1), None, None, z(2, 8, 4, 4), None, z(2, 4, 4, 4), None, True, 5.0, 0.0, True, False, False),
        r"grad_kl must have shape \(2, 4\), got \(1, 1\)",
    ),
    (OPS.residual_normal, (z(2, 8, 4, 4), None, z(2, 4, 4, 3), None, True, 5.0, 0.0), "noise must have shape"),
    (OPS.normal_log_prob_backward, (z(1, 4), z(2, 4, 4, 4), None, 5.0, 0.0, True, False), "grad must have shape"),
    (OPS.spectral_gradients, (torch.tensor(1.0), [z(3, 4)], [z(1, 3)], [z(1, 2)]), r"v\[0\] must have shape \(1, 4\)"),
    (OPS.spectral_gradients, (torch.tensor(1.0), [z(3, 4)], [z(1, 3)], []), "v must have 1 entries"),
    (OPS.spectral_lengths, ([z(3, 4).double()], [z(1, 3)], 1, 1e-6), r"u\[0\] must be contiguous"),
    (OPS.spectral_lengths, ([z(3, 4), z(3, 5)], [z(2, 3)], 1, 1e-6), r"weights\[1\] must be Float with 3 rows and 4 columns"),
    (OPS.weight_norm_many, ([z(2, 1, 1, 1)], [], [None], 1e-5, None), "log_weight_norms must have 1 entries"),
    (
        OPS.weight_norm_many_backward,
        ([z(4, 1, 3, 3), z(1, 4, 3, 3)], [z(4, 1, 3, 3)] * 2, [z(4, 1, 1, 1)] * 2, [None] * 2, 1e-5, True, True),
        r"grads\[1\] must have shape \(4, 1, 3, 3\), got \(1, 4, 3, 3\)",
    ),
    (OPS.adamax, ([z(4)], [z(3)], [z(4)], [z(4)], 0.1, 0.9, 0.9, 1e-3, 0.0), "grads must be float32, of the parameter's shape"),
    (OPS.mixture_logistic_log_prob, (z(1, 20, 2, 2), z(1, 3, 2, 1), 2, 8), "x must have shape"),
    (OPS.mixture_logistic_mean, (z(1, 20, 2, 2), 2**62), "params must have shape"),
    (OPS.depthwise_conv2d, (z(1, 2, 4, 4), z(2, 1, 3, 3), None, None, 1, 1, 1, None, False, [9]), "taps must be in"),
    (
        OPS.depthwise_conv2d_backward,
        (z(1, 2, 4, 3), *[None] * 5, z(1, 2, 4, 4), z(2, 1, 3, 3), None, None, 1, 1, 1, None, None, True, True, False),
        r"grad must have shape \(1, 2, 4, 4\), got \(1, 2, 4, 3\)",
    ),
    (OPS.plane_affine, (z(2, 3, 2, 2), z(3, 3), None, None, None), "a must have shape"),
    (OPS.philox_normal, ([3, -1], torch.tensor(0), torch.float32, False), "size must have no negative extent"),
]  # fmt: skip


@pytest.mark.parametrize("op, args, message", WRONG, ids=[f"{i}-{case[0]}" for i, case in enumerate(WRONG)])
def test_wrong_arguments_are_named(op: Any, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        op(*args)
    assert str(caught.value).startswith(op.__name__.split(".")[-1] + ": ")


# ---------------------------------------------------------------------------------- memory


def test_out_of_memory_names_operator_size_and_device() -> None:
    with pytest.raises(
        torch.OutOfMemoryError, match=r"^philox_normal: out of memory: could not allocate 4\.4 TB on cpu$"
    ):
        nf.philox_normal((2**40,), 0)
    with pytest.raises(RuntimeError, match=r"philox_normal: out of memory: could not allocate 73\.8 EB"):
        nf.philox_normal((2**62, 4), 0)  # more bytes than an int64 counts
    many = z(1).expand(2**15, 2, 2**10, 2**10)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"^residual_normal: out of memory: could not allocate 274\.9 GB"
    ):
        nf.residual_normal(many, seed=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"^residual_normal: out of memory"):
        nf.residual_normal(many.detach().requires_grad_(), seed=0)
    with pytest.raises(
        RuntimeError, match=r"^channel_statistics: out of memory: could not allocate 137\.4 GB on cpu$"
    ):
        OPS.channel_statistics(many[:, :1], False)


def test_out_of_memory_on_a_gpu_is_the_class_of_pytorch() -> None:
    error = RuntimeError("residual_normal_backward: CUDA out of memory. could not allocate 1.0 GB on cuda:0")

    def fail(*args: Any) -> Tensor:
        raise error

    with pytest.raises(torch.cuda.OutOfMemoryError, match=re.escape(str(error))):
        _memory.translated(fail)()
    with pytest.raises(ValueError, match="other"):
        _memory.translated(lambda: (_ for _ in ()).throw(ValueError("other: out of memory")))()
