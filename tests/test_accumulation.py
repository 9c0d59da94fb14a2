"""A step in parts: the gradient of the whole batch, and where batch norm makes it another one, which."""

from __future__ import annotations

import pytest
import torch
from training_runs import digits_of, tiny_model, trainer

from nvae_fast.ops.philox import split_seed
from nvae_fast.training import Step, TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = TrainingConfig(batch_size=6, cuda_graph=False)


def gradients(model, x, seed, weight=0.1, **options):
    """Gradients of one step by parameter, and its result."""
    step = Step(model, CONFIG.replace(**options))
    found = {}

    def keep(rate):
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    step.update = keep
    return found, step(x, seed=seed, coefficient=1.0, weight=weight, learning_rate=1e-3)


def images(count=6):
    return torch.rand(count, 1, 32, 32, generator=torch.Generator().manual_seed(1)).round().double()


@pytest.mark.parametrize("accumulate", [2, 4, 6])
@pytest.mark.parametrize("arch", ["res_mbconv", "res_elu"])
def test_parts_give_the_gradient_of_the_batch(arch, accumulate):
    """Batch norm in evaluation mode, every image with its own noise: nothing is left that sees the batch."""
    seeds = torch.arange(6)
    model = tiny_model(2, arch_instance=arch).double().eval()
    whole, expected = gradients(model, images(), seeds)
    model = tiny_model(2, arch_instance=arch).double().eval()
    parts, result = gradients(model, images(), seeds, accumulate=accumulate)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-8, atol=1e-10, msg=name)
    for field in ("loss", "reconstruction", "kl", "spectral", "batch_norm", "grad_norm"):
        assert getattr(result, field) == pytest.approx(getattr(expected, field), rel=1e-9), field


def test_batch_norm_sees_a_part_at_a_time():
    """The gradient is the mean of the parts' own, each with its statistics; running statistics move once a part."""
    x, seeds = images(), split_seed(torch.tensor(5), 2)
    model = tiny_model(2).double().train()
    parts, _ = gradients(model, x, 5, 0.0, accumulate=2)
    assert {int(b) for name, b in model.named_buffers() if "num_batches" in name} == {2}
    again = tiny_model(2).double().train()
    singles = [gradients(again, x[3 * i : 3 * i + 3], seeds[i], 0.0)[0] for i in range(2)]
    for name in parts:
        expected = (singles[0][name] + singles[1][name]) / 2
        torch.testing.assert_close(parts[name], expected, rtol=1e-8, atol=1e-10, msg=name)
    whole, _ = gradients(tiny_model(2).double().train(), x, 5, 0.0)
    different = [
        float((parts[name] - whole[name]).norm() / whole[name].norm().clamp_min(1e-3)) for name in parts
    ]
    assert max(different) > 0.1, "batches of three have other statistics than one of six"


def test_a_short_batch_has_fewer_parts():
    model = tiny_model(2).double().eval()
    found, result = gradients(model, images(2), 5, accumulate=4)
    assert found
    assert not result.skipped


def test_a_run_in_parts_trains(tmp_path, digits):
    config = TrainingConfig(batch_size=6, accumulate=3, max_steps=3, log_every=1, warmup_epochs=0.01)
    run = trainer(tmp_path, digits_of(digits, 30), config, arch_instance="res_elu")
    result = run.run()
    assert (result.step, result.skipped) == (3, 0)


def test_more_parts_than_images_are_refused():
    with pytest.raises(ValueError, match=r"accumulate \(8\) must not exceed batch_size \(4\)"):
        TrainingConfig(batch_size=4, accumulate=8)
    with pytest.raises(ValueError, match="accumulate must be at least 1, got 0"):
        TrainingConfig(accumulate=0)
