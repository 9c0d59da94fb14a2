"""What the commands say: options nearly right, finished runs, where pictures are, data that moved, names of options."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_files import random_pixels
from training_runs import TINY_TRAINING, tiny_model

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.cli import options
from nvae_fast.cli.program import one_line
from nvae_fast.training import Trainer, checkpoint, progress

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = [
    "--num-channels-enc", "4", "--num-channels-dec", "4", "--num-groups-per-scale", "1", "--num-latent-scales", "2",
    "--num-latent-per-group", "2", "--sample-readjust-passes", "0", "--max-steps", "1", "--batch-size", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A folder with images and a run on them by a relative path; tests only read it."""
    folder = tmp_path_factory.mktemp("project")
    np.save(folder / "images.npy", random_pixels(12, 16, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["train", "--data", "images.npy", "--out", "runs/one", *WORDS]) == 0
    return folder


def failing(capsys, *words) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--preset", "cifar"], "did you mean cifar10?"),
        (["presets", "celeba64"], "did you mean celeba_64?"),
        (["trian"], "did you mean train?"),
        (["train", "--lerning-rate", "1"], "did you mean --learning-rate?"),
    ],
)
def test_a_word_that_is_nearly_right(words, message, capsys):
    assert message in failing(capsys, *words)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nvae_fast {nf.__version__}\n"


def test_every_preset_of_the_command_line_is_one_of_the_model():
    for name, entry in nf.training.PRESETS.items():
        assert nf.NVAEConfig.preset(name) == entry.model_config()


def test_temperature_zero(project, tmp_path):
    words = [
        "sample",
        str(project / "runs/one"),
        "-n",
        "3",
        "--temperature",
        "0",
        "--pixels",
        "mean",
        "--quiet",
    ]
    for seed in "01":
        assert cli.main([*words, "--seed", seed, "--out", str(tmp_path / f"{seed}.png")]) == 0
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    nf.training.TrainingConfig(sample_temperature=0.0)


