"""The training loop: resuming bit for bit, kills and signals, bad steps, full disks, processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import wait_until
from training_runs import TINY, TINY_TRAINING, digits_of, trainer

from nvae_fast.training import (
    CheckpointError,
    Trainer,
    TrainingDiverged,
    checkpoint,
    metrics,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def same_runs(a: Path, b: Path) -> None:
    """Two run folders ended in the same state, bit for bit, and report the same."""
    first, second = checkpoint.load(a), checkpoint.load(b)
    for part in ("model", "optimizer"):
        flat_a, flat_b = flatten(first[part]), flatten(second[part])
        assert flat_a.keys() == flat_b.keys()
        for name, value in flat_a.items():
            same = torch.equal(value, flat_b[name]) if torch.is_tensor(value) else value == flat_b[name]
            assert same, f"{part} {name}"
    timing = ("seconds", "images_per_second")
    lines = [
        [{k: v for k, v in line.items() if k not in timing} for line in metrics.read_metrics(f)]
        for f in (a, b)
    ]
    assert lines[0] == lines[1]


def flatten(value, prefix="") -> dict:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {name: leaf for key, item in items for name, leaf in flatten(item, f"{prefix}/{key}").items()}


@pytest.mark.parametrize("arch", ["res_mbconv", "res_elu"])
@pytest.mark.parametrize("stop", [1, 5])
def test_resume_is_bit_exact_at_any_step(tmp_path, digits, arch, stop):
    few = digits_of(digits, 10)  # 2 batches an epoch: step 5 is in the middle of epoch 2
    config = TINY_TRAINING.replace(max_steps=8)
    trainer(tmp_path / "whole", few, config, arch_instance=arch).run()
    interrupted = trainer(tmp_path / "parts", few, config, arch_instance=arch)
    interrupted_steps(interrupted, stop)
    state = checkpoint.load(tmp_path / "parts")
    assert state["progress"]["step"] == stop
    torch.manual_seed(99)
    trainer(tmp_path / "parts", few, config, state=state, seed=7, arch_instance=arch).run()
    same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("arch", ["res_elu"])
def test_resume_from_before_the_first_step(tmp_path, digits, arch):
    trainer(tmp_path / "whole", digits, arch_instance=arch).run()
    begun = trainer(tmp_path / "parts", digits, arch_instance=arch)
    begun.save()
    state = checkpoint.load(tmp_path / "parts")
    trainer(tmp_path / "parts", digits, state=state, seed=7, arch_instance=arch).run()
    same_runs(tmp_path / "whole", tmp_path / "parts")


def interrupted_steps(run: Trainer, stop: int) -> None:
    """Run until step `stop` and save there, as SIGTERM does."""
    real = run._take_step

    def take(x):
        if run.step == stop - 1:
            os.kill(os.getpid(), 15)
        return real(x)

    run._take_step = take
    result = run.run()
    assert result.signal == 15
    assert result.step == stop


def poisoned(dataset, from_index: int = 0):
    few = digits_of(dataset, 40)

    def batch(indices, seed):
        x = dataset.batch(indices, seed)
        x[torch.as_tensor(np.asarray(indices)) >= from_index] = float("nan")
        return x

    few.batch = batch
    return few


def test_bad_steps_are_counted_and_training_goes_on(tmp_path, digits):
    config = TINY_TRAINING.replace(max_steps=10, batch_size=1, max_bad_steps=10)
    result = trainer(tmp_path, poisoned(digits, 20), config).run()
    assert result.step == 10
    assert 1 <= result.skipped <= 9
    lines = metrics.read_metrics(tmp_path)
    assert sum(line["skipped_steps"] for line in lines) == result.skipped
    assert checkpoint.load(tmp_path)["progress"]["skipped"] == result.skipped


def test_too_many_bad_steps_stop_with_advice(tmp_path, digits):
    run = trainer(tmp_path, poisoned(digits), TINY_TRAINING.replace(max_bad_steps=3, max_steps=50))
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    with pytest.raises(
        TrainingDiverged,
        match=r"3 times in a row.*lower learning_rate .--learning-rate.*last good checkpoint",
    ):
        run.run()
    kept = checkpoint.load(tmp_path)
    assert kept["progress"]["step"] == 0
    for name, value in before.items():
        assert torch.equal(kept["model"][name], value)


def test_full_disk_while_training_keeps_the_checkpoint(tmp_path, digits, monkeypatch):
    run = trainer(tmp_path, digits)
    run.save()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left.*intact"):
        run.run()
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)["progress"]["step"] == 0


def test_data_and_model_must_fit(tmp_path, digits):
    few = digits_of(digits, 10)
    few.channels = 3
    with pytest.raises(ValueError, match=r"model takes images of .* \(1, 32, 32\), few has \(3, 32, 32\)"):
        trainer(tmp_path, few)
    run = trainer(tmp_path, digits)
    run.save()
    state = checkpoint.load(tmp_path)
    with pytest.raises(ValueError, match=r"trained on 1500 images .* have 10: give the same data"):
        trainer(tmp_path, digits_of(digits, 10), state=state)
    with pytest.raises(ValueError, match=r"375 steps an epoch.*same batch_size"):
        trainer(tmp_path, digits, TINY_TRAINING.replace(batch_size=8), state=state)


def test_time_limit_ends_the_run_with_finished_schedules(tmp_path, digits):
    config = TINY_TRAINING.replace(max_steps=100_000, time_limit=0.04, log_every=1, checkpoint_every=10**6)
    result = trainer(tmp_path, digits, config).run()
    assert result.step < config.max_steps
    last = metrics.read_metrics(tmp_path)[-1]
    assert last["kl_coefficient"] == 1.0
    assert last["learning_rate"] < 1e-3


RUN = """
import sys, torch
torch.set_num_threads(1)
from nvae_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""
RUN_OPTIONS = [
    "train", "--data", "digits", "--max-steps", "200", "--batch-size", "8", "--log-every", "20",
    "--checkpoint-every", "40", "--warmup-epochs", "0.05", "--threads", "1", "--device", "cpu",
    "--time-limit", "none", "--validate-images", "8", "--quiet",
]  # fmt: skip


