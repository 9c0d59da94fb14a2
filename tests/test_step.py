"""The step as one unit: a body of tensors only, captured or eager; what a capture may not do is forbidden here too."""

from __future__ import annotations

import contextlib
import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.training import Step, TrainingConfig
from nvae_fast.training.distributed import World
from nvae_fast.training.graph import WARM_UP, CapturedFunction, DeviceScalars

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"coefficient": 0.37, "weight": 0.02, "learning_rate": 2e-3}
FLOWS = {"dataset": "photos", "num_nf": 1, "num_latent_scales": 2}
# What waits for the device, or has a shape that depends on values there.
WAITING = (
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount",
    "repeat_interleave.Tensor", "allclose",
)  # fmt: skip


class NoWaiting(TorchDispatchMode):
    """Fails on every operator that waits for the device; ``device``: and on every tensor elsewhere that holds anything
    (PyTorch 2.11 starts a checkpoint with an empty tensor on the CPU, from which nothing is copied)."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = str(func).removeprefix("aten.")
        assert not name.startswith(WAITING), f"{name} waits for the device"
        result = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves((args, kwargs, result)):
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                assert leaf.device.type == self.device, f"{name} with a tensor on {leaf.device}"
        return result


class Again:
    """Stands in for CUDA: a capture runs nothing, a replay calls the body and fills the same outputs."""

    def warm_up(self, body):
        return body()

    def capture(self, body):
        outputs = torch.empty(0)

        def replay():
            result = body()
            outputs.resize_(result.shape).copy_(result)

        return replay, outputs


@pytest.fixture
def capturable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets Adamax keep its count of steps in tensors on the CPU and on ``meta`` as it does on a GPU."""
    adamax = importlib.import_module("torch.optim.adamax")  # no attribute of its package
    monkeypatch.setattr(
        adamax, "_get_capturable_supported_devices", lambda **options: ["cpu", "cuda", "meta"]
    )


def images(count: int = 4, **changes) -> torch.Tensor:
    channels = 3 if changes.get("dataset") == "photos" else 1
    return (torch.rand(count, channels, 32, 32) * 255).round() / 255


def state(model: torch.nn.Module, step: Step) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    for index, entry in step.optimizer.state_dict()["state"].items():
        found.update({f"optimizer {index} {name}": value.clone() for name, value in entry.items()})
    return found


@pytest.mark.parametrize("arch", ["res_mbconv", "res_elu"])
def test_captured_step_is_the_eager_step(arch, capturable):
    models = [tiny_model(arch_instance=arch).train() for _ in range(2)]
    eager = Step(models[0], TrainingConfig())
    captured = Step(models[1], TrainingConfig(), recorder=Again())
    assert captured.mode == "one CUDA graph"
    for number in range(WARM_UP + 5):
        x = images()
        rates = {**OPTIONS, "learning_rate": 1e-3 * (number + 1), "coefficient": 0.1 * number}
        results = [step(x, seed=number, **rates) for step in (eager, captured)]
        assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
        assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-3)
    assert captured._replay.captures == 1
    before, after = state(models[0], eager), state(models[1], captured)
    assert before.keys() == after.keys()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=2e-3, atol=2e-4, msg=name)


def test_bad_step_in_a_graph_is_undone_bit_for_bit(capturable):
    model = tiny_model().train()
    step = Step(model, TrainingConfig(grad_clip=10.0), recorder=Again())
    bad = images()
    bad[0, 0, 5, 5] = float("nan")
    assert step(bad, seed=0, **OPTIONS).skipped  # before anything was initialised
    for number in range(WARM_UP + 1):
        assert not step(images(), seed=number, **OPTIONS).skipped
    assert step._replay.captures == 1
    before = state(model, step)
    result = step(bad, seed=9, **OPTIONS)
    assert result.skipped
    assert math.isnan(result.loss)
    assert step._replay.captures == 1
    after = state(model, step)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not step(images(), seed=10, **OPTIONS).skipped
    assert not any(torch.equal(p, before[n]) for n, p in model.named_parameters() if n == "stem.weight")


