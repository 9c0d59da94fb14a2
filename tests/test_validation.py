"""Validation while training: when it takes place, what it writes, that it changes nothing, and exact resuming."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training_loop import flatten, interrupted_steps, same_runs
from training_runs import TINY_TRAINING, digits_of, tiny_model

from nvae_fast import cli
from nvae_fast.data import open_dataset
from nvae_fast.training import (
    CheckpointError,
    Trainer,
    TrainingConfig,
    checkpoint,
    evaluate,
    load_model,
    metrics,
)
from nvae_fast.training import validation as module
from nvae_fast.training.distributed import World
from nvae_fast.training.validation import Validation, held_out

pytestmark = pytest.mark.usefixtures("one_thread")

# Two steps an epoch: validations after steps 2, 4, 6 and 7, of three batches each.
CONFIG = TINY_TRAINING.replace(
    max_steps=7,
    validate_every=1,
    validate_images=9,
    validate_samples=2,
    validate_final_samples=3,
    log_every=1,
)


def validated(folder: Path, digits, config: TrainingConfig = CONFIG, *, validation=True, **more) -> Trainer:
    """A trainer of a tiny model on ten images, validated on twelve others."""
    folder.mkdir(exist_ok=True)
    return Trainer(
        tiny_model(more.pop("seed", 0)),
        config,
        digits_of(digits, 10),
        folder,
        quiet=True,
        validation=twelve(digits) if validation else None,
        **more,
    )


def twelve(digits):
    few = digits_of(digits, 12)
    few.batch = lambda indices, seed: digits.batch(torch.as_tensor(indices) + 100, seed)
    return few


def lines(folder: Path, prefix: str) -> list[dict]:
    return [line for line in metrics.read_metrics(folder) if f"{prefix}/bits_per_dim" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits) -> Path:
    """A run that nothing interrupted; tests only read it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    validated(folder, digits).run()
    return folder


def test_validation_leaves_training_as_it_was(whole, tmp_path, digits):
    validated(tmp_path / "plain", digits, validation=False).run()
    first, second = checkpoint.load(whole), checkpoint.load(tmp_path / "plain")
    for part in ("model", "optimizer", "rng"):
        for (name, a), (_, b) in zip(
            flatten(first[part]).items(), flatten(second[part]).items(), strict=True
        ):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, f"{part} {name}"
    losses = [
        [line["loss"] for line in metrics.read_metrics(f) if "loss" in line]
        for f in (whole, tmp_path / "plain")
    ]
    assert losses[0] == losses[1]
    assert not (tmp_path / "plain" / checkpoint.BEST).exists()


def test_the_trained_model_is_untouched(tmp_path, digits, monkeypatch):
    run = validated(tmp_path / "run", digits)
    evaluated = []

    def seen(*args, **options):
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        evaluated.append((before, torch.get_rng_state()))
        return evaluate(*args, **options)

    monkeypatch.setattr(module, "evaluate", seen)
    real = run.validation._keep

    def keep(*args):
        before, rng = evaluated[-1]
        assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), rng)
        assert run.model.training
        assert all(module.training for module in run.model.modules())
        return real(*args)

    run.validation._keep = keep
    run.run()
    assert len(evaluated) == 5


def test_what_is_written(whole, digits):
    val, final = lines(whole, "val"), lines(whole, "final")
    assert [line["step"] for line in val] == [2, 4, 6, 7]
    assert [line["step"] for line in final] == [7]
    assert [line["epoch"] for line in val] == [1.0, 2.0, 3.0, 3.5]
    assert {line["val/samples"] for line in val} == {2}
    assert final[0]["final/samples"] == 3
    assert final[0]["final/images"] == 9
    assert len(val[0]["val/kl_per_group"]) == 2
    best = min(val, key=lambda line: line["val/bits_per_dim"])
    state = checkpoint.load(whole / checkpoint.BEST)
    assert state["progress"]["step"] == best["step"]
    assert state["validation"] == {
        "best": best["val/bits_per_dim"],
        "best_step": best["step"],
        "step": best["step"],
        "final_step": 0,
        "images": 12,
    }
    assert checkpoint.load(whole)["validation"] == {**state["validation"], "step": 7, "final_step": 7}
    # The best checkpoint is resumed like any other, and gives the value in its metadata.
    model, facts = load_model(whole / checkpoint.BEST)
    assert facts["step"] == best["step"]
    images = module._spread(twelve(digits), 9)
    result = evaluate(model, images, samples=2, batch_size=4)
    assert result.negative_log_likelihood_bits_per_dim == best["val/bits_per_dim"]
    assert checkpoint.load(whole / checkpoint.PREVIOUS)["progress"]["step"] == 6


