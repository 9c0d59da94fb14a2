"""What benchmarks write: results, the console, plots, and the table in the README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from benchmark_runs import CPU, tiny_run

from benchmarks import machine, report, run


@pytest.fixture(scope="module")
def results() -> dict:
    return tiny_run(["weight_norm", "residual_normal"])


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
