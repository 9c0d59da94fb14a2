"""The fused kernels of the mixture of logistics: every vector width, size and layout, accuracy in every decade of the
likelihood, the numbers of the stream, and that the model goes through them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import assert_close, evaluate, relative_error, strided
from internals import DEFINITIONS, needs_extension
from torch.utils._python_dispatch import TorchDispatchMode

import nvae_fast as nf
from nvae_fast.models.likelihoods import MixtureLogistic

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def inputs(
    size: tuple[int, int, int], mixtures: int = 3, bits: int = 8, log_scale: float = -2.5
) -> dict[str, torch.Tensor]:
    """float64."""
    b, h, w = size
    generator = torch.Generator().manual_seed(h * w + mixtures)
    params = torch.randn((b, 10 * mixtures, h, w), generator=generator, dtype=torch.float64)
    params[:, mixtures:].view(b, 3, 3, mixtures, h, w)[:, :, 1] += log_scale
    params[:, mixtures:].view(b, 3, 3, mixtures, h, w)[:, :, 0] *= 0.5
    x = torch.randint(0, 2**bits, (b, 3, h, w), generator=generator).double() / (2**bits - 1)
    x.view(-1)[::5], x.view(-1)[1::7] = 0.0, 1.0
    return {"params": params, "x": x}


def everything(
    params: torch.Tensor, x: torch.Tensor, mixtures: int = 3, bits: int = 8
) -> tuple[torch.Tensor, ...]:
    """log_prob, which the gradients are of, mean and a sample."""
    return (
        nf.mixture_logistic_log_prob(params, x, num_mixtures=mixtures, num_bits=bits),
        nf.mixture_logistic_mean(params.detach(), num_mixtures=mixtures),
        nf.mixture_logistic_sample(params, num_mixtures=mixtures, temperature=0.8, seed=2**40 + 3),
    )


def truth(params: torch.Tensor, x: torch.Tensor, mixtures: int = 3, bits: int = 8) -> dict[str, torch.Tensor]:
    """The reference in float64. Samples are compared to those of the dtype itself."""
    with nf.use_backend("reference"):
        wide = {"params": params.double(), "x": x.double()}
        return evaluate(lambda **t: everything(**t, mixtures=mixtures, bits=bits), wide, ("params",))


# Tolerances of values and gradients that float32 arithmetic and one rounding to the dtype keep.
ROUNDING = {torch.float32: 4e-6, torch.float64: 1e-12, torch.bfloat16: 4e-3, torch.float16: 6e-4}


@pytest.mark.parametrize("mixtures", [1, 2, 7, 10, 17])
@pytest.mark.parametrize("pixels", [(1, 1), (1, 3), (2, 4), (3, 5), (1, 16), (1, 17), (3, 43), (16, 17)])
def test_any_size_in_any_layout(mixtures: int, pixels: tuple[int, int], device: torch.device) -> None:
    """Tails of vectors, of spans and of blocks of channels."""
    wide = inputs((2, *pixels), mixtures)
    for dtype in ROUNDING:
        if device.type == "cuda" and dtype == torch.float64:
            continue
        narrow = {name: t.to(device, dtype) for name, t in wide.items()}
        expected = truth(**{name: t.cpu() for name, t in narrow.items()}, mixtures=mixtures)
        for layout in LAYOUTS:
            placed = {name: t.contiguous(memory_format=layout) for name, t in narrow.items()}
            found = evaluate(lambda **t: everything(**t, mixtures=mixtures), placed, ("params",))
            if "reference" not in nf.backends()["mixture_logistic_log_prob"][device.type]:
                assert found["grad params"].is_contiguous(memory_format=layout)
            for name, value in expected.items():
                assert_close(found[name], value, 2 * ROUNDING[dtype], f"{name} {dtype} {layout}")


def test_inputs_may_differ_in_layout_and_dtype(device: torch.device) -> None:
    t = {name: value.to(device, torch.float32) for name, value in inputs((2, 5, 7)).items()}
    t["params"] = t["params"].bfloat16()
    expected = evaluate(everything, {**t, "params": t["params"].float()}, ("params",))
    last = t["x"].contiguous(memory_format=torch.channels_last)
    for x in (t["x"], last, strided(t["x"]), t["x"].double()):
        for params in (t["params"], t["params"].contiguous(memory_format=torch.channels_last)):
            found = evaluate(everything, {"params": params, "x": x}, ("params",))
            assert_close(found["output 0"], expected["output 0"], 4e-6)
            assert_close(found["grad params"], expected["grad params"], 4e-3)
    wide = torch.randn(3, 40, 6, 9, device=device)
    part = wide[1:, 5:35, :, 1:8]
    x = torch.rand(2, 3, 6, 7, device=device)
    for a, e in zip(everything(part, x), everything(part.contiguous(), x), strict=True):
        assert torch.equal(a, e)


def test_a_pixel_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    """Layout, place in the vector and threads leave every bit of it alone."""
    t = {name: value.to(device, torch.float32) for name, value in inputs((3, 9, 31)).items()}
    whole = evaluate(everything, t, ("params",))
    last = {name: value.contiguous(memory_format=torch.channels_last) for name, value in t.items()}
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for again in (evaluate(everything, t, ("params",)), evaluate(everything, last, ("params",))):
                for name, value in whole.items():
                    assert torch.equal(again[name], value), name
    finally:
        torch.set_num_threads(threads)
    log_prob = nf.mixture_logistic_log_prob(
        t["params"][1:2, :, 3:4, 5:22], t["x"][1:2, :, 3:4, 5:22], num_mixtures=3
    )
    assert torch.equal(log_prob, whole["output 0"][1:2, 3:4, 5:22])


@pytest.mark.parametrize("bits", [8, 5, 2, 1])
def test_as_accurate_as_the_reference_in_every_decade(bits: int, device: torch.device) -> None:
    """One component; every pixel, means inside and far outside, scales from the clamp on. The errors of probabilities near
    1 (log P near 0) count relative to log P like all others."""
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(4)
    n = 60_000
    params = torch.zeros(n, 10, 1, 1)
    colours = params[:, 1:].view(n, 3, 3)
    colours[:, :, 0] = torch.rand((n, 1), generator=generator) * 4 - 2
    colours[:, :, 1] = torch.rand((n, 1), generator=generator) * 10 - 8
    x = (torch.randint(0, 2**bits, (n, 1, 1, 1), generator=generator) / levels).expand(n, 3, 1, 1)
    x = x.float().contiguous()
    x[::4], x[1::4] = 0.0, 1.0  # where probabilities near 1 are

    def run(p: torch.Tensor, value: torch.Tensor) -> dict[str, torch.Tensor]:
        function = lambda params: nf.mixture_logistic_log_prob(  # noqa: E731
            params, value, num_mixtures=1, num_bits=bits
        )
        return {k: v.cpu().double() for k, v in evaluate(function, {"params": p}, ("params",)).items()}

    found = run(params.to(device), x.to(device))
    with nf.use_backend("reference"):
        native, expected = run(params, x), run(params.double(), x.double())
    exact = expected["output 0"].flatten()
    # On the threshold between the difference and the density, rounding decides.
    same = ((native["output 0"] - expected["output 0"]).abs() < 1e-3).flatten()
    same &= ((found["output 0"] - expected["output 0"]).abs() < 1e-3).flatten() | (exact.abs() > 100)
    assert same.double().mean() > 0.999
    for decade in range(-8, 4):
        chosen = same & (exact.abs() >= 10.0**decade) & (exact.abs() < 10.0 ** (decade + 1))
        if chosen.sum() < 200:
            continue
        for name in expected:
            lost = relative_error(native[name][chosen], expected[name][chosen])
            # exp(|m| - d) is a quotient of two exponentials here, of one rounded number there; both are far from 1 where a
            # bin is many scales wide, which is usual with one bit.
            bound = (6 if bits == 1 else 3) * max(lost, torch.finfo(torch.float32).eps)
            assert_close(found[name][chosen], expected[name][chosen], bound, f"{name}, 1e{decade}")


def test_logits_of_any_size(device: torch.device) -> None:
    """Only their differences count: none of the digits of log P is lost to logits of 1e4."""
    t = {name: value.to(device, torch.float32) for name, value in inputs((2, 6, 7)).items()}
    raised = t["params"].clone()
    raised[:, :3] = (raised[:, :3] * 64).round() / 64
    base = nf.mixture_logistic_log_prob(raised, t["x"], num_mixtures=3)
    raised[:, :3] += 2.0**13
    assert torch.equal(nf.mixture_logistic_log_prob(raised, t["x"], num_mixtures=3), base)
    raised[:, 0] = -torch.inf  # a component that is not there
    out = evaluate(
        lambda params: nf.mixture_logistic_log_prob(params, t["x"], num_mixtures=3),
        {"params": raised},
        ("params",),
    )
    assert torch.isfinite(out["output 0"]).all()
    assert not out["grad params"][:, 0].any()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("size", [(4, 32, 32), (3, 5, 7), (70, 1, 1), (1, 1, 130), (2, 3, 43)])
def test_samples_are_the_references_numbers(
    size: tuple[int, int, int], temperature: float, device: torch.device
) -> None:
    """The same words, hence the same components, and noise to a few units in the last place."""
    for dtype in (torch.float32, torch.float64):
        params = inputs(size, 10)["params"].to(device, dtype)
        for layout in LAYOUTS:
            placed = params.contiguous(memory_format=layout)
            for seed in (0, -5, 2**62 + 11):
                actual = nf.mixture_logistic_sample(placed, temperature=temperature, seed=seed)
                with nf.use_backend("reference"):
                    expected = nf.mixture_logistic_sample(params, temperature=temperature, seed=seed)
                assert (actual - expected).abs().max() <= (2e-6 if dtype == torch.float32 else 1e-13)


def test_argmax_takes_nan_and_the_first_of_equals(route: str, device: torch.device) -> None:
    params = torch.zeros(1, 30, 2, 2, device=device)
    params[:, 3:6] = torch.tensor([-0.5, 0.0, 0.5], device=device)[:, None, None]
    params[:, 6:9] = -30.0
    params[:, 1] = float("nan")
    x = nf.mixture_logistic_sample(params, num_mixtures=3, seed=1)
    assert (x[:, 0] - 0.5).abs().max() < 0.01, "the component whose logit is NaN"
    params[:, 0] = float("nan")
    x = nf.mixture_logistic_sample(params, num_mixtures=3, seed=1)
    assert (x[:, 0] - 0.25).abs().max() < 0.01, "the first of two"


_CAPABILITY = """
import sys, numpy as np, torch
sys.path.insert(0, "tests")
from test_mixture_logistic_kernels import everything, inputs
from harness import evaluate
from nvae_fast.ops import _extension
found = {}
for bits in (8, 5, 1):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for layout in (torch.contiguous_format, torch.channels_last):
            t = {k: v.to(dtype).contiguous(memory_format=layout) for k, v in inputs((2, 5, 29), 3, bits).items()}
            got = evaluate(lambda **t: everything(**t, bits=bits), t, ("params",))
            found |= {f"{bits} {dtype} {layout} {k}": v.double().contiguous().numpy() for k, v in got.items()}
