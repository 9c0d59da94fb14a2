"""Every kind of file that `open_dataset` reads, and how each says what is wrong with a broken one."""

from __future__ import annotations

import gzip
import logging
import os
import pickle

import numpy as np
import pytest
import torch
from data_files import (
    as_bytes,
    image_folder,
    png_bytes,
    random_pixels,
    write_cifar,
    write_idx,
    write_lmdb,
)

from nvae_fast.data import BatchLoader, open_dataset

# ---------------------------------------------------------------- numpy files


@pytest.mark.parametrize(
    "shape", [(5, 32, 32), (5, 32, 32, 1), (5, 1, 32, 32), (5, 32, 32, 3), (5, 3, 32, 32)]
)
def test_npy_layouts(tmp_path, shape):
    pixels = random_pixels(*shape)
    np.save(tmp_path / "x.npy", pixels)
    dataset = open_dataset(tmp_path / "x.npy", binarize=False)
    expected = (
        pixels[:, None] if len(shape) == 3 else pixels if shape[1] in (1, 3) else pixels.transpose(0, 3, 1, 2)
    )
    assert dataset.image_size == 32
    assert dataset.channels == expected.shape[1]
    assert np.array_equal(as_bytes(dataset), expected)
    assert open_dataset(tmp_path / "x.npy").binarize == (dataset.channels == 1)


def test_npy_ambiguous_layouts(tmp_path):
    pixels = random_pixels(4, 3, 3, 3)
    np.save(tmp_path / "x.npy", pixels)
    assert np.array_equal(
        as_bytes(open_dataset(tmp_path / "x.npy")), pixels.transpose(0, 3, 1, 2)
    )  # channels last
    pixels = random_pixels(4, 1, 3, 3)  # channels first, since only so are the images square
    np.save(tmp_path / "x.npy", pixels)
    assert np.array_equal(as_bytes(open_dataset(tmp_path / "x.npy", binarize=False)), pixels)
    with pytest.raises(ValueError, match=r"x\.npy: expected square images, got 1x3"):
        open_dataset(tmp_path / "x.npy", channels=3)


def test_gray_28_is_padded(tmp_path):
    pixels = random_pixels(3, 28, 28)
    np.save(tmp_path / "x.npy", pixels)
    padded = as_bytes(open_dataset(tmp_path / "x.npy", binarize=False))
    assert padded.shape == (3, 1, 32, 32)
    assert np.array_equal(padded[:, 0, 2:-2, 2:-2], pixels)
    assert padded.sum() == pixels.sum(dtype=np.int64)
    assert open_dataset(tmp_path / "x.npy", image_size=28).image_size == 28


def test_npz_splits(tmp_path):
    train, test = random_pixels(5, 8, 8, 3), random_pixels(2, 8, 8, 3, seed=1)
    np.savez(tmp_path / "a.npz", x_train=train, y_train=np.arange(5), x_test=test, y_test=np.arange(2))
    assert np.array_equal(as_bytes(open_dataset(tmp_path / "a.npz")), train.transpose(0, 3, 1, 2))
    assert np.array_equal(
        as_bytes(open_dataset(tmp_path / "a.npz", split="test")), test.transpose(0, 3, 1, 2)
    )
    np.savez_compressed(tmp_path / "b.npz", only=train)
    assert len(open_dataset(tmp_path / "b.npz")) == 5
    np.savez(tmp_path / "c.npz", p=train, q=train)
    with pytest.raises(ValueError, match=r"c\.npz: which array holds the images\? .*found \['p', 'q'\]"):
        open_dataset(tmp_path / "c.npz")
    np.savez(tmp_path / "d.npz", train=train)
    with pytest.raises(ValueError, match=r"d\.npz: no test images; looked for test, x_test"):
        open_dataset(tmp_path / "d.npz", split="test")


