"""Images in: every source, exact pixels, deterministic order and noise, broken files named. PNG grids out."""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import os
import pickle
import struct
import threading
import time

import numpy as np
import pytest
import torch

from nvae_fast.data import BatchLoader, extras, hashing, open_dataset, save_grid
from nvae_fast.data.dataset import ImageDataset, MemoryImages, reduce_bits
from nvae_fast.data.png import make_grid


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def memory_dataset(count: int = 50, channels: int = 3, size: int = 8, **options) -> ImageDataset:
    return ImageDataset(
        MemoryImages("memory", random_pixels(count, channels, size, size)), split="train", **options
    )


def as_bytes(dataset: ImageDataset) -> np.ndarray:
    """The dataset's 8-bit pixels back as uint8 (N,C,H,W)."""
    return (dataset.batch(torch.arange(len(dataset)), 0) * 255).round().to(torch.uint8).numpy()


def write_idx(path, images: np.ndarray, *, magic: bytes = b"\0\0\x08\x03") -> None:
    data = magic + struct.pack(f">{images.ndim}I", *images.shape) + images.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_cifar(path, images: np.ndarray) -> None:
    labels = np.arange(len(images), dtype=np.uint8)[:, None] % 10
    path.write_bytes(np.concatenate([labels, images.reshape(len(images), -1)], axis=1).tobytes())


