"""`prepare`: what it writes is what `open_dataset` reads, also after it was stopped at any moment."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from data_files import as_bytes, image_folder, png_bytes, random_pixels

from nvae_fast.cli.program import main
from nvae_fast.data import open_dataset, prepare
from nvae_fast.data import preparation as module

pytest.importorskip("lmdb")


def stored(folder: Path, split: str = "train", **options) -> np.ndarray:
    return as_bytes(open_dataset(folder, split=split, **options))


def test_a_folder_without_splits(tmp_path):
    pixels = image_folder(tmp_path / "images", 20)
    calls = []
    summary = prepare(
        "folder", tmp_path / "images", tmp_path / "db", size=8, on_images=lambda *c: calls.append(c)
    )
    assert {split: facts["images"] for split, facts in summary["splits"].items()} == {
        "train": 18,
        "validation": 2,
    }
    assert calls == [("train", 18, 18), ("validation", 2, 2)]
    assert np.array_equal(stored(tmp_path / "db"), pixels[:18].transpose(0, 3, 1, 2))
    assert np.array_equal(stored(tmp_path / "db", "validation"), pixels[18:].transpose(0, 3, 1, 2))
    names = (tmp_path / "db" / "train.txt").read_text().split("\n")
    assert [Path(name).name for name in names[:2]] == ["000.png", "001.png"]
    assert json.loads((tmp_path / "db" / "prepared.json").read_text())["size"] == 8


def test_folders_named_after_splits(tmp_path):
    pixels = {name: image_folder(tmp_path / "src" / name, 4, size=12) for name in ("train", "val", "test")}
    prepare("folder", tmp_path / "src", tmp_path / "db", size=12)
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        assert np.array_equal(stored(tmp_path / "db", split), pixels[name].transpose(0, 3, 1, 2))


@pytest.mark.parametrize("moment", ["before", "between", "cut"])
def test_a_stop_at_any_moment(tmp_path, monkeypatch, moment):
    """A stop before a transaction, between it and its lines of the record, and within the last line."""
    monkeypatch.setattr(module, "_BATCH", 4)
    pixels = image_folder(tmp_path / "images", 22)
    (tmp_path / "images" / "a" / "005.png").write_bytes(png_bytes(pixels[5])[:60])
    expected = np.delete(pixels, 5, axis=0).transpose(0, 3, 1, 2)
    options = {"size": 8, "validation": 0, "max_skipped": 0.1}
    original, calls = module._put, []

    def stop(lmdb, environment, key, values):
        calls.append(key)
        if len(calls) == 3 and moment != "before":
            original(lmdb, environment, key, values)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(lmdb, environment, key, values)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_put", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare("folder", tmp_path / "images", tmp_path / "db", **options)
    assert not (tmp_path / "db" / "prepared.json").exists()
    if moment == "cut":
        with open(tmp_path / "db" / "train.txt", "a") as file:
            file.write("/half/a/na")
    with pytest.raises(ValueError, match=r"begun with other options \(size: 8 then, 4 now\)"):
        prepare("folder", tmp_path / "images", tmp_path / "db", **{**options, "size": 4})
    summary = prepare("folder", tmp_path / "images", tmp_path / "db", **options)
    assert summary["splits"]["train"]["images"] == 21
    assert [(Path(name).name, reason) for name, reason in summary["splits"]["train"]["skipped"]] == [
        ("005.png", "OSError: image file is truncated")
    ]
    assert np.array_equal(stored(tmp_path / "db"), expected)
    assert len((tmp_path / "db" / "train.txt").read_text().splitlines()) == 22
    with pytest.raises(FileExistsError, match="is prepared already"):
        prepare("folder", tmp_path / "images", tmp_path / "db", **options)


def test_too_many_damaged_images(tmp_path):
    pixels = image_folder(tmp_path / "images", 20)
    for i in (3, 5, 7):
        (tmp_path / "images" / "a" / f"00{i}.png").write_bytes(png_bytes(pixels[i])[:60])
    with pytest.raises(ValueError, match=r"2 of 18 images cannot be read.*max_skipped=0.01.*003\.png"):
        prepare("folder", tmp_path / "images", tmp_path / "db", size=8)


def test_celeba(tmp_path):
    faces = random_pixels(6, 218, 178, 3)
    folder = tmp_path / "src" / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for i, face in enumerate(faces):
        (folder / f"{i:06}.jpg").write_bytes(png_bytes(face))  # the content counts
    lines = [f"{i:06}.jpg {part}\n" for i, part in enumerate((0, 0, 1, 0, 2, 2))]
    (folder.parent / "list_eval_partition.txt").write_text("".join(lines))
    prepare("celeba", tmp_path / "src", tmp_path / "db")
    direct = {0: [0, 1, 3], 1: [2], 2: [4, 5]}
    for split, part in (("train", 0), ("validation", 1), ("test", 2)):
        kept = [faces[i][20:198] for i in direct[part]]
        assert np.array_equal(stored(tmp_path / "db", split), np.stack(kept).transpose(0, 3, 1, 2))
    assert open_dataset(tmp_path / "db", image_size=64, dataset="celeba_64").reading["crop"] == 148
    with pytest.raises(ValueError, match="faces of celeba are kept whole"):
        prepare("celeba", tmp_path / "src", tmp_path / "other", size=64)
    (folder.parent / "list_eval_partition.txt").write_text("000000.jpg 3\n")
    with pytest.raises(
        ValueError, match=r"list_eval_partition\.txt: line 1: expected a file name and 0, 1 or 2"
    ):
        prepare("celeba", tmp_path / "src", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def example(pixels: bytes, shape: tuple[int, ...], packed: bool) -> bytes:
    numbers = (
        field(1, b"".join(map(varint, shape))) if packed else b"".join(b"\x08" + varint(n) for n in shape)
    )
    entries = (("shape", field(3, numbers)), ("data", field(1, field(1, pixels))))
    return field(1, b"".join(field(1, field(1, k.encode()) + field(2, v)) for k, v in entries))


def write_records(path: Path, messages: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(struct.pack("<Q", len(m)) + b"crc1" + m + b"crc2" for m in messages))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("planes", [False, True])
def test_tfrecords(tmp_path, packed, planes):
    pixels = random_pixels(5, 16, 16, 3)
    layout = pixels.transpose(0, 3, 1, 2) if planes else pixels
    messages = [example(picture.tobytes(), picture.shape, packed) for picture in layout]
    write_records(tmp_path / "src" / "train" / "r04-0.tfrecords", messages[:2])
    write_records(tmp_path / "src" / "train" / "r04-1.tfrecords", messages[2:4])
    write_records(tmp_path / "src" / "validation" / "r04-0.tfrecords", messages[4:])
    prepare("tfrecord", tmp_path / "src", tmp_path / "db")
    assert np.array_equal(stored(tmp_path / "db"), pixels[:4].transpose(0, 3, 1, 2))
    assert np.array_equal(stored(tmp_path / "db", "validation"), pixels[4:].transpose(0, 3, 1, 2))
    prepare("tfrecord", tmp_path / "src", tmp_path / "small", size=8)
    assert open_dataset(tmp_path / "small").image_size == 8


def test_damaged_tfrecords(tmp_path):
    good = [example(picture.tobytes(), picture.shape, True) for picture in random_pixels(200, 4, 4, 3)]
    bad = [
        b"",
        b"\xff" * 30,
        example(b"abc", (4, 4, 3), True),
        example(bytes(48), (16, 3, 1), False),
        good[0][:40],
    ]
    for i, message in enumerate(bad):
        write_records(tmp_path / str(i) / "x.tfrecord", [*good[:100], message, *good[100:]])
        summary = prepare("tfrecord", tmp_path / str(i), tmp_path / f"db{i}")
        assert [name for name, _ in summary["splits"]["train"]["skipped"]] == [
            f"{tmp_path / str(i) / 'x.tfrecord'}, record 100"
        ]
        assert len(open_dataset(tmp_path / f"db{i}")) == 200
    (tmp_path / "0" / "x.tfrecord").write_bytes(struct.pack("<Q", 1 << 60) + bytes(100))
    with pytest.raises(ValueError, match=r"x\.tfrecord: damaged TFRecord file: record 0 ends outside"):
        prepare("tfrecord", tmp_path / "0", tmp_path / "other")


def test_nothing_is_overwritten(tmp_path):
    image_folder(tmp_path / "images", 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name, message in (("mine", "is not empty"), ("file", "is a file")):
        with pytest.raises(FileExistsError, match=message):
            prepare("folder", tmp_path / "images", tmp_path / name, size=8)
    assert os.listdir(tmp_path / "mine") == ["notes"]
    for kind, message in (
        ("folder", "size"),
        ("imagenet", "train and val"),
        ("celeba", "list_eval"),
        ("x", "kind"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare(kind, tmp_path / "images", tmp_path / "new", size=None if kind != "imagenet" else 8)
    with pytest.raises(FileNotFoundError, match="SRC: expected a folder"):
        prepare("folder", tmp_path / "nowhere", tmp_path / "new", size=8)
    assert not (tmp_path / "new").exists()


def test_a_map_that_is_full_grows(tmp_path, monkeypatch):
    import lmdb

    pixels = image_folder(tmp_path / "images", 40, size=64)
    original = lmdb.open
    monkeypatch.setattr(
        lmdb, "open", lambda *a, **k: original(*a, **{**k, "map_size": 1 << 16} if "map_size" in k else k)
    )
    prepare("folder", tmp_path / "images", tmp_path / "db", size=64, validation=0)
    assert np.array_equal(stored(tmp_path / "db"), pixels.transpose(0, 3, 1, 2))


def test_command(tmp_path, capsys):
    image_folder(tmp_path / "imagenet" / "train", 6, size=40)
    image_folder(tmp_path / "imagenet" / "val", 2, size=40)
    words = [
        "prepare",
        "imagenet",
        str(tmp_path / "imagenet"),
        str(tmp_path / "db"),
        "--resample",
        "bilinear",
    ]
    assert main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == "train: 6 images\nvalidation: 2 images\n"
    assert "train image 6/6" in captured.err
    assert stored(tmp_path / "db").shape == (6, 3, 32, 32)
    assert main(words) == 2
    assert "DST: " in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["plain", "none"])
def test_prepare_shows_progress_as_asked(mode, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("lmdb")
    (tmp_path / "images").mkdir()
    for number in range(4):
        image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    words = ["prepare", "folder", tmp_path / "images", tmp_path / "out", "--size", 8, "--progress", mode]
    assert main(list(map(str, words))) == 0
    assert ("image 4/4" in capsys.readouterr().err) == (mode == "plain")
