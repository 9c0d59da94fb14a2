"""Progress of long jobs: a bar of tqdm on a terminal, lines elsewhere, nothing when asked."""

from __future__ import annotations

import io
import sys

import pytest
from training_runs import TINY_TRAINING, digits_of, trainer

from nvae_fast import cli
from nvae_fast.training import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, **options) -> str:
    bar = progress.Progress("train", 10, stream=stream, **options)
    for done in range(4, 11):
        bar.update(done, f"loss {done}", force=done == 10)
        if done == 6:
            bar.message("note")
    bar.close()
    return stream.getvalue()


def test_lines_in_a_log():
    text = shown(io.StringIO())
    assert text.splitlines() == [
        " 40%  train step 4/10  loss 4",  # the first and the forced one, nothing in between
        "note",
        "100%  train step 10/10  loss 10",
    ]


def test_plain_lines_on_a_terminal():
    assert shown(Terminal(), mode="plain") == shown(io.StringIO())


def test_lines_on_a_terminal_without_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert shown(Terminal()) == shown(io.StringIO())


def test_a_bar_on_a_terminal():
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    text = shown(Terminal())
    last = text.replace("\n", "\r").rstrip("\r").split("\r")[-1]
    assert last.startswith("100%")
    assert "train step 10/10  loss 10" in last
    assert "note" in text.splitlines(), "messages stay, on lines of their own"
    assert text.endswith("\n")


def test_a_bar_shows_the_count_in_place_of_the_position():
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    stream = Terminal()
    bar = progress.Progress("train", 100, stream=stream)
    bar.update(20.5, count="7", force=True)
    bar.close()
    assert "train step 7" in stream.getvalue()
    assert " 20%" in stream.getvalue() or " 21%" in stream.getvalue()


def test_nothing_but_messages():
    assert shown(Terminal(), mode="none") == "note\n"
    assert shown(io.StringIO(), mode="none") == "note\n"
    assert shown(Terminal(), quiet=True) == ""


def test_time_left_counts_from_where_the_job_began(monkeypatch):
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    stream = io.StringIO()
    bar = progress.Progress("train", 100, stream=stream)
    bar.update(50)
    bar.update(60)
    assert stream.getvalue().splitlines()[-1] == " 60%  left 0:40  train step 60/100"
    assert progress.clock(3723) == "1:02:03"


def test_unknown_modes_are_refused(capsys):
    with pytest.raises(ValueError, match=r"mode \(--progress\) must be one of auto, plain, none, got 'bar'"):
        progress.Progress("train", 10, mode="bar")
    assert cli.main(["train", "--progress", "bar"]) == 2
    assert "argument --progress: invalid choice: 'bar'" in capsys.readouterr().err


@pytest.mark.parametrize("options, seen", [([], True), (["--progress", "none"], False), (["--quiet"], False)])
def test_commands_obey(tmp_path, digits, capsys, one_thread, options, seen):
    trainer(tmp_path, digits_of(digits, 10), TINY_TRAINING).save()
    images = ["--max-images", "4", "--data", "digits"]
    for command, more in (
        ("evaluate", images),
        ("sample", ["--number", "2", "--out", str(tmp_path / "x.png")]),
    ):
        assert cli.main([command, str(tmp_path), "--device", "cpu", "--threads", "1", *more, *options]) == 0
        assert (f"{command} image" in capsys.readouterr().err) == seen


@pytest.mark.parametrize("mode, seen", [("plain", True), ("none", False)])
def test_training_obeys(tmp_path, digits, capsys, one_thread, mode, seen):
    run = trainer(tmp_path, digits_of(digits, 10), TINY_TRAINING.replace(max_steps=1))
    run.quiet, run.progress = False, mode
    run.run()
    assert ("train step 1/1" in capsys.readouterr().err) == seen
