"""The Triton kernels of the mixture of logistics against the reference in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from harness import relative_error, strided
from internals import DEFINITIONS

import nvae_fast as nf
from nvae_fast.kernels import mixture_logistic as kernels

FORMATS = {"rows": torch.contiguous_format, "channels": torch.channels_last}
SEED = 2**40 + 12345


@dataclass(frozen=True)
class Case:
    """All kernels on one set of inputs."""

    size: tuple[int, int, int] = (2, 7, 9)
    layout: str = "rows"
    dtype: torch.dtype = torch.float32
    mixtures: int = 2
    bits: int = 8
    log_scale: float = -2.5
    temperature: float = 0.7
    change: str = ""
    wide: bool = False
    tolerance: float = 4.0  # in units of what the reference loses in the dtype


DEFAULT = Case()
CASES = [
    *(replace(DEFAULT, layout=layout, bits=bits) for layout in FORMATS for bits in (8, 5, 1)),
    *(replace(DEFAULT, layout=layout, dtype=torch.bfloat16) for layout in FORMATS),
    replace(DEFAULT, dtype=torch.float16, size=(3, 1, 1), mixtures=1),
    replace(DEFAULT, size=(1, 13, 11), mixtures=10),
    replace(DEFAULT, size=(1, 16, 16), log_scale=2.0),
    replace(DEFAULT, size=(1, 16, 16), log_scale=-6.0),
    # The smallest scales with few bits: a bin is up to a thousand scales wide.
    *(replace(DEFAULT, size=(1, 16, 16), log_scale=-5.0, bits=bits) for bits in (1, 2, 4)),
    *(
        replace(DEFAULT, change=change, layout=layout)
        for change in ("strided", "expanded")
        for layout in FORMATS
    ),
    replace(DEFAULT, wide=True),
    replace(DEFAULT, temperature=2.5, mixtures=5),
]


def inputs(case: Case, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """params, x and the gradient of the log-probability."""
    generator = torch.Generator().manual_seed(3)
    b, h, w = case.size
    m = case.mixtures
    params = torch.randn((b, 10 * m, h, w), generator=generator)
    params[:, m:].view(b, 3, 3, m, h, w)[:, :, 1] += case.log_scale
    params[:, m:].view(b, 3, 3, m, h, w)[:, :, 0] *= 0.5
    x = torch.randint(0, 2**case.bits, (b, 3, h, w), generator=generator).float() / (2**case.bits - 1)
    x.view(-1)[::5], x.view(-1)[1::7] = 0.0, 1.0
    grad = torch.randn((b, h, w), generator=generator)
    params, x = (t.to(case.dtype).contiguous(memory_format=FORMATS[case.layout]) for t in (params, x))
    if case.change == "strided":
        params, x, grad = strided(params), strided(x), strided(grad)
    elif case.change == "expanded":
        params, grad = params[:1].expand_as(params), grad[:1, :1, :1].expand_as(grad)
    return tuple(t.to(dtype or t.dtype) for t in (params, x, grad))


def compute(case: Case, functions: Any, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    params, x, grad = inputs(case, dtype)
    seed = torch.tensor(SEED)
    log_prob, backward, sample, mean = functions
    return {
        "log_prob": log_prob(params, x, case.mixtures, case.bits),
        "gradient": backward(grad, params, x, case.mixtures, case.bits),
        "sample": sample(params, seed, case.mixtures, case.temperature),
        "mean": mean(params, case.mixtures),
    }


NAMES = ("log_prob", "log_prob_backward", "sample", "mean")
OPERATORS = [DEFINITIONS[f"mixture_logistic_{name}"] for name in NAMES]
REFERENCES = tuple(operator.formula for operator in OPERATORS)


KERNELS = tuple(operator.launch for operator in OPERATORS)

HARD = torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4, 88.0, -9.0, 9.0, -1e30, float("nan")])


def hard(functions: Any) -> dict[str, torch.Tensor]:
    """Every triple of extreme values for the means, log-scales and coefficients of one component, at three pixels."""
    grid = HARD[torch.tensor(list(itertools.product(range(len(HARD)), repeat=3)))]
    params = torch.zeros(len(grid), 10, 1, 3)
    params[:, 1:] = grid[:, None, :, None].expand(-1, 3, -1, 3).reshape(-1, 9, 1, 3)
    x = torch.tensor([0.0, 0.4, 1.0]).expand(len(grid), 3, 1, 3)
    log_prob, backward, sample, mean = functions
    return {
        "log_prob": log_prob(params, x, 1, 8),
        "gradient": backward(torch.ones(len(grid), 1, 3), params, x, 1, 8),
        "mean": mean(params, 1),
        "sample": sample(params, torch.tensor(SEED), 1, 1.0),
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their dtypes and strides too."""
    if case.wide:
        monkeypatch.setattr(kernels, "_INT32_LIMIT", 0)
    found = compute(case, KERNELS)
    with nf.use_backend("reference"):
        truth = compute(case, REFERENCES, torch.float64)
        native = compute(case, REFERENCES)
        fakes = compute(case, [operator.fake for operator in OPERATORS]).values()
    for (name, expected), like in zip(truth.items(), fakes, strict=True):
        assert (found[name].dtype, found[name].stride()) == (like.dtype, like.stride()), name
        unavoidable = relative_error(expected.to(like.dtype), expected)
        lost = relative_error(native[name], expected)
        bound = case.tolerance * max(lost, unavoidable, torch.finfo(torch.float32).eps)
        error = relative_error(found[name], expected)
        assert error <= bound, f"{name}: relative error {error:.3g} exceeds {bound:.3g}"


def test_extremes() -> None:
    """NaN where the reference has NaN, and the same numbers elsewhere. Where the log-probability is NaN, so are gradients,
    but a log-scale's below the clamp is 0 there for the reference."""
    with nf.use_backend("reference"):
        expected = hard(REFERENCES)
    lost = expected["log_prob"].isnan()[:, None]
    for name, actual in hard(KERNELS).items():
        value = expected[name]
        if name == "gradient":
            assert actual[lost.expand_as(actual)].isnan().all()
            actual, value = actual.masked_fill(lost, 0.0), value.masked_fill(lost, 0.0)
        # A unit in the last place of tanh, times the largest inverse scale.
        atol = 2e-6 * (1097 if name == "gradient" else 1)
        torch.testing.assert_close(
            actual, value, rtol=2e-5, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_float64_is_the_references() -> None:
    case = replace(DEFAULT, size=(1, 2, 3))
    expected = compute(case, REFERENCES, torch.float64)
    for name, value in compute(case, KERNELS, torch.float64).items():
        assert torch.equal(value, expected[name])
    direct = [getattr(kernels, f"mixture_logistic_{name}") for name in NAMES]
    with pytest.raises(TypeError, match=r"the GPU kernel computes in float32; .*got torch\.float64"):
        compute(case, direct, torch.float64)


def test_empty() -> None:
    for size in ((0, 3, 4), (2, 0, 4)):
        case = replace(DEFAULT, size=size)
        expected = {name: value.shape for name, value in compute(case, KERNELS).items()}
        assert list(expected.values()) == [
            size,
            (size[0], 20, *size[1:]),
            (size[0], 3, *size[1:]),
            (size[0], 3, *size[1:]),
        ]
