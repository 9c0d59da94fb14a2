"""How processes end: by a signal, beside a process that hangs, or while they wait for one another; and who may write a run."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import START, environment, free_port, ranks
from training_runs import TINY, trainer

from nvae_fast.cli import main
from nvae_fast.training import RunFolderError, checkpoint, metrics, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

TINY_RUN = [
    "--batch-size", "2", "--log-every", "1", "--checkpoint-every", "4", "--threads", "1", "--device", "cpu", "--quiet",
    *(word for name, value in TINY.items() for word in (f"--{name}", str(value))),
]  # fmt: skip


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A tiny training on images of its own: quicker than the digits, which need scikit-learn."""
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    return ["train", "--data", str(tmp_path / "images.npy"), *TINY_RUN]


# Three runs in each process: a complete one, one that process 1 is signalled to stop after step 3, and its continuation.
THREE_RUNS = """
import os, signal, sys, torch
torch.set_num_threads(1)
from nvae_fast.cli import main
from nvae_fast.training.loop import Trainer
ports, folder, words = sys.argv[1].split(), sys.argv[2], [*sys.argv[3:], "--max-steps", "6"]
report = Trainer._report
def stop(self, *args):
    if self.step == 3 and self.world.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return report(self, *args)
codes = []
whole, cut = ["--out", folder + "/whole"], ["--out", folder + "/cut"]
for port, more in zip(ports, (whole, cut, [*cut, "--resume"])):
    os.environ["MASTER_PORT"] = port
    Trainer._report = stop if more == cut else report
    codes.append(main([*words, *more]))
    if len(codes) == 2:
        from nvae_fast.training import checkpoint
        print(checkpoint.load(folder + "/cut")["progress"]["step"], os.path.exists(folder + "/cut/samples.png"))
print(codes)
"""


def test_a_signal_to_one_process_stops_all_of_them_and_nothing_is_lost(tmp_path, words):
    words = [word for word in words if word != "--quiet"]
    ports = " ".join(free_port() for _ in range(3))
    both = ranks(2, [ports, str(tmp_path), *words], start=THREE_RUNS)
    texts = [process.communicate(timeout=300) for process in both]
    for out, err in texts:
        assert out.splitlines() == ["3 False", "[0, 143, 0]"], err
    assert (
        f"stopped at step 3 of 6; saved in {tmp_path}/cut/checkpoint.pt, continue with --resume"
        in texts[0][1]
    )
    whole, cut = (checkpoint.load(tmp_path / name) for name in ("whole", "cut"))
    for part in ("model", "optimizer"):
        assert_equal(whole[part], cut[part])
    assert metrics.read_metrics(tmp_path / "cut")[-1]["step"] == 6


def assert_equal(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def wait_for(process: subprocess.Popen, condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def interrupt(process: subprocess.Popen) -> str:
    """What a process says that ends on the second of two SIGINTs."""
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 130, text
    return text


def test_two_interrupts_end_a_process_whose_peer_hangs(tmp_path, words):
    survivor, hung = ranks(2, [*words, "--max-steps", "100000", "--out", str(tmp_path / "run")])
    try:
        log = tmp_path / "run" / metrics.NAME
        wait_for(survivor, lambda: log.exists() and '"step": 3' in log.read_text())
        hung.send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # the survivor then waits inside an exchange
        assert "checkpoints written before are intact" in interrupt(survivor)
    finally:
        hung.kill()
        hung.communicate()
        survivor.kill()
    assert checkpoint.load(tmp_path / "run")["progress"]["step"] % 4 == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_says_what_it_waits_for(tmp_path, words, rank):
    """Instead of waiting in silence for minutes."""
    soon = "import nvae_fast.training.distributed as d\nd.WAITING_NOTE = 0.1\n"
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", soon + START, *words, "--out", str(tmp_path / "run")],
        env=environment(
            RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        ),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        awaited = ("the other processes", "process 0")[rank]
        assert f"process {rank} of 2 has waited 0 s for {awaited} at 127.0.0.1:{port}" in line
        interrupt(process)
    finally:
        process.kill()
    assert not (tmp_path / "run").exists()


def locked_by_another(folder: Path) -> int:
    """The lock of a run folder, held as by another process; close the descriptor to release it."""
    descriptor = os.open(folder / run_folder.LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(descriptor, b"process 7 on there\n")
    return descriptor


def test_one_folder_is_written_by_one_run(tmp_path, words, capsys, digits):
    folder = tmp_path / "run"
    words = [*words, "--out", str(folder)]
    assert main([*words, "--max-steps", "1"]) == 0
    assert not (folder / run_folder.LOCK).exists()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / ".checkpoint.pt.7.tmp").write_text("what the other run is writing")
    descriptor = locked_by_another(folder)
    for more in (["--resume"], ["--overwrite"]):
        capsys.readouterr()
        assert main([*words, *more, "--max-steps", "2"]) == 2
        text = capsys.readouterr().err
        assert f"another process (process 7 on there) is training in {folder}: wait" in text
    with pytest.raises(RunFolderError, match="another process"):
        trainer(folder, digits).run()
    assert (folder / ".checkpoint.pt.7.tmp").exists()
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert not list(tmp_path.glob("run.replaced-*"))
    os.close(descriptor)  # as when the other process is killed, which leaves the file
    assert main([*words, "--resume", "--max-steps", "2"]) == 0
    assert checkpoint.load(folder)["progress"]["step"] == 2
    assert not (folder / run_folder.LOCK).exists()


def test_a_new_run_does_not_take_the_folder_of_another_new_run(tmp_path, words, capsys):
    (tmp_path / "run").mkdir()
    descriptor = locked_by_another(tmp_path / "run")
    assert main([*words, "--out", str(tmp_path / "run"), "--max-steps", "1"]) == 2
    os.close(descriptor)
    assert "is training in" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "run").iterdir()] == [run_folder.LOCK]


def test_a_lock_is_taken_again_when_its_file_was_removed(tmp_path):
    with run_folder.lock(tmp_path):
        with run_folder.lock(tmp_path):  # of the same process
            pass
        assert (tmp_path / run_folder.LOCK).exists()
        (tmp_path / run_folder.LOCK).unlink()
    with run_folder.lock(tmp_path):
        assert (tmp_path / run_folder.LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_folder.fcntl, "flock", no_locks)
    with (
        pytest.warns(UserWarning, match="file system without locks .No locks available"),
        run_folder.lock(tmp_path),
    ):
        pass
