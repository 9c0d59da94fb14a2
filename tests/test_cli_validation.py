"""Validation while training, from the command line and over two processes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from processes import free_port, ranks
from test_training_loop import same_runs
from test_validation import lines, same_best
from training_runs import TINY

from nvae_fast import cli
from nvae_fast.data import open_dataset
from nvae_fast.training import (
    checkpoint,
    evaluate,
    load_model,
)
from nvae_fast.training import validation as module

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [
    "train", "--batch-size", "4", "--threads", "1", "--device", "cpu", "--log-every", "2",
    *(word for name, value in TINY.items() for word in (f"--{name}", str(value))),
]  # fmt: skip
OFTEN = [
    "--validate-every",
    "1",
    "--validate-images",
    "5",
    "--validate-samples",
    "2",
    "--validate-final-samples",
    "4",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Eight images to train on and six to validate on."""
    folder = tmp_path_factory.mktemp("parts")
    images = np.random.default_rng(0).integers(0, 256, (14, 32, 32), dtype=np.uint8)
    np.save(folder / "train.npy", images[:8])
    np.save(folder / "validation.npy", images[8:])
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than the training of these tests."""
    monkeypatch.setattr("nvae_fast.cli.train.final_pictures", lambda *given: None)


@pytest.mark.usefixtures("no_pictures")
def test_the_command_line(parts, tmp_path, capsys):
    run = tmp_path / "run"
    assert (
        cli.main([*WORDS, "--data", str(parts), "--out", str(run), "--epochs", "2", *OFTEN, "--tensorboard"])
        == 0
    )
    said = capsys.readouterr().err
    assert "validation on 5 validation images every 1 epoch(s) and at the end" in said
    assert "step 2: validation" in said
    assert "final evaluation, 4 draws for each image" in said
    assert [line["step"] for line in lines(run, "val")] == [2, 4]
    best = checkpoint.load(run / checkpoint.BEST)["validation"]
    words = [
        "--split",
        "validation",
        "--samples",
        "2",
        "--batch-size",
        "4",
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    assert cli.main(["evaluate", str(run / checkpoint.BEST), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert cli.main(["evaluate", str(run), "--threads", "1", "--device", "cpu"]) == 0
    assert "final" not in capsys.readouterr().out
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert {"val/bits_per_dim", "val/kl_per_group/01", "final/bits_per_dim"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("val/bits_per_dim")] == [2, 4]
    resume = [*WORDS[:1], "--resume", "--out", str(run), "--epochs", "3"]
    assert cli.main([*resume, "--validate-samples", "3"]) == 2
    assert (
        "--validate-samples cannot change when a run is resumed: it has 2, 3 was asked for"
        in capsys.readouterr().err
    )
    assert cli.main([*resume, "--validate-every", "2", "--validate-final-samples", "0"]) == 0
    assert [line["step"] for line in lines(run, "val")] == [2, 4, 6]
    assert [line["step"] for line in lines(run, "final")] == [4]
    assert checkpoint.load(run)["validation"]["best"] <= best["best"]


@pytest.mark.usefixtures("no_pictures")
def test_data_without_other_parts_are_trained_on_without_validation(parts, tmp_path, capsys):
    words = [*WORDS, "--data", str(parts / "train.npy"), "--max-steps", "2", "--val-fraction", "0"]
    assert cli.main([*words, "--out", str(tmp_path / "run"), "--validate-every", "1"]) == 0
    assert capsys.readouterr().err.count("has no validation or test part: training without validation") == 1
    assert not lines(tmp_path / "run", "val")
    assert not (tmp_path / "run" / checkpoint.BEST).exists()
    assert cli.main([*words, "--out", str(tmp_path / "off"), "--validate-every", "0"]) == 0
    assert "validation" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--validate-every", "-1"], "--validate-every must be at least 0, got -1"),
        (["--validate-images", "0"], "--validate-images must be at least 1, got 0"),
        (["--validate-samples", "0"], "--validate-samples must be at least 1, got 0"),
        (["--validate-final-samples", "-1"], "--validate-final-samples must be at least 0, got -1"),
        (
            ["--validate-every", "0", "--validate-images", "5"],
            "--validate-images is of no use without validation",
        ),
        (["--validate-every", "0", "--validate-samples", "5"], "which --validate-every 0 switches off"),
        (["--validate-every", "0", "--validate-final-samples", "5"], "--validate-final-samples is of no use"),
    ],
)
def test_errors_name_the_option(parts, tmp_path, capsys, words, message):
    assert cli.main([*WORDS, "--data", str(parts), "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# In each of two processes: a complete run, one in which process 1 is signalled in the second validation, its continuation.
THREE_RUNS = """
import os, signal, sys, torch
torch.set_num_threads(1)
import nvae_fast.cli.train
from nvae_fast.cli import main
from nvae_fast.training import checkpoint, validation
nvae_fast.cli.train.final_pictures = lambda *given: None  # which take longer than the rest
ports, folder, words = sys.argv[1].split(), sys.argv[2], sys.argv[3:]
real, count = validation.evaluate, 0
def evaluate(model, dataset, **options):
    global count
    count += 1
    if count == 2 and options["world"].rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(model, dataset, **options)
codes = []
whole, cut = ["--out", folder + "/whole"], ["--out", folder + "/cut"]
for port, more in zip(ports, (whole, cut, [*cut, "--resume"])):
    os.environ["MASTER_PORT"] = port
    validation.evaluate = evaluate if more == cut else real
    codes.append(main([*words, *more]))
    if len(codes) == 2:
        print(checkpoint.load(folder + "/cut")["progress"]["step"])
print(codes)
"""


def test_processes_share_the_images_and_stop_together(parts, tmp_path, capsys):
    words = [*WORDS, "--data", str(parts), "--batch-size", "2", "--epochs", "2", *OFTEN, "--quiet"]
    ports = " ".join(free_port() for _ in range(3))
    for process in ranks(2, [ports, str(tmp_path), *words], start=THREE_RUNS):
        out, err = process.communicate(timeout=300)
        assert out.splitlines() == ["4", "[0, 143, 0]"], err
    same_runs(tmp_path / "whole", tmp_path / "cut")
    same_best(tmp_path / "whole", tmp_path / "cut")
    model, _ = load_model(tmp_path / "whole")
    images = module._spread(open_dataset(str(parts), split="validation", likelihood="bernoulli"), 5)
    alone = evaluate(model, images, samples=4, batch_size=2)
    (final,) = lines(tmp_path / "whole", "final")
    assert final["final/bits_per_dim"] == alone.negative_log_likelihood_bits_per_dim
    assert final["final/kl_per_group"] == alone.kl_per_group