@pytest.mark.parametrize("command", ["interpolate", "reconstruct"])
def test_a_picture_is_what_its_name_says(project, command, tmp_path, capsys):
    words = [command, project / "runs/one", "--out", tmp_path / "picture.jpg"]
    assert "--out must be a PNG file, whose name ends in .png, got" in failing(capsys, *words)
    words = ["sample", project / "runs/one", "--out", tmp_path / "many", "--grid", tmp_path / "picture.jpg"]
    assert "--grid must be a PNG file" in failing(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_the_last_lines_name_the_pictures_and_the_next_command(project, tmp_path, capsys):
    out = tmp_path / "a run"
    words = ["train", "--data", str(project / "images.npy"), "--out", str(out), *WORDS]
    assert cli.main(words) == 0
    *_, pictures, following = capsys.readouterr().err.splitlines()
    assert pictures == f"pictures: {out / 'samples.png'}, {out / 'reconstructions.png'}"
    assert following.startswith(f"next: python -m nvae_fast sample '{out}', ")


def test_resuming_a_finished_run_says_that_it_is_complete(project, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(project / "runs/one", run)
    before = {file.name: file.stat().st_mtime_ns for file in run.iterdir()}
    resume = ["train", "--resume", "--out", str(run), "--data", str(project / "images.npy")]
    assert cli.main(resume) == 0
    text = capsys.readouterr().err
    assert f"the run in {run} is complete: 1 steps. A larger --epochs or --max-steps goes on with it" in text
    assert "trained" not in text
    assert {name: (run / name).stat().st_mtime_ns for name in before} == before
    assert cli.main([*resume, "--max-steps", "2"]) == 0
    assert "trained 2 steps" in capsys.readouterr().err


def test_evaluate_prints_its_table_with_json_too(project, tmp_path, capsys):
    words = [
        "evaluate",
        str(project / "runs/one"),
        "--data",
        str(project / "images.npy"),
        "--max-images",
        "2",
    ]
    assert cli.main([*words, "--json", str(tmp_path / "report.json")]) == 0
    assert "negative ELBO" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["images"] == 1
    assert "negative ELBO" in printed.err


def test_data_are_found_from_another_folder_and_after_a_move(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = checkpoint.load(project / "runs/one")
    assert state["data"]["source"] == str(project / "images.npy")
    assert cli.main(["evaluate", str(project / "runs/one"), "--quiet"]) == 0
    moved = tmp_path / "moved"
    shutil.copytree(project, moved)
    # As if the project were no longer where it was.
    state["data"].update(source=str(tmp_path / "gone/images.npy"))
    checkpoint.save(state, moved / "runs/one", keep_previous=False)
    capsys.readouterr()
    assert cli.main(["evaluate", str(moved / "runs/one"), "--quiet"]) == 0
    assert f"1 images of {moved / 'images.npy'} (validation)" in capsys.readouterr().out
    # 0.1.0 stored the path as it was given, and nothing else.
    state["data"] = {**state["data"], "source": "../../images.npy"}
    del state["data"]["beside"]
    checkpoint.save(state, moved / "runs/one", keep_previous=False)
    assert cli.main(["evaluate", str(moved / "runs/one"), "--quiet"]) == 0
    resume = ["train", "--resume", "--out", str(moved / "runs/one"), "--max-steps", "2", "--quiet"]
    assert cli.main(resume) == 0
    assert checkpoint.load(moved / "runs/one")["data"]["source"] == str(moved / "images.npy")


def test_the_time_left_is_within_80_columns():
    stream = io.StringIO()
    lines = progress.Progress("train", 100, stream=stream)
    lines.update(1, "x" * 100, force=True)
    lines._started -= 10
    lines.update(50, "x" * 100, force=True)
    assert re.search(r"  left \d:\d\d  ", stream.getvalue().splitlines()[-1][:80])


def test_a_state_of_another_model_is_ten_names_of_each_kind():
    model = tiny_model(num_groups_per_scale=3)
    state = tiny_model(num_groups_per_scale=9).state_dict()
    with pytest.raises(RuntimeError, match="surplus keys: ") as caught:
        model.load_state_dict(state)
    parts = str(caught.value).split("; ")[1:]
    assert [part.split(":")[0] for part in parts] == ["surplus keys", "shapes that differ"]
    assert [len(re.findall(r"(?:: |, )(?=[a-z])", part)) for part in parts] == [
        10,
        20,
    ]  # expected and got, of each
    assert all(re.search(r" and \d+ more", part) for part in parts)


def test_the_command_line_names_options_and_python_arguments(digits, tmp_path, capsys):
    tiny = TINY_TRAINING.replace(batch_size=2000)
    with pytest.raises(ValueError, match=r"^batch_size \(--batch-size\) 2000, times 1 process") as caught:
        Trainer(tiny_model(), tiny, digits, tmp_path)
    assert one_line(caught.value).startswith("--batch-size 2000, times 1 process")
    with pytest.raises(ValueError, match="set image_size and image_channels"):
        nf.training.evaluate(tiny_model(image_size=16), digits)
    wrong = failing(capsys, "train", "--data", "digits", "--data-kind", "digit")
    assert "error: --data-kind: expected one of" in wrong
    for given, shown in (
        ("crop, resample (--crop, --resample): x", "--crop, --resample: x"),
        ("off: val_fraction=0 (--val-fraction 0)", "off: --val-fraction 0"),
        ("that max_skipped=0.01 (--max-skipped-images 0.01) allows", "that --max-skipped-images 0.01 allows"),
        ("the file weights.pth (--inception) is short", "the file weights.pth (--inception) is short"),
    ):
        assert one_line(ValueError(given)) == shown


def test_numbers_may_be_written_large():
    assert options.whole_number("1e6") == 1_000_000
    assert options.whole_number("1_000") == 1000
    with pytest.raises(ValueError):
        options.whole_number("1.5")
