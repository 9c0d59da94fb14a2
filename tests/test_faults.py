"""What happens when something breaks: a process killed, a disk full, files damaged. Nothing is lost, the message says what
to do, and doing that works."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ranks, wait_until
from training_runs import TINY, trainer

from nvae_fast.cli import main
from nvae_fast.training import CheckpointError, RunFolderError, checkpoint, metrics, run_folder

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = [
    "train", "--data", "DATA", "--max-steps", "100000", "--batch-size", "2", "--log-every", "2",
    "--checkpoint-every", "4", "--threads", "1", "--device", "cpu", "--time-limit", "none", "--quiet",
    "--sample-readjust-passes", "0", "--no-ada-groups",
    *(word for name, value in TINY.items() for word in (f"--{name}", str(value))),
]  # fmt: skip
# Rank 0 of a run whose disk is full after two checkpoints.
FULL_DISK = """
import torch
save, calls = torch.save, []
def full(*args, **kwargs):
    calls.append(1)
    if len(calls) > 2:
        raise OSError(28, "No space left on device")
    save(*args, **kwargs)
torch.save = full
"""


def said(process: subprocess.Popen) -> str:
    """The last line of a process that ends by itself with code 2."""
    _, text = process.communicate(timeout=120)
    assert process.returncode == 2, text
    return text.strip().splitlines()[-1]


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """OPTIONS with images of its own: quicker than the digits, which need scikit-learn."""
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    return [str(tmp_path / "images.npy") if word == "DATA" else word for word in OPTIONS]


@pytest.mark.parametrize("fault", ["kill 0", "kill 1", "torchrun's kill 1", "full disk"])
def test_a_lost_process_ends_the_others_and_the_run_goes_on(tmp_path, options, fault, monkeypatch):
    folder = tmp_path / "run"
    if fault.startswith("torchrun"):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    both = ranks(2, [*options, "--out", str(folder)], {0: FULL_DISK} if fault == "full disk" else None)
    log = folder / metrics.NAME
    if fault != "full disk":
        wait_until(lambda: log.exists() and '"step": 8' in log.read_text(), both)
    victim = 0 if fault == "full disk" else int(fault[-1])
    if fault == "full disk":
        text = said(both[0])
        assert f"cannot write checkpoint {folder / checkpoint.NAME}: No space left on device" in text
        assert "intact" in text
        assert "--resume" in text
    else:
        both[victim].kill()
        if fault.startswith(
            "torchrun"
        ):  # ends the others when it sees that one is gone; here, again and again
            while both[1 - victim].poll() is None:
                both[1 - victim].terminate()
                time.sleep(0.05)
        both[victim].communicate()
    text = said(both[1 - victim])
    assert f"process {1 - victim} of 2: error: another process of this run died or stopped" in text
    assert f"newest whole checkpoint is {folder / checkpoint.NAME}, step " in text
    assert f"--resume --out {folder}" in text
    step = checkpoint.load(folder)["progress"]["step"]
    assert f"step {step}:" in text
    assert step % 4 == 0
    # The advice taken, by one process that computes the images of both.
    again = [*options, "--out", str(folder), "--resume", "--max-steps", str(step + 2)]
    del again[again.index("--batch-size") : again.index("--batch-size") + 2]
    assert main(again) == 0
    state = checkpoint.load(folder)
    assert state["progress"]["step"] == step + 2
    assert state["progress"]["world_size"] == 1
    assert state["training_config"]["batch_size"] == 4
    assert not list(folder.glob(".*.tmp"))


def document(value: float) -> dict:
    return {
        "model_config": {},
        "model": {"w": torch.full((30_000,), value)},
        "progress": {"step": int(value)},
    }


def killed_while_saving(folder: Path, at: int) -> bool:
    """Save in a process that kills itself at its ``at``-th write, flush or rename; False when it came to the end."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # forking: the child saves and ends, it uses no threads
        child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    calls = 0

    def counted(real):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    try:
        for name in ("fsync", "replace", "link"):
            setattr(os, name, counted(getattr(os, name)))
        real_save = torch.save

        def save(state, handle):
            class Slow:
                def write(self, data):
                    handle.write(bytes(data)[: len(data) // 2])
                    handle.flush()
                    counted(lambda: None)()
                    return len(data) // 2 + handle.write(bytes(data)[len(data) // 2 :])

                flush = handle.flush

            real_save(state, Slow())

        torch.save = save
        checkpoint.save(document(3.0), folder)
    finally:
        os._exit(0)


def test_a_save_killed_anywhere_leaves_a_whole_checkpoint(tmp_path):
    at, values = 0, []
    while True:
        at += 1
        folder = tmp_path / str(at)
        folder.mkdir()
        for value in (1.0, 2.0):
            checkpoint.save(document(value), folder)
        killed = killed_while_saving(folder, at)
        values.append(checkpoint.load(folder)["progress"]["step"])
        assert checkpoint.load(folder / checkpoint.PREVIOUS)["progress"]["step"] in (1, 2)
        assert f"step {values[-1]}: --resume" in run_folder.how_to_continue(folder)
        run_folder.prepare(folder, resume=True)
        assert sorted(f.name for f in folder.iterdir()) == [checkpoint.PREVIOUS, checkpoint.NAME]
        if not killed:
            break
    assert at > 8
    assert values == sorted(values)
    assert values[0] == 2
    assert values[-1] == 3


def limited(size: int):
    """No file may grow beyond ``size`` bytes, as on a disk that is full: also for root."""

    class Limit:
        def __enter__(self):
            self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, self.before[1]))

        def __exit__(self, *exception):
            resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    return Limit()


