"""Cells computed again in the backward pass: same numbers, no second set of statistics, no second noise, less memory."""

from __future__ import annotations

import pytest
import torch
from training_runs import tiny_model

from benchmarks import measure
from nvae_fast.models import nvae
from nvae_fast.training import Step, TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"coefficient": 0.37, "weight": 0.02, "learning_rate": 2e-3}
MODELS = [
    {},
    {"arch_instance": "res_elu"},
    {"arch_instance": "mbconv_sep", "num_latent_scales": 2},
    {"dataset": "photos", "num_nf": 1},
    {"num_groups_per_scale": 1},  # the vanilla model: no towers
]


def images(changes: dict, count: int = 4) -> torch.Tensor:
    channels = 3 if changes.get("dataset") == "photos" else 1
    return (torch.rand(count, channels, 32, 32) * 255).round() / 255


def gradients(changes: dict, *, checkpointed: bool, autocast: str | None = None) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of a first training step (data-dependent initialisation included)."""
    model = tiny_model(**changes).train()
    step = Step(model, TrainingConfig(checkpoint_cells=checkpointed, autocast=autocast))
    assert model.checkpoint_cells is checkpointed
    step._controls.write(7, **OPTIONS)
    torch.manual_seed(3)
    found = {"values": step.gradients(images(changes))}
    found.update({f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.grad is not None})
    found.update({f"buffer {n}": b.clone() for n, b in model.named_buffers()})
    return found


@pytest.mark.parametrize("autocast", [None, "bf16"])
@pytest.mark.parametrize("changes", MODELS)
def test_loss_gradients_and_statistics_are_the_same_bit_for_bit(changes, autocast):
    plain = gradients(changes, checkpointed=False, autocast=autocast)
    again = gradients(changes, checkpointed=True, autocast=autocast)
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    counts = [value for name, value in again.items() if name.endswith("num_batches_tracked")]
    assert all(int(count) == 1 for count in counts), "statistics are updated exactly once a step"
    assert counts or changes.get("arch_instance") == "res_elu" or changes == {}


def test_nothing_is_drawn_again(monkeypatch):
    draws = []
    original = nvae.residual_normal

    def counted(*args, **kwargs):
        draws.append(kwargs["seed"])
        return original(*args, **kwargs)

    monkeypatch.setattr(nvae, "residual_normal", counted)
    model = tiny_model().train()
    model.checkpoint_cells = True
    out = model(images({}), seed=3)
    groups = len(draws)
    assert groups == model.config.num_groups
    state = torch.get_rng_state()
    (out.kl.sum() + out.logits.sum()).backward()
    assert len(draws) == groups
    assert torch.equal(state, torch.get_rng_state())


def test_less_memory_is_held():
    changes = {"num_channels_enc": 8, "num_channels_dec": 8, "num_groups_per_scale": 4}
    peaks = {}
    for checkpointed in (False, True):
        model = tiny_model(**changes).train()
        model.checkpoint_cells = checkpointed
        x = images(changes, 8)

        def work(model=model, x=x):
            out = model(x, seed=1)
            (out.kl.sum() + model.reconstruction_loss(out.logits, x).sum()).backward()

        work()
        peaks[checkpointed] = measure.peak_bytes(work, torch.device("cpu"))
    assert peaks[True] < 0.6 * peaks[False]


def test_evaluation_keeps_nothing_and_gives_gradients():
    model = tiny_model().eval()
    x = images({}).requires_grad_()
    expected = torch.autograd.grad(model(x, seed=1).logits.sum(), x)[0]
    model.checkpoint_cells = True
    assert torch.equal(torch.autograd.grad(model(x, seed=1).logits.sum(), x)[0], expected)
    with torch.no_grad():
        assert not model(x, seed=1).logits.requires_grad
