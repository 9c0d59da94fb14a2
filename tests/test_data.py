"""Exact pixels, the built-in sets, deterministic noise, and the loader."""

from __future__ import annotations

import itertools
import os
import sys
import threading

import numpy as np
import pytest
import torch
from data_files import (
    image_folder,
    memory_dataset,
    png_bytes,
    random_pixels,
    write_lmdb,
)

from nvae_fast.data import BatchLoader, extras, hashing, open_dataset, save_grid
from nvae_fast.data.dataset import ImageDataset, MemoryImages, reduce_bits

# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_follow_the_formula(bits):
    values = np.arange(256, dtype=np.uint8)
    # floor(x*255 / 2^(8-b)) / (2^b - 1) in exact rational arithmetic, x*255 being the stored integer
    expected = np.array([(v // 2 ** (8 - bits)) / (2**bits - 1) for v in range(256)])
    got = reduce_bits(values, bits)
    assert got.dtype == np.float32
    assert np.array_equal(got, expected.astype(np.float32))
    assert got.min() == 0.0
    assert got.max() == 1.0
    assert len(np.unique(got)) == 2**bits


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
    assert mean[0] == 0.0
    assert mean[255] == 1.0
    z = (mean - p)[1:255] / (p * (1 - p) / 4000).sqrt()[1:255]
    assert z.abs().max() < 5
    assert 0.85 < z.std() < 1.15
    assert abs(z.mean()) < 0.25
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
    with pytest.raises(TypeError, match=r"seed: expected an integer, got 0\.5"):
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


def test_a_batch_of_digits_takes_no_python_for_each_image():
    """Some 20,000 images a second are read so."""
    pytest.importorskip("sklearn")
    dataset = open_dataset("digits")
    calls = []
    for count in (20, 200):
        index = torch.arange(count)
        dataset.batch(index, 1)
        calls.append(0)

        def note(frame, event, argument):
            calls[-1] += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            dataset.batch(index, 1)
        finally:
            sys.setprofile(None)
    assert 0 < calls[1] < 2 * calls[0], "ten times the images"


@pytest.mark.parametrize("size", [32, 64])
def test_photos(size):
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    datasets = pytest.importorskip("sklearn.datasets")
    train = open_dataset("photos", image_size=size)
    test = open_dataset("photos", split="test", image_size=size)
    assert (train.image_size, train.channels, train.binarize) == (size, 3, False)
    assert len(train) > 2000
    assert len(test) > 80
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
        ({"split": "valid"}, r"split \(--split\): expected 'train', 'validation', 'test', got 'valid'"),
        ({"num_bits": 9}, "num_bits: expected an integer from 1 to 8, got 9"),
        ({"num_bits": 2.0}, "num_bits: expected an integer from 1 to 8, got 2.0"),
        ({"channels": 2}, "channels: expected 1, 3 or None, got 2"),
        ({"image_size": 0}, "image_size: expected a positive integer or None, got 0"),
        ({"kind": "tfrecord"}, r"kind \(--data-kind\): expected one of digits, .* or None, got 'tfrecord'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset("digits", **options)


def test_missing_package_is_named(monkeypatch, tmp_path):
    def missing(module: str):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    image_folder(tmp_path)
    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(
        ModuleNotFoundError, match=r"'digits' needs the package scikit-learn: pip install scikit-learn"
    ):
        open_dataset("digits")
    with pytest.raises(
        ModuleNotFoundError, match=r"image files needs the package Pillow: pip install Pillow"
    ):
        open_dataset(tmp_path)
    (tmp_path / "data.mdb").write_bytes(b"")
    with pytest.raises(ModuleNotFoundError, match=r"LMDB database needs the package lmdb: pip install lmdb"):
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
    assert len(whole) == 6
    assert all(x.shape == (8, channels, 8, 8) for x in whole)
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
    assert len(loader) == 7
    assert epoch(loader)[-1].shape[0] == 5
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
    assert bool((kept ^ mirrored).all())
    assert 150 < int(mirrored.sum()) < 250
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