def command(*options: str) -> list[str]:
    model = []
    for name, value in TINY.items():
        model += [f"--{name}", str(value)]
    return [sys.executable, "-c", RUN, *RUN_OPTIONS, "--no-ada-groups", *model, *options]


def environment() -> dict[str, str]:
    root = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


def test_killed_and_resumed_run_equals_the_uninterrupted_one(tmp_path):
    whole = subprocess.Popen(command("--out", str(tmp_path / "whole")), env=environment())
    parts = subprocess.Popen(command("--out", str(tmp_path / "parts")), env=environment())
    log = tmp_path / "parts" / metrics.NAME
    wait_until(lambda: log.exists() and '"step": 120' in log.read_text(), [parts])
    parts.kill()
    assert parts.wait() == -9
    killed_at = checkpoint.load(tmp_path / "parts")["progress"]["step"]
    assert 80 <= killed_at < 200
    command_line = command("--out", str(tmp_path / "parts"), "--resume")
    assert subprocess.run(command_line, env=environment(), timeout=300).returncode == 0
    assert whole.wait(timeout=300) == 0
    same_runs(tmp_path / "whole", tmp_path / "parts")
    assert [
        line["step"] for line in metrics.read_metrics(tmp_path / "whole") if "val/bits_per_dim" in line
    ] == [187, 200]
    lines = [line for line in metrics.read_metrics(tmp_path / "whole") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(20, 201, 20))
    assert lines[-1]["bits_per_dim"] < 0.75 * lines[0]["bits_per_dim"]
    for name in ("samples.png", "reconstructions.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(15, 143), (2, 130)])
def test_signal_saves_and_exits(tmp_path, number, code):
    options = ["--max-steps", "100000", "--checkpoint-every", "100000", "--log-every", "2"]
    run = subprocess.Popen(
        command("--out", str(tmp_path / "run"), *options),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / metrics.NAME
    wait_until(lambda: log.exists() and log.read_text(), [run])
    run.send_signal(number)
    assert run.wait(timeout=300) == code
    assert "finishing this step, then saving" in run.stderr.read()
    assert checkpoint.load(tmp_path / "run")["progress"]["step"] >= 2


def test_two_processes_train_one_model(tmp_path):
    """As documented, with torchrun: the gradient is the mean, only rank 0 writes, both leave cleanly."""
    options = ["--out", str(tmp_path / "run"), "--max-steps", "3", "--batch-size", "2", "--log-every", "1"]
    words = command(*options)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*torchrun, "-m", "nvae_fast", *words[words.index("train") :]],
        env=environment(),
        check=True,
        timeout=300,
    )
    state = checkpoint.load(tmp_path / "run")
    assert state["progress"]["step"] == 3
    assert state["progress"]["world_size"] == 2
    assert state["progress"]["steps_per_epoch"] == 1500 // 4
    assert [line["step"] for line in metrics.read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "samples.png").exists()


def test_random_kills_and_a_run_without_any_end_alike(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "kills.py"), "3", str(tmp_path / "runs")]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "3 kills" in found.stdout


def with_bad_steps(run: Trainer, bad) -> list[int]:
    """Let the steps for which ``bad`` holds see NaN; returns the list of the steps at which checkpoints are written."""
    real, save, saved = run._take_step, run.save, []

    def take(x):
        return real(x * float("nan") if bad(run.step) else x)

    def count():
        before = run._last_saved
        save()
        if run._last_saved != before:
            saved.append(run.step)

    run._take_step, run.save = take, count
    return saved


