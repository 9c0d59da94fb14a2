"""Processes started by torchrun, mpirun or srun find one another, and notice when they were started differently."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from processes import environment, free_port, ranks
from training_runs import trainer

from nvae_fast.training.launch import Launch, find_launch

pytestmark = pytest.mark.usefixtures("one_thread")

TORCHRUN = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="5")
OPEN_MPI = dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK="1")
SLURM = dict(SLURM_PROCID="3", SLURM_STEP_NUM_TASKS="4", SLURM_LOCALID="1", SLURM_NTASKS="4")
MPICH = dict(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        (TORCHRUN, Launch(1, 4, 1, "a", "5")),
        (TORCHRUN | OPEN_MPI | SLURM, Launch(1, 4, 1, "a", "5")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, Launch(1, 2, 1, "127.0.0.1", "29500")),
        (OPEN_MPI | {"MASTER_ADDR": "b", "MASTER_PORT": "7"}, Launch(1, 2, 1, "b", "7")),
        (MPICH, Launch(1, 2, 1, "127.0.0.1", "29500")),
        (SLURM | {"SLURM_STEP_NUM_NODES": "1"}, Launch(3, 4, 1, "127.0.0.1", "29500")),
        (SLURM | {"MASTER_ADDR": "b"}, Launch(3, 4, 1, "b", "29500")),
        # A batch script of four tasks, outside srun, is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Launch()),
    ],
)
def test_variables_of_launchers(variables, expected):
    assert find_launch(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set and RANK is not"),
        ({"RANK": "2"}, "RANK=2 is set and WORLD_SIZE is not"),
        (TORCHRUN | {"RANK": "4"}, r"RANK must be below WORLD_SIZE \(4\), got 4"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE must be a whole number >= 1, got 'many'"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "LOCAL_RANK must be a whole number >= 0, got '-1'"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "there are 2 processes, but MASTER_ADDR is not set"),
        (SLURM | {"SLURM_STEP_NUM_NODES": "2"}, "MASTER_ADDR is not set"),
    ],
)
def test_variables_that_do_not_suffice(variables, message):
    with pytest.raises(ValueError, match=message):
        find_launch(variables)


def test_processes_of_mpirun_are_one_run():
    """Not two runs that write one file."""
    port = free_port()
    join = "from nvae_fast.training import start_world as s\nw = s('cpu')\nprint(w.size, *w.largest(w.rank))"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", join],
            env=environment(
                OMPI_COMM_WORLD_RANK=str(rank), OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_LOCAL_RANK=str(rank),
                OMPI_COMM_WORLD_LOCAL_SIZE="2", MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.communicate(timeout=120)[0] for process in both] == ["2 1.0\n"] * 2


# Commands that must fail, one after another in the same processes. A line: shared words | those of process 0 | of process 1.
DIFFERENT = """
import os, sys, torch
import torch.distributed as dist
torch.set_num_threads(1)
from nvae_fast.cli import main
for port, line in zip(sys.argv[1].split(), sys.argv[2:]):
    os.environ["MASTER_PORT"] = port
    shared, *own = line.split("|")
    print(main([*shared.split(), *own[int(os.environ["RANK"])].split()]), file=sys.stderr)
    dist.destroy_process_group()
"""


def test_processes_that_differ_are_named(tmp_path, digits):
    run = trainer(tmp_path / "run", digits)
    run.save()
    (tmp_path / "other").mkdir()
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0] += 1e-3
    run.folder, run._last_saved = tmp_path / "other", -1
    run.save()
    machine = "--device cpu --threads 1 --quiet"
    evaluate, sample = (
        f"evaluate --data digits --max-images 4 {machine}",
        f"sample -n 4 --out {tmp_path}/s.png {machine}",
    )
    train = f"train --data digits --out {tmp_path}/run --resume {machine}".replace(" --threads 1", "")
    cases = [
        (f"{evaluate} {tmp_path}/run | | --seed 5 --batch-size 2", ["--batch-size, of", "--seed, of"], ["32", "2"]),
        (f"{evaluate} {tmp_path}/run | --split test | --split train", ["--split"], ["test", "train"]),
        (f"{evaluate} | {tmp_path}/run | {tmp_path}/other", ["the model's weights"], ["", ""]),
        (f"{sample} {tmp_path}/run | | --temperature 0.5", ["--temperature"], ["1.0", "0.5"]),
        (f"{sample} | {tmp_path}/run | {tmp_path}/other", ["the model's weights"], ["", ""]),
        (f"| {sample} {tmp_path}/run | {evaluate} {tmp_path}/run", ["the command"], ["sample", "evaluate"]),
        (f"{train} | --max-steps 8 | --max-steps 9", ["--max-steps"], ["8", "9"]),
    ]  # fmt: skip
    ports = " ".join(free_port() for _ in cases)
    for rank, process in enumerate(ranks(2, [ports, *(line for line, *_ in cases)], start=DIFFERENT)):
        _, text = process.communicate(timeout=300)
        said = [part for part in text.splitlines() if part]
        assert said[1::2] == ["2"] * len(cases), text
        for error, (_, names, values) in zip(said[::2], cases, strict=True):
            assert f"process {rank} of 2: error: the processes of this run differ in {names[0]}" in error
            assert all(name in error for name in names)
            assert f"of which process {rank} of 2 has {values[rank]}" in error
    assert not (tmp_path / "s.png").exists()