def test_npy_folder_and_split_notice(tmp_path, caplog):
    np.save(tmp_path / "train.npy", random_pixels(5, 8, 8, 3))
    np.save(tmp_path / "val.npy", random_pixels(2, 8, 8, 3))
    with caplog.at_level(logging.WARNING, "nvae_fast.data"):
        assert [len(open_dataset(tmp_path, split=s)) for s in ("train", "test")] == [5, 2]
        assert not caplog.records
        assert len(open_dataset(tmp_path / "train.npy", split="test")) == 5
    assert "has no splits: all of its 5 images" in caplog.text


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (
            np.zeros((2, 8, 8), np.float32),
            {},
            r"x\.npy: expected uint8 pixels .* got float32 of shape \(2, 8, 8\)",
        ),
        (np.zeros((2, 8), np.uint8), {}, r"x\.npy: expected \(N,H,W\).* got \(2, 8\)"),
        (np.zeros((2, 8, 8, 4), np.uint8), {}, r"C = 1 or 3, got \(2, 8, 8, 4\)"),
        (np.zeros((2, 8, 9, 3), np.uint8), {}, "expected square images, got 8x9"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"image_size": 16}, "expected images of 16x16, got 8x8"),
        (np.zeros((2, 8, 8, 3), np.uint8), {"channels": 1}, r"expected 1 channel\(s\), the images have 3"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, r"x\.npy: holds no images"),
        (np.array([{}]), {}, r"x\.npy: cannot be read as a numpy file: .*allow_pickle"),
    ],
)
def test_npy_mismatches(tmp_path, array, options, message):
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path / "x.npy", **options)


def test_npy_corrupt(tmp_path):
    np.save(tmp_path / "x.npy", random_pixels(5, 8, 8, 3))
    whole = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"cut\.npy: cannot be read as a numpy file"):
        open_dataset(tmp_path / "cut.npy")
    np.savez(tmp_path / "x.npz", random_pixels(5, 8, 8, 3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"cut\.npz: cannot be read as a numpy file"):
        open_dataset(tmp_path / "cut.npz")
    (tmp_path / "no.npy").write_bytes(b"hello world")
    with pytest.raises(ValueError, match=r"no\.npy: .*wrong magic number 68656c6c6f20"):
        open_dataset(tmp_path / "no.npy")


# ---------------------------------------------------------------- MNIST


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "MNIST/raw"])
def test_idx(tmp_path, ending, folder):
    where = tmp_path / folder
    where.mkdir(parents=True, exist_ok=True)
    train, test = random_pixels(7, 28, 28), random_pixels(3, 28, 28, seed=1)
    write_idx(where / f"train-images-idx3-ubyte{ending}", train)
    write_idx(where / f"t10k-images-idx3-ubyte{ending}", test)
    for split, expected in (("train", train), ("test", test)):
        dataset = open_dataset(tmp_path, split=split)
        assert dataset.binarize
        assert dataset.image_size == 32
        assert dataset.channels == 1
        gray = as_bytes(open_dataset(tmp_path, split=split, binarize=False))
        assert np.array_equal(gray[:, 0], np.pad(expected, ((0, 0), (2, 2), (2, 2))))
    assert len(open_dataset(where / f"t10k-images-idx3-ubyte{ending}")) == 3


