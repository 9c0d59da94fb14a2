"""depthwise_conv2d: the backward operator with all it can fold in, every form of the C++ kernels against the
formula, masked taps, and every level of vector instructions."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import assert_close, assert_gradcheck, assert_opcheck, strided
from internals import DEFINITIONS

import nvae_fast as nf

ROOT = Path(__file__).parents[1]
FORWARD = torch.ops.nvae_fast.depthwise_conv2d
BACKWARD = torch.ops.nvae_fast.depthwise_conv2d_backward
CAUSAL = [*range(10), 10, 11, 12]  # 5x5, everything before the centre, and it

FORMS = [
    (stride, dilation, upsample)
    for stride, dilation, upsample in itertools.product((1, 2), repeat=3)
    if not (stride == 2 and upsample == 2)
]
SIZES = [(2, 17, 9, 13), (1, 35, 2, 3), (3, 3, 1, 1), (1, 16, 16, 5)]


def arguments(
    kernel: int,
    size: tuple[int, ...],
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.channels_last,
    form: tuple[int, int, int] = (1, 1, 1),
) -> dict[str, Any]:
    """Everything the backward operator takes as tensors."""
    generator = torch.Generator().manual_seed(sum(size) + kernel)
    b, c, h, w = size
    stride, _, upsample = form
    out = (b, c, *((n * upsample + stride - 1) // stride for n in (h, w)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    maps = {"grad": normal(*out), "out": normal(*out), "x": normal(*size)}
    vectors = {name: normal(c).to(wide) for name in ("alpha", "beta", "gamma", "pivot", "scale", "shift")}
    return {
        **{n: t.to(dtype).contiguous(memory_format=memory_format) for n, t in maps.items()},
        **vectors,
        "weight": normal(c, 1, kernel, kernel).to(dtype),
    }


def backward_of(operator: Any, t: dict[str, Any], options: tuple, wanted: tuple, folded: bool = True) -> Any:
    stride, dilation, upsample, activation, taps = options
    extra = [t[n] if folded else None for n in ("out", "alpha", "beta", "gamma", "pivot")]
    affine = (t["scale"], t["shift"]) if folded else (None, None)
    return operator(
        t["grad"], *extra, t["x"], t["weight"], *affine, stride, dilation, upsample, activation, taps, *wanted
    )


def widened(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() for name, value in t.items()}


# Of float32 sums, and of one rounding to 16 bits at worst, which half an eps bounds.
TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps / 2 + 3e-6,
    torch.float16: torch.finfo(torch.float16).eps / 2 + 3e-6,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9, 11])
def test_every_form(kernel: int, form: tuple, memory_format: torch.memory_format) -> None:
    """Values and gradients of the operators against the formula in float64."""
    cases = itertools.product(SIZES, TOLERANCES, (None, "swish", "elu"))
    for i, (size, dtype, activation) in enumerate(cases):
        if (
            i + kernel + form[1]
        ) % 3:  # a third of them for each form: all kinds meet, in a third of the time
            continue
        t = arguments(kernel, size, dtype, memory_format, form)
        wide, tolerance = widened(t), TOLERANCES[dtype]
        what = f"{size} {dtype} {activation}"
        y, mean, m2 = FORWARD(t["x"], t["weight"], t["scale"], t["shift"], *form, activation, True, None)
        expected, _, _ = DEFINITIONS["depthwise_conv2d"].formula(
            wide["x"], wide["weight"], wide["scale"], wide["shift"], *form, activation, True, None
        )
        assert_close(y, expected, tolerance, f"y {what}")
        # Statistics are of y as it is stored.
        var, middle = torch.var_mean(y.double(), (0, 2, 3), correction=0)
        floor = 1e-12 if dtype == torch.float64 else 1e-5
        assert_close(mean, middle, floor, f"mean {what}")
        assert_close(m2, var * (y.numel() / y.shape[1]), floor, f"M2 {what}")
        options, wanted = (*form, activation, None), (True, True, True)
        found = backward_of(BACKWARD, t, options, wanted)
        truth = backward_of(DEFINITIONS["depthwise_conv2d_backward"].formula, wide, options, wanted)
        for name, a, e in zip(
            ("grad_x", "grad_weight", "grad_scale", "grad_shift"), found, truth, strict=True
        ):
            floor = 2e-5 if name in ("grad_scale", "grad_shift") and dtype != torch.float64 else 0.0
            assert_close(a, e, max(tolerance, floor), f"{name} {what}")


@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3)))
@pytest.mark.parametrize("folded", [True, False])
def test_what_is_not_wanted_is_empty(wanted: tuple, folded: bool) -> None:
    t = arguments(5, (2, 19, 6, 7), torch.float32)
    options = (1, 1, 1, "swish", None)
    every = backward_of(BACKWARD, t, options, (True, True, True), folded)
    found = backward_of(BACKWARD, t, options, wanted, folded)
    for a, e, asked in zip(found, every, (*wanted, wanted[2]), strict=True):
        assert torch.equal(a, e) if asked else a.numel() == 0
    truth = backward_of(
        DEFINITIONS["depthwise_conv2d_backward"].formula, widened(t), options, (True, True, True), folded
    )
    for a, e in zip(every, truth, strict=True):
        assert_close(a, e, 3e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("taps", [CAUSAL, [24 - i for i in CAUSAL], [12], [0, 24], [7, 17]])
def test_masked_taps(taps: list[int], form: tuple, route: str) -> None:
    """Taps that do not exist are not read, not even when NaN stands there, and receive gradient zero."""
    t = arguments(5, (2, 18, 7, 6), torch.float64, form=form)
    dead = torch.ones(25, dtype=torch.bool)
    dead[taps] = False
    dead = dead.view(5, 5).expand(18, 1, 5, 5)
    clean, poisoned = t["weight"].masked_fill(dead, 0), t["weight"].masked_fill(dead, float("nan"))
    expected_leaves = [t["x"].clone().requires_grad_(), clean.requires_grad_()]
    leaves = [t["x"].clone().requires_grad_(), poisoned.requires_grad_()]
    stride, dilation, upsample = form
    options = {"stride": stride, "dilation": dilation, "upsample": upsample, "activation": "elu"}
    y = nf.depthwise_conv2d(*leaves, taps=taps, **options)
    with nf.use_backend("reference"):
        expected = nf.depthwise_conv2d(*expected_leaves, **options)
    assert_close(y, expected, 1e-13)
    gradients = torch.autograd.grad(y, leaves, t["grad"])
    truth = torch.autograd.grad(expected, expected_leaves, t["grad"])
    assert_close(gradients[0], truth[0], 1e-13)
    assert_close(gradients[1], truth[1].masked_fill(dead, 0), 1e-13)
    assert not gradients[1][dead].any()


@pytest.mark.parametrize("mirrored", [False, True])
def test_taps_of_the_autoregressive_transform(mirrored: bool) -> None:
    transform = nf.nn.AutoregressiveTransform(3, mirrored=mirrored)
    mask = nf.nn.causal_mask(18, 1, 5, strict=False, mirrored=mirrored)
    assert all(row.nonzero().flatten().tolist() == list(transform.spatial_taps) for row in mask.flatten(1))


@pytest.mark.parametrize(
    "taps, shown",
    [([], r"\[\]"), ([25], r"\[25\]"), ([-1], r"\[-1\]"), ([3, 3], r"\[3, 3\]"), ([1.0], r"\[1.0\]")],
)
def test_errors_of_taps(taps: list, shown: str, route: str) -> None:
    with pytest.raises(ValueError, match=f"^depthwise_conv2d: taps must be .* between 0 and 24.*got {shown}"):
        nf.depthwise_conv2d(torch.zeros(1, 2, 4, 4), torch.zeros(2, 1, 5, 5), taps=taps)


@pytest.mark.parametrize("form", [(1, 1, 1), (2, 1, 1), (1, 1, 2)])
def test_gradcheck_with_statistics_and_taps(form: tuple, route: str) -> None:
    stride, dilation, upsample = form
    t = arguments(3, (2, 2, 3, 4), torch.float64)
    names = ("x", "weight", "scale", "shift")

    def run(**leaves: torch.Tensor) -> Any:
        y, found = nf.depthwise_conv2d(
            **leaves, stride=stride, dilation=dilation, upsample=upsample, activation="swish", stats=True,
            taps=(0, 1, 4, 5),
        )  # fmt: skip
        return y, found.mean, found.m2

    assert_gradcheck(run, {name: t[name] for name in names}, names)


def test_statistics_alone_may_have_a_gradient(route: str) -> None:
    """No gradient arrives at y itself."""
    t = arguments(5, (3, 4, 6, 5), torch.float64)
    leaf = t["x"].clone().requires_grad_()
    _, found = nf.depthwise_conv2d(leaf, t["weight"], stats=True)
    (gradient,) = torch.autograd.grad((found.m2 * t["scale"]).sum() + found.mean.sum(), leaf)
    plain = t["x"].clone().requires_grad_()
    y = nf.depthwise_conv2d(plain, t["weight"])
    centred = y - y.mean((0, 2, 3), keepdim=True)
    total = (centred.square().sum((0, 2, 3)) * t["scale"]).sum() + y.mean((0, 2, 3)).sum()
    assert_close(gradient, torch.autograd.grad(total, plain)[0], 1e-12)


def test_opcheck_backward() -> None:
    t = arguments(5, (2, 3, 5, 4), torch.float32)
    assert_opcheck(
        "depthwise_conv2d_backward",
        *(t[n] for n in ("grad", "out", "alpha", "beta", "gamma", "pivot", "x", "weight", "scale", "shift")),
        1, 1, 1, "elu", CAUSAL, True, True, True,
    )  # fmt: skip


def test_layouts_may_differ() -> None:
    """x, grad and out each in its own layout, sliced or strided."""
    t = arguments(5, (2, 19, 6, 7), torch.float32, torch.contiguous_format)
    options, wanted = (1, 1, 1, "swish", None), (True, True, True)
    expected = backward_of(BACKWARD, t, options, wanted)
    forms = [
        lambda v: v.contiguous(memory_format=torch.channels_last),
        strided,
        lambda v: torch.cat((v, v), 1).contiguous(memory_format=torch.channels_last)[:, : v.shape[1]],
        lambda v: torch.cat((v, v), 3)[..., : v.shape[3]],
    ]
    for change in itertools.product(forms, repeat=2):
        changed = {**t, "x": change[0](t["x"]), "grad": change[1](t["grad"]), "out": change[0](t["out"])}
        for a, e in zip(backward_of(BACKWARD, changed, options, wanted), expected, strict=True):
            assert_close(a, e, 1e-6)


@pytest.mark.parametrize("size", [(3, 50, 40, 9), (1, 20, 100, 100)])
def test_threads_change_nothing(size: tuple) -> None:
    """The cut into tasks depends on shapes alone: equal bit for bit for any number of threads."""
    t = arguments(5, size, torch.float32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(
                (
                    *FORWARD(t["x"], t["weight"], t["scale"], t["shift"], 1, 1, 1, "swish", True, None),
                    *backward_of(BACKWARD, t, (1, 1, 1, "swish", None), (True, True, True)),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("offset", [100.0, -100.0])
def test_statistics_of_a_large_map_far_from_zero(offset: float, memory_format: torch.memory_format) -> None:
    """|mean| / std = 100, in several tasks whose parts are merged."""
    x = (torch.randn(2, 20, 128, 96) + offset).contiguous(memory_format=memory_format)
    weight = torch.zeros(20, 1, 5, 5)
    weight[:, 0, 2, 2] = torch.linspace(-2, 2, 20)
    _, found = nf.depthwise_conv2d(x, weight, stats=True)
    wide = x.double() * weight[:, 0, 2, 2].double()[:, None, None]
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    assert_close(found.mean, mean, 1e-6, "mean")
    assert_close(found.m2, var * found.count, 1e-5, "M2")


_CAPABILITY = """
import sys, torch
sys.path[:0] = [{tests!r}]
import nvae_fast as nf
from nvae_fast.ops import _extension
from test_depthwise_conv2d_kernels import BACKWARD, FORMS, FORWARD, arguments, backward_of
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for kernel, form in ((k, f) for k in (3, 5, 11) for f in FORMS):
            t = arguments(kernel, (1, 21, 7, 11), dtype, memory_format, form)
            found += FORWARD(t["x"], t["weight"], t["scale"], t["shift"], *form, "swish", True, None)
            found += backward_of(BACKWARD, t, (*form, "elu", None), (True, True, True))
torch.save(found, sys.argv[1])
print(_extension.info()["cpu_capability"])
"""


@pytest.mark.skipif(nf.backends()["depthwise_conv2d"]["cpu"] != "cpp", reason="needs the C++ extension")
def test_every_capability_gives_the_same(tmp_path: Path) -> None:
    results = {}
    for capability in ("baseline", "avx2", "avx512"):
        path = tmp_path / f"{capability}.pt"
        done = subprocess.run(
            [sys.executable, "-c", _CAPABILITY.format(tests=str(ROOT / "tests")), str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "NVAE_FAST_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        results.setdefault(done.stdout.strip(), torch.load(path))
    expected = results["baseline"]
    for capability, found in results.items():
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}[a.dtype]
            assert_close(a, e, tolerance, f"{capability}, result {i}")