def test_no_checkpoint_is_written_between_bad_steps(tmp_path, digits):
    config = TINY_TRAINING.replace(max_steps=14, checkpoint_every=2, max_bad_steps=9)
    run = trainer(tmp_path, digits, config)
    saved = with_bad_steps(run, lambda step: 3 <= step < 9)
    assert run.run().skipped == 6
    # The one due at step 4 waits for step 10, the first finite one.
    assert saved == [0, 2, 10, 12, 14]


def test_a_checkpoint_after_which_nothing_was_finite_is_not_the_newest(tmp_path, digits):
    run = trainer(tmp_path, digits, TINY_TRAINING.replace(max_steps=50, checkpoint_every=2, max_bad_steps=3))
    real = run._take_step

    def take(x):
        result = real(x)
        if run.step == 5:  # the update of this step was too large: weights are finite, what follows is not
            with torch.no_grad():
                run.model.stem.log_weight_norm.fill_(80.0)
        return result

    run._take_step = take
    with pytest.raises(
        TrainingDiverged,
        match=r"3 times in a row.*\(step 6, kept as .*-diverged\.pt\).*now .*checkpoint\.pt \(step 4\)",
    ):
        run.run()
    names = {
        name: checkpoint.load(tmp_path / name)["progress"]["step"]
        for name in os.listdir(tmp_path)
        if "pt" in name
    }
    assert names == {checkpoint.NAME: 4, checkpoint.PREVIOUS: 4, "checkpoint-diverged.pt": 6}
    resumed = trainer(
        tmp_path, digits, TINY_TRAINING.replace(max_steps=8), state=checkpoint.load_training(tmp_path)
    )
    assert resumed.run().skipped == 0


def test_images_that_are_not_finite_say_nothing_of_the_checkpoint(tmp_path, digits):
    config = TINY_TRAINING.replace(checkpoint_every=2, max_bad_steps=3, max_steps=4)
    trainer(tmp_path, digits, config).run()
    state = checkpoint.load_training(tmp_path)
    run = trainer(tmp_path, digits, config.replace(max_steps=20), state=state)
    run.dataset.batch, real = lambda *given: real(*given) * float("nan"), run.dataset.batch
    try:
        with pytest.raises(TrainingDiverged, match=r"and the images are not.*checkpoint\.pt \(step 4\)"):
            run.run()
    finally:
        run.dataset.batch = real
    assert checkpoint.load(tmp_path)["progress"]["step"] == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path, digits):
    run = trainer(tmp_path, digits, TINY_TRAINING.replace(checkpoint_every=2))
    real = run._take_step

    def take(x):
        result = real(x)
        if run.step == 3:
            with torch.no_grad():
                run.model.stem.weight[0] = float("inf")
        return result

    run._take_step = take
    advice = r"step 4: stem\.weight holds an infinity.*last good checkpoint is .*checkpoint\.pt \(step 2\)"
    with pytest.raises(TrainingDiverged, match=advice):
        run.run()
    assert checkpoint.load(tmp_path)["progress"]["step"] == 2


@pytest.mark.parametrize("change", [{}, {"learning_rate": 1e-4}, {"grad_clip": 1.0}])
def test_other_rates_restart_the_count_of_bad_steps(tmp_path, digits, change):
    config = TINY_TRAINING.replace(max_steps=6, max_bad_steps=4, warmup_epochs=0, learning_rate_min=0)
    run = trainer(tmp_path, digits, config)
    with_bad_steps(run, lambda step: step >= 3)
    assert run.run().skipped == 3
    state = checkpoint.load_training(tmp_path)
    assert state["progress"]["bad_in_a_row"] == 3
    again = trainer(tmp_path, digits, config.replace(max_steps=8, **change), state=state)
    with_bad_steps(again, lambda step: step == 6)
    if change:
        assert again.run().step == 8
    else:
        with pytest.raises(TrainingDiverged, match="4 times in a row"):
            again.run()


def test_a_state_that_does_not_fit_names_the_run(tmp_path, digits):
    trainer(tmp_path, digits).run()
    for part, change in (
        ("optimizer", lambda part: part["state"][0].pop("exp_avg")),
        ("optimizer", lambda part: part["state"][0].update(exp_avg=torch.zeros(2))),
        ("optimizer", lambda part: part["param_groups"][0].update(params=[0])),
        ("rng", lambda part: part.update(torch=torch.zeros(3))),
        ("awaiting_data", lambda part: part.append("nowhere")),
        ("model", lambda part: part.update({"stem.weight": 3})),
    ):
        state = checkpoint.load_training(tmp_path)
        change(state[part])
        with pytest.raises(CheckpointError, match=rf"{tmp_path}, does not fit: "):
            trainer(tmp_path, digits, state=state)
