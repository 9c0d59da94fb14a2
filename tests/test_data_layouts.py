"""Data sets as they are published: batches of ImageNet, LSUN's keys, Omniglot's .mat; and their splits."""

from __future__ import annotations

import numpy as np
import pytest
from data_files import as_bytes, image_folder, png_bytes, random_pixels, write_cifar, write_lmdb

from nvae_fast.data import arrays, open_dataset

# ---------------------------------------------------------------- ImageNet at 32 and 64 pixels


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("in_memory", [1 << 28, 100])
def test_imagenet_batches(tmp_path, size, save, in_memory, monkeypatch):
    monkeypatch.setattr(arrays, "_IN_MEMORY", in_memory)
    pixels = random_pixels(23, 3, size, size)
    for i in range(11):  # number 10 comes after 9, not after 1
        part = pixels[2 * i : 2 * i + 2].reshape(2, -1)
        save(tmp_path / f"train_data_batch_{i + 1}.npz", data=part, labels=np.arange(2), mean=part.mean(0))
    save(tmp_path / "val_data.npz", data=pixels[22:].reshape(1, -1), labels=np.arange(1))
    dataset = open_dataset(tmp_path, image_size=size, channels=3)
    assert np.array_equal(as_bytes(dataset), pixels[:22])
    order = np.random.default_rng(0).permutation(22)
    assert np.array_equal((dataset.batch(order, 0) * 255).round().byte().numpy(), pixels[order])
    for split in ("validation", "test"):
        assert np.array_equal(as_bytes(open_dataset(tmp_path, split=split)), pixels[22:])
    save(tmp_path / "train_data_batch_4.npz", data=random_pixels(2, 3 * 8 * 8))
    with pytest.raises(ValueError, match=r"train_data_batch_4\.npz: images of shape \(3, 8, 8\), those of"):
        open_dataset(tmp_path)


def test_flat_rows(tmp_path):
    gray, rgb = random_pixels(3, 16, 16), random_pixels(3, 3, 16, 16)
    for expected in (gray[:, None], rgb):
        np.save(tmp_path / "x.npy", expected.reshape(3, -1))
        assert np.array_equal(as_bytes(open_dataset(tmp_path / "x.npy", binarize=False)), expected)


# ---------------------------------------------------------------- LSUN


