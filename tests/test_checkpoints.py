"""Checkpoints, run folders and metrics: nothing a user made is ever lost."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from nvae_fast import cli
from nvae_fast.io import atomic_file
from nvae_fast.training import (
    CheckpointError,
    RunFolderError,
    checkpoint,
    metrics,
    run_folder,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Two steps of a tiny model on digits, written by version 0.1.0.
OLD_RUN = Path(__file__).parent / "data" / "run_0.1.0"
OLD_BOUND = 775.8858108520508  # what 0.1.0 gave for its first 8 test images


def document(value: float = 1.0) -> dict:
    return {"model_config": {}, "model": {"w": torch.full((1000,), value)}, "step": int(value)}


def loaded(path: Path) -> float:
    return float(checkpoint.load(path)["model"]["w"][0])


def test_checkpoint_keeps_the_previous_one(tmp_path):
    for value in (1.0, 2.0, 3.0):
        checkpoint.save(document(value), tmp_path)
    assert loaded(tmp_path) == 3.0
    assert loaded(tmp_path / checkpoint.PREVIOUS) == 2.0
    assert sorted(f.name for f in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.NAME]


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "torch.save", "os.link"])
@pytest.mark.parametrize("after", [0, 1])
def test_failed_save_leaves_the_newest_whole(tmp_path, monkeypatch, where, after):
    checkpoint.save(document(1.0), tmp_path)
    checkpoint.save(document(2.0), tmp_path)
    owner, name = (os, where[3:]) if where.startswith("os.") else (torch, "save")
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            if where == "torch.save":
                args[1].write(b"PK half of it")
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    if where == "os.link" or (where == "torch.save" and after):
        checkpoint.save(document(3.0), tmp_path)  # no hard links: falls back to a copy
        expected = 3.0
    else:
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left.*before is intact"):
            checkpoint.save(document(3.0), tmp_path)
        expected = 2.0
    monkeypatch.undo()
    assert loaded(tmp_path) == expected
    assert loaded(tmp_path / checkpoint.PREVIOUS) in (1.0, 2.0)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.99])
def test_truncated_checkpoint_points_at_the_previous_one(tmp_path, keep):
    for value in (1.0, 2.0):
        checkpoint.save(document(value), tmp_path)
    file = tmp_path / checkpoint.NAME
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=rf"{checkpoint.NAME}.*(truncated|not a checkpoint)"):
        checkpoint.load(tmp_path)
    if keep != 1:
        with pytest.raises(CheckpointError, match=rf"use the previous one, .*{checkpoint.PREVIOUS}"):
            checkpoint.load(tmp_path)
    assert loaded(tmp_path / checkpoint.PREVIOUS) == 1.0


class _Hostile:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "x": _Hostile()}, tmp_path / checkpoint.NAME)
    with pytest.raises(CheckpointError, match="could run code: refused"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_checkpoint_refuses_what_it_could_not_read_back(tmp_path):
    with pytest.raises(
        TypeError, match=r"checkpoint\['step'\] must be a tensor or a plain value, got float64"
    ):
        checkpoint.save({**document(), "step": np.float64(1)}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_foreign_and_newer_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path)
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of nvae_fast"):
        checkpoint.load(tmp_path / "other.pt")
    with atomic_file(tmp_path / "new.pt") as handle:
        torch.save({**document(), "format": checkpoint.FORMAT, "version": 99}, handle)
    with pytest.raises(CheckpointError, match=r"format version 99.*newer nvae_fast"):
        checkpoint.load(tmp_path / "new.pt")


def test_run_folder_is_never_written_over(tmp_path):
    folder = tmp_path / "run"
    assert run_folder.prepare(folder) == (folder, None)
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(RunFolderError, match="--resume continues that run, --overwrite moves it aside"):
        run_folder.prepare(folder)
    with pytest.raises(RunFolderError, match="nothing to resume"):
        run_folder.prepare(folder, resume=True)
    _, note = run_folder.prepare(folder, overwrite=True)
    (aside,) = [f for f in tmp_path.iterdir() if f.name != "run"]
    assert (aside / "mine.txt").read_text() == "precious"
    assert str(aside) in note
    assert list(folder.iterdir()) == []
    with pytest.raises(RunFolderError, match="is a file"):
        run_folder.prepare(aside / "mine.txt")


def test_metrics_are_readable_while_written_and_cut_on_resume(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": float("nan") if step == 20 else 1.5})
        assert metrics.read_metrics(tmp_path)[-1]["step"] == step
    log.close()
    with open(tmp_path / metrics.NAME, "a") as handle:
        handle.write('{"step": 40, "lo')  # a crash in the middle of a line
    log = metrics.MetricsLog(tmp_path, resume_step=20)
    log.write({"step": 30, "loss": 2.5})
    log.close()
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [10, 20, 30]
    assert metrics.read_metrics(tmp_path)[1]["loss"] is None


def test_a_run_of_version_0_1_0_is_evaluated_and_continued(tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(OLD_RUN, folder)
    assert cli.main(["evaluate", str(folder), "--max-images", "8", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["negative_elbo"] == pytest.approx(OLD_BOUND, rel=1e-5)
    assert cli.main(["train", "--resume", "--out", str(folder), "--max-steps", "3", "--quiet"]) == 0
    assert checkpoint.load(folder)["progress"]["step"] == 3
