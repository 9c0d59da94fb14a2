"""The benchmarks: every operator module has a case, the gate runs and can turn red, results and README round trips."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest
import torch

import nvae_fast as nf
from benchmarks import machine, model, report, run
from benchmarks.case import Case, load_cases, modules, select
from benchmarks.gate import Gate, relative_error
from benchmarks.providers import Candidate, Random, build_inputs, candidates, time_limit
from benchmarks.timing import CpuClock, Series, interleave

CPU = torch.device("cpu")
CASES = load_cases()
OPS_FOLDER = Path(nf.__file__).parent / "ops"


def tiny_run(names: list[str]) -> dict:
    return run.run(names, run.settings_for(CPU, tiny=True), say=lambda line: None)


@pytest.fixture(scope="module")
def results() -> dict:
    return tiny_run(["weight_norm", "residual_normal"])


def broken(case: Case, wrong) -> Case:
    """The case with a library route that computes something else."""
    assert case.library is not None
    library = dataclasses.replace(case.library, run=wrong, moments=False)
    return dataclasses.replace(case, library=library)


def test_a_budget_measures_the_first_cases_first_and_names_what_it_skips(monkeypatch):
    started: list[str] = []
    measure_case = run.measure_case
    monkeypatch.setattr(
        run, "measure_case", lambda case, *rest: started.append(case.name) or measure_case(case, *rest)
    )
    saved: list[dict] = []
    settings = dataclasses.replace(run.settings_for(CPU, tiny=True), budget=0.0)
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
        run.settings_for(CPU, tiny=True),
        say=lambda line: None,
        save=lambda document: saved.append(sorted({row["case"] for row in document["rows"]})),
    )
    assert saved == [
        ["weight_norm"],
        ["normal_log_prob", "weight_norm"],
    ]


# ---------------------------------------------------------------------------------------------------- cases


def test_every_operator_module_has_a_case_and_every_op_is_measured():
    public = {path.stem for path in OPS_FOLDER.glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    public -= {"adamax", "affine_activation", "spectral_norm", "sync_batch_norm_swish"}  # measured in their callers
    assert set(modules()) == public
    assert {case.op for case in CASES.values()} == set(nf.backends())
    assert {case.module for case in CASES.values()} == public


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
    from nvae_fast.ops import _backend

    case = CASES["residual_normal"]
    monkeypatch.delitem(_backend._fused, ("residual_normal", "cpu"), raising=False)
    monkeypatch.setitem(_backend._absent, ("residual_normal", "cpu"), "no compiler here")
    found = candidates(case, case.shapes["tiny"][0], CPU, compile_reason="no")
    ours = [candidate for candidate in found if candidate.provider == "nvae_fast"]
    assert len(ours) == 2
    assert all(candidate.run is None and candidate.reason == "no compiler here" for candidate in ours)
    monkeypatch.setitem(_backend._fused, ("residual_normal", "cpu"), "cpp")
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


# ----------------------------------------------------------------------------------------------------- gate


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
    shape, settings = case.shapes["tiny"][0], run.settings_for(CPU, tiny=True)
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
    monkeypatch.setattr(run, "settings_for", lambda device, quick: dataclasses.replace(_TINY_SETTINGS))
    assert run.main(["normal_log_prob", "--device", "cpu"]) == 1
    assert "RED normal_log_prob" in capsys.readouterr().out


_TINY_SETTINGS = run.settings_for(CPU, tiny=True)


def test_a_provider_that_raises_is_failed_but_a_compiler_that_gives_up_is_absent():
    case = CASES["weight_norm"]
    shape, settings = case.shapes["tiny"][0], run.settings_for(CPU, tiny=True)

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


# --------------------------------------------------------------------------------------------------- timing


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


# ---------------------------------------------------------------------------------------------------- model


def test_whole_steps_and_sampling_pass_their_gate(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(model, "MEMORY_FORMATS", {"contiguous": torch.contiguous_format})
    rows = tiny_run(["training_step", "sampling"])["rows"]
    assert not [row["reason"] for row in rows if row["status"] == "failed"]
    timed = {(row["case"], row["provider"]) for row in rows if row["status"] == "ok"}
    for case, lap in (("training_step", "step"), ("sampling", "sample")):
        assert {(case, "reference"), (case, "library")} <= timed
        row = next(row for row in rows if row["case"] == case and row["provider"] == "reference")
        assert row["passes"][lap]["images_per_s"] > 0
        assert row["operator_calls"] > 100
        assert row["peak_bytes"] > 0


def test_settings_that_would_start_too_late_are_skipped_and_named(monkeypatch: pytest.MonkeyPatch):
    tiny = model.workloads(CPU, tiny=True)
    monkeypatch.setattr(model, "workloads", lambda *a, **k: tiny * 2)
    monkeypatch.setattr(model, "measure_model", lambda *a, **k: [{"measured": True}])
    settings = dataclasses.replace(_TINY_SETTINGS, models_until=-1.0)
    rows, skipped = run.measure_models(["sampling"], settings, say=lambda line: None)
    assert rows == [{"measured": True}]
    assert skipped == [f"{tiny[0].label} (--models-until -1)"]


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


# ------------------------------------------------------------------------------ results and command line


def test_results_hold_what_they_promise_and_survive_a_round_trip(results: dict, tmp_path: Path):
    path = tmp_path / "new" / "machine.json"
    report.write_json(results, path)
    assert report.read_json(path) == results == json.loads(path.read_text())
    assert [p.name for p in path.parent.iterdir()] == ["machine.json"], "a temporary file was left"
    assert results["versions"]["torch"] == torch.__version__
    row = next(r for r in results["rows"] if r["provider"] == "reference" and r["case"] == "residual_normal")
    assert row["gate"]["errors"]["gradient of prior"] <= row["gate"]["tolerance"]
    assert set(row["passes"]) == {"forward", "backward"}
    for timed in row["passes"].values():
        assert 0 < timed["min_ms"] <= timed["lower_quartile_ms"] <= timed["median_ms"]
        assert timed["median_ms"] <= timed["upper_quartile_ms"]
        assert timed["gb_per_s"] > 0
        assert timed["copy_fraction"] > 0
    assert row["peak_bytes"] >= 9 * 2 * 3 * 16 * 4  # z and both gradients at least
    assert row["operator_calls"] > 10
    copies = [r for r in results["rows"] if r["provider"] == "copy"]
    assert all(t["copy_fraction"] == pytest.approx(1) for r in copies for t in r["passes"].values())
    assert all(not r["passes"] for r in results["rows"] if r["status"] != "ok")


def test_a_damaged_results_file_is_named(results: dict, tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: not JSON"):
        report.read_json(path)
    path.write_text(json.dumps({**results, "schema": 99}))
    with pytest.raises(ValueError, match="expected a results document with schema 1, got 99"):
        report.read_json(path)
    path.write_text(json.dumps({**results, "rows": [{"case": "a"}]}))
    with pytest.raises(ValueError, match="row 0: missing module"):
        report.read_json(path)


def test_results_of_other_cases_are_not_lost(results: dict, tmp_path: Path):
    path = tmp_path / "machine.json"
    report.write_json(results, path)
    report.check_target(path, ["weight_norm", "residual_normal"], overwrite=False)
    report.check_target(path, ["weight_norm"], overwrite=True)
    with pytest.raises(ValueError, match=r"holds cases this run does not measure \(residual_normal\)"):
        report.check_target(path, ["weight_norm"], overwrite=False)
    with pytest.raises(SystemExit) as stop:
        run.main(["weight_norm", "--device", "cpu", "--json", str(path)])
    assert stop.value.code == 2
    assert report.read_json(path) == results


def test_console_shows_every_provider(results: dict):
    text = report.console(results)
    assert "reference NCHW" in text
    assert "library channels_last" in text
    assert "torch.compile               absent: left out of a quick run" in text
    assert "of copy" in text


def test_list_and_machine_name(capsys: pytest.CaptureFixture[str]):
    assert run.main(["--list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in run.available())
    assert run.main(["--machine-name", "--device", "cpu"]) == 0
    name = capsys.readouterr().out.strip()
    assert name == machine.machine_name(CPU)
    assert name.endswith(f"-{machine.cores()}core")


@pytest.mark.parametrize(
    "name,slug",
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD EPYC", "amd-epyc"),
        ("AMD EPYC 7763 64-Core Processor", "amd-epyc-7763"),
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "intel-xeon-platinum-8481c"),
        ("", "unknown"),
    ],
)
def test_machine_names_are_clean(name: str, slug: str):
    assert machine.slug(name) == slug


@pytest.mark.parametrize("arguments", [["nonsense"], ["--seconds", "-1"], ["--threads", "0"]])
def test_wrong_arguments_stop_before_anything_is_measured(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "run", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stop:
        run.main([*arguments, "--device", "cpu"])
    assert stop.value.code == 2


def test_plot(results: dict, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = report.plot_path(str(tmp_path), None, "box")
    assert path == tmp_path / "box.png"
    report.plot(results, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert report.plot_path(None, None, "box") is None
    assert report.plot_path("", tmp_path / "a.json", "box") == tmp_path / "a.png"
    with pytest.raises(ValueError, match="expected a directory or"):
        report.plot_path("picture.doc", None, "box")


# --------------------------------------------------------------------------------------------------- README


@pytest.fixture
def folder(results: dict, tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    report.write_json(results, tmp_path / "results" / "box.json")
    (tmp_path / "README.md").write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    return tmp_path


def readme_command(folder: Path, *more: str) -> int:
    return report.main(["--readme", str(folder / "README.md"), "--results", str(folder / "results"), *more])


def test_the_readme_table_comes_from_the_results(folder: Path, results: dict):
    assert readme_command(folder, "--check") == 1
    assert "old" in (folder / "README.md").read_text(), "--check must change nothing"
    assert readme_command(folder) == 0
    text = (folder / "README.md").read_text()
    assert readme_command(folder, "--check") == 0
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "old" not in text
    row = next(
        r
        for r in results["rows"]
        if (r["case"], r["provider"], r["memory_format"]) == ("residual_normal", "reference", "NCHW")
    )
    line = next(line for line in text.splitlines() if line.startswith("| residual_normal "))
    assert f" {report.total_ms(row):.{report.decimals(report.total_ms(row))}f} [" in line
    assert len(line.split("|")) == len(report.COLUMNS) + 2
    (folder / "results" / "box.json").unlink()
    assert readme_command(folder, "--check") == 1, "a table without its results is stale"


def test_whole_models_have_a_table_of_their_own(results: dict):
    def row(provider: str, layout: str, ms: float, **more: object) -> dict:
        timed = {"median_ms": ms, "lower_quartile_ms": ms, "upper_quartile_ms": ms, "images_per_s": 8e3 / ms}
        return {
            **dict(
                case="training_step",
                module="model",
                workload="mnist B8",
                dtype="float32",
                status="ok",
                reason="",
            ),
            **dict(provider=provider, memory_format=layout, passes={"step": timed}),
            **dict(peak_bytes=3 * 2**20, operator_calls=22309, **more),
        }

    rows = [
        row("reference", "NCHW", 2000.0),
        row("reference", "channels_last", 1600.0),
        {**row("torch.compile", "NCHW", 1.0), "status": "absent", "passes": {}},
        {**row("nvae_fast", "channels_last", 800.0), "peak_bytes": None, "operator_calls": None},
    ]
    text = report.readme_table([{**results, "rows": results["rows"] + rows}])
    assert text.splitlines()[-2:] == [
        "| training_step mnist B8 | float32 | reference channels_last | 5.00 | 3 | 22,309 operator calls |",
        f"| training_step mnist B8 | float32 | nvae_fast channels_last | 10.0 | {report.NONE} | {report.NONE} |",
    ]
    assert report.WHOLE_MODELS not in report.readme_table([results]), "no models, no table"


@pytest.mark.parametrize(
    "value,text", [(0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234.4, "1234")]
)
def test_three_significant_digits(value: float, text: str):
    assert f"{value:.{report.decimals(value)}f}" == text


def test_a_readme_without_markers_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "README.md").write_text("nothing here\n")
    with pytest.raises(SystemExit):
        readme_command(folder)
    assert "expected one <!-- results:begin -->" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "nothing here\n"
