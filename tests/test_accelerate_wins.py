"""accelerate runs a kernel where it is known to be faster: the table of measurements, and measuring at hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_cells import WHOLE, make
from foreign_model import SyncBatchNormSwish, Tower
from harness import assert_close
from torch import nn

import nvae_fast as nf
from benchmarks.parts import PARTS_MEASURED
from nvae_fast.patching import bound as bound_module
from nvae_fast.patching import measure, sample, wins
from nvae_fast.patching.apply import replace
from nvae_fast.patching.forwards import BATCH_NORM, SEQUENTIAL, SQUEEZE_EXCITE

pytestmark = pytest.mark.measured_wins

SWISH = "batch norm + swish"


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the rows of the table: (part, mode, layout, batch, channels, pixels, ratio); ``others``: of a second machine."""

    def use(*rows: Any, others: tuple[Any, ...] = (), dtypes: tuple[str, ...] = ("float32",)) -> None:
        machines = [
            [("cpu", d, *row) for d in dtypes for row in machine] for machine in (rows, others) if machine
        ]
        monkeypatch.setattr(wins, "_tables", lambda: [wins._table(machine) for machine in machines])
        for function in (wins._measured, wins._wins, wins.often):
            function.cache_clear()

    yield use
    monkeypatch.undo()
    for function in (wins._measured, wins._wins, wins.often):
        function.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the kernels that ran."""
    seen: list[str] = []
    for kind, forward in bound_module.FORWARDS.items():

        def counting(*args: Any, kind: str = kind, forward: Any = forward, **kwargs: Any) -> Any:
            seen.append(kind)
            return forward(*args, **kwargs)

        monkeypatch.setitem(bound_module.FORWARDS, kind, counting)
    return seen


def test_what_the_rows_near_a_size_say(table: Any) -> None:
    table(
        (SWISH, "training", "contiguous", 8, 64, 256, 1.5),
        (SWISH, "training", "contiguous", 8, 128, 256, 0.9),
        (SWISH, "training", "contiguous", 8, 1024, 256, 2.0),
        (SWISH, "evaluation", "contiguous", 8, 64, 256, 1.01),
    )
    x = torch.empty
    assert wins.wins(SWISH, "training", x(8, 64, 16, 16))
    assert not wins.wins(SWISH, "training", x(8, 32, 16, 16))  # smaller than all that was measured
    assert not wins.wins(SWISH, "training", x(8, 128, 16, 16))
    assert not wins.wins(SWISH, "training", x(16, 96, 16, 16))  # near both
    assert wins.wins(SWISH, "training", x(8, 2000, 16, 16))  # the nearest decides
    assert not wins.wins(SWISH, "evaluation", x(8, 64, 16, 16))  # not by enough
    assert not wins.wins(
        SWISH, "training", x(8, 64, 16, 16).to(memory_format=torch.channels_last)
    )  # not measured
    assert not wins.wins("other", "training", x(8, 64, 16, 16))
    assert wins.wins(
        SWISH, "training", x(8, 64, 16, 16, dtype=torch.float64)
    )  # no row of the dtype: nothing is known
    assert wins.wins(SWISH, "training", x(8, 64, 16, 16, device="meta"))


def test_a_few_microseconds_are_not_enough(table: Any) -> None:
    x = torch.empty(8, 64, 16, 16)
    for microseconds, expected in ((99.0, False), (101.0, True)):  # half of it is saved
        table((SWISH, "training", "contiguous", 8, 64, 256, 2.0, microseconds))
        assert wins.wins(SWISH, "training", x) is expected
        assert wins.often(SWISH, "cpu", torch.float32, "training") is expected


def test_parts_that_hardly_ever_win(table: Any) -> None:
    sizes = [(SWISH, "training", "contiguous", 8, 64, 4**i) for i in range(8)]
    for faster in range(6):
        table(*((*row, 1.5 if i < faster else 0.9) for i, row in enumerate(sizes)))
        assert wins.often(SWISH, "cpu", torch.float32, "training") is (faster >= 4)


@pytest.mark.parametrize("training", [True, False])
def test_the_own_forward_runs_where_it_is_faster(training: bool, table: Any, kernels: list[str]) -> None:
    table(
        (SWISH, "training", "contiguous", 2, 4, 25, 2.0), (SWISH, "evaluation", "contiguous", 2, 4, 25, 0.5)
    )
    theirs, ours = SyncBatchNormSwish(4).train(training), nf.accelerate(SyncBatchNormSwish(4)).train(training)
    kernels.clear()
    x = torch.randn(2, 4, 5, 5)
    with torch.set_grad_enabled(training):
        assert_close(ours(x), theirs(x), 2e-5)
    assert kernels == [BATCH_NORM] * training
    with torch.no_grad():
        ours(x)  # in training mode the statistics are those of the batch also without gradients
    assert kernels == [BATCH_NORM] * (2 * training)


def test_inference_asks_once_for_each_shape(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(SWISH, mode, "contiguous", 8) for mode in ("training", "evaluation")]
    table((*rows[0], 16, 64, 1.5), (*rows[1], 16, 64, 0.9), (*rows[1], 512, 64, 1.5))
    model = nf.accelerate(SyncBatchNormSwish(16)).eval()
    bound = bound_module.bound_forward(model)
    asked: list[torch.Size] = []
    assert bound is not None
    monkeypatch.setattr(type(bound), "pays", lambda self, x: bool(asked.append(x.shape)))
    with torch.no_grad():
        model.train()
        for _ in range(2):  # batch statistics: it depends on the processes, which may come later
            model(torch.randn(2, 16, 8, 8))
        assert len(asked) == 2
        assert not bound.decided
        asked.clear()
        model.eval()
        for side in (8, 8, 4, 8):
            model(torch.randn(2, 16, side, side))
        assert asked == [(2, 16, 8, 8), (2, 16, 4, 4)]
        for side in range(1, 200):
            model(torch.randn(1, 16, side, 1))
        assert len(bound.decided) <= 64
        twin = copy.deepcopy(model)
        twin(torch.randn(2, 16, 8, 8))
    copied = bound_module.bound_forward(twin)
    assert copied is not None
    assert copied.decided.keys() == {(torch.Size((2, 16, 8, 8)), True, False, False, False)}


def test_training_asks_once_where_no_statistics_are_taken(
    table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in each combination of modes: with gradients of parameters, of the input, without."""
    part = "depthwise 5x5, stride 1"
    rows = [(part, mode, "contiguous", 8) for mode in ("training", "evaluation")]
    table((*rows[0], 16, 64, 1.5), (*rows[1], 16, 64, 0.9), (*rows[1], 512, 64, 1.5))
    model = nf.accelerate(nn.Conv2d(16, 16, 5, padding=2, groups=16))
    seen: list[bool] = []
    bound = bound_module.bound_forward(model)
    assert bound is not None
    pays = type(bound).pays
    monkeypatch.setattr(type(bound), "pays", lambda self, x: seen.append(pays(self, x)) or seen[-1])
    x = torch.randn(8, 16, 8, 8)
    for _ in range(3):
        model.train()(x)
        model.eval()(x)
        model(x.clone().requires_grad_())
        with torch.no_grad():
            model(x.clone().requires_grad_())
    assert seen == [True, False, True, False]


