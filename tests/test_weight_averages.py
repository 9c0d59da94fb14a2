"""Averages of weights: what they are, that they survive everything a run survives, and that commands use them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_step import Again, capturable  # noqa: F401  a fixture
from test_training_loop import interrupted_steps
from training_runs import TINY_TRAINING, digits_of, tiny_model, trainer

import nvae_fast as nf
from nvae_fast.cli import main
from nvae_fast.cli.train import final_pictures
from nvae_fast.training import (
    CheckpointError,
    Step,
    TrainingConfig,
    checkpoint,
    load_model,
    metrics,
    pictures,
)
from nvae_fast.training.averages import WeightAverages
from nvae_fast.training.graph import WARM_UP
from nvae_fast.training.readjust import readjust

pytestmark = pytest.mark.usefixtures("one_thread")

EMA = TINY_TRAINING.replace(ema=0.9)
OPTIONS = {"coefficient": 0.5, "weight": 0.01, "learning_rate": 1e-2}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def images(digits, count: int = 4, seed: int = 0) -> torch.Tensor:
    return digits.batch(torch.arange(count), seed)


def test_every_average_is_the_formula(digits):
    """In float64, from the weights after each step: weights and batch-norm statistics averaged, other buffers copied."""
    model = tiny_model().train()
    step = Step(model, TrainingConfig(ema=0.35))
    averaged = {name for name, _ in model.named_parameters()} | set(filter(statistic, model.state_dict()))
    copied = set(model.state_dict()) - averaged
    assert any("num_batches_tracked" in name for name in copied)
    assert any("spectral" in name for name in copied)
    expected: dict[str, torch.Tensor] = {}
    for number in range(7):
        step(images(digits), seed=number, **OPTIONS)
        decay = min(0.35, (1 + number) / (10 + number)) if number else 0.0
        for name, value in state_of(model).items():
            expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * value.double()
    found = state_of(step.averages.module)
    for name in averaged:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
    assert all(torch.equal(found[name], model.state_dict()[name]) for name in copied)
    assert any(not torch.equal(found[name], model.state_dict()[name]) for name in filter(statistic, found))
    assert step.averages.updates == 7


def test_the_averages_are_those_of_pytorch():
    """Where the decay is reached: AveragedModel with the function that PyTorch has for it, bit for bit."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = tiny_model()
    ours = WeightAverages(model, 0.3)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.3), use_buffers=True)
    generator = torch.Generator().manual_seed(1)
    for number in range(8):
        with torch.no_grad():
            for value in model.state_dict().values():
                if value.is_floating_point():
                    value.add_(torch.randn(value.shape, generator=generator))
        ours.update()
        if number < 3:  # (1 + n) / (10 + n) is below the decay until n = 3
            theirs.module.load_state_dict(ours.module.state_dict())
            theirs.n_averaged += 1
        else:
            theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        if "spectral" not in name:
            assert torch.equal(value, ours.module.state_dict()[name]), name


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_that_is_undone_does_not_count(digits, graph, capturable):  # noqa: F811
    model = tiny_model(arch_instance="res_elu").train()
    step = Step(model, TrainingConfig(ema=0.9), recorder=Again() if graph else None)
    assert not any(getattr(part, "needs_data_init", False) for part in step.averages.module.modules())
    bad = images(digits)
    bad[0, 0, 5, 5] = float("nan")
    before = state_of(step.averages.module)
    assert step(bad, seed=0, **OPTIONS).skipped  # before anything was initialised
    assert same(before, state_of(step.averages.module))
    for number in range(WARM_UP + 2):
        step(images(digits), seed=number, **OPTIONS)
    assert not graph or step._replay.captures == 1
    before = state_of(step.averages.module)
    assert step(bad, seed=9, **OPTIONS).skipped
    assert same(before, state_of(step.averages.module))
    assert step.averages.updates == WARM_UP + 2
    step(images(digits), seed=10, **OPTIONS)
    assert not same(before, state_of(step.averages.module))


def test_the_trained_model_is_not_changed_by_averages(digits):
    models = [tiny_model().train() for _ in range(2)]
    for model, ema in zip(models, (None, 0.9), strict=True):
        step = Step(model, TrainingConfig(ema=ema))
        for number in range(3):
            step(images(digits), seed=number, **OPTIONS)
    assert same(state_of(models[0]), state_of(models[1]))
    assert all(p.requires_grad for p in models[1].parameters())
    assert not any(p.requires_grad for p in step.averages.module.parameters())


