"""Objective, schedules, configuration, the step that undoes itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_runs import assert_same, everything, tiny_model

import nvae_fast as nf
from nvae_fast.training import (
    Step,
    TrainingConfig,
    annealed_lambda,
    balanced_kl,
    kl_balance,
    kl_coefficient,
    learning_rate,
    preset,
    schedule,
    seeds,
)
from nvae_fast.training.objective import kl_alpha

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parent / "data"


def groups(*per_scale: int) -> SimpleNamespace:
    return SimpleNamespace(groups_per_scale=list(per_scale))


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"learning_rate_min": 1.0}, "learning_rate_min .* must not exceed"),
        ({"kl_anneal_portion": 1.5}, "kl_anneal_portion must be between 0 and 1, got 1.5"),
        ({"autocast": "fp8"}, "autocast must be None, 'auto', 'bf16' or 'fp16', got 'fp8'"),
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
    with pytest.raises(
        ValueError, match=r"unknown preset 'mnsit'; did you mean mnist. there are: digits_demo"
    ):
        preset("mnsit")


@pytest.mark.parametrize("arch", ["res_mbconv", "res_elu"])
def test_non_finite_step_changes_nothing(digits, arch):
    model = tiny_model(arch_instance=arch).train()
    step = Step(model, TrainingConfig())
    x = digits.batch(torch.arange(4), 0)
    bad = x.clone()
    bad[0, 0, 5, 5] = float("nan")
    options = {"coefficient": 0.5, "weight": 0.01, "learning_rate": 1e-3}
    before = everything(step)
    assert step(bad, seed=1, **options).skipped  # before data-dependent initialisation has happened
    assert_same(before, everything(step))
    assert not step(x, seed=2, **options).skipped
    middle = everything(step)
    result = step(bad, seed=3, **options)
    assert result.skipped
    assert math.isnan(result.loss)
    assert_same(middle, everything(step))
    assert not step(x, seed=4, **options).skipped
    twin = tiny_model(arch_instance=arch).train()
    other = Step(twin, TrainingConfig())
    for seed in (2, 4):
        other(x, seed=seed, **options)
    assert_same(everything(other), everything(step))


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
