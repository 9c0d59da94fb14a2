"""Mixed precision: which one a device takes, and float16 with a scaled loss beside the step's own undoing."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from processes import ranks
from test_step import Again, capturable  # noqa: F401  a fixture
from test_training_loop import interrupted_steps, same_runs, with_bad_steps
from training_runs import TINY, TINY_TRAINING, assert_same, digits_of, everything, tiny_model, trainer

from benchmarks import loss_curves
from nvae_fast.cli import main
from nvae_fast.cli.train import new_run
from nvae_fast.training import (
    PRESETS,
    CheckpointError,
    Sampler,
    Step,
    TrainingConfig,
    TrainingDiverged,
    checkpoint,
    importance_bound,
    metrics,
    precision,
)

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"coefficient": 0.5, "weight": 0.01, "learning_rate": 1e-2}
FP16 = TrainingConfig(autocast="fp16")


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of an fp16 step computes in float32: what is left is the scaling, and float16 is slow on a CPU."""
    monkeypatch.setattr(precision, "autocast", lambda name, device: contextlib.nullcontext())


def images(digits, count: int = 4) -> torch.Tensor:
    return digits.batch(torch.arange(count), 0)


def test_presets_take_what_the_device_has(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    seen = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: seen.append(device) or contextlib.nullcontext())
    assert {entry.training.autocast for entry in PRESETS.values()} == {"auto"}
    assert TrainingConfig().autocast is None
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert precision.chosen("auto", cuda) == expected
        assert precision.chosen("auto", cpu) is None
        for explicit in (None, "bf16", "fp16"):
            assert precision.chosen(explicit, cuda) == precision.chosen(explicit, cpu) == explicit
    assert seen == [cuda, cuda]
    config = PRESETS["cifar10"].training
    assert precision.resolved(config, cuda) == config.replace(autocast="fp16")
    assert precision.resolved(config, cpu) == config.replace(autocast=None)
    for explicit in (None, "bf16"):
        assert new_run("cifar10", "folder", {"autocast": explicit}, {})[0].autocast == explicit


def test_a_run_records_and_says_what_was_computed(tmp_path, capsys):
    model = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    options = [
        "train", "--preset", "digits_demo", *model, "--no-ada-groups", "--max-steps", "1", "--batch-size", "2",
        "--sample-readjust-passes", "0", "--device", "cpu", "--progress", "none",
    ]  # fmt: skip
    for given, recorded, words in (
        ([], None, "on cpu in fp32, into"),
        (["--autocast", "auto"], None, "on cpu in fp32, into"),
        (["--autocast", "bf16"], "bf16", "on cpu in bf16 autocast, into"),
        (["--autocast", "fp16"], "fp16", "on cpu in fp16 autocast with a gradient scaler, into"),
    ):
        folder = tmp_path / "run"
        assert main([*options, "--out", str(folder), "--overwrite", *given]) == 0
        assert words in capsys.readouterr().err
        assert checkpoint.load(folder)["training_config"]["autocast"] == recorded
        assert json.loads((folder / "config.json").read_text())["training"]["autocast"] == recorded
    assert main([*options[:-2], "--out", str(folder), "--overwrite", "--autocast", "fp8"]) == 2
    assert "--autocast must be None, 'auto', 'bf16' or 'fp16', got 'fp8'" in capsys.readouterr().err
    resume = ["train", "--resume", "--out", str(folder), "--max-steps", "2", "--device", "cpu"]
    assert main([*resume, "--autocast", "auto"]) == 0
    assert "--autocast changes from fp16 to None from here on" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"grad_clip": 1.0}, {"accumulate": 2}])
def test_the_scale_itself_changes_nothing(digits, no_autocast, changes):
    """Scaled by a power of two, unscaled before clipping: bit for bit the step without."""
    steps = [Step(tiny_model().train(), TrainingConfig(autocast=name, **changes)) for name in (None, "fp16")]
    assert steps[1].scaling.scale == 2.0**16
    for number in range(3):
        plain, scaled = (step(images(digits), seed=number, **OPTIONS) for step in steps)
        assert plain == scaled
    assert changes.get("grad_clip") is None or plain.grad_norm > 10
    assert_same(*map(everything, steps))
    assert steps[1].scaling.state()["_growth_tracker"] == 3


def test_a_gradient_that_overflows_is_undone_and_lowers_the_scale(digits):
    """In float16: the first scale is too large for this model, as it is for most."""
    step = Step(tiny_model(arch_instance="res_elu").train(), FP16)
    before, rescaled = everything(step), 0
    while (result := step(images(digits), seed=1, **OPTIONS)).skipped:
        rescaled += 1
        assert result.rescaled
        assert math.isfinite(result.loss)
        assert not math.isfinite(result.grad_norm)
        assert step.scaling.scale == 2.0 ** (16 - rescaled)
        assert_same(before, everything(step))
        assert rescaled < 16
    assert rescaled > 0
    assert not result.rescaled
    assert math.isfinite(result.grad_norm)


