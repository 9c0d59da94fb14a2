"""What benchmarks write: results, the console, charts, and the tables in README.md and the pages of docs/."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_runs import CPU, tiny_run

from benchmarks import charts, machine, report, run
from nvae_fast.patching import wins


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
    path = charts.plot_path(str(tmp_path), None, "box")
    assert path == tmp_path / "box.png"
    charts.plot(results, path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert charts.plot_path(None, None, "box") is None
    assert charts.plot_path("", tmp_path / "a.json", "box") == tmp_path / "a.png"
    with pytest.raises(ValueError, match="expected a directory or"):
        charts.plot_path("picture.doc", None, "box")


@pytest.fixture
def folder(results: dict, tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    report.write_json(results, tmp_path / "results" / "box.json")
    (tmp_path / "README.md").write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    return tmp_path


def readme_command(folder: Path, *more: str) -> int:
    return report.main(["--page", str(folder / "README.md"), "--results", str(folder / "results"), *more])


def test_the_table_comes_from_the_results(folder: Path, results: dict):
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


def timed_row(case: str, workload: str, provider: str, ms: float) -> dict:
    timed = {"median_ms": ms, "lower_quartile_ms": ms, "upper_quartile_ms": ms, "samples": 9}
    return dict(
        case=case, module="", workload=workload, dtype="float32", provider=provider, memory_format="NCHW", status="ok",
        reason="", passes={"forward": timed},
    )  # fmt: skip


def test_the_interval_of_a_speedup() -> None:
    rows = [timed_row("elu", "B32", "reference", 3.0), timed_row("elu", "B32", "nvae_fast", 2.0)]
    (timed,) = (row["passes"]["forward"] for row in rows[1:])
    timed |= {"lower_quartile_ms": 1.9, "upper_quartile_ms": 2.1, "samples": 25}
    half = 1.96 * 0.93 * 0.2 / 5 / 2.0  # relative
    assert report.speedup_cell(rows) == f"1.50x [{1.5 * math.exp(-half):.2f} {1.5 * math.exp(half):.2f}]"
    assert report.speedup_cell(rows[:1]) == report.NONE


def test_readme_has_a_few_rows_with_those_that_lose(results: dict, tmp_path: Path) -> None:
    rows = [
        timed_row("weight_norm", "Out40 In128 K3", "reference", 1.0),
        timed_row("weight_norm", "Out40 In128 K3", "library", 0.5),
        timed_row("weight_norm", "Out40 In128 K3", "nvae_fast", 1.0),
        timed_row("elu", "B32", "reference", 1.0),
        timed_row("elu", "B32", "nvae_fast", 1.0),
        timed_row("residual_normal", "B32 Z20 H16", "reference", 1.0),
    ]
    text = report.summary_table([{**results, "rows": rows}])
    head, table, slower = text.split("\n\n")
    assert head.replace("\n", " ") == f"Measured on {report.headline(results)}."
    assert table.splitlines()[2:] == [
        "| weight_norm Out40 In128 K3 | library, 0.500 [0.000] | 1.00 [0.00] | 0.50x [0.50 0.50] |"
    ]
    assert slower == "Slower than PyTorch there: weight_norm Out40 In128 K3 (0.50x)."
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    for path in (readme, page):
        path.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write_json({**results, "rows": rows}, tmp_path / "results" / "box.json")
    command = ["--readme", str(readme), "--page", str(page), "--results", str(tmp_path / "results")]
    assert report.main([*command, "--check"]) == 1
    assert report.main(command) == 0
    assert report.main([*command, "--check"]) == 0
    assert "| elu |" in page.read_text()
    assert "elu" not in readme.read_text()


def test_the_page_on_accelerate_shows_the_table_by_which_it_chooses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_on = {
        "machine": {"name": "box", "processor": "CPU"},
        "versions": {"torch": "2"},
        "threads": 1,
        "date": "2026-01-02T",
    }
    rows = [
        ["cpu", "float32", "gate", "training", "contiguous", 8, 16, 256, 0.5],
        ["cpu", "float32", "gate", "training", "contiguous", 8, 16, 64, 1.5],
        ["cpu", "float32", "gate", "training", "contiguous", 8, 16, 16, 0.75],
        ["cpu", "bfloat16", "gate", "evaluation", "channels_last", 8, 16, 16, 2.0],
    ]
    folder = tmp_path / "measured"
    folder.mkdir()
    (folder / "box.json").write_text(json.dumps({"measured_on": measured_on, "rows": rows}))
    monkeypatch.setattr(wins, "FOLDER", folder)
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main(["--accelerate", str(page), "--check"]) == 1
    assert report.main(["--accelerate", str(page)]) == 0
    assert report.main(["--accelerate", str(page), "--check"]) == 0
    text = page.read_text()
    for dtype in ("float32", "bfloat16"):
        assert (
            f"{dtype}, median and range over sizes. Measured on box: CPU, 1 thread; torch 2; 2026-01-02."
            in text
        )
    assert [line for line in text.splitlines() if line.startswith("| gate")] == [
        f"| gate | 0.75 (0.50 to 1.50) | {report.NONE} | {report.NONE} | {report.NONE} |",
        f"| gate | {report.NONE} | {report.NONE} | {report.NONE} | 2.00 (2.00 to 2.00) |",
    ]


def texts_of(monkeypatch: pytest.MonkeyPatch, draw: Callable[[Path], None], path: Path) -> list[str]:
    """The texts of a chart and, in place of clipped ones, an error: all must be inside the figure."""
    found: list[str] = []
    save = charts._save

    def look(figure: Any, out: Path) -> None:
        save(figure, out)
        from matplotlib.text import Text

        edge = figure.bbox
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text():
                box = text.get_window_extent()
                assert edge.x0 <= box.x0 < box.x1 <= edge.x1, text.get_text()
                found.append(text.get_text())

    monkeypatch.setattr(charts, "_save", look)
    draw(path)
    return found


def test_charts_have_values_speed_ups_and_whole_titles(
    results: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    shape = "B32 C768 H16 K5 of a shape with quite a long name"
    rows = [
        timed_row("depthwise_conv2d", shape, "reference", 12.0),
        timed_row("depthwise_conv2d", shape, "nvae_fast", 3.0),
        timed_row("depthwise_conv2d", "B8", "reference", 3.0),
        timed_row("depthwise_conv2d", "B8", "nvae_fast", 1.5),
        timed_row("sampling", "cifar10", "reference", 10.0),
        timed_row("sampling", "cifar10", "nvae_fast", 20.0),
    ]
    document = {**results, "rows": rows}
    found = texts_of(monkeypatch, lambda path: charts.plot(document, path), tmp_path / "panels.png")
    assert {" 12.0 ms", " 3.00 ms, 4.00x", " 20.0 ms, 0.50x"} <= set(found)
    assert f"depthwise_conv2d {shape} float32, forward" in {text.replace("\n", " ") for text in found}
    found = texts_of(monkeypatch, lambda path: charts.speedup_chart(document, path), tmp_path / "chart.png")
    assert {"3.00x (2.00 to 4.00)", "0.50x", "depthwise conv2d", "sampling, whole model"} <= set(found)


def test_the_command_for_the_chart(results: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    report.write_json(
        {**results, "rows": [timed_row("elu", "B32", name, 1.0) for name in ("reference", "nvae_fast")]},
        tmp_path / "box.json",
    )
    for name in ("a.png", "b.svg"):
        assert charts.main([str(tmp_path / name), "--results", str(tmp_path / "box.json")]) == 0
        assert (tmp_path / name).stat().st_size > 1000
    with pytest.raises(SystemExit):
        charts.main([str(tmp_path / "a.doc"), "--results", str(tmp_path / "box.json")])
    assert "expected a directory or a .png" in capsys.readouterr().err


def test_whole_models_have_a_table_of_their_own(results: dict):
    def row(provider: str, layout: str, ms: float, **more: object) -> dict:
        timed = {
            "median_ms": ms,
            "lower_quartile_ms": ms,
            "upper_quartile_ms": ms,
            "samples": 9,
            "images_per_s": 8e3 / ms,
        }
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
    text = report.page_table([{**results, "rows": results["rows"] + rows}])
    assert text.splitlines()[-2:] == [
        "| training_step mnist B8 | float32 | reference channels_last | 5.00 | 3 | 22,309 operator calls |",
        f"| training_step mnist B8 | float32 | nvae_fast channels_last | 10.0 | {report.NONE} | {report.NONE} |",
    ]
    assert report.WHOLE_MODELS not in report.page_table([results]), "no models, no table"


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