def test_the_best_checkpoint_is_resumed_like_any_other(whole, tmp_path, digits):
    state = checkpoint.load_training(whole / checkpoint.BEST)
    best = state["progress"]["step"]
    validated(tmp_path / "run", digits, state=state).run()
    first, second = checkpoint.load(whole), checkpoint.load(tmp_path / "run")
    assert first["validation"] == second["validation"]
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    assert [line["step"] for line in lines(tmp_path / "run", "val")] == [s for s in (2, 4, 6, 7) if s > best]


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path, digits, stop):
    first = validated(tmp_path / "parts", digits)
    interrupted_steps(first, stop)
    state = checkpoint.load_training(tmp_path / "parts")
    torch.manual_seed(99)
    validated(tmp_path / "parts", digits, state=state, seed=7).run()
    same_runs(whole, tmp_path / "parts")
    same_best(whole, tmp_path / "parts")


def same_best(a: Path, b: Path) -> None:
    assert checkpoint.load(a)["validation"] == checkpoint.load(b)["validation"]
    best = [flatten(checkpoint.load(folder / checkpoint.BEST)["model"]) for folder in (a, b)]
    assert all(torch.equal(value, best[1][name]) for name, value in best[0].items())


def stop_while_evaluating(run: Trainer, step: int, samples: int) -> None:
    """SIGTERM arrives while the validation (2 samples) or the final evaluation (3 samples) of a step is at work."""
    real = module.evaluate

    def evaluate(*args, **options):
        if (run.step, options["samples"]) == (step, samples):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    module.evaluate = evaluate
    try:
        result = run.run()
    finally:
        module.evaluate = real
    assert (result.step, result.signal) == (step, signal.SIGTERM)


@pytest.mark.parametrize(("step", "samples"), [(4, 2), (7, 2), (7, 3)])
def test_a_signal_during_validation_stops_and_the_run_goes_on_bit_for_bit(
    whole, tmp_path, digits, step, samples
):
    folder = tmp_path / "parts"
    stop_while_evaluating(validated(folder, digits), step, samples)
    assert [line["step"] for line in lines(folder, "val")] == [
        s for s in (2, 4, 6, 7) if s < step or (s == step and samples == 3)
    ]
    stopped = (folder / checkpoint.NAME).read_bytes()
    for _ in range(2):  # The second as after a kill: lines were written that the checkpoint does not know.
        (folder / checkpoint.NAME).write_bytes(stopped)
        state = checkpoint.load_training(folder)
        assert state["progress"]["step"] == step
        validated(folder, digits, state=state, seed=7).run()
    same_runs(whole, folder)
    same_best(whole, folder)


def test_a_finished_run_that_goes_on_is_validated_at_its_new_end(whole, tmp_path, digits):
    state = checkpoint.load_training(whole)
    run = validated(
        tmp_path / "longer", digits, CONFIG.replace(max_steps=9, validate_final_samples=0), state=state
    )
    run.run()
    assert [line["step"] for line in lines(tmp_path / "longer", "val")] == [8, 9]
    assert not lines(tmp_path / "longer", "final")


def test_worse_values_and_values_that_are_not_finite_are_not_the_best(tmp_path, digits, monkeypatch):
    values = iter([math.nan, 5.0, 6.0, math.inf])
    real = module.evaluate

    def evaluate(*args, **options):
        result = real(*args, **options)
        if options["samples"] == 3:
            return result
        return dataclasses.replace(result, negative_log_likelihood_bits_per_dim=next(values))

    monkeypatch.setattr(module, "evaluate", evaluate)
    run = validated(tmp_path / "run", digits)
    run.run()
    assert (run.validation.best, run.validation.best_step) == (5.0, 4)
    assert checkpoint.load(tmp_path / "run" / checkpoint.BEST)["progress"]["step"] == 4
    assert [line["val/bits_per_dim"] for line in lines(tmp_path / "run", "val")] == [None, 5.0, 6.0, None]


def test_averages_of_the_weights_are_validated(tmp_path, digits):
    run = validated(tmp_path / "run", digits, CONFIG.replace(ema=0.9, learning_rate=0.02))
    run.run()
    value = lines(tmp_path / "run", "val")[-1]["val/bits_per_dim"]
    found = {}
    for weights in ("ema", "model"):
        model, _ = checkpoint.load_model(tmp_path / "run" / checkpoint.NAME, weights=weights)
        result = evaluate(
            model, run.validation.dataset, samples=run.config.validate_samples, batch_size=4, seed=0
        )
        found[weights] = result.negative_log_likelihood_bits_per_dim
    assert found["ema"] == pytest.approx(value, rel=1e-5)
    assert abs(found["model"] - value) > 1e-3


def test_a_full_disk_keeps_the_best_checkpoint(tmp_path, digits, monkeypatch):
    run = validated(tmp_path / "run", digits)
    run.validation.best = 0.0  # so that nothing is better
    run.run()
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.pt")}
    run.validation.best = None

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    result = evaluate(run.model, twelve(digits))
    with pytest.raises(CheckpointError, match=r"checkpoint-best\.pt: No space left"):
        run.validation._keep(result, run)
    assert {file.name: file.read_bytes() for file in (tmp_path / "run").glob("*.pt")} == before


# ---------------------------------------------------------------------------- schedule


def interval(steps_per_epoch: int, total_steps: int, every: int | None = None, dataset=()) -> int:
    config = TrainingConfig(validate_every=every)
    made = Validation(
        config, dataset, steps_per_epoch=steps_per_epoch, total_steps=total_steps, world=World()
    )
    return made.interval


