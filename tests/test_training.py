"""Objective, schedules, checkpoints, the step that undoes itself, resuming, evaluation."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import nvae_fast as nf
from nvae_fast._files import atomic_file
from nvae_fast.data import open_dataset
from nvae_fast.training import (
    CheckpointError,
    RunFolderError,
    Step,
    Trainer,
    TrainingConfig,
    TrainingDiverged,
    annealed_lambda,
    balanced_kl,
    checkpoint,
    evaluate,
    importance_bound,
    kl_balance,
    kl_coefficient,
    learning_rate,
    load_model,
    metrics,
    preset,
    progress,
    run_folder,
    schedule,
    seeds,
)
from nvae_fast.training.evaluate import OnlineLogMeanExp
from nvae_fast.training.objective import kl_alpha
from nvae_fast.training.signals import StopRequest

DATA = Path(__file__).parent / "data"

TINY = {
    "dataset": "digits",
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 2,
    "num_preprocess_blocks": 1,
    "num_postprocess_blocks": 1,
    "num_preprocess_cells": 1,
    "num_postprocess_cells": 1,
}
TINY_TRAINING = TrainingConfig(batch_size=4, max_steps=6, log_every=2, checkpoint_every=3, warmup_epochs=0.01)


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are so small that threads only get in each other's way."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits():
    return open_dataset("digits", split="train")


def tiny_model(seed: int = 0, **changes) -> nf.NVAE:
    torch.manual_seed(seed)
    return nf.NVAE(nf.NVAEConfig(**{**TINY, **changes}))


def trainer(folder: Path, dataset, config: TrainingConfig = TINY_TRAINING, *, state=None, **model) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(tiny_model(**model), config, dataset, folder, state=state, quiet=True)


def groups(*per_scale: int) -> SimpleNamespace:
    return SimpleNamespace(groups_per_scale=list(per_scale))


# ---------------------------------------------------------------------------- objective


def test_kl_coefficient_rises_linearly_after_the_constant_part():
    assert kl_coefficient(0, 1000) == 1e-4
    assert kl_coefficient(150, 1000, 0.3, 0.0) == 0.5
    assert kl_coefficient(250, 1000, 0.5, 0.1) == pytest.approx(0.3)
    assert kl_coefficient(99, 1000, 0.5, 0.1) == 1e-4
    assert kl_coefficient(300.1, 1000) == 1.0
    assert kl_coefficient(999, 1000) == 1.0
    assert kl_coefficient(5, 10, 0.0, 0.0) == 1.0
    with pytest.raises(ValueError, match="total_steps must be positive, got 0"):
        kl_coefficient(0, 0)


def test_alpha_counts_pixels_and_groups():
    # coarsest scale 2 groups, then 4, then 8: 1/2, 4/4, 16/8, over the smallest
    assert kl_alpha(groups(2, 4, 8)) == [1.0] * 2 + [2.0] * 4 + [4.0] * 8
    assert kl_alpha(groups(3)) == [1.0] * 3


def test_balance_by_hand():
    kl = torch.tensor([[1.0, 4.0], [3.0, -4.0]], dtype=torch.float64, requires_grad=True)
    size = [2.01, 4.01]  # mean |kl| + 0.01
    raw = [size[0] / 1.0 * sum(size), size[1] / 4.0 * sum(size)]  # one group a scale: alpha 1 and 4
    expected = [2 * r / sum(raw) for r in raw]
    gamma = kl_balance(kl, groups(1, 1))
    assert not gamma.requires_grad
    assert gamma.tolist() == pytest.approx(expected, rel=1e-12)
    balanced = balanced_kl(kl, 0.25, groups(1, 1))
    by_hand = [0.25 * (expected[0] * row[0] + expected[1] * row[1]) for row in kl.tolist()]
    assert balanced.tolist() == pytest.approx(by_hand, rel=1e-12)
    (gradient,) = torch.autograd.grad(balanced.sum(), kl)
    assert gradient[0].tolist() == pytest.approx([0.25 * e for e in expected], rel=1e-12)


def test_coefficient_one_is_the_plain_sum():
    kl = torch.rand(3, 6)
    for one in (1.0, 1, torch.tensor(1.0)):
        assert torch.equal(balanced_kl(kl, one, groups(2, 4)), kl.sum(1))


def test_tensor_coefficient_agrees_with_float_and_takes_gradients():
    kl = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    for c in (1e-4, 0.37, 1.0):
        a = balanced_kl(kl, c, groups(2, 4))
        b = balanced_kl(kl, torch.tensor(c, dtype=torch.float64), groups(2, 4))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        ga, gb = torch.autograd.grad(a.sum(), kl)[0], torch.autograd.grad(b.sum(), kl)[0]
        torch.testing.assert_close(ga, gb, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["mnist_tiny", "cifar10_flow_tiny"])
def test_recorded_balance(name, mode):
    record = np.load(DATA / f"{name}.npz", allow_pickle=False)
    config = nf.NVAEConfig.from_official(json.loads(bytes(record["args.json"])))
    kl = torch.from_numpy(record[f"{mode}/kl_all"])
    gamma, expected = kl_balance(kl, config), torch.from_numpy(record[f"{mode}/kl_coeffs"])
    torch.testing.assert_close(gamma, expected, rtol=2e-6, atol=0)
    expected = torch.from_numpy(record[f"{mode}/balanced_kl"])
    torch.testing.assert_close(balanced_kl(kl, 0.37, config), expected, rtol=2e-6, atol=0)


def test_bad_kl_is_named():
    with pytest.raises(ValueError, match=r"balanced_kl: kl must be a tensor of shape \(B, 6\).*\(3, 5\)"):
        balanced_kl(torch.rand(3, 5), 0.5, groups(2, 4))
    with pytest.raises(TypeError, match=r"kl must be a floating-point tensor, got torch\.int64"):
        kl_balance(torch.ones(3, 6, dtype=torch.int64), groups(2, 4))
    with pytest.raises(ValueError, match="coefficient must be a number or a 0-d tensor"):
        balanced_kl(torch.rand(3, 6), torch.ones(1), groups(2, 4))


def test_lambda_annealing():
    assert annealed_lambda(0.3, 0.01) == 0.01
    assert annealed_lambda(0.0, 0.01, 1.0) == pytest.approx(1.0)
    assert annealed_lambda(0.5, 0.01, 1.0) == pytest.approx(0.1)
    assert annealed_lambda(1.0, 0.01, 1.0) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="greater than 0"):
        annealed_lambda(0.5, 0.0, 1.0)


# ---------------------------------------------------------------------------- schedule


def test_learning_rate_warms_up_then_falls_as_a_cosine():
    def rate(step: float) -> float:
        return learning_rate(step, 111, peak=1e-2, minimum=1e-4, warmup_steps=10)

    assert rate(0) == pytest.approx(1e-3)
    assert rate(9) == pytest.approx(1e-2)
    assert rate(10) == pytest.approx(1e-2)
    assert rate(60) == pytest.approx((1e-2 + 1e-4) / 2)  # half of the way from 10 to 110
    assert rate(35) == pytest.approx(1e-4 + 0.99e-2 * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == pytest.approx(1e-4)
    assert rate(500) == pytest.approx(1e-4)


def test_time_limit_stretches_the_schedule_to_its_end():
    assert schedule.advance(7, 100, elapsed=1e9, last=1.0, limit=None) == 8
    assert schedule.advance(7, 100, elapsed=10, last=0.1, limit=100) == 8.0  # 92 steps left, 900 affordable
    position, taken = 0.0, 0
    while position < 1000:  # a second a step, 100 seconds, 1000 steps planned
        taken += 1
        position = schedule.advance(position, 1000, elapsed=float(taken), last=1.0, limit=100.0)
    assert 98 <= taken <= 102


def test_seeds_depend_on_every_part():
    values = {seeds.mix_seed(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(values) == 512
    assert all(0 <= value < 2**63 for value in values)
    assert seeds.mix_seed(1, 2) != seeds.mix_seed(2, 1)


# ---------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"learning_rate_min": 1.0}, "learning_rate_min .* must not exceed"),
        ({"kl_anneal_portion": 1.5}, "kl_anneal_portion must be between 0 and 1, got 1.5"),
        ({"autocast": "fp8"}, "autocast must be None or 'bf16', got 'fp8'"),
        ({"max_bad_steps": 0}, "max_bad_steps must be at least 1"),
        ({"weight_decay_norm_anneal": True, "weight_decay_norm": 0.0}, "weight_decay_norm_anneal needs"),
        ({"nonsense": 1}, "unknown option.* nonsense"),
    ],
)
def test_training_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig().replace(**changes)


def test_training_config_types_and_round_trip():
    with pytest.raises(TypeError, match="epochs must be int, got str"):
        TrainingConfig(epochs="3")
    with pytest.raises(TypeError, match="batch_size must be int, got bool"):
        TrainingConfig(batch_size=True)
    config = TrainingConfig(max_steps=7, autocast="bf16")
    assert TrainingConfig.from_dict({**config.to_dict(), "from_the_future": 1}) == config
    assert config.total_steps(100) == 7
    assert TrainingConfig(epochs=3).total_steps(100) == 300


def test_published_presets():
    table = {  # batch, epochs, lambda, warm-up, learning rate
        "mnist": (200, 400, 1e-2, 5, 1e-2),
        "cifar10": (32, 400, 1e-2, 5, 1e-2),
        "celeba_64": (16, 90, 1e-1, 5, 1e-2),
        "imagenet_32": (24, 45, 1e-2, 1, 1e-2),
        "celeba_256": (4, 300, 1e-2, 5, 1e-2),
        "ffhq": (4, 200, 1e-1, 5, 8e-3),
    }
    for name, expected in table.items():
        c = preset(name).training
        assert (c.batch_size, c.epochs, c.weight_decay_norm, c.warmup_epochs, c.learning_rate) == expected
        assert c.lambda_initial() == (1.0 if name in ("imagenet_32", "celeba_256", "ffhq") else None)
        assert preset(name).model_config() == nf.NVAEConfig.preset(name)
    with pytest.raises(ValueError, match="unknown preset 'mnsit'; there are: digits_demo"):
        preset("mnsit")


# ---------------------------------------------------------------------------- checkpoints


def document(value: float = 1.0) -> dict:
    return {"model_config": {}, "model": {"w": torch.full((1000,), value)}, "step": int(value)}


def loaded(path: Path) -> float:
    return float(checkpoint.load(path)["model"]["w"][0])


def test_checkpoint_keeps_the_previous_one(tmp_path):
    for value in (1.0, 2.0, 3.0):
        checkpoint.save(document(value), tmp_path)
    assert loaded(tmp_path) == 3.0
    assert loaded(tmp_path / checkpoint.PREVIOUS) == 2.0
    assert sorted(f.name for f in tmp_path.iterdir()) == [checkpoint.PREVIOUS, checkpoint.NAME]


@pytest.mark.parametrize("where", ["os.fsync", "os.replace", "torch.save", "os.link"])
@pytest.mark.parametrize("after", [0, 1])
def test_failed_save_leaves_the_newest_whole(tmp_path, monkeypatch, where, after):
    checkpoint.save(document(1.0), tmp_path)
    checkpoint.save(document(2.0), tmp_path)
    owner, name = (os, where[3:]) if where.startswith("os.") else (torch, "save")
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            if where == "torch.save":
                args[1].write(b"PK half of it")
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    if where == "os.link" or (where == "torch.save" and after):
        checkpoint.save(document(3.0), tmp_path)  # no hard links: falls back to a copy
        expected = 3.0
    else:
        with pytest.raises(CheckpointError, match=r"cannot write .*No space left.*before is intact"):
            checkpoint.save(document(3.0), tmp_path)
        expected = 2.0
    monkeypatch.undo()
    assert loaded(tmp_path) == expected
    assert loaded(tmp_path / checkpoint.PREVIOUS) in (1.0, 2.0)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("keep", [0, 1, 30, 0.5, 0.99])
def test_truncated_checkpoint_points_at_the_previous_one(tmp_path, keep):
    for value in (1.0, 2.0):
        checkpoint.save(document(value), tmp_path)
    file = tmp_path / checkpoint.NAME
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=rf"{checkpoint.NAME}.*(truncated|not a checkpoint)"):
        checkpoint.load(tmp_path)
    if keep != 1:
        with pytest.raises(CheckpointError, match=rf"use the previous one, .*{checkpoint.PREVIOUS}"):
            checkpoint.load(tmp_path)
    assert loaded(tmp_path / checkpoint.PREVIOUS) == 1.0


class _Hostile:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_hostile_checkpoint_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "x": _Hostile()}, tmp_path / checkpoint.NAME)
    with pytest.raises(CheckpointError, match="could run code: refused"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_checkpoint_refuses_what_it_could_not_read_back(tmp_path):
    with pytest.raises(
        TypeError, match=r"checkpoint\['step'\] must be a tensor or a plain value, got float64"
    ):
        checkpoint.save({**document(), "step": np.float64(1)}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_foreign_and_newer_checkpoints(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(tmp_path)
    torch.save({"a": 1}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of nvae_fast"):
        checkpoint.load(tmp_path / "other.pt")
    with atomic_file(tmp_path / "new.pt") as handle:
        torch.save({**document(), "format": checkpoint.FORMAT, "version": 99}, handle)
    with pytest.raises(CheckpointError, match=r"format version 99.*newer nvae_fast"):
        checkpoint.load(tmp_path / "new.pt")


def test_run_folder_is_never_written_over(tmp_path):
    folder = tmp_path / "run"
    assert run_folder.prepare(folder) == (folder, None)
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(RunFolderError, match="--resume continues that run, --overwrite moves it aside"):
        run_folder.prepare(folder)
    with pytest.raises(RunFolderError, match="nothing to resume"):
        run_folder.prepare(folder, resume=True)
    _, note = run_folder.prepare(folder, overwrite=True)
    (aside,) = [f for f in tmp_path.iterdir() if f.name != "run"]
    assert (aside / "mine.txt").read_text() == "precious"
    assert str(aside) in note
    assert list(folder.iterdir()) == []
    with pytest.raises(RunFolderError, match="is a file"):
        run_folder.prepare(aside / "mine.txt")


def test_metrics_are_readable_while_written_and_cut_on_resume(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    for step in (10, 20, 30):
        log.write({"step": step, "loss": float("nan") if step == 20 else 1.5})
        assert metrics.read_metrics(tmp_path)[-1]["step"] == step
    log.close()
    with open(tmp_path / metrics.NAME, "a") as handle:
        handle.write('{"step": 40, "lo')  # a crash in the middle of a line
    log = metrics.MetricsLog(tmp_path, resume_step=20)
    log.write({"step": 30, "loss": 2.5})
    log.close()
    assert [line["step"] for line in metrics.read_metrics(tmp_path)] == [10, 20, 30]
    assert metrics.read_metrics(tmp_path)[1]["loss"] is None


# ---------------------------------------------------------------------------- the step


def everything(model: torch.nn.Module, step: Step) -> dict[str, torch.Tensor]:
    state = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    for index, entry in step.optimizer.state_dict()["state"].items():
        state.update({f"optimizer {index} {name}": value.clone() for name, value in entry.items()})
    return state


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("arch", ["res_mbconv", "res_elu"])
def test_non_finite_step_changes_nothing(digits, arch):
    model = tiny_model(arch_instance=arch).train()
    step = Step(model, TrainingConfig())
    x = digits.batch(torch.arange(4), 0)
    bad = x.clone()
    bad[0, 0, 5, 5] = float("nan")
    options = {"coefficient": 0.5, "weight": 0.01, "learning_rate": 1e-3}
    before = everything(model, step)
    assert step(bad, seed=1, **options).skipped  # before data-dependent initialisation has happened
    assert_same(before, everything(model, step))
    assert not step(x, seed=2, **options).skipped
    middle = everything(model, step)
    result = step(bad, seed=3, **options)
    assert result.skipped
    assert math.isnan(result.loss)
    assert_same(middle, everything(model, step))
    assert not step(x, seed=4, **options).skipped
    twin = tiny_model(arch_instance=arch).train()
    other = Step(twin, TrainingConfig())
    for seed in (2, 4):
        other(x, seed=seed, **options)
    assert_same(everything(twin, other), everything(model, step))


def test_gradient_that_is_not_finite_is_skipped_too(digits):
    model = tiny_model().train()
    step = Step(model, TrainingConfig())
    handle = next(model.parameters()).register_hook(lambda g: g * float("inf"))
    x = digits.batch(torch.arange(4), 0)
    result = step(x, seed=1, coefficient=0.5, weight=0.01, learning_rate=1e-3)
    assert result.skipped
    assert math.isfinite(result.loss)
    handle.remove()
    assert not step(x, seed=1, coefficient=0.5, weight=0.01, learning_rate=1e-3).skipped


def test_step_is_the_written_formula(digits):
    model = tiny_model().train()
    twin = tiny_model().train()
    x = digits.batch(torch.arange(6), 0)
    step = Step(model, TrainingConfig(weight_decay=3e-4))
    result = step(x, seed=5, coefficient=0.37, weight=0.02, learning_rate=2e-3)
    out = twin(x, seed=5)
    spectral, batch_norm = twin.regularization()
    recon = twin.reconstruction_loss(out.logits, x)
    loss = (recon + balanced_kl(out.kl, 0.37, twin.config)).mean() + 0.02 * (spectral + batch_norm)
    loss.backward()
    optimizer = torch.optim.Adamax(twin.parameters(), lr=2e-3, eps=1e-3, weight_decay=3e-4, foreach=False)
    optimizer.step()
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.kl == pytest.approx(out.kl.sum(1).mean().item(), rel=1e-6)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)


def test_gradient_clipping_and_autocast(digits):
    x = digits.batch(torch.arange(4), 0)
    options = {"seed": 1, "coefficient": 0.5, "weight": 0.01, "learning_rate": 1e-3}
    plain, clipped = tiny_model().train(), tiny_model().train()
    norm = Step(plain, TrainingConfig())(x, **options).grad_norm
    assert Step(clipped, TrainingConfig(grad_clip=1.0))(x, **options).grad_norm == pytest.approx(norm)
    low = Step(tiny_model().train(), TrainingConfig(autocast="bf16"))(x, **options)
    full = Step(tiny_model().train(), TrainingConfig())(x, **options)
    assert low.loss == pytest.approx(full.loss, rel=0.02)
    assert low.loss != full.loss


# ---------------------------------------------------------------------------- the loop


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


def digits_of(dataset, count: int):
    class Few:
        name, split, image_size, channels, skipped = "few", "train", dataset.image_size, dataset.channels, []
        binarize = True

        def __len__(self):
            return count

        def batch(self, indices, seed):
            return dataset.batch(indices, seed)

    return Few()


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
        TrainingDiverged, match=r"3 times in a row.*lower --learning-rate.*last good checkpoint"
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
    with pytest.raises(ValueError, match=r"trained on 1500 images .* have 10: give the same --data"):
        trainer(tmp_path, digits_of(digits, 10), state=state)
    with pytest.raises(ValueError, match=r"375 steps an epoch.*same --batch-size"):
        trainer(tmp_path, digits, TINY_TRAINING.replace(batch_size=8), state=state)


def test_time_limit_ends_the_run_with_finished_schedules(tmp_path, digits):
    config = TINY_TRAINING.replace(max_steps=100_000, time_limit=0.04, log_every=1, checkpoint_every=10**6)
    started = time.monotonic()
    result = trainer(tmp_path, digits, config).run()
    assert time.monotonic() - started < 20
    assert result.step < 5000
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
    "--time-limit", "none", "--quiet",
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
    deadline = time.monotonic() + 300
    while not (log.exists() and '"step": 120' in log.read_text()):
        assert parts.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parts.kill()
    assert parts.wait() == -9
    killed_at = checkpoint.load(tmp_path / "parts")["progress"]["step"]
    assert 80 <= killed_at < 200
    command_line = command("--out", str(tmp_path / "parts"), "--resume")
    assert subprocess.run(command_line, env=environment(), timeout=300).returncode == 0
    assert whole.wait(timeout=300) == 0
    same_runs(tmp_path / "whole", tmp_path / "parts")
    lines = metrics.read_metrics(tmp_path / "whole")
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
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text()):
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(number)
    assert run.wait(timeout=300) == code
    assert "finishing this step, then saving" in run.stderr.read()
    assert checkpoint.load(tmp_path / "run")["progress"]["step"] >= 2


def test_two_processes_train_one_model(tmp_path):
    """torchrun's environment: the gradient is the mean, only rank 0 writes, both leave cleanly."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--out", str(tmp_path / "run"), "--max-steps", "3", "--batch-size", "2", "--log-every", "1"]
    ranks = []
    for rank in ("0", "1"):
        ring = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        ring["MASTER_PORT"] = str(port)
        ranks.append(subprocess.Popen(command(*options), env={**environment(), **ring}))
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    state = checkpoint.load(tmp_path / "run")
    assert state["progress"]["step"] == 3
    assert state["progress"]["world_size"] == 2
    assert state["progress"]["steps_per_epoch"] == 1500 // 4
    assert [line["step"] for line in metrics.read_metrics(tmp_path / "run")] == [1, 2, 3]
    assert (tmp_path / "run" / "samples.png").exists()


