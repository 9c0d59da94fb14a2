"""evaluate and sample by several processes: the files that one process writes, bit for bit."""

from __future__ import annotations

import json

import pytest
from processes import ranks
from training_runs import trainer

from nvae_fast.cli import main
from nvae_fast.training import World
from nvae_fast.training import checkpoint as checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

# Two commands in the processes of one start: importing takes longer than they do.
BOTH = """
import os, sys, torch
torch.set_num_threads(1)
from nvae_fast.cli import main
options = sys.argv[1:]
cut = options.index("sample")
assert main(options[:cut]) == 0
os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]
assert main(options[cut:]) == 0
"""


def commands(run, out) -> tuple[list[str], list[str]]:
    machine = ["--device", "cpu", "--threads", "1", "--quiet"]
    limits = ["--max-images", "10", "--batch-size", "3", "--samples", "2", "--seed", "4"]
    evaluate = [
        "evaluate",
        str(run),
        "--data",
        "digits",
        *limits,
        "--json",
        str(out / "result.json"),
        *machine,
    ]
    size = ["--number", "10", "--batch-size", "4", "--pixels", "sample", "--npy", str(out / "images.npy")]
    readjusted = ["--readjust", "--readjust-passes", "2", "--temperature", "0.8"]
    return evaluate, ["sample", str(run), *size, *readjusted, "--out", str(out / "grid.png"), *machine]


def test_evaluate_and_sample_do_not_depend_on_the_processes(tmp_path, digits, capsys):
    trainer(tmp_path / "run", digits).run()
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    three = ranks(3, [w for c in commands(tmp_path / "run", tmp_path / "three") for w in c], start=BOTH)
    for rank, process in enumerate(three):
        out, text = process.communicate(timeout=300)
        assert process.returncode == 0, text
        assert not out, f"process {rank} says {out}"
    for kept in (tmp_path / "run").glob("*.bn-*"):
        kept.unlink()  # or the second would read the statistics of the first
    for command in commands(tmp_path / "run", tmp_path / "one"):
        assert main(command) == 0
    for name in ("result.json", "images.npy", "grid.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes(), name
    assert json.loads((tmp_path / "one" / "result.json").read_text())["images"] == 10


def test_a_step_that_cannot_be_shared_says_who_can(tmp_path, digits):
    from nvae_fast.cli.train import _shared_out

    run = trainer(tmp_path, digits)
    run.save()
    state = checkpoints.load(tmp_path)
    notes: list[str] = []
    assert _shared_out(run.config, state, notes.append, World(0, 2)).batch_size == 2
    assert "--batch-size 4 becomes 2, a step has the same 4 images" in notes[0]
    with pytest.raises(
        ValueError, match=r"has 4 images .*3 processes cannot share.*one of 1, 2, 4 processes"
    ):
        _shared_out(run.config, state, notes.append, World(0, 3))