def test_idx_corrupt(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    write_idx(path, random_pixels(7, 28, 28))
    whole = path.read_bytes()
    for content, message in (
        (
            whole[:-1],
            r"train-images-idx3-ubyte: truncated, its header \(7, 28, 28\) needs 5504 bytes, got 5503",
        ),
        (whole + b"x", "too long"),
        (whole[:9], "truncated, the IDX header needs 16 bytes, got 9"),
        (b"\0\0\x0d" + whole[3:], "wrong data type 0x0d"),
        (b"\0\0\x08\x01" + whole[4:], r"1 dimension\(s\).*a file of labels"),
        (b"\x01" + whole[1:], "wrong magic number 01000803"),
        (b"", r"wrong magic number \(empty file\)"),
        (gzip.compress(whole)[:-100], "train-images-idx3-ubyte: damaged gzip file"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no test images; looked for .*t10k-images-idx3-ubyte"):
        open_dataset(tmp_path, split="test")


# ---------------------------------------------------------------- CIFAR-10


def test_cifar10(tmp_path, caplog):
    pixels = random_pixels(10, 3, 32, 32)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(5):
        write_cifar(folder / f"data_batch_{i + 1}.bin", pixels[2 * i : 2 * i + 2])
    write_cifar(folder / "test_batch.bin", pixels[:3])
    for path in (tmp_path, folder):
        dataset = open_dataset(path)
        assert (dataset.image_size, dataset.channels, dataset.binarize) == (32, 3, False)
        assert np.array_equal(as_bytes(dataset), pixels)
        assert np.array_equal(as_bytes(open_dataset(path, split="test")), pixels[:3])
    assert len(open_dataset(folder / "data_batch_1.bin")) == 2
    assert not caplog.records
    (folder / "data_batch_3.bin").unlink()
    assert len(open_dataset(folder)) == 8
    assert "found 4 of the 5 training batches" in caplog.text


def test_cifar10_corrupt(tmp_path):
    path = tmp_path / "data_batch_1.bin"
    write_cifar(path, random_pixels(4, 3, 32, 32))
    whole = path.read_bytes()
    for content, message in (
        (
            whole[:-5],
            r"data_batch_1\.bin: expected records of 3073 bytes .* got 12287 bytes, which is 3 records and",
        ),
        (b"\x63" + whole[1:], "record 0 has label 99, expected 0 to 9"),
        (b"\0" * 3074 * 2, "CIFAR-100"),
        (b"", "got 0 bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no test images; looked for test_batch\.bin"):
        open_dataset(tmp_path, split="test")


# ---------------------------------------------------------------- folders


def test_folder(tmp_path):
    pixels = image_folder(tmp_path)
    (tmp_path / "readme.txt").write_text("not an image, not counted")
    (tmp_path / ".hidden.png").write_bytes(b"left out")
    dataset = open_dataset(tmp_path)
    assert (len(dataset), dataset.image_size, dataset.channels, dataset.skipped) == (6, 8, 3, [])
    assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))  # from memory this time
    gray = open_dataset(tmp_path, image_size=4, channels=1, binarize=True)
    assert gray.batch([0], 0).shape == (1, 1, 4, 4)
    assert gray.binarize


def test_folder_crops_and_resizes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = (200, 100, 50)  # exactly the central square
    image.fromarray(wide).save(tmp_path / "wide.png")
    image.fromarray(np.full((30, 12), 77, np.uint8)).save(tmp_path / "tall-gray.png")
    image.fromarray(np.full((9, 9), 257 * 40, np.uint16)).save(tmp_path / "sixteen.png")
    image.new("RGB", (11, 16), (10, 20, 30)).save(tmp_path / "photo.jpg", quality=95)
    x = as_bytes(open_dataset(tmp_path, image_size=10, channels=3))
    names = ["photo.jpg", "sixteen.png", "tall-gray.png", "wide.png"]
    expected = {
        "wide.png": (200, 100, 50),
        "tall-gray.png": (77,) * 3,
        "sixteen.png": (40,) * 3,
        "photo.jpg": (10, 20, 30),
    }
    for name, picture in zip(names, x, strict=True):
        error = np.abs(picture.astype(int) - np.array(expected[name])[:, None, None])
        assert error.max() <= (3 if name == "photo.jpg" else 0), name


def test_folder_splits(tmp_path):
    image_folder(tmp_path / "train", 6)
    with pytest.raises(
        FileNotFoundError, match="no test images; it has a folder train, but none of test, val"
    ):
        open_dataset(tmp_path, split="test")
    image_folder(tmp_path / "val", 4)
    assert [len(open_dataset(tmp_path, split=s)) for s in ("train", "test")] == [6, 4]


def test_folder_unreadable_files(tmp_path, caplog):
    pixels = image_folder(tmp_path)
    good = (tmp_path / "a" / "001.png").read_bytes()
    (tmp_path / "a" / "000x.png").write_bytes(b"garbage")  # no image at all: takes no index
    (tmp_path / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "a" / "001.png").write_bytes(
        good[: len(good) // 2]
    )  # breaks when decoded: replaced by the next
    dataset = open_dataset(tmp_path, max_skipped=0.5)
    assert len(dataset) == 6
    x = as_bytes(dataset)
    assert np.array_equal(x, pixels[[0, 2, 2, 3, 4, 5]].transpose(0, 3, 1, 2))
    assert np.array_equal(as_bytes(dataset), x)
    assert [os.path.basename(file) for file, _ in dataset.skipped] == ["000x.png", "empty.jpg", "001.png"]
    assert [reason for _, reason in dataset.skipped][:2] == ["not an image file", "empty file"]
    assert caplog.text.count("unreadable image skipped") == 3
    loader = BatchLoader(dataset, 2, seed=0, workers=3)
    for _ in range(3):
        list(loader.epoch(0))
    assert len(dataset.skipped) == 3


def test_folder_does_not_blame_files_for_the_process(tmp_path, monkeypatch):
    image_folder(tmp_path)
    dataset = open_dataset(tmp_path)

    def exhausted(index: int) -> np.ndarray:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(dataset.source, "decode", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        dataset.batch([3], 0)
    assert dataset.skipped == []


def test_folder_with_only_unreadable_files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"garbage")
    for options in ({}, {"image_size": 8, "channels": 3}):
        with pytest.raises(ValueError, match=r"none of .*image files can be read; the first: .*0\.png"):
            open_dataset(tmp_path, **options)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png_bytes(random_pixels(8, 8, 3))[:60])
    with pytest.raises(ValueError, match=r"none of the 3 images can be read; the first: .*0\.png"):
        open_dataset(tmp_path, image_size=8, channels=3, max_skipped=1)


# ---------------------------------------------------------------- LMDB


@pytest.mark.parametrize("style", ["raw", "png"])
def test_lmdb(tmp_path, style):
    pixels = random_pixels(12, 8, 8, 3)
    values = [p.tobytes() if style == "raw" else png_bytes(p) for p in pixels]
    write_lmdb(tmp_path / "train.lmdb", values)
    write_lmdb(tmp_path / "validation.lmdb", values[:3])
    dataset = open_dataset(tmp_path)
    assert (len(dataset), dataset.image_size, dataset.channels, dataset.binarize) == (12, 8, 3, False)
    assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(as_bytes(open_dataset(tmp_path, split="test")), pixels[:3].transpose(0, 3, 1, 2))
    # the same database twice in one process, by folder and by file, and in a copy sent to another process
    assert len(open_dataset(tmp_path / "train.lmdb")) == 12
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.batch([11, 0], 0), dataset.batch([11, 0], 0))
    file = tmp_path / "single.mdb"
    file.write_bytes((tmp_path / "train.lmdb" / "data.mdb").read_bytes())
    assert len(open_dataset(file)) == 12


def test_lmdb_after_fork(tmp_path):
    pixels = random_pixels(4, 8, 8, 3)
    write_lmdb(tmp_path, [p.tobytes() for p in pixels])
    dataset = open_dataset(tmp_path)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))


