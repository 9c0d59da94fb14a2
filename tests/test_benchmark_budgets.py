"""Benchmarks within a budget of time: what is measured first, what is skipped, what is saved."""

from __future__ import annotations

import dataclasses

import pytest
from benchmark_runs import CPU, TINY

from benchmarks import model, run


def test_a_budget_measures_the_first_cases_first_and_names_what_it_skips(monkeypatch):
    started: list[str] = []
    measure_case = run.measure_case
    monkeypatch.setattr(
        run, "measure_case", lambda case, *rest: started.append(case.name) or measure_case(case, *rest)
    )
    saved: list[dict] = []
    settings = dataclasses.replace(TINY, budget=0.0)
    names = ["elu", "weight_norm_many", "residual_normal", "training_step"]
    found = run.run(names, settings, say=lambda line: None, save=saved.append)
    assert started == ["residual_normal", "weight_norm_many", "elu"]
    assert found["rows"] == []
    assert saved == []
    assert [line.split()[0] for line in found["skipped"]] == [*started, "mnist"]
    assert all(line.endswith("(--budget 0)") for line in found["skipped"])


def test_results_are_saved_after_every_case():
    saved: list[list[str]] = []
    run.run(
        ["weight_norm", "normal_log_prob"],
        TINY,
        say=lambda line: None,
        save=lambda document: saved.append(sorted({row["case"] for row in document["rows"]})),
    )
    assert saved == [
        ["weight_norm"],
        ["normal_log_prob", "weight_norm"],
    ]


def test_compilation_time_is_shared_by_the_cases():
    budget = run.CompileBudget(30.0, 3, quick=False, option="--compile-seconds")
    budget.next_case()
    assert budget.left == pytest.approx(10)
    assert budget.reason(first=True) == ""
    assert "only the first shape" in budget.reason(first=False)
    budget.spent = 25.0
    assert "30 s, is spent (--compile-seconds)" in budget.reason(first=True)
    budget.next_case()
    assert budget.reason(first=True)
    budget.next_case()
    assert budget.left == pytest.approx(5)
    assert budget.reason(first=True) == ""
    assert run.CompileBudget(0.0, 1, quick=False, option="--o").reason(first=True) == "left out: --o is 0"


def test_settings_that_would_start_too_late_are_skipped_and_named(monkeypatch: pytest.MonkeyPatch):
    tiny = model.workloads(CPU, tiny=True)
    monkeypatch.setattr(model, "workloads", lambda *a, **k: tiny * 2)
    monkeypatch.setattr(model, "measure_model", lambda *a, **k: [{"measured": True}])
    settings = dataclasses.replace(TINY, models_until=-1.0)
    rows, skipped = run.measure_models(["sampling"], settings, say=lambda line: None)
    assert rows == [{"measured": True}]
    assert skipped == [f"{tiny[0].label} (--models-until -1)"]
