"""What people look at: KL and active channels of every group in the metrics, TensorBoard's pictures, the plot of runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import TINY_TRAINING, digits_of, tiny_model, trainer

from nvae_fast import cli
from nvae_fast.training import Step, TrainingConfig, World, metrics, plot, plot_runs
from nvae_fast.training.loss import Objective
from nvae_fast.training.step import StepResult

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------- KL of every group


def test_the_loss_reports_the_kl_of_every_channel(digits):
    model = tiny_model().double().eval()
    x = digits.batch(torch.arange(4), 0).double()
    _, parts = Objective(model, TINY_TRAINING, World())(x, 3, 1.0, 0.01)
    expected = torch.cat(model(x, seed=3).kl_per_channel)
    torch.testing.assert_close(parts[5:], expected.detach(), rtol=1e-12, atol=0)
    assert float(parts[5:].sum()) == pytest.approx(float(parts[2]), rel=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_channels_add_up_to_the_kl(digits, accumulate):
    """With parts of unequal size."""
    step = Step(tiny_model().train(), TrainingConfig(batch_size=5, accumulate=accumulate))
    x = digits.batch(torch.arange(5), 0)
    result = step(x, seed=0, coefficient=1.0, weight=0.01, learning_rate=1e-3)
    assert len(result.kl_per_channel) == 2 * 2
    assert sum(result.kl_per_channel) == pytest.approx(result.kl, rel=1e-5)


def _result(*channels: float, skipped: bool = False) -> StepResult:
    return StepResult(*[1.0] * 6, skipped, kl_per_channel=channels)


def test_averages_by_group():
    averages = metrics.Averages()
    averages.add(_result(1.0, 0.05, 0.0, 0.0))
    averages.add(_result(*[float("nan")] * 4, skipped=True))
    averages.add(_result(2.0, 0.25, 0.15, 0.0))
    resumed = metrics.Averages(json.loads(json.dumps(averages.state())))
    for one in (averages, resumed):
        groups = one.groups(2)
        assert groups["kl_per_group"] == pytest.approx([1.65, 0.075])
        assert groups["active_per_group"] == [2, 0]
    assert metrics.Averages().groups(2) == {"kl_per_group": None, "active_per_group": None}


def test_averages_continue_from_a_checkpoint_without_channels():
    averages = metrics.Averages()
    averages.add(_result(1.0, 1.0))
    old = {key: value for key, value in averages.state().items() if key != "channels"}
    resumed = metrics.Averages(old)
    resumed.add(_result(1.0, 1.0))
    assert resumed.means()["kl"] == 1.0
    assert resumed.groups(1) == {"kl_per_group": None, "active_per_group": None}


def test_a_run_writes_the_kl_of_every_group(tmp_path, digits):
    trainer(tmp_path / "run", digits, TINY_TRAINING.replace(max_steps=4)).run()
    for line in metrics.read_metrics(tmp_path / "run"):
        assert sum(line["kl_per_group"]) == pytest.approx(line["kl"], rel=1e-5)
        assert len(line["active_per_group"]) == 2
        assert all(isinstance(count, int) and 0 <= count <= 2 for count in line["active_per_group"])


# ---------------------------------------------------------------------------- TensorBoard


class Board:
    """What a SummaryWriter is asked to write."""

    def __init__(self) -> None:
        self.images: dict[tuple[str, int], np.ndarray] = {}
        self.scalars: dict[tuple[str, int], float] = {}

    def add_image(self, name, pixels, step, dataformats):
        assert len(dataformats) == pixels.ndim
        self.images[name, step] = pixels

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value

    def close(self):
        pass


def test_tensorboard_has_pictures_and_groups_and_the_run_stays_what_it_is(tmp_path, digits, monkeypatch):
    config = TINY_TRAINING.replace(max_steps=5)
    trainer(tmp_path / "plain", digits_of(digits, 10), config).run()
    board = Board()
    monkeypatch.setattr(metrics, "require_tensorboard", lambda: None)
    monkeypatch.setattr(metrics, "_board", lambda folder, step: board)
    shown = trainer(
        tmp_path / "shown", digits_of(digits, 10), config.replace(tensorboard=True, sample_every=2)
    )
    shown.run()
    names = {name for name, _ in board.images}
    assert names == {*(f"samples/temperature {t}" for t in (0.7, 0.8, 0.9, 1.0)), "reconstructions"}
    assert {step for _, step in board.images} == {2, 4, 5}, "when samples are drawn, and at the end"
    assert board.images["samples/temperature 0.7", 2].shape == (134, 134)
    assert not np.array_equal(board.images["reconstructions", 2], board.images["reconstructions", 5])
    assert {"kl_per_group/00", "kl_per_group/01", "active_per_group/01"} <= {
        name for name, _ in board.scalars
    }
    assert shown.model.training
    lines = [
        [
            {k: v for k, v in line.items() if k not in ("seconds", "images_per_second")}
            for line in metrics.read_metrics(tmp_path / name)
        ]
        for name in ("plain", "shown")
    ]
    assert lines[0] == lines[1]


def test_tensorboard_files_hold_the_pictures(tmp_path, digits):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer(
        tmp_path / "run", digits_of(digits, 10), TINY_TRAINING.replace(max_steps=2, tensorboard=True)
    ).run()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert "reconstructions" in events.Tags()["images"]
    assert "kl_per_group/01" in events.Tags()["scalars"]


# ---------------------------------------------------------------------------- plot


def write_run(
    folder: Path, *, groups: int = 3, steps: int = 20, validation: bool = False, kl: bool = True
) -> Path:
    folder.mkdir(parents=True)
    lines = []
    for step in range(10, 10 * steps + 1, 10):
        line = {"step": step, "loss": 1e4 if step == 10 else 50 + 1000 / step, "bits_per_dim": 3 + 20 / step}
        line["learning_rate"] = 0.01 * step / (10 * steps)
        if kl:
            line["kl_per_group"] = [step * (group + 1) / 100 for group in range(groups)]
            line["active_per_group"] = list(range(groups))
        if validation:
            line["val/bits_per_dim"] = 3.1
        lines.append(line)
    lines.append(
        {"step": 999, "loss": None, "bits_per_dim": None, "kl_per_group": None, "learning_rate": None}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 10')
    return folder


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were drawn."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figures = []
    draw = plot._draw
    monkeypatch.setattr(plot, "_draw", lambda runs: figures.append(draw(runs)) or figures[-1])
    return figures


def axes_of(figure) -> dict[str, object]:
    return {axis.get_title(): axis for axis in figure.get_axes() if axis.get_title()}


def test_plot_of_two_runs(tmp_path, drawn):
    runs = [write_run(tmp_path / "one", validation=True), write_run(tmp_path / "two", groups=2, steps=10)]
    plot_runs(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    axes = axes_of(drawn[0])
    assert list(axes) == [
        "loss (nats per image)", "bits per dimension", "learning rate", "KL of each group: one", "KL of each group: two",
    ]  # fmt: skip
    loss = axes["loss (nats per image)"]
    assert [line.get_label() for line in loss.get_lines()] == ["one", "two"]
    assert [len(line.get_xdata()) for line in loss.get_lines()] == [20, 10], (
        "lines without a loss are left out"
    )
    assert loss.get_ylim()[1] < 200, "the first step does not squeeze the rest"
    bits = axes["bits per dimension"]
    assert [line.get_marker() for line in bits.get_lines()] == ["None", "o", "None", "o"]
    assert bits.get_legend().get_texts()[0].get_text() == "validation"
    table = axes["KL of each group: one"].collections[0].get_array()
    assert table.shape == (3, 20)
    assert table[2, 19] == pytest.approx(200 * 3 / 100)
    other = axes["KL of each group: two"].collections[0]
    assert other.get_clim() == (0, 6.0), "one scale of colours for all runs"


def test_plot_of_a_run_of_an_earlier_version(tmp_path, drawn):
    plot_runs([write_run(tmp_path / "old", kl=False)], tmp_path / "x.svg")
    (text,) = axes_of(drawn[0])["KL of each group: old"].texts
    assert text.get_text() == "not in this run's metrics"


def test_names_of_runs_are_as_long_as_needed():
    assert plot._names(["a/x", "b/y/metrics.jsonl"]) == ["x", "y"]
    assert plot._names(["a/x", "b/x"]) == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="the same run is given twice"):
        plot._names(["a/x", "a/x/metrics.jsonl"])


def test_plot_command(tmp_path, drawn, capsys):
    run = write_run(tmp_path / "run")
    assert cli.main(["plot", str(run)]) == 0
    assert f"wrote {run / 'curves.png'}" in capsys.readouterr().err
    assert cli.main(["plot", str(run)]) == 2
    assert "curves.png exists already: --overwrite replaces it" in capsys.readouterr().err
    assert cli.main(["plot", str(run), "--overwrite", "--quiet"]) == 0
    assert not capsys.readouterr().err
    assert cli.main(["plot", str(run / "metrics.jsonl"), "--out", str(tmp_path / "x.pdf")]) == 0
    assert (tmp_path / "x.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "run2"], "--out is needed for the picture of 2 runs"),
        (["run", "--out", "x.txt"], "--out: the picture must be .png, .pdf or .svg, got x.txt"),
        (["run", "run", "--out", "x.png"], "the same run is given twice"),
        (["none"], "no metrics.jsonl of a run at"),
        (["empty"], "has no lines of metrics yet"),
        (["run", "--out", "none/x.png"], "the folder of none/x.png does not exist"),
        (["run", "--columns", "3"], "unrecognized arguments: --columns 3"),
    ],
)
def test_plot_errors_name_the_option(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    write_run(tmp_path / "run2")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["plot", *words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_matplotlib_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_runs([write_run(tmp_path / "run")], tmp_path / "x.png")