@pytest.mark.parametrize("stop", [1, 5])
def test_resume_restores_the_averages_bit_for_bit(tmp_path, digits, stop):
    few = digits_of(digits, 10)
    config = EMA.replace(max_steps=8, channels_last=stop == 5)
    trainer(tmp_path / "whole", few, config).run()
    interrupted_steps(trainer(tmp_path / "parts", few, config), stop)
    state = checkpoint.load_training(tmp_path / "parts")
    assert state["ema"]["updates"] == stop
    trainer(tmp_path / "parts", few, config, state=state, seed=7).run()
    whole, parts = (checkpoint.load(tmp_path / name)["ema"] for name in ("whole", "parts"))
    assert same(whole.pop("model"), parts.pop("model"))
    assert whole == parts == {"decay": 0.9, "updates": 8}


def test_averages_can_begin_and_end_when_a_run_is_resumed(tmp_path, digits, capsys):
    options = [
        "train", "--out", str(tmp_path / "run"), "--resume", "--device", "cpu", "--progress", "none",
    ]  # fmt: skip
    run = trainer(tmp_path / "run", digits, TINY_TRAINING.replace(max_steps=2))
    run.data = ("digits", None)
    run.run()
    assert "ema" not in checkpoint.load(tmp_path / "run")
    start = checkpoint.load(tmp_path / "run")["model"]
    assert main([*options, "--max-steps", "3", "--ema", "0.99"]) == 0
    assert "--ema changes from None to 0.99 from here on" in capsys.readouterr().err
    first = checkpoint.load(tmp_path / "run")
    assert same(first["ema"]["model"], dict(first["model"])), "the first update is a copy"
    assert not same(start, first["model"])
    assert main([*options, "--max-steps", "4"]) == 0
    assert checkpoint.load(tmp_path / "run")["ema"]["updates"] == 2
    assert main([*options, "--max-steps", "5", "--ema", "none"]) == 0
    assert "ema" not in checkpoint.load(tmp_path / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits) -> Path:
    """A run with averages that differ from its weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("averages") / "run"
    config = TINY_TRAINING.replace(ema=0.9999, max_steps=12, learning_rate=5e-2)
    made = trainer(folder, digits, config)
    made.data = ("digits", None)
    made.run()
    return folder


def test_load_model_chooses(run):
    document = checkpoint.load(run)
    found = {weights: load_model(run, weights=weights) for weights in (None, "ema", "model")}
    for weights, (model, facts) in found.items():
        assert facts["weights"] == (weights or "ema")
        assert facts["ema"] == {"decay": 0.9999, "updates": 12}
        wanted = document["model"] if weights == "model" else document["ema"]["model"]
        assert same(state_of(model), wanted)
    assert not same(state_of(found["ema"][0]), state_of(found["model"][0]))
    with pytest.raises(ValueError, match="weights must be 'model', 'ema' or None, got 'mean'"):
        load_model(run, weights="mean")


def test_a_checkpoint_without_averages(tmp_path):
    old = Path(__file__).parent / "data" / "run_0.1.0"
    model, facts = load_model(old)
    assert facts["weights"] == "model"
    assert "ema" not in facts
    message = rf"{old}.*has no averages of the weights, which weights .--weights. ema asks for"
    with pytest.raises(CheckpointError, match=message):
        load_model(old, weights="ema")
    nf.save_official(model, tmp_path / "official.pt")
    assert load_model(tmp_path / "official.pt")[1]["weights"] == "model"
    with pytest.raises(CheckpointError, match=r"official\.pt has no averages"):
        load_model(tmp_path / "official.pt", weights="ema")


COMMANDS = {
    "evaluate": ["--max-images", "4", "--json", "OUT"],
    "sample": ["-n", "2", "--out", "OUT.png", "--overwrite"],
    "interpolate": ["--pairs", "1", "--steps", "2", "--out", "OUT.png", "--overwrite"],
    "reconstruct": ["-n", "2", "--out", "OUT.png", "--overwrite"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_take_the_averages_and_say_so(run, tmp_path, capsys, name):
    def result(*options: str) -> tuple[bytes, str]:
        words = [word.replace("OUT", str(tmp_path / "out")) for word in COMMANDS[name]]
        assert main([name, str(run), *words, "--threads", "1", "--progress", "none", *options]) == 0
        file = tmp_path / ("out.png" if "OUT.png" in COMMANDS[name] else "out")
        return file.read_bytes(), capsys.readouterr().err

    default, averages, last = result(), result("--weights", "ema"), result("--weights", "model")
    assert default[0] == averages[0] != last[0]
    assert "weights: averages (decay 0.9999, 12 steps)" in default[1]
    assert "weights: those of the last step, not their averages" in last[1]
    if name == "evaluate":
        assert json.loads(default[0])["weights"] == "ema"
        assert json.loads(last[0])["weights"] == "model"


@pytest.mark.parametrize("name", [*COMMANDS, "convert"])
def test_commands_refuse_averages_that_are_not_there(tmp_path, capsys, name):
    old = Path(__file__).parent / "data" / "run_0.1.0"
    words = [str(tmp_path / "out.pt")] if name == "convert" else COMMANDS[name][:2]
    assert main([name, str(old), *words, "--weights", "ema"]) == 2
    error = capsys.readouterr().err
    assert "--weights ema" in error
    assert str(old) in error
    assert not (tmp_path / "out.pt").exists()


def test_convert_writes_the_averages(run, tmp_path, capsys):
    for weights in ("ema", "model"):
        target = tmp_path / f"{weights}.pt"
        assert (
            main(["convert", str(run), str(target), *(["--weights", "model"] if weights == "model" else [])])
            == 0
        )
        expected = load_model(run, weights=weights)[0]
        found = dict(nf.load_official(target).named_parameters())
        assert all(torch.equal(found[name], value) for name, value in expected.named_parameters())
    assert "weights: averages" in capsys.readouterr().err


def test_readjusted_statistics_of_either_weights_are_kept_apart(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    source, found = tmp_path / "run" / checkpoint.NAME, {}
    for weights in ("model", "ema", "model", "ema"):
        model, _ = load_model(source, weights=weights)
        path = readjust(model, source, temperature=0.7, passes=2, batch=2, weights=weights)
        state = {name: value for name, value in state_of(model).items() if statistic(name)}
        assert same(found.setdefault(weights, (path, state))[1], state)
        assert found[weights][0] == path
    assert "-ema" not in found["model"][0].name, "the name that files of earlier versions have"
    assert not same(found["model"][1], found["ema"][1])


def test_pictures_of_a_run_are_of_the_averages(tmp_path, digits, monkeypatch):
    seen = []
    for name in ("write_samples", "write_reconstructions"):
        monkeypatch.setattr(pictures, name, lambda model, *_, **__: seen.append(model))
    monkeypatch.setattr(metrics.MetricsLog, "pictures", lambda log, step, model, *_, **__: seen.append(model))
    for config in (EMA, TINY_TRAINING):
        made = trainer(tmp_path / f"{config.ema}", digits, config.replace(max_steps=2, sample_every=1))
        made.run()
        final_pictures(made, "digits", "digits", {})
        averages = made.step_function.averages
        assert len(seen) == 6
        assert all(model is (made.model if averages is None else averages.module) for model in seen)
        seen.clear()


def test_averages_that_do_not_fit_are_errors(run, tmp_path, digits):
    config = TrainingConfig.from_dict(checkpoint.load(run)["training_config"])
    state = checkpoint.load_training(run)
    del state["ema"]
    with pytest.raises(CheckpointError, match="does not fit: it lacks ema"):
        trainer(tmp_path / "run", digits, config, state=state)
    state = checkpoint.load_training(run)
    state["ema"]["model"].pop("stem.weight")
    with pytest.raises(CheckpointError, match=r"(?s)does not fit: .*stem\.weight"):
        trainer(tmp_path / "run", digits, config, state=state)
    state = checkpoint.load_training(run)
    del state["ema"]["updates"]
    checkpoint.save({k: v for k, v in state.items() if k not in ("format", "version")}, tmp_path)
    with pytest.raises(CheckpointError, match=r"ema lacks updates"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="ema must be greater than 0 and less than 1, got 1"):
        TrainingConfig(ema=1.0)


def test_a_process_group_is_shared_with_the_copy():
    class Group:
        def __deepcopy__(self, memo):
            raise TypeError("cannot pickle a process group")

    model, group = tiny_model(), Group()
    nf.nn.set_process_group(model, group)
    averages = WeightAverages(model, 0.9)
    assert averages.module.stem is not model.stem
    norms = [part for part in averages.module.modules() if hasattr(part, "process_group")]
    assert norms
    assert all(part.process_group is group for part in norms)


@pytest.mark.gpu
def test_averages_follow_a_cuda_graph(digits):
    model = tiny_model().cuda().train()
    step, x = Step(model, TrainingConfig(cuda_graph=True, ema=0.2)), images(digits).cuda()
    expected: dict[str, torch.Tensor] = {}
    for number in range(WARM_UP + 4):
        assert not step(x, seed=number, **OPTIONS).skipped
        decay = min(0.2, (1 + number) / (10 + number)) if number else 0.0
        for name, value in model.named_parameters():
            expected[name] = decay * expected.get(name, 0.0) + (1 - decay) * value.detach().double()
    assert step._replay.captures == 1
    for name, value in step.averages.module.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
