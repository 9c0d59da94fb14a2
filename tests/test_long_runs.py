"""Two thousand steps: nothing grows, nothing stays open, and what is going on can be read meanwhile."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from processes import environment
from training_runs import TINY

import nvae_fast as nf
from nvae_fast.training import Trainer, TrainingConfig, checkpoint, metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STEPS = 2000


class Specks:
    """Sixty-four tiny images: an epoch every sixteen steps, each with threads of its own that read ahead."""

    name, split, image_size, channels, skipped, binarize = "specks", "train", 8, 1, [], True
    pixels = (torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.5).float()

    def __len__(self) -> int:
        return 64

    def batch(self, indices, seed):
        return self.pixels[torch.as_tensor(indices)].clone()


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks in_use free keepcost".split()  # noqa: SIM905
    ]


def allocated() -> int | None:
    """Bytes that malloc has given out: unlike the resident size it does not depend on how freed memory is kept."""
    try:
        information = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return None
    information.restype = _Mallinfo
    found = information()
    return found.in_use + found.hblkhd


def facts() -> dict[str, int]:
    gc.collect()
    return {
        "bytes": allocated() or 0,
        "resident": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }


def long_run(folder: Path) -> dict[str, dict[str, int]]:
    """What there is of everything early, in the middle and at the end of a run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nf.NVAE(nf.NVAEConfig(**{**TINY, "image_size": 8, "num_groups_per_scale": 1}))
    config = TrainingConfig(
        batch_size=4, max_steps=STEPS, log_every=20, checkpoint_every=400, workers=2, warmup_epochs=0.01
    )
    seen = {"before": facts()}
    run = Trainer(model, config, Specks(), folder, quiet=True)
    take = run._take_step

    def watched(x):
        if run.step in (500, 1250, STEPS - 1):
            seen[str(run.step)] = facts()
            lines = metrics.read_metrics(folder)
            assert lines[-1]["step"] == run.step // 20 * 20, "readable while training, to the last line"
            assert checkpoint.load(folder)["progress"]["step"] == run.step // 400 * 400
        return take(x)

    run._take_step = watched
    assert run.run().step == STEPS
    seen["after"] = facts()
    return seen


def test_two_thousand_steps_leave_nothing_behind(tmp_path):
    """In a process of its own, where nothing else is freed or made meanwhile."""
    if not os.path.isdir("/proc/self/fd") or allocated() is None:
        pytest.skip("needs /proc and glibc 2.33")
    command = [sys.executable, __file__, str(tmp_path)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout)
    first, last = seen["500"], seen[str(STEPS - 1)]
    assert last["files"] == first["files"], seen
    assert last["threads"] == first["threads"], seen
    assert seen["after"]["threads"] == seen["before"]["threads"], "the threads that read ahead have ended"
    assert last["objects"] - first["objects"] < 1000, seen
    # A leak of a hundred bytes a step would be 75 kB in each half. Seen: 40 kB. A table that grows, does so in one half only.
    halves = seen["1250"]["bytes"] - first["bytes"], last["bytes"] - seen["1250"]["bytes"]
    assert min(halves) < 60_000, seen
    assert last["resident"] - first["resident"] < 8_000_000, seen
    assert sorted(f.name for f in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.NAME, metrics.NAME]


def test_threads_end_when_a_run_breaks_off(tmp_path):
    before = threading.active_count()
    model = nf.NVAE(nf.NVAEConfig(**{**TINY, "image_size": 8, "num_groups_per_scale": 1}))
    run = Trainer(model, TrainingConfig(batch_size=4, max_steps=9, workers=2), Specks(), tmp_path, quiet=True)

    def broken(x):
        raise KeyError("broken off")

    run._take_step = broken
    with pytest.raises(KeyError) as kept:
        run.run()
    assert kept.value is not None  # the error, and with it every frame of the run, is still there
    assert threading.active_count() == before


if __name__ == "__main__":
    print(json.dumps(long_run(Path(sys.argv[1]))))