def test_lmdb_celeba_size_is_cropped(tmp_path):
    pytest.importorskip("PIL")
    tall = np.zeros((218, 178, 3), np.uint8)
    tall[20:198] = 90
    write_lmdb(tmp_path, [tall.tobytes()])
    assert (as_bytes(open_dataset(tmp_path, image_size=64)) == 90).all()


def test_lmdb_corrupt(tmp_path, caplog):
    pytest.importorskip("PIL")
    values = [png_bytes(p) for p in random_pixels(4, 8, 8, 3)]
    write_lmdb(tmp_path / "one", [values[0], values[1][:50], values[2]])
    dataset = open_dataset(tmp_path / "one")
    x = as_bytes(dataset)
    assert np.array_equal(x[1], x[2])
    assert len(dataset.skipped) == 1
    assert "key '1'" in dataset.skipped[0][0]
    write_lmdb(tmp_path / "keys", values, first=5)
    with pytest.raises(ValueError, match=r"4 entries, but none has the key '0'"):
        open_dataset(tmp_path / "keys")
    write_lmdb(tmp_path / "size", [b"x" * 100])
    with pytest.raises(
        ValueError, match=r"key '0' has 100 bytes, neither an encoded image .* 64\*64\*3 bytes"
    ):
        open_dataset(tmp_path / "size", image_size=64)
    write_lmdb(tmp_path / "empty", [])
    with pytest.raises(ValueError, match="an empty LMDB database"):
        open_dataset(tmp_path / "empty")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"junk" * 3000)
    with pytest.raises(ValueError, match=r"junk/data\.mdb: cannot be opened as an LMDB database"):
        open_dataset(tmp_path / "junk")
    write_lmdb(tmp_path / "cut", [random_pixels(3072, seed=i).tobytes() for i in range(40)])
    file = tmp_path / "cut" / "data.mdb"
    file.write_bytes(file.read_bytes()[:40000])
    with pytest.raises(ValueError, match=r"data\.mdb: truncated, 40000 of at least"):
        open_dataset(tmp_path / "cut")