def test_another_shape_is_another_capture(capturable):
    step = Step(tiny_model().train(), TrainingConfig(), recorder=Again())
    for _ in range(WARM_UP + 2):
        step(images(4), seed=1, **OPTIONS)
    assert step._replay.captures == 1
    for _ in range(WARM_UP):
        step(images(3), seed=1, **OPTIONS)
    assert step._replay.captures == 1, "a new shape is warmed up first"
    step(images(3), seed=1, **OPTIONS)
    assert step._replay.captures == 2
    step(images(3).contiguous(memory_format=torch.channels_last), seed=1, **OPTIONS)
    assert step._replay.captures == 2  # one channel: the strides may agree, if not it is warming up
    assert step._images.shape[0] == 3


def test_weights_have_new_versions_after_a_replay(capturable):
    """Caches of what follows from the weights see that they changed, though a graph writes behind autograd's back."""
    model = tiny_model().train()
    step = Step(model, TrainingConfig(), recorder=Again())
    for _ in range(WARM_UP + 1):
        step(images(), seed=1, **OPTIONS)
    step._replay._replay = lambda: None  # as a graph: nothing that Python sees happens
    before = [value._version for value in (*model.parameters(), *model.buffers())]
    step(images(), seed=1, **OPTIONS)
    after = [value._version for value in (*model.parameters(), *model.buffers())]
    assert all(a < b for a, b in zip(before, after, strict=True))


def prepared(device: str, changes: dict, options: dict) -> tuple[Step, torch.Tensor]:
    """A step past its beginning, whose body may be captured next, and its images."""
    model = tiny_model(**changes).train()
    with torch.no_grad():
        model.regularization()  # the first power iterations are made
    x = images(2, **changes)
    for module in model.modules():
        if getattr(module, "needs_data_init", False):
            module.needs_data_init = False
    step = Step(model.to(device), TrainingConfig(**options), recorder=Again())
    x = x.to(device)
    step.gradients(x)
    step.update(step._rate)
    step.optimizer.zero_grad(set_to_none=True)
    return step, x


CASES = [
    ({}, {}),
    ({"arch_instance": "res_elu"}, {"grad_clip": 1.0}),
    (FLOWS, {"autocast": "bf16"}),
    ({"arch_instance": "mbconv_den", "num_channels_enc": 8, "num_channels_dec": 8}, {"kl_balance": False}),
    ({}, {"checkpoint_cells": True}),
]


@pytest.mark.parametrize(("changes", "options"), CASES)
def test_the_body_never_waits_for_the_device(changes, options, capturable, route):
    step, x = prepared("cpu", changes, options)
    with NoWaiting("cpu") as mode:
        values = step.body(x)
    assert mode.calls > 300
    assert torch.isfinite(values).all()
    assert all(p.grad is None for p in step.parameters)


@pytest.mark.parametrize(("changes", "options"), CASES)
def test_the_body_stays_on_its_device(changes, options, capturable, monkeypatch):
    """On ``meta``, which has shapes and no values: nothing comes from the host or goes there."""
    clip = importlib.import_module("torch.nn.utils.clip_grad")
    monkeypatch.setattr(clip, "_device_has_foreach_support", lambda device: True)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # has no meta
    step, x = prepared("meta", changes, {k: v for k, v in options.items() if k != "autocast"})
    with NoWaiting("meta"):
        channels = step.model.config.num_groups * step.model.config.num_latent_per_group
        assert step.body(x).shape == (7 + channels,)


def test_what_waits_is_caught():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting("cpu"):
        torch.ones(3).sum().item()
    with pytest.raises(AssertionError, match="tensor on cpu"), NoWaiting("meta"):
        torch.ones(3, device="meta") + torch.tensor(1.0)
    with NoWaiting("meta"):
        torch.empty(0)


def test_a_graph_that_cannot_be_is_refused_with_the_reason():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"cuda_graph asked for, but a CUDA graph needs a GPU, .* on cpu"):
        Step(model, TrainingConfig(cuda_graph=True))
    assert Step(model, TrainingConfig()).mode == "eager: a CUDA graph needs a GPU, the model is on cpu"
    assert Step(model, TrainingConfig(cuda_graph=False)).mode == "eager: cuda_graph is off"
    from nvae_fast.training.step import _no_graph

    reason = _no_graph(torch.device("cuda"), World(0, 4), TrainingConfig())
    assert reason == "a CUDA graph holds the step of one process, this run has 4"