def test_lsun_keys(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    pixels = random_pixels(7, 8, 8, 3)
    keys = [f"{i * 7 % 10:x}a{i:038x}".encode() for i in range(7)]
    for name, part in (("tower_train_lmdb", slice(0, 5)), ("tower_val_lmdb", slice(5, 7))):
        with (
            lmdb.open(str(tmp_path / name), map_size=1 << 20) as environment,
            environment.begin(write=True) as t,
        ):
            for key, picture in zip(keys[part], pixels[part], strict=True):
                t.put(key, png_bytes(picture))
    order = sorted(range(5), key=lambda i: keys[i])
    expected = pixels[order].transpose(0, 3, 1, 2)
    for path in (tmp_path, tmp_path / "tower_train_lmdb"):
        assert np.array_equal(as_bytes(open_dataset(path, image_size=8)), expected)
    assert len(open_dataset(tmp_path, split="validation")) == 2
    assert len(open_dataset(tmp_path, split="test")) == 2
    with (
        lmdb.open(str(tmp_path / "tower_val_lmdb"), map_size=1 << 20) as environment,
        environment.begin(write=True) as t,
    ):
        t.put(keys[6], b"nothing")
    dataset = open_dataset(tmp_path, split="test")
    dataset.batch([0, 1], 0)
    assert dataset.skipped[0][0].endswith(f"tower_val_lmdb, key '{keys[6].decode()}'")
    (tmp_path / "church_train_lmdb").mkdir()
    with pytest.raises(
        ValueError, match=r"several databases, give one of them: .*church_train_lmdb, .*tower_train"
    ):
        open_dataset(tmp_path)


# ---------------------------------------------------------------- Omniglot


def write_mat(path, train: np.ndarray, test: np.ndarray, **options) -> None:
    matlab = pytest.importorskip("scipy.io")
    columns = {  # an image in each column, stored column by column
        name: images.transpose(0, 2, 1).reshape(len(images), 784).T.astype(np.float64) / 255
        for name, images in (("data", train), ("testdata", test))
    }
    matlab.savemat(path, {**columns, "target": np.zeros((50, len(train)))}, **options)


@pytest.mark.parametrize("compressed", [False, True])
def test_omniglot(tmp_path, compressed):
    train, test = random_pixels(5, 28, 28), random_pixels(3, 28, 28, seed=1)
    write_mat(tmp_path / "chardata.mat", train, test, do_compression=compressed)
    for path in (tmp_path, tmp_path / "chardata.mat"):
        for split, expected in (("train", train), ("test", test)):
            dataset = open_dataset(path, split=split, likelihood="normal")
            assert (dataset.image_size, dataset.channels) == (32, 1)
            assert np.array_equal(as_bytes(dataset)[:, 0, 2:-2, 2:-2], expected)
    assert open_dataset(tmp_path).binarize
    with pytest.raises(ValueError, match=r"split .*has train and test images, no validation"):
        open_dataset(tmp_path, split="validation")


def test_omniglot_damaged(tmp_path):
    matlab = pytest.importorskip("scipy.io")
    path = tmp_path / "chardata.mat"
    write_mat(path, random_pixels(5, 28, 28), random_pixels(3, 28, 28))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"chardata\.mat: cannot be read as a MATLAB file"):
        open_dataset(tmp_path)
    path.write_bytes(b"<html></html>")
    with pytest.raises(ValueError, match=r"chardata\.mat: cannot be read as a MATLAB file.*HTML page"):
        open_dataset(tmp_path)
    for content, message in (
        ({"other": np.zeros((784, 2))}, r"no array 'data' of train images, found \['other'\]"),
        (
            {"data": np.zeros((100, 2))},
            r"expected numbers of shape \(784, N\), got double of shape \(100, 2\)",
        ),
        ({"data": np.full((784, 2), 255.0)}, "has values from 255 to 255, expected 0 to 1"),
        ({"data": np.full((784, 2), np.nan)}, "has values from nan to nan"),
    ):
        matlab.savemat(path, content)
        with pytest.raises(ValueError, match=rf"chardata\.mat: .*{message}"):
            open_dataset(tmp_path)
    matlab.savemat(path, {"data": np.zeros((784, 1 << 15))}, do_compression=True)
    with pytest.raises(ValueError, match=r"chardata\.mat: .*compressed bytes would become"):
        open_dataset(tmp_path)


# ---------------------------------------------------------------- splits


def test_validation_split(tmp_path, caplog):
    values = [picture.tobytes() for picture in random_pixels(6, 8, 8, 3)]
    for name, part in (("train", values[:3]), ("validation", values[3:5]), ("test", values[5:])):
        (tmp_path / "db").mkdir(exist_ok=True)
        write_lmdb(tmp_path / "db" / f"{name}.lmdb", part)
        image_folder(tmp_path / "images" / name, 2 * len(part))
        (tmp_path / "npy").mkdir(exist_ok=True)
        np.save(tmp_path / "npy" / f"{name}.npy", random_pixels(len(part), 8, 8, 3))
    for path, lengths in (("db", (3, 2, 1)), ("images", (6, 4, 2)), ("npy", (3, 2, 1))):
        found = [len(open_dataset(tmp_path / path, split=s)) for s in ("train", "validation", "test")]
        assert tuple(found) == lengths
    assert not caplog.records
    (tmp_path / "npy" / "validation.npy").unlink()
    with pytest.raises(FileNotFoundError, match="no validation images"):
        open_dataset(tmp_path / "npy", split="validation")
    np.savez(tmp_path / "x.npz", train=random_pixels(4, 8, 8, 3), val=random_pixels(2, 8, 8, 3))
    assert len(open_dataset(tmp_path / "x.npz", split="validation")) == 2
    np.savez(tmp_path / "y.npz", train=random_pixels(4, 8, 8, 3), test=random_pixels(2, 8, 8, 3))
    with pytest.raises(ValueError, match=r"y\.npz: no validation images"):
        open_dataset(tmp_path / "y.npz", split="validation")
    open_dataset(tmp_path / "npy" / "train.npy", split="validation")
    assert "has no splits: all of its 3 images are given as the validation split" in caplog.text


def test_sets_without_a_validation_part(tmp_path):
    write_cifar(tmp_path / "test_batch.bin", random_pixels(4, 3, 32, 32))
    for path in (tmp_path, "digits"):
        with pytest.raises(ValueError, match=r"split \(--split\): .*no validation images"):
            open_dataset(path, split="validation")
