"""State dicts: tensors only, with prefixes of wrappers, refused where they hold no weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.cli import main
from nvae_fast.models import building
from nvae_fast.models.building import build
from nvae_fast.models.states import not_finite
from nvae_fast.training import CheckpointError, checkpoint, load_model

pytestmark = pytest.mark.usefixtures("one_thread")

OLD = Path(__file__).parent / "data" / "run_0.1.0"


def estimated(model: nf.NVAE) -> nf.NVAE:
    model.regularization()
    return model


def test_a_state_dict_holds_tensors_only():
    model = estimated(tiny_model())
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = tiny_model(seed=1)
    other.load_state_dict({key: value.clone() for key, value in state.items()})
    assert other.spectral.warm
    assert torch.equal(other.regularization()[0], model.regularization()[0])
    cold = tiny_model(seed=2)
    other.load_state_dict(cold.state_dict())
    assert not other.spectral.warm, "the first estimate is still to come"
    assert torch.equal(other.regularization()[0], cold.regularization()[0])


def test_averaged_models_and_safetensors(tmp_path):
    model = tiny_model()
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        averaged.update_parameters(estimated(model))
    tiny_model(seed=1).load_state_dict(averaged.state_dict())
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model.state_dict(), tmp_path / "a.safetensors")
    other = tiny_model(seed=1)
    other.load_state_dict(safetensors.load_file(tmp_path / "a.safetensors"))
    assert torch.equal(other.regularization()[0], model.regularization()[0])


@pytest.mark.parametrize("warm", [True, False])
def test_states_of_version_0_1_0(warm):
    """They have a flag in a dict, and random vectors before the first estimate."""
    document = torch.load(OLD / checkpoint.NAME, weights_only=True)
    state = document["model"]
    assert state["spectral._extra_state"] == {"warm": True}
    state["spectral._extra_state"] = {"warm": warm}
    model = nf.NVAE(nf.NVAEConfig(**document["model_config"]))
    model.load_state_dict(state)
    assert model.spectral.warm is warm
    for name, value in model.spectral.named_buffers():
        expected = state[f"spectral.{name}"]
        assert torch.equal(value, expected if warm or name[0] == "u" else torch.zeros_like(expected))
    assert "spectral._extra_state" in state, "the caller's dict is left as it was"
    wrapper = nn.ModuleDict({"inner": nf.NVAE(model.config)})
    wrapper.load_state_dict({f"inner.{key}": value for key, value in state.items()})
    assert wrapper["inner"].spectral.warm is warm


PREFIXES = [
    "_orig_mod.",
    "module.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.module.",
    "_fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_dropped(tmp_path, prefix):
    model = estimated(tiny_model())
    expected = model.state_dict()
    for state, load in (
        (expected, lambda other, state: other.load_state_dict(state)),
        (model.official_state_dict(), lambda other, state: other.load_official_state_dict(state)),
    ):
        other = tiny_model(seed=1)
        load(other, {prefix + key: value for key, value in state.items()})
        found = other.state_dict()
        assert all(torch.equal(found[k], v) for k, v in expected.items() if not k.startswith("spectral"))
    document = {"model_config": model.config.to_dict(), "model": {prefix + k: v for k, v in expected.items()}}
    checkpoint.save(document, tmp_path)
    assert torch.equal(load_model(tmp_path)[0].stem.weight, model.stem.weight)


def test_prefixes_inside_and_of_the_model():
    model = tiny_model()
    state = {key.replace("ops", "_orig_mod.ops"): value for key, value in model.state_dict().items()}
    tiny_model(seed=1).load_state_dict(state)
    compiled = tiny_model(seed=1)
    compiled.decoder[0] = torch.compile(compiled.decoder[0])
    compiled.load_state_dict(state)
    assert torch.equal(next(compiled.decoder.parameters()), next(model.decoder.parameters()))
    compiled.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"load_state_dict: state_dict has stem\.weight twice"):
        model.load_state_dict({**model.state_dict(), "module.stem.weight": model.stem.weight})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, "sparse", "none"])
def test_values_that_are_no_weights_are_refused(tmp_path, dtype):
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    weight = model.stem.weight.detach()
    wrong = (
        {"sparse": weight.to_sparse(), "none": None}[dtype] if isinstance(dtype, str) else weight.to(dtype)
    )
    for state, load in (
        (model.state_dict(), model.load_state_dict),
        (model.official_state_dict(), model.load_official_state_dict),
    ):
        with pytest.raises(TypeError, match=r"load\w*_state_dict: these entries .*: stem\.weight"):
            load({**state, "stem.weight": wrong})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if dtype in ("sparse", "none"):
        return
    torch.save({"state_dict": {**model.official_state_dict(), "stem.weight": wrong}, "args": model.config.to_dict()},
               tmp_path / "file.pt")  # fmt: skip
    with pytest.raises(ValueError, match=r"file\.pt: .*stem\.weight"):
        nf.load_official(tmp_path / "file.pt")
    document = {"model_config": model.config.to_dict(), "model": {**model.state_dict(), "stem.weight": wrong}}
    checkpoint.save(document, tmp_path, name="ours.pt")
    with pytest.raises(CheckpointError, match=r"ours\.pt .*stem\.weight"):
        load_model(tmp_path / "ours.pt")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("what", ["missing", "surplus", "shape", "first"])
def test_a_state_that_does_not_fit_writes_nothing(what, strict):
    """Also what comes before the entry at fault."""
    model, other = tiny_model(), tiny_model(seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = other.state_dict()
    last = list(dict(model.named_parameters()))[-1]
    if what == "missing":
        del state[last]
    elif what == "surplus":
        state["other.weight"] = torch.zeros(1)
    else:
        name = last if what == "shape" else "stem.weight"
        state[name] = state[name].flatten()[:-1]
    if not strict and what in ("missing", "surplus"):
        model.load_state_dict(state, strict=False)
        assert torch.equal(model.stem.weight, other.stem.weight)
        return
    words = {"missing": "missing keys", "surplus": "surplus keys"}.get(what, "shapes that differ")
    with pytest.raises(RuntimeError, match=rf"NVAE\.load_state_dict: state_dict does not fit .*{words}: "):
        model.load_state_dict(state, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_hooks_may_change_a_state_that_does_not_fit():
    model, other = tiny_model(), tiny_model(seed=1)
    state = {f"old.{key}": value for key, value in other.state_dict().items()}

    def rename(module, state_dict, *_):
        for key in list(state_dict):
            state_dict[key.removeprefix("old.")] = state_dict.pop(key)

    model.register_load_state_dict_pre_hook(rename)
    model.load_state_dict(state)
    assert torch.equal(model.stem.weight, other.stem.weight)


def test_halves_are_weights():
    model = tiny_model()
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    assert model.stem.weight.dtype == torch.float32


@pytest.mark.parametrize("kind", ["ours", "official"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_file(tmp_path, capsys, kind, value):
    model = tiny_model()
    with torch.no_grad():
        model.image_head.bias[0] = value
    file = tmp_path / "bad.pt"
    if kind == "ours":
        document = {"model_config": model.config.to_dict(), "model": model.state_dict()}
        checkpoint.save(document, tmp_path, name=file.name)
    else:
        nf.save_official(model, file)
    what = "NaN" if value != value else "an infinity"
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))}: image_head\.bias holds {what}"):
        load_model(file)
    out = tmp_path / "out.png"
    for command in (["sample", str(file), "--out", str(out)], ["evaluate", str(file), "--data", "digits"]):
        assert main([*command, "--quiet"]) == 2
        assert f"{file}: image_head.bias holds {what}" in capsys.readouterr().err
    assert not out.exists()


def test_not_finite_finds_the_first():
    fine = {"a": torch.zeros(3), "n": torch.tensor(3), "e": torch.zeros(0), "h": torch.full((2,), 6e4).half()}
    assert not_finite(fine.items()) is None
    large = {"a": torch.full((4,), 3e38), "d": torch.full((4,), 1e308, dtype=torch.float64)}
    assert not_finite(large.items()) is None
    assert not_finite({**fine, "b": torch.tensor([0, -torch.inf]), "c": torch.tensor(torch.nan)}.items()) == (
        "b holds an infinity"
    )


def test_a_configuration_larger_than_its_state_is_not_built(monkeypatch):
    state, config = tiny_model().state_dict(), tiny_model().config
    never = lambda model: pytest.fail("it was built")  # noqa: E731
    with pytest.raises(ValueError, match="its options ask for a larger model than its state is of"):
        build(config.replace(num_channels_enc=2**16), state, never)
    monkeypatch.setattr(building, "NVAE", lambda config: pytest.fail("building began"))
    for change in (
        {"num_preprocess_cells": 1500, "num_postprocess_cells": 1500},
        {"num_groups_per_scale": 1000},
        {"num_nf": 1500},
    ):
        with pytest.raises(ValueError, match=r"its options ask for \d{4} cells, its state has \d+ entries"):
            build(config.replace(**change), state, never)
    for name in ("num_latent_scales", "num_preprocess_blocks"):
        change = {name: 10**9, name.replace("pre", "post"): 10**9}
        with pytest.raises(ValueError, match=rf"{name} must be <= \d+, got 10+"):
            config.replace(**change)


def test_numpy_integers_are_integers(tmp_path):
    model = tiny_model().eval()
    assert torch.equal(model.sample(np.int64(2), seed=np.int32(3)), model.sample(2, seed=3))
    options = {
        "num_latent_per_group": np.int32(3),
        "use_se": np.bool_(False),
        "num_groups_per_scale": np.uint8(1),
    }
    config = copy.copy(model.config).replace(**options)
    assert [
        type(v) for v in config.to_dict().values() if v is not None and type(v) not in (int, bool, str)
    ] == []
    training = nf.training.TrainingConfig(
        batch_size=np.int64(4), learning_rate=np.float32(0.5), tensorboard=np.False_
    )
    assert [type(training.batch_size), type(training.learning_rate), type(training.tensorboard)] == [
        int,
        float,
        bool,
    ]
    for wrong in (np.float64(2), np.bool_(True), "2"):
        with pytest.raises(ValueError, match="n must be an int >= 0"):
            model.sample(wrong)
    with pytest.raises(TypeError, match=r"num_latent_per_group must be int, got 2\.5"):
        model.config.replace(num_latent_per_group=np.float64(2.5))


def test_numpy_integers_elsewhere(digits):
    i, model = np.int64, tiny_model().eval()
    sampler = nf.training.Sampler(model)
    for first in (None, 3):
        numpy_first = None if first is None else i(first)
        assert torch.equal(
            sampler(i(2), seed=i(2**62), first=numpy_first), sampler(2, seed=2**62, first=first)
        )
    given = {"samples": 1, "batch_size": 4, "seed": 2**62, "max_images": 4}
    result = nf.training.evaluate(model, digits, **{key: i(value) for key, value in given.items()})
    assert result == nf.training.evaluate(model, digits, **given)
    assert type(result.seed) is type(result.samples) is int
    with pytest.raises(TypeError, match=r"evaluate: samples must be an int, got 1\.5"):
        nf.training.evaluate(model, digits, samples=1.5)
    data = nf.data.open_dataset("digits", image_size=i(32), channels=i(1), num_bits=i(8))
    loader = nf.data.BatchLoader(data, i(4), seed=i(2**62), workers=i(0), rank=i(0), world_size=i(1))
    plain = nf.data.BatchLoader(data, 4, seed=2**62)
    assert torch.equal(next(iter(loader.epoch(i(1), i(2)))), next(iter(plain.epoch(1, 2))))
    assert torch.equal(nf.philox_normal((i(3), i(2)), i(1)), nf.philox_normal((3, 2), 1))
    assert nf.distributions.DiscMixLogistic(torch.zeros(1, 100, 2, 2), i(10), i(8)).num_mix == 10
