"""CIFAR-10 and CIFAR-100 as torchvision leaves them, and their pickles, of which nothing is called."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_files import as_bytes, random_pixels, write_cifar, write_idx

from nvae_fast.data import arrays_only, open_dataset

# A batch of 2 images as Python 2 pickled it (protocol 2): strings are bytes, and so is the array's data.
PYTHON_2 = (
    b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x04testq\x03U\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
    b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01"
    b"\x87Rq\t(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x18\x00\x00%btbU\x06labelsq\n]q\x0b"
    b"(K\x03K\x05eu."
)


def batch(pixels: np.ndarray, labels: str, protocol: int = 4, text: bool = False) -> bytes:
    value = {
        "data": pixels.reshape(len(pixels), -1),
        labels: [0] * len(pixels),
        "filenames": ["a.png"] * len(pixels),
    }
    return pickle.dumps(value if text else {k.encode(): v for k, v in value.items()}, protocol)


def write_ten(folder: Path, pixels: np.ndarray, **options) -> None:
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"data_batch_{i + 1}").write_bytes(batch(pixels[2 * i : 2 * i + 2], "labels", **options))
    (folder / "test_batch").write_bytes(batch(pixels[:3], "labels", **options))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat"]}))


def archive(folder: Path) -> Path:
    target = folder.with_name(
        {"cifar-10-batches-py": "cifar-10-python"}.get(folder.name, folder.name) + ".tar.gz"
    )
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return target


@pytest.mark.parametrize("options", [{"protocol": p} for p in (2, 3, 4, 5)] + [{"text": True}])
def test_cifar_10(tmp_path, options, caplog):
    pixels = random_pixels(10, 3, 32, 32)
    folder = tmp_path / "data" / "cifar-10-batches-py"
    write_ten(folder, pixels, **options)
    packed = archive(folder)
    packed.rename(tmp_path / packed.name)
    for path in (tmp_path / "data", folder, tmp_path / packed.name):
        assert np.array_equal(as_bytes(open_dataset(path)), pixels)
        assert np.array_equal(as_bytes(open_dataset(path, split="test")), pixels[:3])
    assert not caplog.records
    assert np.array_equal(as_bytes(open_dataset(folder / "data_batch_2")), pixels[2:4])
    (tmp_path / "data" / "cifar-10-batches-py").rename(tmp_path / "away")
    assert len(open_dataset(tmp_path)) == 10  # the archive beside it


def test_cifar_100(tmp_path):
    pixels = random_pixels(10, 3, 32, 32)
    folder = tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    (folder / "train").write_bytes(batch(pixels, "fine_labels"))
    (folder / "test").write_bytes(batch(pixels[:3], "fine_labels"))
    packed = archive(folder)
    packed.rename(tmp_path / packed.name)
    for path in (tmp_path / "data", folder, tmp_path / packed.name):
        for kind in (None, "cifar100"):
            assert np.array_equal(as_bytes(open_dataset(path, kind=kind)), pixels)
            assert np.array_equal(as_bytes(open_dataset(path, kind=kind, split="test")), pixels[:3])


def test_cifar_100_binary(tmp_path):
    pixels = random_pixels(10, 3, 32, 32)
    folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    labels = np.tile(np.array([[19, 99]], np.uint8), (10, 1))
    (folder / "train.bin").write_bytes(np.concatenate([labels, pixels.reshape(10, -1)], axis=1).tobytes())
    assert np.array_equal(as_bytes(open_dataset(tmp_path)), pixels)


def test_a_batch_of_python_2():
    data = bytes(range(256)) * 24
    value = arrays_only.loads(PYTHON_2.replace(b"%b", data))
    assert value[b"labels"] == [3, 5]
    array = arrays_only.uint8_array(value[b"data"])
    assert np.array_equal(array, np.frombuffer(data, np.uint8).reshape(2, 3072))


def test_several_data_sets_in_one_folder(tmp_path):
    pixels = random_pixels(10, 3, 32, 32)
    write_ten(tmp_path / "cifar-10-batches-py", pixels)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", random_pixels(4, 28, 28))
    with pytest.raises(
        ValueError, match=r"several data sets .*\(cifar10, idx\): kind \(--data-kind\) chooses"
    ):
        open_dataset(tmp_path)
    assert len(open_dataset(tmp_path, kind="cifar10")) == 10
    assert len(open_dataset(tmp_path, kind="idx")) == 4


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_is_called(tmp_path, protocol):
    mark = tmp_path / "called"
    for name, value in (("data_batch_1", {b"data": Evil(mark)}), ("data_batch_2", Evil(mark))):
        (tmp_path / name).write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(ValueError, match=rf"{name}: .*(the file names posix\.mkdir|expected records)"):
            open_dataset(tmp_path / name, kind="cifar10")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({b"data": np.zeros((2, 3072), np.float32)}, "an array of type 'f4', expected u1"),
        ({b"data": np.array([{}, {}])}, "an array of type 'O8', expected u1"),
        ({b"data": np.zeros((2, 3000), np.uint8)}, r"shape \(N, 3072\), got \(2, 3000\)"),
        ({b"data": "text"}, "expected an array, got str"),
        ({b"data": np.dtype(np.uint8)}, "expected an array, got another object"),
        ({b"labels": [1]}, "expected an entry 'data', got"),
        ([1, 2], "expected a dictionary, got list"),
    ],
)
def test_other_pickles(tmp_path, value, message):
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(value, 4))
    with pytest.raises(ValueError, match=rf"data_batch_1: .*{message}"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02]r\xff\xff\xff\xff.",  # remembers a list under the index 2^32 - 1
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.",  # bytes of a length of 2^40
        b"\x80\x05\x96\xff\xff\xff\xff\x00\x00\x00\x00.",  # a bytearray of 4 GB, which would be filled with zeros
        b"\x80\x02\x82\x01.",
        b"\x80\x02cbuiltins\neval\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93}\x8c\x01ax\x62.",
        b"\x80\x02" + b"(" * 5000,
        b"\x80\x02P1\n.",
    ],
)
def test_damaged_pickles(tmp_path, data):
    (tmp_path / "data_batch_1").write_bytes(data)
    with pytest.raises(ValueError, match="data_batch_1: not a pickled CIFAR batch"):
        open_dataset(tmp_path)


def test_damaged_archives(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_ten(folder, random_pixels(10, 3, 32, 32))
    packed = archive(folder)
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz: damaged archive"):
        open_dataset(packed)
    packed.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz: damaged archive"):
        open_dataset(packed)
    with tarfile.open(packed, "w:gz") as tar:
        entry = tarfile.TarInfo("readme")
        tar.addfile(entry, io.BytesIO())
        big = tarfile.TarInfo("data_batch_1")
        big.size = 1 << 27
        tar.addfile(big, io.BytesIO(bytes(1 << 27)))
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz: .*compressed bytes would become"):
        open_dataset(packed)


def test_names_of_batches(tmp_path):
    write_cifar(tmp_path / "data_batch_1.bin", random_pixels(4, 3, 32, 32))
    (tmp_path / "data_batch_1").mkdir()  # a folder is no batch
    assert len(open_dataset(tmp_path)) == 4
