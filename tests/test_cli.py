"""The commands as a user types them: results, files, exit codes, one-line errors, complete help."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.cli import options
from nvae_fast.training import TrainingConfig, checkpoint, load_model, metrics

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = [
    "--num_channels_enc", "4", "--num_channels_dec", "4", "--num_latent_scales", "1",
    "--num_groups_per_scale=2",
    "--num_latent_per_group", "2", "--num_preprocess_blocks", "1", "--num_postprocess_blocks", "1",
    "--num-preprocess-cells", "1", "--num-postprocess-cells", "1",
]  # fmt: skip
SHORT = [
    "--max-steps", "4", "--batch-size", "4", "--log-every", "2", "--threads", "1", "--time-limit", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps, made once; tests only read it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "--data", "digits", "--out", str(folder), *MODEL, *SHORT]) == 0
    return folder


def failing(capsys, *words: str) -> str:
    """The one line of error of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line]
    assert lines, "no message"
    assert lines[-1].startswith("nvae_fast: error: ")
    assert "Traceback" not in captured.err
    return lines[-1]


# ---------------------------------------------------------------------------- help


def actions() -> list[tuple[str, argparse.Action]]:
    (commands,) = [a for a in cli.make_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return [(name, action) for name, parser in commands.choices.items() for action in parser._actions]


def test_every_option_has_help_with_its_default():
    seen = set()
    for command, action in actions():
        if isinstance(action, argparse._HelpAction):
            continue
        name = f"{command} {action.option_strings or action.dest}"
        assert action.help, name
        if action.option_strings:
            assert "default: " in action.help, name
            if action.default not in (argparse.SUPPRESS, None, False):
                assert f"default: {action.default}" in action.help.replace("default: 1)", "default: 1.0)"), (
                    name
                )
        seen.add((command, action.dest))
    for field in dataclasses.fields(TrainingConfig):
        assert ("train", field.name) in seen
    for field in dataclasses.fields(nf.NVAEConfig):
        assert ("train", field.name) in seen


def test_help_shows_the_real_defaults_and_units():
    text = {action.dest: action.help for command, action in actions() if command == "train"}
    assert "(default: 0.01; a preset" in text["learning_rate"]
    assert "[minutes]" in text["time_limit"]
    assert "(default: none" in text["time_limit"]
    assert "[steps]" in text["checkpoint_every"]
    assert "(default: yes" in text["channels_last"]
    config = nf.NVAEConfig()
    assert f"(default: {config.num_latent_per_group};" in text["num_latent_per_group"]


@pytest.mark.parametrize("command", ["train", "evaluate", "fid", "sample", "plot", "convert", "info"])
def test_help_prints(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert "usage: nvae_fast" in capsys.readouterr().out


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "nvae_fast", "trian"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert done.returncode == 2
    assert re.fullmatch(r"nvae_fast: error: .*invalid choice: 'trian'.*\n", done.stderr)


# ---------------------------------------------------------------------------- train


def test_train_leaves_a_whole_run(run):
    names = {f.name for f in run.iterdir()}
    assert {"checkpoint.pt", "metrics.jsonl", "config.json", "samples.png", "reconstructions.png"} <= names
    assert [line["step"] for line in metrics.read_metrics(run)] == [2, 4]
    for name in ("samples.png", "reconstructions.png"):
        assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["num_channels_enc"] == 4
    assert config["training"]["max_steps"] == 4
    assert config["data"]["source"] == "digits"


def test_train_refuses_an_existing_run_and_moves_it_aside_when_told(run, tmp_path, capsys):
    before = (run / "checkpoint.pt").read_bytes()
    assert "is not empty: --resume" in failing(
        capsys, "train", "--data", "digits", "--out", run, *MODEL, *SHORT
    )
    assert (run / "checkpoint.pt").read_bytes() == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "note.txt").write_text("precious")
    assert (
        cli.main(
            [
                "train",
                "--data",
                "digits",
                "--out",
                str(mine),
                "--overwrite",
                *MODEL,
                *SHORT,
                "--max-steps",
                "1",
            ]
        )
        == 0
    )
    (aside,) = tmp_path.glob("mine.replaced-*")
    assert (aside / "note.txt").read_text() == "precious"


def configuration(*words: str) -> tuple[TrainingConfig, nf.NVAEConfig, str]:
    """What `train` with these options trains, without training it."""
    from nvae_fast.cli.train import new_run

    arguments = cli.parse(["train", *words])
    training = options.given(arguments, [field.name for field in dataclasses.fields(TrainingConfig)])
    model = options.given(arguments, options.MODEL_HELP)
    return new_run(arguments.preset, arguments.data, training, model)


def test_where_nothing_is_chosen_options_have_the_defaults_of_the_library():
    training, model, data = configuration("--data", "photos", "--num-channels-enc", "8")
    assert training == TrainingConfig()
    assert model == nf.NVAEConfig(dataset="photos", num_channels_enc=8)
    assert data == "photos"
    assert configuration("--data", "x.npy")[1] == nf.NVAEConfig()
    assert configuration("--data", "digits", "--dataset", "mnist")[1] == nf.NVAEConfig(dataset="mnist")


def test_options_given_win_over_those_of_the_preset():
    demo = nf.training.preset("digits_demo")
    assert configuration("--preset", "digits_demo") == (demo.training, demo.model_config(), "digits")
    steps = 50  # an epoch
    training, _, _ = configuration("--preset", "digits_demo", "--epochs", "3")
    assert (training.total_steps(steps), training.time_limit) == (150, None)
    training, _, _ = configuration("--preset", "digits_demo", "--max-steps", "5000")
    assert (training.total_steps(steps), training.time_limit) == (5000, None)
    training, _, _ = configuration("--preset", "digits_demo", "--max-steps", "5000", "--time-limit", "7")
    assert (training.total_steps(steps), training.time_limit) == (5000, 7.0)
    training, _, _ = configuration("--preset", "digits_demo", "--time-limit", "7")
    assert (training.total_steps(steps), training.time_limit) == (600, 7.0)
    # Every other option: the value given, and all else as the preset has it.
    changes = {
        "batch_size": 9,
        "threads": 2,
        "sample_temperature": 0.5,
        "num_channels_enc": 6,
        "ada_groups": False,
    }
    for name, value in changes.items():
        option = f"--{name.replace('_', '-')}"
        words = ["--no-ada-groups"] if value is False else [option, str(value)]
        training, model, _ = configuration("--preset", "digits_demo", *words)
        before = demo.training.to_dict() | demo.model_config().to_dict()
        assert training.to_dict() | model.to_dict() == before | {name: value}


def test_epochs_given_to_a_resumed_run_are_heard(tmp_path, capsys):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (12, 32, 32), dtype=np.uint8))
    new = ["train", "--data", str(tmp_path / "images.npy"), "--out", str(tmp_path / "run"), *MODEL, *SHORT]
    assert cli.main([*new, "--time-limit", "9", "--val-fraction", "0"]) == 0
    assert cli.main(["train", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]) == 0
    assert checkpoint.load(tmp_path / "run")["progress"]["step"] == 6  # of 3 an epoch
    text = capsys.readouterr().err
    assert "--max-steps changes from 4 to None from here on" in text
    assert "the run's --time-limit of 9 minutes still holds" in text


