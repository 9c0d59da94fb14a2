"""Official checkpoints: key names, strictness, bitwise round trip, hostile and damaged files."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
from harness import Record

import nvae_fast as nf
from nvae_fast.models.architectures import ARCHITECTURES

MODELS = ["mnist_tiny", "cifar10_flow_tiny"]


@pytest.fixture
def small() -> nf.NVAEConfig:
    return nf.NVAEConfig.from_official(Record("mnist_tiny").args)


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Bitwise, dtypes included."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def write(path: Path, model: nf.NVAE, **changes: object) -> Path:
    """A checkpoint as the official code writes it, with entries replaced (or dropped, by None)."""
    document = {
        "epoch": 3,
        "state_dict": model.official_state_dict(),
        "optimizer": {"state": {}, "param_groups": []},
        "global_step": 7,
        "args": argparse.Namespace(**model.config.to_dict(), save="/tmp/somewhere", learning_rate=1e-2),
        "arch_instance": model.config.arch_instance,
        "scheduler": {},
        "grad_scalar": {},
    }
    document.update(changes)
    torch.save({k: v for k, v in document.items() if v is not None}, path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_recorded_keys_are_ours(name: str) -> None:
    record = Record(name)
    state = record.under("state/")
    model = nf.NVAE(nf.NVAEConfig.from_official(record.args))
    model.load_official_state_dict(state)
    exported = model.official_state_dict()
    assert_same_state(exported, state)
    parameters = dict(model.official_named_parameters())
    assert parameters.keys() <= state.keys()
    assert len(parameters) == len(list(model.parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_file_round_trip_is_bitwise(name: str, tmp_path: Path) -> None:
    record = Record(name)
    model = nf.NVAE(nf.NVAEConfig.from_official(record.args))
    model.load_official_state_dict(record.under("state/"))
    nf.save_official(model, tmp_path / "a.pt", epoch=5, global_step=9)
    back = nf.load_official(tmp_path / "a.pt")
    assert back.config == model.config
    assert not back.training
    assert_same_state(back.official_state_dict(), model.official_state_dict())
    document = torch.load(tmp_path / "a.pt", weights_only=False)
    assert set(document) == {
        "epoch", "state_dict", "optimizer", "global_step", "args", "arch_instance", "scheduler", "grad_scalar",
    }  # fmt: skip
    assert isinstance(document["args"], argparse.Namespace)
    assert document["epoch"] == 5
    assert document["global_step"] == 9


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_round_trips(small: nf.NVAEConfig, arch: str) -> None:
    config = small.replace(arch_instance=arch, use_se="mb" in arch, num_nf=1)
    model, other = nf.NVAE(config), nf.NVAE(config)
    state = model.official_state_dict()
    assert not any("spectral" in key or "mask" in key for key in state)
    other.load_official_state_dict(state)
    assert_same_state(other.official_state_dict(), state)


def test_key_patterns(small: nf.NVAEConfig) -> None:
    keys = set(nf.NVAE(small.replace(arch_instance="res_bnelu")).official_state_dict())
    assert "dec_tower.1._ops.1.bn.bn.running_mean" in keys
    keys = set(nf.NVAE(small.replace(arch_instance="res_elu")).official_state_dict())
    assert "enc_tower.0._ops.0.conv_0.log_weight_norm" in keys
    assert not any("bn" in key for key in keys)
    vanilla = small.replace(num_latent_scales=1, num_groups_per_scale=1, ada_groups=False)
    keys = set(nf.NVAE(vanilla).official_state_dict())
    assert {"stem_decoder.weight", "prior_ftr0", "enc_sampler.0.weight"} <= keys
    assert not any(key.startswith(("enc_tower", "dec_tower", "dec_sampler")) for key in keys)


def test_missing_surplus_and_misshapen_keys_are_named(small: nf.NVAEConfig) -> None:
    model = nf.NVAE(small)
    before = {k: v.clone() for k, v in model.official_state_dict().items()}
    state = dict(before)
    del state["stem.weight"]
    state["stem.wieght"] = torch.zeros(1)
    state["enc0.1.bias"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing keys: stem\.weight; surplus keys: stem\.wieght; .*enc0\.1\.bias.*\(3,\)"
    ):
        model.load_official_state_dict(state)
    assert_same_state(model.official_state_dict(), before)  # nothing was written
    with pytest.raises(TypeError, match=r"not tensors: stem\.weight"):
        model.load_official_state_dict({**before, "stem.weight": 3})


def test_aliases_may_be_absent_and_are_ignored(small: nf.NVAEConfig) -> None:
    model = nf.NVAE(small)
    state = {k: v.clone() for k, v in model.official_state_dict().items()}
    for key in list(state):
        if key.endswith("weight_normalized"):
            del state[key]
    nf.NVAE(small).load_official_state_dict(state)
    nf.NVAE(small).load_official_state_dict({f"module.{k}": v for k, v in state.items()})


def test_old_arguments_get_their_defaults(small: nf.NVAEConfig, tmp_path: Path) -> None:
    config = small.replace(ada_groups=False, min_groups_per_scale=1, num_mixture_dec=10)
    model = nf.NVAE(config)
    args = {k: v for k, v in config.to_dict().items() if v is not None}
    for key in ("ada_groups", "min_groups_per_scale", "num_mixture_dec"):
        del args[key]
    back = nf.load_official(
        write(tmp_path / "old.pt", model, args=argparse.Namespace(**args, distributed=True))
    )
    assert back.config == config
    assert (
        nf.NVAEConfig.from_official(args) == nf.NVAEConfig.from_official(argparse.Namespace(**args)) == config
    )
    with pytest.raises(TypeError, match="Mapping or a Namespace"):
        nf.NVAEConfig.from_official([1])


def test_cuda_tensors_load_on_a_cpu(small: nf.NVAEConfig, tmp_path: Path) -> None:
    """A file whose storages are tagged "cuda:0": made by renaming the tag that torch.save wrote."""
    import zipfile

    source = write(tmp_path / "cpu.pt", nf.NVAE(small))
    target = tmp_path / "cuda.pt"
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as out:
        for entry in archive.namelist():
            data = archive.read(entry)
            if entry.endswith("data.pkl"):
                tag = b"X\x03\x00\x00\x00cpu"
                assert tag in data
                data = data.replace(tag, b"X\x06\x00\x00\x00cuda:0")
            out.writestr(entry.replace("cpu/", "cuda/"), data)
    model = nf.load_official(target)
    assert all(p.device.type == "cpu" for p in model.parameters())


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("place", ["args", "optimizer", "state_dict"])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_pickle_runs_nothing(
    small: nf.NVAEConfig, tmp_path: Path, place: str, legacy: bool
) -> None:
    marker = tmp_path / "owned"
    document = {"state_dict": {}, "args": argparse.Namespace(), "optimizer": {}, place: Hostile(marker)}
    torch.save(document, tmp_path / "evil.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.pt holds objects that are not plain data \(\w+\.mkdir\)"):
        nf.load_official(tmp_path / "evil.pt")
    assert not marker.exists()
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(document))
    with pytest.raises(ValueError, match=r"raw\.pt"):
        nf.load_official(tmp_path / "raw.pt")
    assert not marker.exists()


def test_damaged_and_foreign_files_are_named(small: nf.NVAEConfig, tmp_path: Path) -> None:
    good = write(tmp_path / "good.pt", nf.NVAE(small)).read_bytes()
    cases = {
        "truncated.pt": good[: len(good) // 2],
        "empty.pt": b"",
        "text.pt": b"hello",
        "flipped.pt": good[:9000][::-1],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            nf.load_official(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"absent\.pt"):
        nf.load_official(tmp_path / "absent.pt")
    torch.save({"model": 1}, tmp_path / "foreign.pt")
    with pytest.raises(
        ValueError, match=r"foreign\.pt must hold a dict with the keys .*'args'.*found \['model'\]"
    ):
        nf.load_official(tmp_path / "foreign.pt")
    torch.save({"nvae_fast": "0.1.0"}, tmp_path / "ours.pt")
    with pytest.raises(ValueError, match=r"a checkpoint of nvae_fast, which nf\.training\.load_model opens"):
        nf.load_official(tmp_path / "ours.pt")
    with pytest.raises(FileNotFoundError, match=r"a folder; a run is opened by nf\.training\.load_model"):
        nf.load_official(tmp_path)
    with pytest.raises(ValueError, match=r"mismatch\.pt: .*missing keys"):
        nf.load_official(write(tmp_path / "mismatch.pt", nf.NVAE(small), state_dict={}))


def test_a_failed_save_leaves_the_old_file(
    small: nf.NVAEConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kept.pt"
    path.write_bytes(b"precious")

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        nf.save_official(nf.NVAE(small), path)
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["kept.pt"]