def test_when_it_is_due():
    assert interval(10, 500) == 10, "up to 50 epochs: every epoch"
    assert interval(10, 501) == 200, "more than 50 epochs: every 20"
    assert interval(10, 10) == 10
    assert interval(10, 9) == 0, "shorter than an epoch: none"
    assert interval(10, 9, every=1) == 10, "but for those that ask for it, at the end"
    assert interval(10, 500, every=3) == 30
    assert interval(10, 500, every=0) == 0
    assert interval(10, 500, every=3, dataset=None) == 0


def test_none_takes_the_default_schedule_and_all_images():
    given = cli.parse(["train", "--validate-every", "none", "--validate-images", "none"])
    assert (given.validate_every, given.validate_images) == (None, None)


def test_short_runs_are_validated_at_the_end_where_asked_for(tmp_path, digits):
    for every, steps in ((1, [1]), (None, [])):
        folder = tmp_path / str(every)
        validated(folder, digits, CONFIG.replace(max_steps=1, validate_every=every)).run()
        assert [line["step"] for line in lines(folder, "val")] == steps
        assert [line["step"] for line in lines(folder, "final")] == steps


def test_images_are_spread_over_the_part(digits):
    spread = module._spread(twelve(digits), 5)
    assert spread.indices.tolist() == [0, 2, 4, 7, 9]
    assert torch.equal(spread.batch(torch.tensor([1, 4]), 3), twelve(digits).batch([2, 9], 3))
    few = twelve(digits)
    assert module._spread(few, None) is few
    assert module._spread(few, 12) is few


def test_a_time_limit_leaves_time_for_validation(tmp_path, digits):
    """Position after a step of one second, halfway through the time, when validations take some of what is left."""

    def position(seconds: float, **changes) -> float:
        config = CONFIG.replace(max_steps=1000, time_limit=100 / 60, **changes)
        run = validated(tmp_path / "run", digits, config)
        run.validation._seconds_per_draw = seconds
        run._advance(50.0, 1.0)
        return run.position

    # Nine images are 2.25 steps of a second, a draw of them a third of that: 2 and 3 draws at the end, 2 in every 2 steps.
    assert position(0.0) == pytest.approx(999 / ((50 - 5 * 0.75) / 1.75))
    # 2 draws and 3 final ones take 5 seconds at the end; 2 draws every 2 steps take 1 second a step.
    assert position(1.0) == pytest.approx(999 / (45 / 2))
    assert position(1.0, validate_final_samples=0) == pytest.approx(999 / (48 / 2))
    assert position(1.0, validate_every=0) == pytest.approx(999 / 50)
    assert position(20.0) == 999, "the next step is the last"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 5}, r"validated on 5 images, the data given now have 12.*--data.*--validate-every 0"),
        ({"step": -1}, "expected whole numbers"),
        ({"best_step": 1.5}, "expected whole numbers"),
        ({"best": "x"}, "is str, expected float"),
    ],
)
def test_a_state_that_does_not_fit(whole, tmp_path, digits, change, message):
    state = checkpoint.load_training(whole)
    state["validation"] = {**state["validation"], **change}
    with pytest.raises(CheckpointError, match=message):
        validated(tmp_path / "run", digits, state=state)


def test_checkpoints_without_validation_are_resumed(whole, tmp_path, digits):
    state = checkpoint.load_training(whole)
    del state["validation"]
    run = validated(tmp_path / "run", digits, state=state)
    assert run.validation.best is None
    run.run()
    assert [line["step"] for line in lines(tmp_path / "run", "val")] == [7]
    # And a run that is resumed without validation keeps what it knows.
    state = checkpoint.load_training(whole)
    kept = validated(tmp_path / "kept", digits, CONFIG.replace(validate_every=0, max_steps=8), state=state)
    kept.run()
    assert checkpoint.load(tmp_path / "kept")["validation"] == state["validation"]


# ---------------------------------------------------------------------------- data


def test_the_part_that_is_held_out(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32), dtype=np.uint8)

    def chosen(path: str) -> tuple[str, int] | None:
        found = held_out(open_dataset(path), lambda part: open_dataset(path, split=part))
        return None if found is None else (found.split, len(found))

    assert chosen("digits") == ("test", 297)
    np.save(tmp_path / "images.npy", images)
    assert chosen(str(tmp_path / "images.npy")) is None
    folder = tmp_path / "parts"
    folder.mkdir()
    np.save(folder / "train.npy", images)
    assert chosen(str(folder)) is None
    np.save(folder / "test.npy", images[:3])
    assert chosen(str(folder)) == ("test", 3)
    np.save(folder / "val.npy", images[:2])
    assert chosen(str(folder)) == ("validation", 2)
    np.savez(tmp_path / "both.npz", x_train=images, x_test=images[:4])
    assert chosen(str(tmp_path / "both.npz")) == ("test", 4)
    (folder / "val.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"val\.npy: .*wrong magic number"):
        chosen(str(folder))