# ---------------------------------------------------------------------------- evaluation


def test_second_interrupt_aborts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        assert stop.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_tensorboard_missing_is_said_before_anything_is_written(tmp_path, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install nvae_fast\[tensorboard\]"):
        trainer(tmp_path, digits, TINY_TRAINING.replace(tensorboard=True))
    assert not list(tmp_path.iterdir())


def test_online_log_mean_exp():
    values = torch.randn(50, 7, dtype=torch.float64) * 300
    online = OnlineLogMeanExp()
    for row in values:
        online.add(row)
    torch.testing.assert_close(online.value(), torch.logsumexp(values, 0) - math.log(50), rtol=1e-12, atol=0)
    online = OnlineLogMeanExp()
    for v in (-math.inf, -math.inf, 2.0):
        online.add(torch.tensor([v]))
    assert float(online.value()) == pytest.approx(2.0 - math.log(3))


def test_importance_bound_is_the_direct_computation(digits):
    model = tiny_model().eval()
    x = digits.batch(torch.arange(5), 0)
    bound, sums = importance_bound(model, x, 6, seed=3)
    terms, kl = [], 0.0
    for k in range(6):
        with torch.no_grad():
            out = model(x, seed=seeds.mix_seed(3, k))
            terms.append(
                -model.reconstruction_loss(out.logits, x).double() - out.log_q.double() + out.log_p.double()
            )
            kl += float(out.kl.sum()) / 6
    torch.testing.assert_close(
        bound, torch.logsumexp(torch.stack(terms), 0) - math.log(6), rtol=1e-12, atol=0
    )
    assert float(sums["kl"]) == pytest.approx(kl, rel=1e-6)
    single, _ = importance_bound(model, x, 1, seed=3)
    assert (bound >= single.new_tensor([-1e9])).all()
    torch.testing.assert_close(single, terms[0], rtol=1e-12, atol=0)


def test_evaluation_reports_nats_bits_and_active_channels(digits):
    model = tiny_model().train()
    few = digits_of(digits, 10)
    result = evaluate(model, few, samples=3, batch_size=4, seed=1)
    assert model.training
    assert result == evaluate(model, few, samples=3, batch_size=4, seed=1)
    assert result != evaluate(model, few, samples=3, batch_size=4, seed=2)
    assert result.images == 10
    assert result.negative_log_likelihood_bits_per_dim == pytest.approx(
        result.negative_log_likelihood / (math.log(2) * 1024)
    )
    assert result.negative_elbo == pytest.approx(result.reconstruction + result.kl)
    assert result.negative_log_likelihood < result.negative_elbo
    assert len(result.kl_per_group) == 2
    assert result.latent_channels == 4
    assert 0 <= result.active_channels <= 4
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        evaluate(model, few, samples=0)


def test_active_channels_count_what_carries_information(digits):
    model = tiny_model().eval()
    with torch.no_grad():  # a posterior equal to the prior, but for the first channel of the first group
        for head in model.posterior:
            head.log_weight_norm.fill_(-30.0)
            head.bias.zero_()
        model.posterior[0].bias[0] = 1.0
    result = evaluate(model, digits_of(digits, 8), batch_size=8)
    assert result.kl_per_group[0] > 1
    assert result.active_channels == 1


def test_load_model_is_the_trained_model(tmp_path, digits):
    run = trainer(tmp_path, digits)
    run.run()
    model, facts = load_model(tmp_path)
    assert facts["step"] == 6
    assert not model.training
    x = digits.batch(torch.arange(3), 0)
    run.model.eval()
    torch.testing.assert_close(model(x, seed=1).logits, run.model(x, seed=1).logits, rtol=1e-5, atol=1e-5)


def test_progress_line_on_a_terminal_and_in_a_log():
    import io

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    log, terminal = io.StringIO(), Terminal()
    for stream in (log, terminal):
        bar = progress.Progress("train", 10, stream=stream)
        for done in range(1, 11):
            bar.update(done, f"loss {done}", force=done == 10)
        bar.close()
    assert log.getvalue().count("\n") == 2  # the first and the forced one, nothing in between
    assert "\r" not in log.getvalue()
    assert "100% step 10/10  loss 10" in terminal.getvalue()
    assert terminal.getvalue().startswith("\r")
    assert progress.clock(3723) == "1:02:03"