def png_bytes(pixels: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def image_folder(path, count: int = 6, size: int = 8) -> np.ndarray:
    """`count` RGB PNG files in two subfolders; their pixels (N,H,W,3) in sorted order."""
    pixels = random_pixels(count, size, size, 3)
    for i, picture in enumerate(pixels):
        folder = path / ("a" if i < count // 2 else "b")
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"{i:03}.png").write_bytes(png_bytes(picture))
    return pixels


def write_lmdb(path, values: list[bytes], first: int = 0) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for i, value in enumerate(values):
            transaction.put(str(first + i).encode("ascii"), value)


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_follow_the_formula(bits):
    values = np.arange(256, dtype=np.uint8)
    # floor(x*255 / 2^(8-b)) / (2^b - 1) in exact rational arithmetic, x*255 being the stored integer
    expected = np.array([(v // 2 ** (8 - bits)) / (2**bits - 1) for v in range(256)])
    got = reduce_bits(values, bits)
    assert got.dtype == np.float32
    assert np.array_equal(got, expected.astype(np.float32))
    assert got.min() == 0.0 and got.max() == 1.0 and len(np.unique(got)) == 2**bits


def test_dataset_applies_bits():
    dataset = memory_dataset(num_bits=5)
    stored = dataset.source.pixels[:4]
    assert torch.equal(
        dataset.batch([0, 1, 2, 3], 0), torch.from_numpy((stored // 8).astype(np.float32) / np.float32(31))
    )


def test_binarisation_statistics():
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    dataset = ImageDataset(MemoryImages("levels", np.repeat(levels, 4000, 0)), split="train", binarize=True)
    x = dataset.batch(torch.arange(4000), 7)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    p = torch.arange(256, dtype=torch.float64) / 255
    mean = x.double().mean(0).flatten()
    assert mean[0] == 0.0 and mean[255] == 1.0
    z = (mean - p)[1:255] / (p * (1 - p) / 4000).sqrt()[1:255]
    assert z.abs().max() < 5 and 0.85 < z.std() < 1.15 and abs(z.mean()) < 0.25
    # neighbouring pixels and neighbouring samples are uncorrelated: products of residuals average to 0
    r = (x.double().flatten(1) - p)[:, 64:192]
    assert abs((r[:, 1:] * r[:, :-1]).mean()) < 5 * 0.25 / (4000 * 127) ** 0.5
    assert abs((r[1:] * r[:-1]).mean()) < 5 * 0.25 / (3999 * 128) ** 0.5


def test_binarisation_depends_on_seed_and_index_only():
    dataset = memory_dataset(channels=1, binarize=True)
    all_at_once = dataset.batch(torch.arange(50), 3)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dataset.batch(order, 3), all_at_once[order])
    assert torch.equal(dataset.batch([7, 7], 3), all_at_once[[7, 7]])
    assert torch.equal(dataset.batch(np.array([9], dtype=np.int32), 3)[0], all_at_once[9])
    assert not torch.equal(dataset.batch(torch.arange(50), 4), all_at_once)


def test_noise_is_frozen():
    """SplitMix64's published first outputs for seed 0, then ours: resuming after upgrades relies on them."""
    words = hashing._words32(
        np.zeros(1, np.uint64), np.array([1, 2], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    )
    assert words.view("<u8").tolist() == [[0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]]
    assert hashing.fold_seed(1, 2, 3) == 15020427595393229491
    assert hashing.permutation(10, 5).tolist() == [4, 3, 9, 5, 6, 2, 0, 1, 8, 7]
    bits = hashing.bernoulli(np.full((1, 16), 128, np.uint8), hashing.index_keys(3, np.array([4])))
    assert bits[0].tolist() == [1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 0, 1]


def test_hash_has_no_structure():
    keys = hashing.index_keys(0, np.arange(20000))
    assert len(np.unique(keys)) == 20000
    assert (
        len(np.unique(np.concatenate([hashing.index_keys(s, np.arange(100)) for s in range(200)]))) == 20000
    )
    bits = (keys[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / 20000**0.5


def test_empty_batch_and_bad_indices():
    dataset = memory_dataset()
    assert dataset.batch([], 0).shape == (0, 3, 8, 8)
    assert memory_dataset(channels=1, binarize=True).batch(torch.zeros(0, dtype=torch.long), 0).shape == (
        0,
        1,
        8,
        8,
    )
    with pytest.raises(IndexError, match=r"indices: expected 0 to 49 for memory, got 50"):
        dataset.batch([0, 50], 0)
    with pytest.raises(IndexError, match="got -1"):
        dataset.batch([-1], 0)
    with pytest.raises(TypeError, match="indices: expected integers, got float"):
        dataset.batch(torch.zeros(2), 0)
    with pytest.raises(ValueError, match=r"one dimension .* got shape \(1, 1\)"):
        dataset.batch([[1]], 0)
    with pytest.raises(TypeError, match="seed: expected an integer, got 0.5"):
        dataset.batch([0], 0.5)


# ---------------------------------------------------------------- built-in sets


def test_digits_look_like_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    target = torch.as_tensor(datasets.load_digits().target)
    train, test = open_dataset("digits"), open_dataset("digits", split="test")
    assert (len(train), len(test)) == (1500, 297)
    assert (train.image_size, train.channels, train.binarize, train.name) == (32, 1, True, "digits")
    x, y = train.batch(torch.arange(1500), 0), test.batch(torch.arange(297), 0)
    assert 0.1 < x.mean() < 0.45
    means = torch.stack([x[target[:1500] == d].mean(0) for d in range(10)])
    guess = torch.cdist(y.flatten(1), means.flatten(1)).argmin(1)
    assert (guess == target[1500:]).float().mean() > 0.8
    # smooth strokes: at 32x32 most ink pixels have ink neighbours, which an 8x8 scatter of noise would not
    ink = y[:, 0, 1:-1, 1:-1] == 1
    neighbours = y[:, 0, :-2, 1:-1] + y[:, 0, 2:, 1:-1] + y[:, 0, 1:-1, :-2] + y[:, 0, 1:-1, 2:]
    assert (neighbours[ink] >= 2).float().mean() > 0.9
    # block sums give the originals back, so the shapes are those of the data
    gray = torch.from_numpy(test.source.pixels).float() / 255
    original = torch.as_tensor(datasets.load_digits().images[1500:]).float() / 16
    blocks = torch.nn.functional.avg_pool2d(gray, 4)[:, 0]
    assert torch.corrcoef(torch.stack([blocks.flatten(), original.flatten()]))[0, 1] > 0.95


def test_digits_speed():
    pytest.importorskip("sklearn")
    dataset = open_dataset("digits")
    index = torch.arange(200)
    best = min(_seconds(lambda: dataset.batch(index, 1)) for _ in range(20))
    assert 200 / best > 20_000


def _seconds(action) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@pytest.mark.parametrize("size", [32, 64])
def test_photos(size):
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    datasets = pytest.importorskip("sklearn.datasets")
    train = open_dataset("photos", image_size=size)
    test = open_dataset("photos", split="test", image_size=size)
    assert (train.image_size, train.channels, train.binarize) == (size, 3, False)
    assert len(train) > 2000 and len(test) > 80
    photo = datasets.load_sample_images().images[0]
    assert np.array_equal(train.source.pixels[0], photo[:size, :size].transpose(2, 0, 1))
    assert np.array_equal(test.source.pixels[0], photo[:size, 480 : 480 + size].transpose(2, 0, 1))
    again = open_dataset("photos", image_size=size)
    assert np.array_equal(again.source.pixels, train.source.pixels)
    # natural: neighbouring pixels are alike, colours are not gray
    x = train.batch(torch.arange(0, len(train), 17), 0)
    assert (x[..., 1:] - x[..., :-1]).abs().mean() < 0.3 * x.std()
    assert (x[:, 0] - x[:, 2]).abs().mean() > 0.05


def test_builtin_arguments():
    pytest.importorskip("sklearn")
    assert open_dataset("digits", image_size=16).batch([0], 0).shape == (1, 1, 16, 16)
    with pytest.raises(ValueError, match="image_size: digits comes in 8 to 128 pixels a side, got 7"):
        open_dataset("digits", image_size=7)
    with pytest.raises(ValueError, match="channels: digits has 1 channel, got 3"):
        open_dataset("digits", channels=3)
    with pytest.raises(ValueError, match="channels: photos has 3 channels, got 1"):
        open_dataset("photos", channels=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "split: expected 'train' or 'test', got 'valid'"),
        ({"num_bits": 9}, "num_bits: expected an integer from 1 to 8, got 9"),
        ({"num_bits": 2.0}, "num_bits: expected an integer from 1 to 8, got 2.0"),
        ({"channels": 2}, "channels: expected 1, 3 or None, got 2"),
        ({"image_size": 0}, "image_size: expected a positive integer or None, got 0"),
        ({"kind": "tfrecord"}, "kind: expected one of digits, .* or None, got 'tfrecord'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset("digits", **options)


def test_missing_package_names_the_extra(monkeypatch, tmp_path):
    def missing(module: str):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    image_folder(tmp_path)
    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r"'digits' needs the package scikit-learn: .*nvae_fast\[data\]"
    ):
        open_dataset("digits")
    with pytest.raises(
        ModuleNotFoundError, match=r"image files needs the package Pillow: .*nvae_fast\[data\]"
    ):
        open_dataset(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(
        ModuleNotFoundError, match=r"LMDB database needs the package lmdb: .*nvae_fast\[data\]"
    ):
        open_dataset(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder 'mnist'; built in are digits, photos"):
        open_dataset("mnist")
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(
        ValueError, match=r"(?s)nothing recognised.*data\.mdb.*t10k-images.*data_batch.*train\.npy.*\.png"
    ):
        open_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.md: not recognised.*it starts with 6e6f7468"):
        open_dataset(tmp_path / "notes.md")
    (tmp_path / "one.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match="a single image: give the folder it is in"):
        open_dataset(tmp_path / "one.png")


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
    assert dataset.image_size == 32 and dataset.channels == expected.shape[1]
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
    assert np.array_equal(padded[:, 0, 2:-2, 2:-2], pixels) and padded.sum() == pixels.sum(dtype=np.int64)
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
        assert dataset.binarize and dataset.image_size == 32 and dataset.channels == 1
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
    with pytest.raises(FileNotFoundError, match="no test images; looked for .*t10k-images-idx3-ubyte"):
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
    assert len(open_dataset(folder)) == 8 and "found 4 of the 5 training batches" in caplog.text


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
    gray = open_dataset(tmp_path, image_size=4, channels=1)
    assert gray.batch([0], 0).shape == (1, 1, 4, 4) and gray.binarize


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
    dataset = open_dataset(tmp_path)
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


def test_folder_with_only_unreadable_files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"garbage")
    for options in ({}, {"image_size": 8, "channels": 3}):
        with pytest.raises(ValueError, match=r"none of .*image files can be read; the first: .*0\.png"):
            open_dataset(tmp_path, **options)
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png_bytes(random_pixels(8, 8, 3))[:60])
    with pytest.raises(ValueError, match=r"none of the 3 images can be read; the first: .*0\.png"):
        open_dataset(tmp_path, image_size=8, channels=3)


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
    assert np.array_equal(x[1], x[2]) and len(dataset.skipped) == 1 and "key '1'" in dataset.skipped[0][0]
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
    with pytest.raises(ValueError, match="junk: cannot be opened as an LMDB database"):
        open_dataset(tmp_path / "junk")
    write_lmdb(tmp_path / "cut", [random_pixels(3072, seed=i).tobytes() for i in range(40)])
    file = tmp_path / "cut" / "data.mdb"
    file.write_bytes(file.read_bytes()[:40000])
    with pytest.raises(ValueError, match=r"data\.mdb: truncated, 40000 of at least"):
        open_dataset(tmp_path / "cut")


# ---------------------------------------------------------------- the loader


def epoch(loader: BatchLoader, number: int = 0, start: int = 0) -> list[torch.Tensor]:
    return list(loader.epoch(number, start))


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
def test_loader_is_deterministic_and_resumable(channels):
    dataset = memory_dataset(53, channels, binarize=channels == 1)
    loader = BatchLoader(dataset, 8, seed=5, flip=True)
    assert len(loader) == 6
    whole = epoch(loader, 2)
    assert len(whole) == 6 and all(x.shape == (8, channels, 8, 8) for x in whole)
    assert same(whole, epoch(BatchLoader(dataset, 8, seed=5, flip=True), 2))
    for start in range(7):
        for workers in (0, 2):
            assert same(
                whole[start:], epoch(BatchLoader(dataset, 8, seed=5, flip=True, workers=workers), 2, start)
            )
    assert not same(whole, epoch(loader, 3))
    assert not same(whole, epoch(BatchLoader(dataset, 8, seed=6, flip=True), 2))


def test_loader_order_is_a_permutation():
    dataset = memory_dataset(53)
    loader = BatchLoader(dataset, 8, seed=0, drop_last=False)
    orders = [np.concatenate(loader.indices(e)) for e in range(4)]
    assert all(sorted(o.tolist()) == list(range(53)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4
    assert len(loader) == 7 and epoch(loader)[-1].shape[0] == 5
    assert np.array_equal(
        np.concatenate(BatchLoader(dataset, 8, seed=0, shuffle=False, drop_last=False).indices(3)),
        np.arange(53),
    )
    counts = np.zeros((6, 6))
    small = memory_dataset(6)
    for e in range(600):
        counts[np.arange(6), np.concatenate(BatchLoader(small, 6, seed=1).indices(e))] += 1
    assert np.abs(counts - 100).max() < 5 * (100 * 5 / 6) ** 0.5  # every image lands everywhere equally often


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_shards_make_up_the_global_batch(world, drop_last):
    dataset = memory_dataset(61, 1, binarize=True)
    whole = epoch(BatchLoader(dataset, 4 * world, seed=9, drop_last=drop_last), 1)
    loaders = [
        BatchLoader(dataset, 4, seed=9, drop_last=drop_last, rank=r, world_size=world) for r in range(world)
    ]
    assert {len(x) for x in loaders} == {len(whole)}
    parts = [epoch(x, 1) for x in loaders]
    assert same(whole, [torch.cat(batch) for batch in zip(*parts, strict=True)])
    sizes = [x[-1].shape[0] for x in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_shard_may_be_empty():
    dataset = memory_dataset(9)
    sizes = [
        [len(x) for x in epoch(BatchLoader(dataset, 2, seed=0, drop_last=False, rank=r, world_size=4))]
        for r in range(4)
    ]
    assert sizes == [[2, 1], [2, 0], [2, 0], [2, 0]]


def test_flips():
    dataset = memory_dataset(400)
    plain = torch.cat(epoch(BatchLoader(dataset, 100, seed=0)))
    flipped = torch.cat(epoch(BatchLoader(dataset, 100, seed=0, flip=True)))
    kept = (plain == flipped).flatten(1).all(1)
    mirrored = (plain.flip(-1) == flipped).flatten(1).all(1)
    assert bool((kept ^ mirrored).all()) and 150 < int(mirrored.sum()) < 250
    again = torch.cat(epoch(BatchLoader(dataset, 50, seed=0, flip=True)))
    assert torch.equal(flipped, again)  # whatever the batch size
    characters = memory_dataset(20, 1)
    assert same(
        epoch(BatchLoader(characters, 5, seed=0)), epoch(BatchLoader(characters, 5, seed=0, flip=True))
    )


def data_threads() -> int:
    return sum(t.name.startswith("nvae_fast-data") for t in threading.enumerate())


def test_workers_change_nothing_and_go_away(tmp_path):
    image_folder(tmp_path, 20)
    reference = epoch(BatchLoader(open_dataset(tmp_path), 3, seed=1, flip=True))
    for workers in (1, 2, 5):
        assert same(
            reference, epoch(BatchLoader(open_dataset(tmp_path), 3, seed=1, flip=True, workers=workers))
        )
    assert data_threads() == 0
    batches = BatchLoader(open_dataset(tmp_path), 3, seed=1, workers=2).epoch(0)
    next(batches)
    assert data_threads() > 0
    del batches  # left early
    assert data_threads() == 0


def test_worker_errors_reach_the_caller():
    dataset = memory_dataset(20)

    def fail(index: np.ndarray) -> np.ndarray:
        raise OSError("disk gone")

    dataset.source.read = fail
    with pytest.raises(OSError, match="disk gone"):
        epoch(BatchLoader(dataset, 4, seed=0, workers=2))
    assert data_threads() == 0


def test_no_file_descriptor_leak(tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("counts open files through /proc")
    image_folder(tmp_path / "images", 8)
    (tmp_path / "images" / "a" / "000.png").write_bytes(png_bytes(random_pixels(8, 8, 3))[:60])
    np.savez(tmp_path / "x.npz", random_pixels(5, 8, 8, 3))
    write_lmdb(tmp_path / "db", [p.tobytes() for p in random_pixels(4, 8, 8, 3)])
    (tmp_path / "db" / "broken.npz").write_bytes(b"PK\x03\x04 broken")

    def once() -> None:
        for path in ("images", "x.npz", "db"):
            dataset = open_dataset(tmp_path / path)
            for start in (0, 1):
                next(itertools.islice(BatchLoader(dataset, 2, seed=0, workers=2).epoch(0, start), 1))
            del dataset
        with pytest.raises(ValueError):
            open_dataset(tmp_path / "db" / "broken.npz")
        save_grid(torch.rand(2, 3, 4, 4), tmp_path / "grid.png")

    once()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        once()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1, got 0"),
        ({"batch_size": 51}, r"batch_size: 51 x 1 process\(es\) = 51 is more than the 50 images of memory"),
        ({"batch_size": 20, "world_size": 3}, r"20 x 3 process\(es\) = 60"),
        ({"workers": -1}, "workers: expected an integer of at least 0, got -1"),
        ({"rank": 1}, r"rank: expected 0 to 0 \(world_size - 1\), got 1"),
        ({"world_size": 0}, "world_size: expected an integer of at least 1, got 0"),
    ],
)
def test_loader_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(memory_dataset(), **{"batch_size": 4, "seed": 0, **options})


def test_epoch_arguments():
    loader = BatchLoader(memory_dataset(), 4, seed=0)
    with pytest.raises(ValueError, match="start_batch: an epoch has 12 batches, got 13"):
        loader.epoch(0, 13)  # at once, not at the first batch
    with pytest.raises(ValueError, match="epoch: expected an integer of at least 0, got -1"):
        loader.epoch(-1)
    with pytest.raises(TypeError, match="seed: expected an integer, got '0'"):
        BatchLoader(memory_dataset(), 4, seed="0")


# ---------------------------------------------------------------- PNG grids


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_reads_back(tmp_path, channels):
    image = pytest.importorskip("PIL.Image")
    pixels = random_pixels(5, channels, 6, 4)
    save_grid(torch.from_numpy(pixels).float() / 255, tmp_path / "grid.png", columns=3)
    with image.open(tmp_path / "grid.png") as opened:
        opened.verify()
    with image.open(tmp_path / "grid.png") as opened:
        assert opened.mode == ("L" if channels == 1 else "RGB")
        got = np.asarray(opened).reshape(2 * 6 + 2, 3 * 4 + 2 * 2, channels)
    for i in range(5):
        top, left = i // 3 * 8, i % 3 * 6
        assert np.array_equal(got[top : top + 6, left : left + 4], pixels[i].transpose(1, 2, 0))
    assert (got[6:8] == 128).all() and (got[8:, 12:] == 128).all()
    assert os.listdir(tmp_path) == ["grid.png"]


def test_grid_shapes_and_types(tmp_path):
    assert make_grid(torch.zeros(5, 1, 2, 2)).shape == (2 * 2 + 2, 3 * 2 + 4)
    assert make_grid(torch.zeros(2, 3, 2, 2), columns=9).shape == (2, 2 * 2 + 2, 3)
    x = torch.rand(4, 3, 8, 8).to(torch.bfloat16).requires_grad_()
    save_grid(x.to(memory_format=torch.channels_last), tmp_path / "x.png")
    assert make_grid(torch.tensor([1.0005, -0.0005]).view(1, 1, 1, 2)).tolist() == [[255, 0]]


@pytest.mark.parametrize(
    ("images", "columns", "error", "message"),
    [
        (torch.zeros(2, 2, 4, 4), None, ValueError, r"images: expected \(N,C,H,W\).* got \(2, 2, 4, 4\)"),
        (torch.zeros(3, 4, 4), None, ValueError, r"got \(3, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), None, ValueError, r"got \(0, 3, 4, 4\)"),
        (torch.full((1, 1, 2, 2), 2.0), None, ValueError, r"expected values in \[0,1\], got 2 to 2"),
        (torch.full((1, 1, 2, 2), float("nan")), None, ValueError, "4 of 4 values are not finite"),
        (torch.zeros(1, 1, 2, 2), 0, ValueError, "columns: expected a positive integer or None, got 0"),
        (np.zeros((1, 1, 2, 2)), None, TypeError, "images: expected a tensor .* got ndarray"),
    ],
)
def test_grid_bad_input(tmp_path, images, columns, error, message):
    target = tmp_path / "grid.png"
    target.write_bytes(b"older")
    with pytest.raises(error, match=message):
        save_grid(images, target, columns=columns)
    assert target.read_bytes() == b"older" and os.listdir(tmp_path) == ["grid.png"]


def test_grid_write_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "grid.png"
    target.write_bytes(b"older")

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_grid(torch.zeros(1, 1, 2, 2), target)
    assert target.read_bytes() == b"older" and os.listdir(tmp_path) == ["grid.png"]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="the folder .*nowhere' does not exist"):
        save_grid(torch.zeros(1, 1, 2, 2), tmp_path / "nowhere" / "grid.png")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_grid(torch.zeros(1, 1, 2, 2), tmp_path)
    save_grid(torch.zeros(1, 1, 2, 2), target)
    assert target.stat().st_mode & 0o777 == 0o644