def test_a_loss_that_is_not_finite_leaves_the_scale_alone(digits, no_autocast):
    step = Step(tiny_model().train(), FP16)
    step(images(digits), seed=1, **OPTIONS)
    before, scaler = everything(step), step.scaling.state()
    result = step(images(digits) * float("nan"), seed=2, **OPTIONS)
    assert result.skipped
    assert not result.rescaled
    assert step.scaling.state() == scaler
    assert_same(before, everything(step))
    assert not step(images(digits), seed=3, **OPTIONS).skipped


def overflowing(run, when) -> None:
    """Make a gradient of the run infinite in the steps for which ``when`` holds."""
    parameter = next(run.model.parameters())
    parameter.register_hook(lambda grad: grad * float("inf") if when(run.step) else grad)


def test_steps_while_the_scale_adapts_are_not_bad_ones(tmp_path, digits, no_autocast):
    config = TINY_TRAINING.replace(
        autocast="fp16", max_bad_steps=1, max_steps=8, log_every=1, checkpoint_every=2
    )
    run = trainer(tmp_path, digits, config)
    overflowing(run, lambda step: 1 <= step <= 4)
    result = run.run()
    assert (result.step, result.skipped, run.bad_in_a_row) == (8, 4, 0)
    lines = metrics.read_metrics(tmp_path)
    assert [line["loss_scale"] for line in lines] == [2.0**k for k in (16, 15, 14, 13, 12, 12, 12, 12)]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1, 0, 0, 0]


def test_a_scale_that_collapses_stops_training(tmp_path, digits, no_autocast, capsys):
    config = TINY_TRAINING.replace(autocast="fp16", max_bad_steps=3, max_steps=100, checkpoint_every=50)
    run = trainer(tmp_path, digits, config)
    run.quiet = False
    overflowing(run, lambda step: step >= 1)
    with pytest.raises(
        TrainingDiverged, match=r"step 19: .*3 times in a row.*try autocast .--autocast. none"
    ):
        run.run()
    # 16 steps bring the scale from 2^16 to 1; those after that are bad.
    assert run.step == 19
    text = capsys.readouterr().err
    assert text.count("a gradient overflowed in fp16, step skipped") == 16
    assert "loss scale 1 now" in text
    assert "not finite, loss scale 0.125, step skipped (3 in a row, 19 in all)" in text


def test_a_bad_loss_between_overflows_still_counts(tmp_path, digits, no_autocast):
    config = TINY_TRAINING.replace(autocast="fp16", max_bad_steps=2, max_steps=8)
    run = trainer(tmp_path, digits, config)
    overflowing(run, lambda step: step == 3)
    with_bad_steps(run, lambda step: step in (2, 4))
    with pytest.raises(TrainingDiverged, match=r"at step 4: .*not finite 2 times in a row"):
        run.run()