def test_a_write_that_fails_half_way_leaves_the_checkpoint(tmp_path, digits):
    run = trainer(tmp_path, digits)
    run.save()
    file = tmp_path / checkpoint.NAME
    with (
        limited(file.stat().st_size // 2),
        pytest.raises(CheckpointError, match=r"cannot write .*: File too large; .*intact: .*--resume"),
    ):
        run.run()
    assert checkpoint.load(tmp_path)["progress"]["step"] == 0
    assert not list(tmp_path.glob(".*"))
    assert trainer(tmp_path, digits, state=checkpoint.load(tmp_path)).run().step == 6


def test_metrics_on_a_full_disk(tmp_path, digits):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    (tmp_path / metrics.NAME).symlink_to("/dev/full")
    run = trainer(tmp_path, digits)
    advice = (
        rf"cannot write .*{metrics.NAME}: No space left on device\. Free disk space.*step 0: --resume --out"
    )
    with pytest.raises(RunFolderError, match=advice):
        run.run()
    (tmp_path / metrics.NAME).unlink()
    assert trainer(tmp_path, digits, state=checkpoint.load(tmp_path)).run().step == 6


def test_a_picture_that_cannot_be_written(tmp_path, digits):
    from training_runs import TINY_TRAINING

    (tmp_path / "samples-0000003.png").mkdir()
    run = trainer(tmp_path, digits, TINY_TRAINING.replace(sample_every=3, checkpoint_every=2))
    with pytest.raises(RunFolderError, match=r"cannot write .*samples-0000003.png.*step 2: --resume --out"):
        run.run()


def test_a_folder_that_cannot_be_written(tmp_path, options, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    assert main([*options, "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot make run folder" in (text := capsys.readouterr().err)
    assert "give another --out" in text
    (tmp_path / "empty").mkdir()

    def read_only(path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(run_folder, "atomic_file", read_only)
    assert main([*options, "--out", str(tmp_path / "empty")]) == 2
    assert "Read-only file system; make it writable" in (text := capsys.readouterr().err)
    assert "--out" in text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["empty", "file", "images.npy"]
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "page"])
def test_a_damaged_checkpoint_makes_way_for_the_previous_one(tmp_path, options, damage, capsys):
    folder = tmp_path / "run"
    few = [*options, "--out", str(folder), "--max-steps", "5"]
    assert main(few) == 0
    file, previous = folder / checkpoint.NAME, folder / checkpoint.PREVIOUS
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    content = {"truncated": data[:1000], "flipped": data, "empty": b"", "page": b"<html>"}[damage]
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file} .*; use the previous one, {previous} \(copy it over"):
        checkpoint.load(folder)
    assert f"{previous}, step 4: --resume" in run_folder.how_to_continue(folder)
    capsys.readouterr()
    again = [*options, "--out", str(folder), "--resume", "--max-steps", "6"]
    assert main(again) == 0
    text = capsys.readouterr().err
    kept = folder / "checkpoint-damaged.pt"
    assert f"checkpoint {file} is " in text
    assert f"it is kept as {kept}, and {previous} (step 4) takes its place" in text
    assert kept.read_bytes() == content
    assert checkpoint.load(folder)["progress"]["step"] == 6
    assert checkpoint.load(previous)["progress"]["step"] == 4


def test_two_damaged_checkpoints_are_refused(tmp_path, options, capsys):
    folder = tmp_path / "run"
    assert main([*options, "--out", str(folder), "--max-steps", "5"]) == 0
    for name in (checkpoint.NAME, checkpoint.PREVIOUS):
        (folder / name).write_bytes(b"")
    before = sorted(f.name for f in folder.iterdir())
    assert main([*options, "--out", str(folder), "--resume", "--max-steps", "6"]) == 2
    assert f"{folder / checkpoint.NAME} is truncated or damaged" in capsys.readouterr().err
    assert sorted(f.name for f in folder.iterdir()) == before


@pytest.mark.parametrize("kind", ["npy", "idx", "png"])
def test_damaged_data_are_named(tmp_path, options, kind, capsys):
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32), dtype=np.uint8)
    folder = tmp_path / "damaged"
    folder.mkdir()
    data = folder / f"images.{kind}"
    if kind == "npy":
        np.save(data, images)
        data.write_bytes(data.read_bytes()[:-5000])
    elif kind == "idx":
        data = folder / "train-images-idx3-ubyte"
        head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)
        data.write_bytes(head + images.tobytes()[:-5000])
    else:
        data.write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    out = tmp_path / "run"
    broken = [*options, "--out", str(out), "--max-steps", "2"]
    broken[broken.index("--data") + 1] = str(folder if kind == "png" else data)
    assert main(broken) == 2
    text = capsys.readouterr().err
    assert "error: " in text
    assert str(data) in text
    assert not out.exists(), "found before anything is written"