np.savez(sys.argv[1], **found)
print(_extension.info()["cpu_capability"])
"""


@needs_extension
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_capability(capability: str, tmp_path: Path) -> None:
    path = tmp_path / "found.npz"
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "NVAE_FAST_CPU_CAPABILITY": capability,
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", _CAPABILITY, str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() != capability:
        pytest.skip(f"this processor has no {capability}")
    found = dict(np.load(path))
    for bits in (8, 5, 1):
        for dtype, tolerance in ROUNDING.items():
            t = {name: value.to(dtype) for name, value in inputs((2, 5, 29), 3, bits).items()}
            expected = truth(**t, bits=bits)
            for layout in LAYOUTS:
                for name, value in expected.items():
                    key = f"{bits} {dtype} {layout} {name}"
                    assert_close(torch.from_numpy(found.pop(key)), value, 2 * tolerance, key)
    assert not found


class Calls(TorchDispatchMode):
    """The names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_the_model_goes_through_the_kernels(device: torch.device) -> None:
    """One operator forward, one backward, one to sample and one for the mean; nothing waits for the device."""
    if "reference" in nf.backends()["mixture_logistic_log_prob"][device.type]:
        pytest.skip("no fused kernel")
    params = torch.randn(2, 100, 4, 4, device=device, requires_grad=True)
    likelihood = MixtureLogistic(params, 10, 8)
    x, seed = torch.rand(2, 3, 4, 4, device=device), torch.tensor(3, device=device)
    with Calls() as calls:
        likelihood.log_prob(x).sum().backward()
        likelihood.sample(0.7, seed)
        likelihood.mean()
    ours = [name for name in calls.names if name.startswith("nvae_fast")]
    assert [name.removeprefix("nvae_fast.mixture_logistic_").removesuffix(".default") for name in ours] == [
        "log_prob",
        "log_prob_backward",
        "sample",
        "mean",
    ]
    assert not [
        name for name in calls.names if "item" in name or "_local_scalar" in name or "nonzero" in name
    ]
    assert len(calls.names) <= 12, calls.names


def test_backward_formula_is_the_gradient() -> None:
    """The plain form of the backward operator against autograd through the reference."""
    for bits in (8, 5, 1):
        t = inputs((2, 9, 11), bits=bits)
        expected = truth(**t, bits=bits)["grad params"]
        grad = torch.ones(2, 9, 11, dtype=torch.float64)
        backward = DEFINITIONS["mixture_logistic_log_prob_backward"].formula
        found = backward(grad, t["params"], t["x"], 3, bits)
        with nf.use_backend("reference"):
            leaf = t["params"].clone().requires_grad_()
            out = nf.mixture_logistic_log_prob(leaf, t["x"], num_mixtures=3, num_bits=bits)
            (expected,) = torch.autograd.grad(out.sum(), leaf)
        assert_close(found, expected, 1e-12)


def test_absent_gradients_cost_nothing(device: torch.device) -> None:
    """Without a gradient that is asked for, the backward operator is not called."""
    t = {name: value.to(device, torch.float32) for name, value in inputs((1, 2, 3)).items()}
    with Calls() as calls, torch.no_grad():
        everything(t["params"].requires_grad_(), t["x"])
    assert not [name for name in calls.names if "backward" in name]