@pytest.mark.parametrize("stop", [2, 4])
def test_resume_restores_the_scaler_bit_for_bit(tmp_path, digits, stop):
    """In float16, with a scale that falls in the first steps and doubles after every second good one."""
    few = digits_of(digits, 10)
    config = TINY_TRAINING.replace(autocast="fp16", max_steps=6, checkpoint_every=50, ema=0.9)

    def begun(folder: str):
        run = trainer(tmp_path / folder, few, config)
        run.step_function.scaling.restore(
            {**run.step_function.scaling.state(), "scale": 512.0, "growth_interval": 2}
        )
        return run

    run = begun("whole")
    first = run.step_function.scaling.state()
    run.run()
    interrupted_steps(begun("parts"), stop)
    state = checkpoint.load_training(tmp_path / "parts")
    assert state["scaler"] != first
    trainer(tmp_path / "parts", few, config, state=state, seed=7).run()
    same_runs(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (checkpoint.load(tmp_path / name)["scaler"] for name in ("whole", "parts"))
    assert whole == parts
    assert whole["growth_interval"] == 2


def test_a_scaler_begins_anew_only_where_there_was_none(tmp_path, digits, no_autocast):
    trainer(tmp_path, digits).run()
    state = checkpoint.load_training(tmp_path)
    fp16 = TINY_TRAINING.replace(autocast="fp16", max_steps=8)
    run = trainer(tmp_path, digits, fp16, state=state)
    assert run.step_function.scaling.scale == 2.0**16
    run.run()
    saved = checkpoint.load_training(tmp_path)
    assert saved["scaler"]["_growth_tracker"] == 2
    del saved["scaler"]
    with pytest.raises(CheckpointError, match="does not fit: it lacks scaler"):
        trainer(tmp_path, digits, fp16, state=saved)
    for bad in (0.0, math.nan, math.inf, -1.0):
        saved = checkpoint.load_training(tmp_path)
        saved["scaler"]["scale"] = bad
        with pytest.raises(CheckpointError, match="loss scale must be positive and finite"):
            trainer(tmp_path, digits, fp16, state=saved)
    saved["scaler"].pop("growth_interval")
    checkpoint.save({k: v for k, v in saved.items() if k not in ("format", "version")}, tmp_path)
    with pytest.raises(CheckpointError, match="scaler lacks growth_interval"):
        checkpoint.load_training(tmp_path)


def test_a_graph_is_refused_with_the_reason(capturable):  # noqa: F811
    step = Step(tiny_model(), FP16, recorder=Again())
    assert step._replay is None
    reason = "fp16 has a gradient scaler, which PyTorch adapts between steps, outside of a CUDA graph"
    assert step.mode == f"eager: {reason}"
    assert Step(tiny_model(), TrainingConfig(autocast="bf16"), recorder=Again()).mode == "one CUDA graph"
    with pytest.raises(ValueError, match=f"cuda_graph asked for, but {reason}"):
        Step(tiny_model(), FP16.replace(cuda_graph=True), recorder=Again())


def test_evaluation_and_sampling_in_fp16(digits):
    model = tiny_model().eval()
    x = images(digits, 2)
    with precision.autocast("fp16", x.device):
        assert model(x, seed=1).logits.dtype == torch.float16
    full, low = (importance_bound(model, x, 1, autocast=name)[0] for name in (None, "fp16"))
    assert not torch.equal(full, low)
    torch.testing.assert_close(low, full, rtol=1e-2, atol=0)
    logits = Sampler(model, pixels="logits", autocast="fp16")(2, seed=1)
    assert logits.dtype == torch.float32
    for call in (
        lambda: importance_bound(model, x, 1, autocast="fp8"),
        lambda: Sampler(model, autocast="fp8"),
    ):
        with pytest.raises(ValueError, match="autocast must be None, 'bf16' or 'fp16', got 'fp8'"):
            call()


@pytest.mark.gpu
def test_fp16_on_a_gpu(digits):
    step, x = Step(tiny_model().cuda().train(), FP16.replace(ema=0.9)), images(digits).cuda()
    assert step.mode.startswith("eager: fp16 has a gradient scaler")
    before = everything(step)
    while (result := step(x, seed=1, **OPTIONS)).rescaled:
        assert_same(before, everything(step))
    assert not result.skipped
    assert step.averages.updates == 1
    assert precision.chosen("auto", x.device) in ("bf16", "fp16")


RANKS = """
import contextlib, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[2]]
from training_runs import tiny_model
from nvae_fast.training import Step, TrainingConfig, precision, start_world
precision.autocast = lambda name, device: contextlib.nullcontext()
world = start_world("cpu")
step = Step(tiny_model().train(), TrainingConfig(autocast="fp16", ema=0.5), world)
found = []
for number in range(5):
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(world.rank)).round()
    if world.rank == 1 and number == 2:
        next(step.model.parameters()).register_hook(lambda grad: grad * float("inf"))
    if world.rank == 0 and number == 3:
        x[:] = float("nan")
    result = step(x, seed=number, coefficient=0.5, weight=0.01, learning_rate=1e-2)
    found.append([result.skipped, result.rescaled, step.scaling.scale])
torch.save({"found": found, "model": step.model.state_dict(), **step.extra_state()}, f"{sys.argv[1]}/{world.rank}.pt")
world.close()
"""


def test_processes_have_the_same_scale_and_averages(tmp_path):
    """Overflow on one process from step 2 on; a loss that is not finite on the other one in step 3."""
    for process in ranks(2, [str(tmp_path), str(Path(__file__).parent)], start=RANKS):
        _, text = process.communicate(timeout=300)
        assert process.returncode == 0, text
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["found"] == second["found"]
    full, half, quarter = 2.0**16, 2.0**15, 2.0**14
    good = [[False, False, full]] * 2
    assert first["found"] == [*good, [True, True, half], [True, False, half], [True, True, quarter]]
    assert_same(first["model"], second["model"])
    assert_same(first["ema"]["model"], second["ema"]["model"])
    assert first["ema"]["updates"] == second["ema"]["updates"] == 2
    assert first["scaler"] == second["scaler"]


def test_curves_of_low_precision_stay_with_float32():
    """A mean over ten steps differs by less than the rounding of one number in that precision, all the way: errors of single
    operations average out, and the learning rate is one at which training does not amplify them."""
    steps = 100
    changes = {
        "image_size": 8, "num_channels_enc": 4, "num_channels_dec": 4, "num_latent_scales": 1, "num_groups_per_scale": 2,
        "num_latent_per_group": 4, "num_preprocess_blocks": 1, "num_postprocess_blocks": 1,
    }  # fmt: skip
    config = loss_curves.model_config("digits").replace(**changes)
    training = TrainingConfig(batch_size=8, warmup_epochs=0.05)
    cpu = torch.device("cpu")
    full, *low = (
        loss_curves.windows(loss_curves.curve("digits", config, training, variant, cpu, steps))
        for variant in ("nvae_fast", "nvae_fast bf16", "nvae_fast fp16")
    )
    assert full[-1] < 0.8 * full[0], "it has learnt something"
    for curve, dtype in zip(low, (torch.bfloat16, torch.float16), strict=True):
        parted = max(abs(a - b) / b for a, b in zip(curve, full, strict=True))
        assert 0 < parted < torch.finfo(dtype).eps / 2, dtype