def test_optimizer_state_moves_between_modes(capturable):
    """Saved from a captured run, continued eagerly, and the other way round."""
    x = [images() for _ in range(2 * WARM_UP + 4)]

    def run(recorders: list) -> dict[str, torch.Tensor]:
        model = tiny_model().train()
        saved, count = None, len(x) // len(recorders)
        for part, recorder in enumerate(recorders):
            step = Step(model, TrainingConfig(), recorder=recorder)
            if saved is not None:
                step.restore(saved)
            for number in range(part * count, (part + 1) * count):
                step(x[number], seed=number, **OPTIONS)
            saved = step.optimizer_state()
            assert saved["param_groups"][0]["capturable"] is False
            assert isinstance(saved["param_groups"][0]["lr"], float)
        return state(model, step)

    expected = run([None, None])
    for recorders in ([Again(), None], [None, Again()], [Again(), Again()]):
        for name, value in run(recorders).items():
            torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=2e-4, msg=name)


def test_controls_and_replay():
    controls = DeviceScalars(("a", "b"), torch.device("cpu"))
    for seed in (0, 5, 2**63 - 1, -1, 2**64 - 3):
        controls.write(seed, a=0.1, b=1e300)
        assert int(controls.seed) == (seed + 2**63) % 2**64 - 2**63
        assert float(controls.numbers["a"]) == 0.1
        assert float(controls.numbers["b"]) == 1e300
    controls.write(torch.tensor(17), a=0.0, b=0.0)
    assert int(controls.seed) == 17
    replay = CapturedFunction(Again())
    for number in range(WARM_UP):
        assert not replay.ready("key")
        assert replay.warm_up(lambda number=number: number) == number
    assert replay.ready("key")
    assert not replay.ready("other")
    assert not replay.ready("key"), "only the newest key is kept"


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"arch_instance": "res_elu"}, FLOWS])
@pytest.mark.parametrize(
    "options", [{}, {"autocast": "bf16"}, {"checkpoint_cells": True, "grad_clip": 100.0}]
)
def test_cuda_graph_equals_eager(changes, options):
    tolerance = 2e-2 if options.get("autocast") else 1e-3
    models = [tiny_model(**changes).cuda().train() for _ in range(2)]
    eager = Step(models[0], TrainingConfig(cuda_graph=False, **options))
    graph = Step(models[1], TrainingConfig(cuda_graph=True, **options))
    for number in range(WARM_UP + 6):
        x = images(4, **changes).cuda()
        a, b = (step(x, seed=number, **OPTIONS) for step in (eager, graph))
        assert not b.skipped
        assert b.loss == pytest.approx(a.loss, rel=tolerance)
        assert b.kl == pytest.approx(a.kl, rel=10 * tolerance, abs=tolerance)
    assert graph._replay.captures == 1


@pytest.mark.gpu
def test_cuda_graph_undoes_a_bad_step_and_follows_seed_and_shape():
    model = tiny_model().cuda().train()
    step = Step(model, TrainingConfig(cuda_graph=True))
    x = images().cuda()
    for number in range(WARM_UP + 2):
        step(x, seed=number, **OPTIONS)
    before = state(model, step)
    bad = x.clone()
    bad[0, 0, 5, 5] = float("nan")
    assert step(bad, seed=9, **OPTIONS).skipped
    after = state(model, step)
    assert all(torch.equal(before[name], after[name]) for name in before)
    still = {**OPTIONS, "learning_rate": 0.0}
    kls = [step(x, seed=seed, **still).kl for seed in (1, 2, 1)]
    assert kls[0] != kls[1]
    for _ in range(WARM_UP + 1):
        assert not step(images(3).cuda(), seed=1, **OPTIONS).skipped
    assert step._replay.captures == 2


@pytest.mark.gpu
def test_cuda_graph_is_one_launch():
    from torch.profiler import ProfilerActivity, profile

    step = Step(tiny_model().cuda().train(), TrainingConfig(cuda_graph=True))
    x = images().cuda()
    for number in range(WARM_UP + 2):
        step(x, seed=number, **OPTIONS)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step(x, seed=1, **OPTIONS)
        torch.cuda.synchronize()
    names = [event.name() for event in record.profiler.kineto_results.events()]
    assert sum(name == "cudaGraphLaunch" for name in names) == 1
    assert sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names) <= 4


def test_nothing_is_initialised_on_import():
    assert nf.__version__
    if torch.cuda.is_available():
        pytest.skip("a GPU test may have initialised CUDA")
    assert not torch.cuda.is_initialized()
