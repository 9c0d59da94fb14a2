"""The fused path trains as the reference does, and bfloat16 as float32: short versions of benchmarks.loss_curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import loss_curves
from nvae_fast.training import TrainingConfig
from nvae_fast.training.step import Objective

pytestmark = pytest.mark.usefixtures("one_thread")

FP16 = "nvae_fast fp16"
SMALL = {
    "num_channels_enc": 4,
    "num_channels_dec": 4,
    "num_latent_scales": 1,
    "num_groups_per_scale": 2,
    "num_latent_per_group": 4,
}


@pytest.fixture(scope="module", params=loss_curves.DATA)
def document(request: pytest.FixtureRequest) -> dict:
    steps = 60 if request.param == "digits" else 30
    cpu = torch.device("cpu")
    # So few steps can take the larger rate: there is no time to part, and something to be learnt.
    return loss_curves.run(
        [request.param],
        cpu,
        steps,
        batch=8,
        learning_rate=1e-2,
        control=True,
        changes=SMALL,
        # float16 convolutions are slow on a CPU: tests/test_mixed_precision.py has a smaller curve.
        variants=[name for name in loss_curves.VARIANTS if name != FP16],
        say=lambda line: None,
    )


def test_curves_stay_together(document: dict):
    (entry,) = document["data"].values()
    comparison, curves = entry["comparison"], entry["curves"]
    assert set(curves) == {*loss_curves.VARIANTS, loss_curves.CONTROL} - {FP16}
    assert 0 < comparison["control_largest"] <= loss_curves.FP32_TOLERANCE
    assert len({len(losses) for losses in curves.values()}) == 1
    assert comparison["fp32_largest"] <= comparison["fp32_largest_single_step"]
    assert comparison["passed"], comparison
    for losses in curves.values():
        means = loss_curves.windows(losses)
        assert means[-1] < 0.95 * means[0], "it has learnt something"
    assert curves["nvae_fast bf16"] != curves["nvae_fast"]


def test_curves_that_part_are_found():
    good = [100.0 / (1 + n) for n in range(40)]
    curves = {"reference": good, "nvae_fast": good, "nvae_fast bf16": good}
    assert loss_curves.compare(curves)["passed"]
    off = [v * (1.002 if 10 <= n < 20 else 1.0) for n, v in enumerate(good)]
    assert not loss_curves.compare({**curves, "nvae_fast": off})["passed"]
    assert loss_curves.compare({**curves, FP16: good})["fp16_end"] == 0.0
    late = [v * (1.02 if n >= 30 else 1.0) for n, v in enumerate(good)]
    assert not loss_curves.compare({**curves, "nvae_fast bf16": late})["passed"]
    assert not loss_curves.compare({**curves, FP16: late})["passed"]
    early = [v * (1.02 if n < 10 else 1.0) for n, v in enumerate(good)]
    assert loss_curves.compare({**curves, "nvae_fast bf16": early})["passed"]


def test_windows():
    assert loss_curves.windows([1.0, 2.0, 3.0]) == [2.0]
    assert loss_curves.windows([float(n) for n in range(25)], 10) == [4.5, 17.0]


def test_command_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        loss_curves, "curve", lambda data, config, training, variant, device, steps: [1.0] * steps
    )
    path = tmp_path / "new" / "curves.json"
    assert loss_curves.main(["digits", "--steps", "12", "--device", "cpu", "--json", str(path)]) == 0
    document = json.loads(path.read_text())
    assert document["settings"]["steps"] == 12
    assert document["data"]["digits"]["comparison"]["passed"] is True
    monkeypatch.setattr(loss_curves, "FP32_TOLERANCE", -1.0)
    assert loss_curves.main(["digits", "--steps", "12", "--device", "cpu"]) == 1
    for wrong in (["cats"], ["--steps", "0"]):
        with pytest.raises(SystemExit) as stop:
            loss_curves.main(wrong)
        assert stop.value.code == 2


@pytest.mark.parametrize("data", loss_curves.DATA)
def test_sums_stay_in_full_precision_under_bf16(data: str):
    """KL, likelihoods and the loss are float32, and equal what float64 makes of the network's own outputs."""
    import nvae_fast as nf
    from nvae_fast.training.distributed import World

    torch.manual_seed(0)
    model = nf.NVAE(loss_curves.model_config(data).replace(**SMALL)).train()
    x = (torch.rand(4, model.config.channels, 32, 32) * 255).round() / 255
    x = x.round() if data == "digits" else x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, seed=3)
    assert out.logits.dtype == torch.bfloat16
    assert {t.dtype for t in (out.kl, out.log_q, out.log_p, *out.kl_per_channel)} == {torch.float32}
    nll = model.reconstruction_loss(out.logits.float(), x)
    exact = model.reconstruction_loss(out.logits.double(), x.double())
    torch.testing.assert_close(nll.double(), exact, rtol=2e-5, atol=1e-3)
    objective = Objective(model, TrainingConfig(autocast="bf16"), World())
    loss, numbers = objective(x, 3, 0.5, 0.01)
    assert loss.dtype == numbers.dtype == torch.float32
    assert math.isfinite(float(loss.detach()))
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
