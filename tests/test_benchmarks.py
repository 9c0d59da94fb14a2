"""The benchmarks: every operator module has a case; providers, timing and whole models."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from benchmark_runs import CASES, CPU, tiny_run
from internals import set_kernel

import nvae_fast as nf
from benchmarks import model, run
from benchmarks.case import modules, select
from benchmarks.providers import Random, candidates, time_limit
from benchmarks.timing import CpuClock, Series, interleave, median_ratio, take_turns

OPS_FOLDER = Path(nf.__file__).parent / "ops"


def test_every_operator_module_has_a_case_and_every_op_is_measured():
    public = {path.stem for path in OPS_FOLDER.glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    public -= {
        "adamax",
        "affine_activation",
        "spectral_norm",
        "sync_batch_norm_swish",
        "wide_conv2d",
        "winograd",
    }  # measured in their callers
    assert set(modules()) == public
    assert {case.op for case in CASES.values()} == set(nf.backends())
    assert {case.module for case in CASES.values()} == public


@pytest.mark.parametrize("name", sorted(CASES))
def test_inputs_are_the_same_every_time_and_shapes_fit_their_axes(name: str):
    case = CASES[name]
    for shapes in case.shapes.values():
        assert shapes
        assert all(len(shape) == len(case.axes) for shape in shapes)
    shape = case.shapes["tiny"][0]
    one, two = (case.inputs(shape, Random(3)) for _ in range(2))
    for key, value in one.items():
        assert torch.equal(value, two[key]) if isinstance(value, torch.Tensor) else value == two[key]
    assert set(case.differentiable) <= set(one)
    assert set(case.work(shape, 4)) == ({"forward", "backward"} if case.differentiable else {"forward"})


def test_our_row_is_absent_with_the_reason_when_no_kernel_is_there(monkeypatch: pytest.MonkeyPatch):
    case = CASES["residual_normal"]
    set_kernel(monkeypatch, "residual_normal", None, reason="no compiler here")
    found = candidates(case, case.shapes["tiny"][0], CPU, compile_reason="no")
    ours = [candidate for candidate in found if candidate.provider == "nvae_fast"]
    assert len(ours) == 2
    assert all(candidate.run is None and candidate.reason == "no compiler here" for candidate in ours)
    set_kernel(monkeypatch, "residual_normal", "cpp")
    found = candidates(case, case.shapes["tiny"][0], CPU, compile_reason="no")
    ours = [candidate for candidate in found if candidate.provider == "nvae_fast"]
    assert all(candidate.run is not None and candidate.backend == "auto" for candidate in ours)


def test_selecting_cases_by_module_and_by_name():
    known = run.available()
    assert select([], known) == list(known)
    assert select(["mixture_logistic"], known) == [n for n in known if n.startswith("mixture_logistic_")]
    assert select(["sampling"], known) == ["sampling"]
    with pytest.raises(ValueError, match=r"no such case: nonsense; there are: .*residual_normal"):
        select(["nonsense"], known)


def test_providers_take_turns():
    order: list[str] = []

    def sample(name: str):
        def take(clock):
            clock.start()
            order.append(name)
            clock.lap("forward")

        return take

    times, failures = interleave(
        {name: sample(name) for name in "abc"}, CpuClock(), seconds=0, warmup=1, min_rounds=3
    )
    assert "".join(order) == "abc" * 4
    assert not failures
    assert all(len(times[name]["forward"].seconds) == 3 for name in "abc")


def test_a_provider_that_breaks_while_timed_is_dropped():
    def breaks(clock):
        raise RuntimeError("out of something")

    times, failures = interleave({"a": breaks, "b": lambda clock: clock.start()}, CpuClock(), seconds=0)
    assert failures == {"a": "RuntimeError: out of something"}
    assert set(times) == {"b"}


def test_summary_of_a_series():
    summary = Series([0.004, 0.001, 0.003, 0.002, 0.005]).summary()
    assert summary == pytest.approx(
        {"median_ms": 3, "lower_quartile_ms": 2, "upper_quartile_ms": 4, "min_ms": 1, "samples": 5}
    )
    assert Series([0.002]).summary()["upper_quartile_ms"] == pytest.approx(2)


def test_ratios_of_rounds():
    """A slow phase takes both of a round; the interval is that of the sign test."""
    slow = [1.0] * 20 + [3.0] * 5
    ratios = [1.5 + 0.01 * (i - 12) for i in range(25)]
    found = median_ratio(Series([x * r for x, r in zip(slow, ratios, strict=True)]), Series(slow))
    assert found == pytest.approx((1.5, ratios[7], ratios[17]))
    assert median_ratio(Series([3.0]), Series([2.0])) == (1.5, 1.5, 1.5)


def test_runs_take_turns():
    order: list[str] = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 4  # the first round warms up
    assert [len(times[name].seconds) for name in "ab"] == [3, 3]
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        take_turns({"a": lambda: 1 / 0}, 1)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals arrive in the main thread"
)
def test_a_time_limit_interrupts_even_what_wraps_errors():
    def count():
        deadline = time.monotonic() + 5
        with time_limit(0.05, "counting"):
            while time.monotonic() < deadline:
                pass

    def wrap():
        with time_limit(0.05, "counting"):
            try:
                time.sleep(5)
            except TimeoutError as error:
                raise RuntimeError("the compiler gave up") from error

    with pytest.raises(TimeoutError, match="counting took more than 0 s"):
        wrap()
    with pytest.raises(TimeoutError, match="counting took more than 0 s"):
        count()


def test_whole_steps_and_sampling_pass_their_gate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "MEMORY_FORMATS", {"contiguous": torch.contiguous_format})
    rows = tiny_run(list(model.CASES))["rows"]
    assert not [row["reason"] for row in rows if row["status"] == "failed"]
    timed = {(row["case"], row["provider"]) for row in rows if row["status"] == "ok"}
    for case, lap in model._LAPS.items():
        assert {(case, "reference"), (case, "library")} <= timed
        row = next(row for row in rows if row["case"] == case and row["provider"] == "reference")
        assert row["passes"][lap]["images_per_s"] > 0
        assert row["operator_calls"] > 100
        assert row["peak_bytes"] > 0


def test_a_wrong_model_turns_its_gate_red(monkeypatch: pytest.MonkeyPatch):
    original = nf.NVAE.sample

    def skewed(self, n, temperature=1.0, noise=None, seed=None):
        return original(self, n, temperature * (1.0 if noise is None else 1.2), noise, seed)

    workload = model.workloads(CPU, tiny=True)[0]
    bench = model.Bench(workload, CPU)
    truth = model.SamplingRun(bench, None, given_noise=True).gate()
    contender = next(c for c in model.contenders(CPU) if c.provider == "library")
    exact = model.SamplingRun(bench, contender, given_noise=True).gate()
    assert model._judge(exact, truth, "float32")["status"] == "ok"
    monkeypatch.setattr(nf.NVAE, "sample", skewed)
    actual = model.SamplingRun(bench, contender, given_noise=True).gate()
    assert model._judge(actual, truth, "float32")["status"] == "failed"
