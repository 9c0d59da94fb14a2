"""Curves of the step time: every axis changes one thing, and the command writes what it measured."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
import torch

from benchmarks import growth, model

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.mark.parametrize("axis", growth.AXES)
def test_an_axis_changes_one_thing(axis: str):
    settings = [growth.workload(axis, value, CPU) for value in growth.AXES[axis][1]]
    values = [value for value, _ in settings]
    assert axis == "threads" or values == sorted(set(values))
    flat = [{"batch": w.batch, **dataclasses.asdict(w.config)} for _, w in settings]
    changed = {key for key in flat[0] if len({entry[key] for entry in flat}) > 1}
    pairs = {
        "batch": {"batch"},
        "resolution": {"image_size"},
        "groups": {"num_groups_per_scale"},
        "depth": {"num_cell_per_cond_enc", "num_cell_per_cond_dec"},
        "channels": {"num_channels_enc", "num_channels_dec"},
        "threads": set(),
    }
    assert changed == pairs[axis]


def test_slope():
    assert growth.slope([(x, 3.0 * x**2) for x in (1, 2, 4, 8)]) == pytest.approx(2.0)
    assert growth.slope([(1, 1.0)]) is None


def test_growth_is_measured_and_drawn(tmp_path: Path):
    document = growth.run(["batch"], CPU, seconds=0.0, rounds=1, points=2, say=lambda line: None)
    entry = json.loads(json.dumps(document))["axes"]["batch"]
    assert [row["value"] for row in entry["points"]] == [1, 2]
    for row in entry["points"]:
        assert set(row["providers"]) == {"reference", "nvae_fast"}
        assert all(timed["images_per_s"] > 0 for timed in row["providers"].values())
        assert all(timed["peak_bytes"] > 0 for timed in row["providers"].values())
    assert entry["slopes"]["peak_bytes"]["nvae_fast"] == pytest.approx(1, abs=0.3)
    pytest.importorskip("matplotlib")
    growth.plot(document, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes()[:4] == b"\x89PNG"


def test_threads_are_set_and_put_back(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(
        growth,
        "measure_point",
        lambda *_: seen.append(torch.get_num_threads()) or {"nvae_fast": {"median_ms": 1.0}},
    )
    monkeypatch.setattr(growth.os, "cpu_count", lambda: 3)
    document = growth.run(["threads"], CPU, say=lambda line: None)
    assert seen == [row["value"] for row in document["axes"]["threads"]["points"]] == [1, 2]
    assert torch.get_num_threads() == 1
    assert growth.values_of("threads", torch.device("cuda")) == ()


@pytest.mark.parametrize(
    "arguments", [["age"], ["--compile", "-1"], ["--threads", "0"], ["--plot", "a.doc"], ["--seconds", "-1"]]
)
def test_wrong_arguments_are_refused(arguments: list[str]):
    with pytest.raises(SystemExit) as stop:
        growth.main(arguments)
    assert stop.value.code == 2


@pytest.mark.parametrize("name", model.PRESETS)
def test_presets_are_scaled_by_the_rule(name: str):
    batch, config = model.scaled(name)
    original = model.nf.NVAEConfig.preset(name)
    assert config.num_channels_enc == config.num_channels_dec
    assert config.num_channels_dec % 4 == 0
    assert 8 <= config.num_channels_dec <= max(original.num_channels_dec // 8, 8)
    assert max(config.groups_per_scale) <= 2
    assert config.resolution <= 64
    assert 2 <= batch <= 8
    kept = (
        "num_latent_scales",
        "num_latent_per_group",
        "num_nf",
        "num_preprocess_cells",
        "num_cell_per_cond_enc",
    )
    assert all(getattr(config, key) == getattr(original, key) for key in kept)
    assert config.likelihood_name == original.likelihood_name


def test_full_models_are_the_ones_in_earnest():
    labels = [(workload.label, workload.precision) for workload in model.workloads(CPU, full=True)]
    cifar10 = "cifar10 B8 32px 64ch 10 groups"
    assert labels[:3] == [
        ("mnist B16 32px 32ch 15 groups", "float32"),
        (cifar10, "float32"),
        (cifar10, "bfloat16"),
    ]
    assert labels[3:] == [(workload.label, workload.precision) for workload in model.workloads(CPU)][3:]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_the_models_module_runs_its_cases(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("benchmarks.run.main", lambda argv: seen.append(argv) or 0)
    monkeypatch.setattr("sys.argv", ["benchmarks.model", "--quick"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("benchmarks.model", run_name="__main__")
    assert end.value.code == 0
    assert seen == [["--quick", *model.CASES]]
