"""Numbered checkpoints: which are kept, which are removed, and what is left alone."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from training_runs import TINY_TRAINING, trainer

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.training import checkpoint, numbered

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(folder: Path) -> list[int]:
    return sorted(
        int(file.stem.split("-")[1]) for file in folder.glob("checkpoint-*.pt") if file.stem[-1].isdigit()
    )


def steps(folder: Path) -> dict[int, int]:
    return {
        number: checkpoint.load(folder / numbered.name_of(number))["progress"]["step"]
        for number in numbers(folder)
    }


def test_the_last_numbered_checkpoints_are_kept(tmp_path, digits):
    folder = tmp_path / "run"
    config = TINY_TRAINING.replace(checkpoint_every=2, max_steps=9, keep=3)
    trainer(folder, digits, config).run()
    assert steps(folder) == {6: 6, 8: 8, 9: 9}
    newest = numbered.name_of(9)
    assert (folder / newest).samefile(folder / checkpoint.NAME)  # no second serialisation
    _, facts = nf.training.load_model(folder / numbered.name_of(6))
    assert facts["step"] == 6
    state = checkpoint.load_training(folder)
    trainer(folder, digits, config.replace(max_steps=12, keep=2), state=state).run()
    assert steps(folder) == {10: 10, 12: 12}


def test_without_keep_nothing_is_numbered_and_nothing_removed(tmp_path, digits):
    folder = tmp_path / "run"
    trainer(folder, digits, TINY_TRAINING.replace(keep=2)).run()
    assert numbers(folder) == [3, 6]
    state = checkpoint.load_training(folder)
    trainer(folder, digits, TINY_TRAINING.replace(max_steps=8), state=state).run()
    assert numbers(folder) == [3, 6]


def test_files_that_the_run_has_not_made_are_left_alone(tmp_path, digits):
    folder = tmp_path / "run"
    folder.mkdir()
    config = TINY_TRAINING.replace(checkpoint_every=1, max_steps=4, keep=1)
    (folder / numbered.name_of(1)).write_bytes(b"another run's")
    (folder / numbered.name_of(3)).write_bytes(b"the user's")
    with pytest.warns(UserWarning, match=r"checkpoint-000000\d\.pt was not made by this run") as caught:
        trainer(folder, digits, config).run()
    assert len(caught) == 2
    assert (folder / numbered.name_of(1)).read_bytes() == b"another run's"
    assert (folder / numbered.name_of(3)).read_bytes() == b"the user's"
    assert numbers(folder) == [1, 3, 4]
    # One of the run's own that was replaced since is no longer the run's.
    (folder / numbered.name_of(4)).unlink()
    (folder / numbered.name_of(4)).write_bytes(b"precious")
    state = checkpoint.load_training(folder)
    trainer(folder, digits, config.replace(max_steps=6), state=state).run()
    assert (folder / numbered.name_of(4)).read_bytes() == b"precious"
    assert numbers(folder) == [1, 3, 4, 6]


def test_without_hard_links_numbered_checkpoints_are_copies(tmp_path, digits, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError("no hard links")

    monkeypatch.setattr(os, "link", refuse)
    folder = tmp_path / "run"
    trainer(folder, digits, TINY_TRAINING.replace(checkpoint_every=1, max_steps=4, keep=2)).run()
    assert steps(folder) == {3: 3, 4: 4}
    assert not (folder / numbered.name_of(4)).samefile(folder / checkpoint.NAME)


def test_a_run_that_is_set_back_replaces_its_later_numbers(tmp_path, digits):
    folder = tmp_path / "run"
    config = TINY_TRAINING.replace(checkpoint_every=2, keep=2)
    trainer(folder, digits, config).run()
    assert numbers(folder) == [4, 6]
    checkpoint.set_aside(folder, "damaged")
    state = checkpoint.load_training(folder)
    assert state["progress"]["step"] == 4
    config = config.replace(checkpoint_every=1, max_steps=5, keep=1)
    trainer(folder, digits, config, state=state).run()
    assert numbers(folder) == [5]  # not 6, which is of the abandoned part


def test_a_crash_between_record_and_file_leaves_nothing_behind(tmp_path, digits, monkeypatch):
    folder = tmp_path / "run"
    config = TINY_TRAINING.replace(checkpoint_every=2, keep=2)

    def crash(*_args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(numbered, "keep_as", crash)
        with pytest.raises(nf.training.RunFolderError, match=r"checkpoint-0000002\.pt"):
            trainer(folder, digits, config).run()
    state = checkpoint.load_training(folder)
    assert state["progress"]["step"] == 2
    trainer(folder, digits, config, state=state).run()
    assert steps(folder) == {4: 4, 6: 6}


def test_evaluate_takes_a_numbered_checkpoint(tmp_path, digits, capsys):
    folder = tmp_path / "run"
    trainer(folder, digits, TINY_TRAINING.replace(keep=1, max_steps=2)).run()
    words = [
        "evaluate",
        folder / numbered.name_of(2),
        "--data",
        "digits",
        "--max-images",
        "4",
        "--json",
        "--quiet",
    ]
    capsys.readouterr()
    assert cli.main(list(map(str, words))) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checkpoint"].endswith("checkpoint-0000002.pt")
    assert math.isfinite(report["negative_elbo"])
