"""Checkpoint files that are damaged, hostile or something else: each is named, nothing runs, memory stays small."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import environment
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.models import torch_files
from nvae_fast.training import CheckpointError, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def ours(path: Path) -> Path:
    model = tiny_model()
    document = {"model_config": model.config.to_dict(), "model": model.state_dict(), "progress": {"step": 3}}
    checkpoint.save(document, path.parent, name=path.name, keep_previous=False)
    return path


def official(path: Path) -> Path:
    nf.save_official(tiny_model(), path, args={"best": np.float64(1.0)})
    return path


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, argparse.Namespace):
        return isinstance(b, argparse.Namespace) and vars(a) == vars(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("make", [ours, official])
def test_flipped_bits_are_refused_or_change_nothing(tmp_path, make):
    """Every bit of a file of ours counts. In others, those that no reader looks at may change."""
    good = make(tmp_path / "good.pt")
    data, expected = good.read_bytes(), torch_files.read(good)
    chance = np.random.default_rng(0)
    broken, refused = tmp_path / "broken.pt", 0
    for count in range(75):
        # Every third in the first or the last part, where the structure of the archive is.
        at = int(chance.integers(len(data)))
        at = at if count % 3 else (at % 2000 if count % 2 else len(data) - 1 - at % 9000)
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(chance.integers(8))
        broken.write_bytes(flipped)
        try:
            found = torch_files.read(broken)
        except torch_files.UnreadableFile:
            refused += 1
            continue
        assert make is official
        assert same(found, expected), at
    assert refused == 75 if make is ours else refused > 50
    for load in (nf.training.load_model, nf.load_official):
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        broken.write_bytes(flipped)
        with pytest.raises((CheckpointError, ValueError), match=r"broken\.pt is truncated or damaged: "):
            load(broken)


def repacked(
    source: Path, target: Path, change=lambda name, data: data, compression=zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(source) as archive, zipfile.ZipFile(target, "w", compression) as out:
        for name in archive.namelist():
            out.writestr(name, change(name, archive.read(name)))
    return target


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_values_of_either_major_version(tmp_path, core):
    values = {
        "best": np.float64(1.5),
        "steps": np.int64(7),
        "flag": np.bool_(True),
        "name": np.str_("x"),
        "array": np.arange(6.0).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        "kind": np.dtype("float32"),
        "nested": [(np.float32(2), {"deep": np.arange(3)})],
    }
    nf.save_official(tiny_model(), tmp_path / "written.pt", args=values)

    def renamed(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        return data.replace(b"numpy._core.", b"numpy.core.").replace(
            b"numpy.core.", b"numpy.%s." % core.encode()
        )

    file = repacked(tmp_path / "written.pt", tmp_path / "other.pt", renamed)
    nf.load_official(file)
    found = vars(torch_files.read(file)["args"])
    for name in ("best", "steps", "flag", "name", "kind"):
        assert found[name] == values[name]
        assert type(found[name]) is type(values[name])
    for name in ("array", "columns"):
        assert found[name].dtype == values[name].dtype
        assert np.array_equal(found[name], values[name])
    assert np.array_equal(found["nested"][0][1]["deep"], np.arange(3))


def test_numpy_options_of_official_checkpoints(tmp_path):
    model = tiny_model()
    options = {
        k: np.int64(v) if type(v) is int else v for k, v in model.config.to_dict().items() if v is not None
    }
    document = {"state_dict": model.official_state_dict(), "args": argparse.Namespace(**options)}
    torch.save(document, tmp_path / "file.pt")
    back = nf.load_official(tmp_path / "file.pt").config
    assert back == model.config
    assert type(back.num_channels_enc) is int


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html>", "HTML"),
        (b"\n<html><body>404", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"/annex/objects/SHA256E-s3--0.pt\n", "git-annex pointer"),
        (struct.pack("<Q", 40) + b'{"a":{"dtype":"F32"}}', "safetensors"),
        (b"\x1f\x8b\x08\0", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x93NUMPY\x01\0", "NumPy array"),
        (b"hello", "not a checkpoint"),
        (pickle.dumps({"a": 1}), "pickle that torch.save did not write"),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path, content, words):
    file = tmp_path / "file.pt"
    file.write_bytes(content)
    for load in (nf.load_official, nf.training.load_model, checkpoint.load):
        with pytest.raises((ValueError, CheckpointError), match=rf"file\.pt .*{words}"):
            load(file)


def test_other_archives_are_called_what_they_are(tmp_path):
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    (tmp_path / "page.txt").write_text("x")
    with zipfile.ZipFile(tmp_path / "plain.zip", "w") as archive:
        archive.write(tmp_path / "page.txt", "page.txt")
    good = official(tmp_path / "good.pt")
    encrypted = bytearray(good.read_bytes())
    with zipfile.ZipFile(good) as archive:
        encrypted[archive.start_dir + 8] |= 1  # flags of the first entry of the directory
    (tmp_path / "encrypted.pt").write_bytes(encrypted)
    repacked(good, tmp_path / "compressed.pt", compression=zipfile.ZIP_DEFLATED)
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("arrays.npz", "an archive of NumPy arrays"),
        ("plain.zip", "an archive of other files"),
        ("encrypted.pt", "an encrypted archive"),
        ("compressed.pt", r"compressed in it \(\d+ bytes for \d+\), so it was not expanded"),
        ("pipe", "no regular file"),
    ):
        for load in (nf.load_official, nf.training.load_model):
            with pytest.raises((ValueError, CheckpointError), match=rf"{name} .*{words}"):
                load(tmp_path / name)


class _Call:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


HOSTILE = """
import sys
import nvae_fast as nf
from nvae_fast.training import checkpoint
def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024
nf.training.load_model(sys.argv[1])  # what is imported late is no part of it
for path in sys.argv[2:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS:")
    for load in (nf.training.load_model, checkpoint.load_training, nf.load_official):
        try:
            load(path)
            print("LOADED", path)
        except (checkpoint.CheckpointError, ValueError) as error:
            if path not in str(error):
                print("UNNAMED", path, error)
    print(path, "grew", resident("VmHWM:") - before, flush=True)
"""


def with_pickle(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return path


def with_changes(path: Path, source: dict, options: str, **changes: object) -> Path:
    torch.save({**source, options: {**source[options], **changes}}, path)
    return path


def test_hostile_files_run_nothing_and_take_little_memory(tmp_path):
    """In one process of its own. Peak memory is that of loading each file in three ways."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("needs /proc")
    good = torch.load(ours(tmp_path / "good.pt"), weights_only=True)
    ran = tmp_path / "ran"
    files = [
        with_pickle(tmp_path / "bomb.pt", bytes(1 << 28), zipfile.ZIP_DEFLATED),
        with_pickle(tmp_path / "objects.pt", b"\x80\x02" + b"}" * (1 << 24) + b"."),
        with_pickle(tmp_path / "structure.pt", bytes(torch_files.MOST_PICKLED_BYTES + 1)),
        with_changes(tmp_path / "cells.pt", good, "model_config", num_preprocess_cells=10**7),
        with_changes(tmp_path / "groups.pt", good, "model_config", num_groups_per_scale=10**7),
        with_changes(tmp_path / "scales.pt", good, "model_config", num_latent_scales=10**9),
        with_changes(tmp_path / "wide.pt", good, "model_config", num_channels_enc=10**6),
        with_changes(tmp_path / "huge.pt", good, "model_config", num_channels_dec=2**200),
        with_changes(tmp_path / "size.pt", good, "model_config", image_size=2**20),
        with_changes(tmp_path / "expanded.pt", good, "model", surplus=torch.zeros(1).expand(10**9)),
    ]
    for name, call in (
        ("mkdir", _Call(os.mkdir, str(ran))),
        ("system", _Call(os.system, f"touch {ran}")),
        ("eval", _Call(eval, f"open({str(ran)!r}, 'w')")),
        ("bytes", _Call(bytearray, 1 << 33)),
        ("array", _Call(np.zeros, 1 << 33)),
        ("tensor", _Call(torch.zeros, 1 << 33)),
        ("storage", _Call(torch.FloatTensor, 1 << 33)),
        ("partial", _Call(collections.defaultdict, list)),
    ):
        stream = io.BytesIO()
        pickle.Pickler(stream, protocol=2).dump({**good, "model": {}, "x": call})
        files.append(with_pickle(tmp_path / f"{name}.pt", stream.getvalue()))
        torch.save(
            {"args": call, "state_dict": {}},
            tmp_path / f"{name}-old.pt",
            _use_new_zipfile_serialization=False,
        )
        files.append(tmp_path / f"{name}-old.pt")
    command = [sys.executable, "-c", HOSTILE, str(tmp_path / "good.pt"), *map(str, files)]
    found = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "LOADED" not in found.stdout
    assert "UNNAMED" not in found.stdout, found.stdout
    grown = {line.split()[0]: int(line.split()[-1]) for line in found.stdout.splitlines()}
    assert len(grown) == len(files)
    assert max(grown.values()) < 500, grown
    assert not ran.exists()


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_too_little_memory_is_not_damage(tmp_path, monkeypatch, error):
    """A whole checkpoint must not be set aside because it could not be read now."""
    ours(tmp_path / checkpoint.NAME)
    ours(tmp_path / checkpoint.PREVIOUS)

    def failing(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", failing)
    assert checkpoint.recover(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt cannot be read: Cannot allocate memory"):
        checkpoint.load(tmp_path)
    with pytest.raises(OSError, match=r"Cannot allocate memory: .*checkpoint\.pt"):
        nf.load_official(tmp_path / checkpoint.NAME)
    assert sorted(os.listdir(tmp_path)) == [checkpoint.PREVIOUS, checkpoint.NAME]


def test_tensors_are_moved_when_asked(tmp_path):
    ours(tmp_path / checkpoint.NAME)
    moved = checkpoint.load(tmp_path, map_location="meta")
    assert {value.device.type for value in moved["model"].values()} == {"meta"}
    assert moved["progress"] == {"step": 3}