def test_resume_continues_and_guards_the_settings(tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["train", "--data", "digits", "--out", str(folder), *MODEL, *SHORT]) == 0
    resume = ["train", "--out", folder, "--resume"]
    assert "--batch-size cannot change when a run is resumed: it has 4, 8" in failing(
        capsys, *resume, "--batch-size", "8"
    )
    assert "num_channels_enc=4, 16 was asked for" in failing(capsys, *resume, "--num-channels-enc", "16")
    assert "the model cannot change" in failing(capsys, *resume, "--preset", "mnist")
    assert "exclude each other" in failing(capsys, *resume, "--overwrite")
    assert cli.main([*map(str, resume), "--max-steps", "6"]) == 0
    assert "--max-steps changes from 4 to 6" in capsys.readouterr().err
    assert checkpoint.load(folder)["progress"]["step"] == 6
    assert [line["step"] for line in metrics.read_metrics(folder)] == [2, 4, 6]
    assert "nothing to resume" in failing(capsys, "train", "--out", tmp_path / "none", "--resume")
    assert not (tmp_path / "none").exists()


def test_a_truncated_checkpoint_names_the_way_out(run, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("checkpoint.pt", "checkpoint-previous.pt"):
        (folder / name).write_bytes((run / name).read_bytes())
    data = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(data[:1000])
    for command in (["evaluate", folder], ["sample", folder, "--out", tmp_path / "s.png"]):
        line = failing(capsys, *command)
        assert f"{folder / 'checkpoint.pt'} is truncated or damaged: " in line
        assert f"; use the previous one, {folder / 'checkpoint-previous.pt'}" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["train", "--max-steps", "inf"], "argument --max-steps: invalid whole number or none value: 'inf'"),
        (["train", "--batch-size", "many"], "argument --batch-size: invalid whole number value: 'many'"),
        (["train", "--learning-rate", "nan"], "--learning-rate must be finite, got nan"),
        (["train", "--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["train", "--preset", "nope"], "invalid choice: 'nope'"),
        (["train", "--preset", "cifar10"], "preset cifar10 needs --data"),
        (["train", "--data", "/does/not/exist"], "/does/not/exist"),
        (["train", "--arch-instance", "nope"], "--arch-instance must be one of"),
        (["train", "--device", "tpu"], "device must be auto, cpu, cuda"),
        (["train", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["sample", "x.pt", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["train", "--data", "digits", "--batch-size", "5000"], "5000"),
        (["train", "--data", "photos", "--data-kind", "xyz"], "kind"),
        (["evaluate", "/does/not/exist"], "no checkpoint at /does/not/exist"),
        (["sample", "x.pt", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["sample", "x.pt", "-n", "0"], "--number must be at least 1, got 0"),
        (["convert", "x.pt"], "the following arguments are required: target"),
        ([], "the following arguments are required: command"),
        (["train"], "--data is missing: give digits, photos or the path"),
        (
            ["train", "--accumulate", "9", "--batch-size", "4"],
            "--accumulate (9) must not exceed --batch-size (4)",
        ),
        (["train", "--workers", "1e18"], "--workers must be at most 1024, got 10"),
        (
            ["train", "--seed", "1e20"],
            "--seed must be at most 9223372036854775807, got 100000000000000000000",
        ),
        (["train", "--time-limit", "nan"], "--time-limit must be finite, got nan"),
        (["train", "--data", "digits", "--threads", "1e6"], "--threads must be at most "),
        (["evaluate", "x.pt", "--threads", "1e6"], "--threads must be at most "),
        (["evaluate", "x.pt", "--samples", "0"], "--samples must be at least 1, got 0"),
        (["evaluate", "x.pt", "--max-images", "-3"], "--max-images must be at least 1, got -3"),
        (
            ["evaluate", "x.pt", "--json", "/does/not/exist.json"],
            "the folder of /does/not/exist.json does not exist",
        ),
        (["sample", "x.pt", "--threads", "1e6"], "--threads must be at most "),
        (
            ["train", "--data", "digits", "--num-latent-scales", "99"],
            "--num-latent-scales must be <= 16, got 99",
        ),
        (
            ["train", "--data", "digits", "--num-channels-enc", "1e18"],
            "--num-channels-enc must be <= 65536, got 1",
        ),
        (
            ["train", "--data", "digits", "--num-nf", "9000"],
            "ask for 27011 cells, at most 10000 are possible",
        ),
        (["sample", "x.pt", "--temperature", "inf"], "--temperature must be finite, got inf"),
        (["sample", "x.pt", "-n", "1e18"], "--number must be at most 1000000000, got 10"),
        (["sample", "x.pt", "--columns", "1e18"], "--columns must be at most 10000, got 10"),
        (["train", "--cont_training"], "did you mean --resume, which continues the run in --out?"),
        (["train", "--num_process_per_node", "8"], "torchrun --nproc-per-node N"),
        (["train", "--lerning_rate=3"], "did you mean --learning-rate?"),
        (["sample", "x.pt", "--temp", "0.7"], "did you mean --temperature?"),
        (["evaluate", "x.pt", "--num_iw_samples", "9"], "did you mean --samples, the draws"),
    ],
)
def test_bad_arguments_are_one_line_and_write_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["evaluate", "/does/not/exist", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("nvae_fast: error: no checkpoint")


# ---------------------------------------------------------------------------- evaluate


def test_evaluate_table_and_json(run, tmp_path, capsys):
    words = [
        "evaluate",
        str(run),
        "--samples",
        "2",
        "--max-images",
        "8",
        "--batch-size",
        "4",
        "--threads",
        "1",
    ]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert "8 images of digits (test)" in table
    assert re.search(r"negative ELBO +\d+\.\d{4} +\d\.\d{5}", table)
    assert cli.main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["samples"] == 2
    assert report["images"] == 8
    assert f"{report['negative_elbo']:.4f}" in table
    target = tmp_path / "report.json"
    assert cli.main([*words, "--json", str(target), "--seed", "1"]) == 0
    other = json.loads(target.read_text())
    assert other.keys() == report.keys()
    assert other["negative_log_likelihood"] != report["negative_log_likelihood"]


def test_evaluate_on_other_data(run, tmp_path, capsys):
    wrong = tmp_path / "wrong.npy"
    np.save(wrong, np.zeros((3, 32, 32, 3), np.uint8))
    assert str(wrong) in failing(capsys, "evaluate", run, "--data", wrong)
    right = tmp_path / "right.npy"
    np.save(right, np.random.default_rng(0).integers(0, 256, (5, 32, 32), dtype=np.uint8))
    assert cli.main(["evaluate", str(run), "--data", str(right), "--quiet"]) == 0
    assert "5 images" in capsys.readouterr().out


# ---------------------------------------------------------------------------- sample


def test_sample_writes_a_grid_and_an_array_that_data_reads(run, tmp_path, capsys):
    grid, array = tmp_path / "s.png", tmp_path / "s.npy"
    words = ["sample", str(run), "-n", "6", "--batch-size", "4", "--out", str(grid), "--npy", str(array)]
    assert cli.main([*words, "--seed", "3", "--temperature", "0.8"]) == 0
    pixels = np.load(array)
    assert pixels.shape == (6, 32, 32, 1)
    assert pixels.dtype == np.uint8
    assert len(nf.data.open_dataset(array)) == 6
    first = grid.read_bytes()
    assert "exists already: --overwrite replaces it" in failing(capsys, *words)
    assert grid.read_bytes() == first
    assert cli.main([*words, "--seed", "3", "--temperature", "0.8", "--overwrite"]) == 0
    assert grid.read_bytes() == first
    assert cli.main([*words, "--seed", "4", "--temperature", "0.8", "--overwrite"]) == 0
    assert grid.read_bytes() != first


def test_readjusted_statistics_are_kept_beside_the_checkpoint(run, tmp_path, capsys, monkeypatch):
    source = tmp_path / "model.pt"
    source.write_bytes((run / "checkpoint.pt").read_bytes())
    words = ["sample", str(source), "-n", "4", "--out", str(tmp_path / "s.png"), "--overwrite", "--readjust"]
    words += ["--readjust-passes", "2"]
    assert cli.main(words[:-3]) == 0
    plain = (tmp_path / "s.png").read_bytes()
    assert cli.main(words) == 0
    first = (tmp_path / "s.png").read_bytes()
    assert first != plain
    (cache,) = tmp_path.glob("model.bn-t1-p2-*.pt")
    calls = []
    real = nf.NVAE.readjust_batch_norm
    monkeypatch.setattr(
        nf.NVAE, "readjust_batch_norm", lambda self, *a, **k: (calls.append(1), real(self, *a, **k))[1]
    )
    assert cli.main(words) == 0
    assert not calls
    assert (tmp_path / "s.png").read_bytes() == first
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 64
    for count, damaged in enumerate((whole[:500], flipped), 1):  # a damaged cache is made again
        cache.write_bytes(damaged)
        assert cli.main(words) == 0
        assert len(calls) == count
        assert (tmp_path / "s.png").read_bytes() == first
    assert cli.main([*words, "--temperature", "0.5"]) == 0
    assert len(calls) == 3
    assert len(list(tmp_path.glob("model.bn-*.pt"))) == 2


# ---------------------------------------------------------------------------- convert


def test_convert_there_and_back(run, tmp_path, capsys):
    official, ours = tmp_path / "official.pt", tmp_path / "ours.pt"
    assert cli.main(["convert", str(run), str(official)]) == 0
    assert checkpoint.sniff(official) == "other"
    assert "exists already" in failing(capsys, "convert", run, official)
    assert cli.main(["convert", str(official), str(ours)]) == 0
    start, end = checkpoint.load(run), checkpoint.load(ours)
    assert start["model_config"] == end["model_config"]
    for name, value in start["model"].items():
        if torch.is_tensor(value) and not name.startswith("spectral."):
            assert torch.equal(value, end["model"][name]), name
    reports = []
    for file in (run, official, ours):
        capsys.readouterr()
        words = ["evaluate", str(file), "--data", "digits", "--max-images", "4", "--json", "--quiet"]
        assert cli.main(words) == 0
        reports.append(json.loads(capsys.readouterr().out)["negative_log_likelihood"])
    assert reports[1] == pytest.approx(reports[0], rel=1e-5)
    assert reports[2] == pytest.approx(reports[0], rel=1e-5)
    assert "give --data" in failing(capsys, "evaluate", ours)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (resumed / "checkpoint.pt").write_bytes(ours.read_bytes())
    assert "holds a model only" in failing(capsys, "train", "--resume", "--out", resumed)


def test_convert_to_safetensors_and_back(run, tmp_path, capsys):
    library = pytest.importorskip("safetensors")
    tensors, ours, official = tmp_path / "model.safetensors", tmp_path / "ours.pt", tmp_path / "official.pt"
    assert cli.main(["convert", str(run), str(tensors)]) == 0
    start = checkpoint.load(run)
    with library.safe_open(tensors, framework="pt") as file:
        assert json.loads(file.metadata()["nvae_fast.model_config"]) == start["model_config"]
        assert set(file.keys()) == {name for name, value in start["model"].items() if torch.is_tensor(value)}
    assert "exists already" in failing(capsys, "convert", run, tensors)
    assert cli.main(["convert", str(tensors), str(ours)]) == 0
    end = checkpoint.load(ours)
    assert end["model_config"] == start["model_config"]
    for name, value in end["model"].items():
        assert torch.equal(value, start["model"][name]), name
    model, facts = load_model(tensors)
    assert facts["kind"] == "nvae_fast"
    assert torch.equal(model.sample(2, seed=1), load_model(run)[0].sample(2, seed=1))
    # An official checkpoint has no statistics of the spectral estimate; the weights are the same.
    assert cli.main(["convert", str(run), str(official)]) == 0
    assert cli.main(["convert", str(official), str(tensors), "--overwrite"]) == 0
    assert torch.equal(load_model(tensors)[0].sample(2, seed=1), model.sample(2, seed=1))


def test_convert_refuses_other_safetensors_files(tmp_path, capsys):
    library = pytest.importorskip("safetensors.torch")
    source, target = tmp_path / "other.safetensors", tmp_path / "ours.pt"
    library.save_file({"weight": torch.zeros(3)}, source)
    assert "holds tensors without the options of a model" in failing(capsys, "convert", source, target)
    library.save_file({"weight": torch.zeros(3)}, source, {"nvae_fast.model_config": "{}"})
    assert "does not fit this nvae_fast" in failing(capsys, "convert", source, target)
    source.write_bytes(source.read_bytes()[:40])
    assert "is truncated or no safetensors file" in failing(capsys, "convert", source, target)
    renamed = tmp_path / "renamed.pt"
    library.save_file({"weight": torch.zeros(3)}, renamed)
    assert ".safetensors" in failing(capsys, "convert", renamed, target)
    assert not target.exists()


# ---------------------------------------------------------------------------- info


def test_info_says_what_runs_where(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("nvae_fast", torch.__version__, "residual_normal", "extension", "cpu"):
        assert word in text
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"].keys() == nf.backends().keys()
    assert report["extension"]["loaded"] or report["extension"]["reason"]
