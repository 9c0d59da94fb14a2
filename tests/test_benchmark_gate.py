"""The gate of the benchmarks: a provider is timed only if it computes the right thing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmark_runs import CASES, CPU, TINY

from benchmarks import run
from benchmarks.case import Case
from benchmarks.gate import Gate, relative_error
from benchmarks.providers import Candidate, build_inputs, candidates


def broken(case: Case, wrong) -> Case:
    """The case with a library route that computes something else."""
    assert case.library is not None
    library = dataclasses.replace(case.library, run=wrong, moments=False)
    return dataclasses.replace(case, library=library)


@pytest.mark.parametrize("name", sorted(CASES))
def test_the_gate_passes_every_provider_on_tiny_shapes(name: str):
    case = CASES[name]
    shape = case.shapes["tiny"][0]
    for dtype in case.dtypes:
        inputs = build_inputs(case, shape, dtype, CPU)
        gate = Gate(case, inputs, case.noise(shape) if case.noise else None, dtype)
        for candidate in candidates(case, shape, CPU, compile_reason="not in this test"):
            if candidate.run is None:
                assert candidate.reason
                continue
            verdict = gate.judge(candidate)
            assert verdict.passed, f"{candidate.name} {dtype}: {verdict.reason}"
            assert verdict.errors, "nothing was compared"


def wrong_value(i):
    out = CASES["normal_log_prob"].run(i)
    return out * (1 + 1e-3)


def wrong_gradient(i):
    out = CASES["normal_log_prob"].run(i)
    return out + (i["z"] - i["z"].detach()).sum((2, 3))


def not_finite(i):
    return CASES["normal_log_prob"].run(i) + float("nan")


@pytest.mark.parametrize(
    "wrong,message",
    [
        (wrong_value, "output 0: relative error"),
        (wrong_gradient, "gradient of z: relative error"),
        (not_finite, "relative error inf"),
        (lambda i: (CASES["normal_log_prob"].run(i),) * 2, "2 outputs, expected 1"),
    ],
)
def test_a_wrong_provider_turns_the_gate_red_and_is_not_timed(wrong, message: str):
    case = broken(CASES["normal_log_prob"], wrong)
    shape, settings = case.shapes["tiny"][0], TINY
    rows = run.measure_workload(
        case,
        shape,
        torch.float32,
        candidates(case, shape, CPU, compile_reason="no"),
        settings,
        {"matmul_gflops": 1.0},
        run.CompileBudget(0.0, 1, quick=True, option="--x"),
    )
    red = [row for row in rows if row["status"] == "failed"]
    assert {row["provider"] for row in red} == {"library"}
    assert all(message in row["reason"] and not row["passes"] for row in red)
    assert all(row["passes"] for row in rows if row["provider"] in ("reference", "copy"))


def test_a_red_gate_fails_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    case = broken(CASES["normal_log_prob"], wrong_value)
    monkeypatch.setattr(run, "load_cases", lambda: {case.name: case})
    monkeypatch.setattr(run, "settings_for", lambda device, quick: TINY)
    assert run.main(["normal_log_prob", "--device", "cpu"]) == 1
    assert "RED normal_log_prob" in capsys.readouterr().out


def test_a_provider_that_raises_is_failed_but_a_compiler_that_gives_up_is_absent():
    case = CASES["weight_norm"]
    shape, settings = case.shapes["tiny"][0], TINY

    def breaks(inputs):
        raise RuntimeError("cannot do it")

    providers = [
        Candidate("library", "contiguous", breaks),
        Candidate("torch.compile", "contiguous", breaks, compiled=True),
    ]
    budget = run.CompileBudget(0.0, 1, quick=True, option="--x")
    rows = run.measure_workload(
        case, shape, torch.float32, providers, settings, {"matmul_gflops": 1.0}, budget
    )
    statuses = {row["provider"]: row["status"] for row in rows}
    assert statuses == {"library": "failed", "torch.compile": "absent", "copy": "ok"}
    assert all("cannot do it" in row["reason"] for row in rows if row["provider"] != "copy")


def test_random_numbers_of_another_generator_are_judged_by_their_moments():
    case = CASES["philox"]
    assert case.library is not None
    inputs = build_inputs(case, (4, 20, 16), torch.float32, CPU)
    gate = Gate(case, inputs, None, torch.float32)
    assert gate.judge(Candidate("library", "contiguous", case.library.run, library=True)).passed
    shifted = gate.judge(
        Candidate("library", "contiguous", lambda i: case.library.run(i) + 0.2, library=True)
    )
    scaled = gate.judge(Candidate("library", "contiguous", lambda i: case.library.run(i) * 1.2, library=True))
    assert not shifted.passed
    assert "mean" in shifted.reason
    assert not scaled.passed
    assert "variance" in scaled.reason
    assert not gate.judge(Candidate("reference", "contiguous", case.library.run)).passed


def test_relative_error_leaves_out_only_the_allowed_fraction():
    expected = torch.ones(1000)
    actual = expected.clone()
    actual[:2] = 5.0
    assert relative_error(actual, expected) > 0.1
    assert relative_error(actual, expected, outliers=2e-3) == 0
    assert relative_error(actual, expected, outliers=1e-3) > 0.1
    assert relative_error(torch.ones(3), torch.ones(4)) == float("inf")