def test_parts_that_never_win_are_left_with_the_reason(table: Any) -> None:
    part = "depthwise 5x5, stride 1"
    row = ("training", "contiguous", 8, 64, 256)
    table((part, *row, 0.8), (SEQUENTIAL, *row, 1.2), dtypes=("float32", "bfloat16"))
    depthwise = nn.Conv2d(4, 4, 5, padding=2, groups=4)
    model = nf.accelerate(nn.ModuleList([depthwise, nn.Sequential(nn.BatchNorm2d(4), nn.SiLU())]))
    report = nf.acceleration_report(model)
    assert report.replaced == [("1", SEQUENTIAL)]
    ((name, reason),) = report.left
    assert name == "0"
    assert f"PyTorch's own was measured to be faster for {part}" in reason


@pytest.mark.parametrize("training", [True, False])
def test_where_a_kernel_hardly_ever_wins_nothing_is_asked(
    training: bool, table: Any, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, other = ("training", "evaluation") if training else ("evaluation", "training")
    table((SWISH, mode, "contiguous", 8, 64, 256, 0.9), (SWISH, other, "contiguous", 1, 1, 1, 1.5))
    theirs, ours = SyncBatchNormSwish(4).train(training), nf.accelerate(SyncBatchNormSwish(4)).train(training)
    asked: list[bool] = []
    monkeypatch.setattr(bound_module.BoundForward, "pays", lambda self, x: asked.append(True) or True)
    kernels.clear()
    x = torch.randn(2, 4, 5, 5)
    with torch.set_grad_enabled(training):
        assert torch.equal(ours(x), theirs(x))
        assert not asked
        with torch.autocast("cpu", torch.bfloat16):  # of bfloat16 nothing is known
            ours(x)
        ours.train(not training)(x)
    assert kernels == [BATCH_NORM] * 2
    assert dict(nf.acceleration_report(ours).notes) == {}


def test_what_rests_can_be_frozen(table: Any) -> None:
    """Freezing folds what its kernel does not compute faster."""
    rows = [
        (SWISH, "evaluation", "contiguous", 8, 64, 256, 0.9),
        (SWISH, "training", "contiguous", 8, 64, 256, 0.9),
    ]
    table(*rows)
    ours = nf.accelerate(SyncBatchNormSwish(4))
    assert nf.acceleration_report(ours).replaced == [("", SWISH)]
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert_close(nf.freeze(ours)(x), ours.eval()(x), 2e-5)
    assert [type(part).__name__ for part in nf.freeze(ours).children()] == ["FrozenBatchNorm"]
    ours.forward.measured = {"evaluation": False, "training": True}
    ours.forward.find_rests()
    assert dict(nf.acceleration_report(ours).notes) == {
        "": "its own forward in evaluation, which was measured to be faster"
    }


def test_processes_that_merge_statistics_decide_alike(
    table: Any, kernels: list[str], monkeypatch: Any
) -> None:
    table((SWISH, "training", "contiguous", 64, 4, 25, 2.0), (SWISH, "training", "contiguous", 1, 4, 25, 0.5))
    ours = nf.accelerate(SyncBatchNormSwish(4))
    assert not ours.forward.pays(torch.randn(1, 4, 5, 5))
    monkeypatch.setattr(bound_module.distributed, "world_size", lambda *_: 2)
    assert ours.forward.pays(torch.randn(1, 4, 5, 5))


# Measuring at hand


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([SyncBatchNormSwish(4), SyncBatchNormSwish(4)])
        self.cell = make(se=True, c=4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.cell(self.norms[1](self.norms[0](x)) * scale)


@pytest.mark.parametrize("how", ["tensor", "tuple", "mapping"])
def test_a_sample_input_decides(
    how: str, table: Any, kernels: list[str], monkeypatch: Any, capsys: Any
) -> None:
    table((SWISH, "training", "contiguous", 2, 4, 25, 0.5))
    asked: list[Any] = []

    def speedups(part: Any, x: torch.Tensor, seconds: float) -> dict[str, wins.Speedup]:
        asked.append((type(part).__name__, tuple(x.shape)))
        return {"training": wins.Speedup(2.0), "evaluation": wins.Speedup(0.5 if len(asked) == 1 else 2.0)}

    monkeypatch.setattr(sample, "speedups", speedups)
    x, model = torch.randn(2, 4, 6, 6), Two()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = {"tensor": x, "tuple": (x, 2.0), "mapping": {"x": x, "scale": 2.0}}[how]
    nf.accelerate(model, sample_input=given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    names = [name for name, _ in asked]
    assert names.count("SyncBatchNormSwish") == 2, "equal parts with equal inputs are measured once"
    assert ("Cell", (2, 4, 6, 6)) in asked
    assert ("SyncBatchNormSwish", (2, 12, 6, 6)) in asked, "parts inside a whole cell as well"
    notes = dict(nf.acceleration_report(model).notes)
    assert (
        notes["norms.0"]
        == notes["norms.1"]
        == "its own forward in evaluation, which was measured to be faster"
    )
    kernels.clear()
    with torch.no_grad():
        model.eval()(x)
    assert kernels == [WHOLE]
    kernels.clear()
    model.train()(x)
    assert kernels == [BATCH_NORM, BATCH_NORM, WHOLE]


def test_measuring_a_model_changes_nothing(table: Any) -> None:
    table()
    model, x = Tower(8).train(), torch.rand(2, 3, 8, 8)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    nf.accelerate(model, sample_input=x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(part.forward.measured for part in model.modules() if part.__dict__.get("forward") is not None)


def test_parts_are_measured_under_the_flags_in_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, cuDNN's choice of algorithms and autocast are those of the model: without them its own forward is slower."""
    seen: list[Any] = []

    def quartiles(*_: Any) -> list[float]:
        flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
        seen.append((*flags, torch.backends.cudnn.allow_tf32, torch.is_autocast_enabled("cpu")))
        return [1.0, 1.0]

    monkeypatch.setattr(measure, "_quartiles", quartiles)
    part, before = replace(SyncBatchNormSwish(4), everywhere=True), torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with (
            torch.backends.cudnn.flags(benchmark=True, allow_tf32=True),
            torch.autocast("cpu", torch.bfloat16),
        ):
            found = measure.speedups(part, torch.randn(2, 4, 5, 5), 0.0)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert found.keys() == {"evaluation", "training"}
    assert set(seen) == {(True, True, True, True)}


def test_measuring_does_not_communicate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rounds is a matter of time: processes that merge statistics would wait for each other."""
    part = replace(SyncBatchNormSwish(4), everywhere=True)
    monkeypatch.setattr(bound_module.distributed, "world_size", lambda *_: 2)
    assert measure.speedups(part, torch.randn(2, 4, 5, 5), 0.0).keys() == {"evaluation"}


# What is shown, and threads


def test_progress_and_threads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from nvae_fast.patching import progress

    monkeypatch.setattr(progress, "_SHOWN_AFTER", 0.0)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    torch.set_num_threads(2)
    try:
        nf.accelerate(SyncBatchNormSwish(4), progress=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith("accelerate: comparing parts: 1 of 1, ")
    nf.accelerate(SyncBatchNormSwish(4), progress=False)
    assert capsys.readouterr().err == ""
    nf.accelerate(SyncBatchNormSwish(4))  # stderr is no terminal
    assert capsys.readouterr().err == ""


# The committed table


@pytest.mark.parametrize("path", sorted(wins.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_the_committed_tables(path: Path) -> None:
    content = json.loads(path.read_text())
    assert content["measured_on"]["threads"] == 1
    assert {"machine", "versions", "date"} < content["measured_on"].keys()
    assert content["measured_on"]["machine"]["name"] == path.stem
    names = {replace(make(16), everywhere=True).forward.part[0] for make in PARTS_MEASURED}
    assert {row[2] for row in content["rows"]} <= names, "a part is not found by its name"
    assert {f"{WHOLE}, stride {stride}" for stride in (1, 2, -1)} < names
    assert {SWISH, SEQUENTIAL, f"{SQUEEZE_EXCITE}: relu, sigmoid", "depthwise 5x5, stride 1"} < names
    for device, dtype, _, mode, layout, *numbers in content["rows"]:
        assert device == "cpu"
        assert dtype in ("float32", "bfloat16")
        assert mode in ("training", "evaluation")
        assert layout in ("contiguous", "channels_last")
        assert len(numbers) in (4, 5)
        assert min(numbers) > 0


def test_what_the_committed_tables_decide() -> None:
    tables = [json.loads(path.read_text())["rows"] for path in wins.FOLDER.glob("*.json")]
    assert len(tables) >= 2
    measured = {row[2] for rows in tables for row in rows}
    assert measured == {replace(make(16), everywhere=True).forward.part[0] for make in PARTS_MEASURED}
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.empty(8, 64, 16, 16).to(memory_format=layout)
        assert wins.wins(f"{WHOLE}, stride 1", "training", x)
        assert wins.wins(f"{WHOLE}, stride 1", "training", x.bfloat16())
        assert not wins.wins("batch norm", "evaluation", x)


def test_every_machine_must_win(table: Any) -> None:
    x = torch.empty(8, 64, 16, 16)
    row, small = (SWISH, "training", "contiguous", 8, 64, 256), (SWISH, "training", "contiguous", 1, 8, 4)
    table((*row, 1.5), others=((*row, 1.3),))
    assert wins.wins(SWISH, "training", x)
    assert wins.often(SWISH, "cpu", torch.float32, "training")
    table((*row, 1.5), (*small, 0.9), others=((*row, 1.0), (*small, 1.5)))
    assert not wins.wins(SWISH, "training", x)
    assert not wins.often(SWISH, "cpu", torch.float32, "training")
    table((*row, 1.5), others=(("other", *row[1:], 1.5),))  # the second machine did not measure this part
    assert wins.wins(SWISH, "training", x)
    assert not wins.wins("of no machine", "training", x)
    assert wins.wins(SWISH, "training", x.bfloat16())  # of that dtype nothing is known
