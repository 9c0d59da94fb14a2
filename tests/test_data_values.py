"""What pixel values mean: binarised or gray, 0 and 1 or 0 to 255, 16 bits, floats; and what is refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import as_bytes, png_bytes, random_pixels, write_idx, write_lmdb

import nvae_fast as nf
from nvae_fast.data import open_dataset
from nvae_fast.data.dataset import ImageDataset, MemoryImages
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.evaluation import evaluate
from nvae_fast.training.loop import Trainer


def model(likelihood: str, channels: int = 1, **options) -> nf.NVAE:
    torch.manual_seed(0)
    small = dict.fromkeys(("num_channels_enc", "num_channels_dec"), 4) | {"num_latent_per_group": 2}
    small |= dict.fromkeys(("num_preprocess_cells", "num_postprocess_cells", "num_groups_per_scale"), 1)
    custom = {"dataset": "custom", "image_size": 8, "image_channels": channels, "likelihood": likelihood}
    return nf.NVAE(nf.NVAEConfig(**small, **custom, **options))


def gray(path: Path, count: int = 4, channels: int = 1, value: int = 90) -> Path:
    np.save(path, np.full((count, 8, 8, channels), value, np.uint8))
    return path


# ---------------------------------------------------------------- binarised or not follows from the likelihood


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal"])
def test_trainer_and_evaluate_follow_the_likelihood(tmp_path, likelihood, channels, monkeypatch):
    dataset = open_dataset(gray(tmp_path / "x.npy", channels=channels))
    net = model(likelihood, channels)
    trainer = Trainer(net, TrainingConfig(max_steps=1, batch_size=4), dataset, tmp_path / "run", quiet=True)
    seen = []
    original = nf.NVAE.forward
    monkeypatch.setattr(
        nf.NVAE, "forward", lambda self, x, *a, **k: (seen.append(x), original(self, x, *a, **k))[1]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seen.append(next(trainer._batches()))
        evaluate(net, dataset, batch_size=4)
    for x in seen:
        values = {round(v * 255) for v in x.unique().tolist()}
        assert values == ({0, 255} if likelihood == "bernoulli" else {90})


def test_open_dataset_takes_the_likelihood(tmp_path):
    path = gray(tmp_path / "x.npy")
    assert open_dataset(path, likelihood="bernoulli").binarize
    assert not open_dataset(path, likelihood="normal").binarize
    assert open_dataset(path, likelihood="normal", binarize=True).binarize  # what is given counts
    assert open_dataset(gray(tmp_path / "c.npy", channels=3), likelihood="bernoulli").binarize


def test_a_loop_of_ones_own_hears_of_binarisation(tmp_path):
    dataset = open_dataset(gray(tmp_path / "x.npy"))
    with pytest.warns(UserWarning, match=r"x\.npy: gray images are binarised at every load.*binarize=False"):
        dataset.batch([0], 0)
    write_idx(tmp_path / "train-images-idx3-ubyte", random_pixels(3, 28, 28))
    np.save(tmp_path / "bw.npy", np.where(random_pixels(3, 8, 8) > 99, 255, 0).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset.batch([0], 0)  # once
        open_dataset(tmp_path / "bw.npy").batch([0], 0)  # nothing changes
        open_dataset(tmp_path / "train-images-idx3-ubyte").batch([0], 0)  # published for it
        open_dataset(tmp_path / "x.npy", binarize=True).batch([0], 0)


def test_what_was_given_is_kept_with_a_warning(tmp_path):
    path = gray(tmp_path / "x.npy")
    with pytest.warns(UserWarning, match="binarize=True, but the likelihood is normal"):
        assert open_dataset(path, binarize=True).for_model("normal", 8).binarize
    with pytest.warns(UserWarning, match="binarize=False, but the likelihood is bernoulli"):
        assert not open_dataset(path, binarize=False).for_model("bernoulli", 8).binarize
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        black_and_white = MemoryImages("bw", np.full((2, 1, 8, 8), 255, np.uint8))
        ImageDataset(black_and_white, split="train").for_model("bernoulli", 8)


def test_bits_follow_the_model(tmp_path):
    path = gray(tmp_path / "x.npy", channels=3)
    dataset = open_dataset(path).for_model("mixture_logistic", 5)
    assert dataset.num_bits == 5
    assert dataset.batch([0], 0)[0, 0, 0, 0] == np.float32(90 // 8) / np.float32(31)
    with pytest.raises(ValueError, match=r"num_bits=8, but the model has num_x_bits=5"):
        open_dataset(path, num_bits=8).for_model("mixture_logistic", 5)


# ---------------------------------------------------------------- images given to the model


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda x: 2 * x - 1, r"\(x \+ 1\) / 2"),
        (lambda x: 255 * x, "divide by 255"),
        (lambda x: (x - 0.5) / 0.2, "undo the normalisation"),
    ],
)
def test_images_of_another_range_are_refused(change, advice):
    net, x = model("normal", 3), torch.rand(2, 3, 8, 8)
    wrong, before = change(x), {k: v.clone() for k, v in net.named_buffers()}
    with pytest.raises(ValueError, match=rf"NVAE: x must hold images in \[0, 1\], got .*{advice}"):
        net(wrong, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in net.named_buffers())
    out = net(x, seed=0)
    with pytest.raises(ValueError, match=rf"NVAE.reconstruction_loss: x must hold.*{advice}"):
        net.reconstruction_loss(out.logits, wrong)


@pytest.mark.parametrize(
    ("likelihood", "channels"), [("bernoulli", 1), ("normal", 3), ("mixture_logistic", 3)]
)
def test_likelihoods_refuse_another_range(likelihood, channels):
    net, x = model(likelihood, channels), torch.rand(2, channels, 8, 8).round()
    distribution = net.likelihood(net(x, seed=0).logits.detach())
    for wrong in (2 * x - 1, 255 * x):
        with pytest.raises(ValueError, match=r"\.log_prob: x must hold images in \[0, 1\]"):
            distribution.log_prob(wrong)


def test_gray_images_for_a_bernoulli_likelihood_are_mentioned():
    net, x = model("bernoulli", 3), torch.rand(2, 3, 8, 8)
    logits = net(x, seed=0).logits
    with pytest.warns(
        UserWarning, match="reconstruction_loss: x has values between 0 and 1, and the likelihood is"
    ):
        net.reconstruction_loss(logits, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model("bernoulli", 3).reconstruction_loss(logits, x.round())
        model("normal", 3).reconstruction_loss(torch.zeros(2, 6, 8, 8), x)


def test_images_within_the_tolerance_and_nan_pass():
    net = model("normal", 3)
    net((torch.rand(2, 3, 8, 8) + 1 / 256).clamp(max=1 + 1 / 256), seed=0)
    net(torch.full((2, 3, 8, 8), float("nan")), seed=0)
    x = torch.rand(2, 3, 8, 8)
    torch.func.grad(lambda y: net.reconstruction_loss(torch.zeros(2, 6, 8, 8), y).sum())(x)


# ---------------------------------------------------------------- arrays


def test_zero_and_one_are_black_and_white_in_every_source(tmp_path):
    bits = (random_pixels(40, 28, 28) > 200).astype(np.uint8)
    np.save(tmp_path / "x.npy", bits)
    np.savez(tmp_path / "x.npz", bits)
    write_idx(tmp_path / "x-idx3-ubyte.gz", bits)
    rgb = np.repeat(np.pad(bits, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=3)
    write_lmdb(tmp_path / "raw", [picture.tobytes() for picture in rgb])
    write_lmdb(tmp_path / "png", [png_bytes(picture) for picture in rgb])
    (tmp_path / "images").mkdir()
    for i, picture in enumerate(rgb):
        (tmp_path / "images" / f"{i:02}.png").write_bytes(png_bytes(picture[..., 0]))
    for name in ("x.npy", "x.npz", "x-idx3-ubyte.gz", "raw", "png", "images"):
        with pytest.warns(UserWarning, match=f"{name}: .*0 and 1 only"):
            dataset = open_dataset(tmp_path / name, binarize=False)
        assert np.array_equal(as_bytes(dataset)[:, 0, 2:-2, 2:-2], 255 * bits), name


def test_bool_arrays_are_black_and_white(tmp_path):
    bits = random_pixels(5, 8, 8) > 99
    np.save(tmp_path / "x.npy", bits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = open_dataset(tmp_path / "x.npy")
        assert np.array_equal(as_bytes(dataset)[:, 0], bits * np.uint8(255))


def test_a_mixed_range_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("nvae_fast.data.fit._SAMPLED", 2)
    bits = (random_pixels(9, 8, 8) > 99).astype(np.uint8)
    bits[4] = 200
    np.save(tmp_path / "x.npy", bits)
    with pytest.warns(UserWarning, match="0 and 1 only"):
        dataset = open_dataset(tmp_path / "x.npy", binarize=False)
    dataset.batch([0, 8], 0)
    with pytest.raises(
        ValueError, match=r"x\.npy: most pixels are 0 and 1 only, some are greater \(up to 200\)"
    ):
        dataset.batch([4], 0)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("float32", r"\(array \* 255\)\.round\(\)"),
        ("float16", "save"),
        ("int64", r"array\.astype\(numpy\.uint8\)"),
        ("uint16", "scale them"),
        ("complex64", "no images"),
        ("S1", "one uint8 array"),
    ],
)
def test_other_dtypes_are_refused(tmp_path, dtype, advice):
    for name, save in (("x.npy", np.save), ("x.npz", np.savez)):
        save(tmp_path / name, np.zeros((2, 8, 8), dtype))
        with pytest.raises(ValueError, match=rf"{re.escape(name)}.*: expected uint8 pixels.*{advice}"):
            open_dataset(tmp_path / name)


# ---------------------------------------------------------------- image files


def one_image(folder: Path, array: np.ndarray, name: str = "a.tif") -> Path:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(exist_ok=True)
    image.fromarray(array).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("values", "dtype", "expected", "words"),
    [
        ((0.0, 0.25, 1.0), np.float32, (0, 64, 255), "float images with values up to 1: 1 is white"),
        ((0.0, 64.4, 255.0), np.float32, (0, 64, 255), "float images with values up to 255: 255 is white"),
        ((0, 16448, 65535), np.uint16, (0, 64, 255), None),
        ((0, 64, 255), np.uint16, (0, 64, 255), "16-bit images with values up to 255"),
        ((0, 1, 1), np.uint16, (0, 255, 255), "16-bit images with values up to 1"),
        ((0, 16448, 65535), np.int32, (0, 64, 255), None),
    ],
)
def test_wide_images(tmp_path, values, dtype, expected, words):
    folder = one_image(tmp_path / "d", np.resize(np.array(values, dtype), (3, 3)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        x = as_bytes(open_dataset(folder, image_size=3, channels=1, binarize=False))
    assert x[0, 0, 0].tolist() == list(expected)
    assert [words in str(w.message) for w in seen] == ([] if words is None else [True])


@pytest.mark.filterwarnings("ignore:.*float images with values up to")
@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 8), np.nan, np.float32),
        np.full((8, 8), -1, np.float32),
        np.full((8, 8), 300, np.float32),
        np.full((8, 8), -5, np.int32),
        np.full((8, 8), 70000, np.int32),
    ],
)
def test_values_of_no_known_range_are_named(tmp_path, array):
    folder = one_image(tmp_path / "d", array)
    with pytest.raises(ValueError, match=r"a\.tif: values from .*expected 0 to"):
        open_dataset(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_in_an_lmdb_are_refused(tmp_path, dtype):
    for name, values in (
        ("unit", random_pixels(4, 8, 8, 3) / 255),
        ("bits", random_pixels(4, 8, 8, 3) > 200),
    ):
        write_lmdb(tmp_path / name, [v.astype(dtype).tobytes() for v in values])
        for size in (None, 8):
            with pytest.raises(ValueError, match=f"{name}: the value of key '0' .* floating-point"):
                open_dataset(tmp_path / name, image_size=size)


def test_bytes_of_an_lmdb_are_not_taken_for_floats(tmp_path):
    rng = np.random.default_rng(0)
    smooth = np.clip(60 + np.cumsum(rng.integers(-1, 2, (16, 16, 3)), axis=1), 40, 67).astype(np.uint8)
    for i, picture in enumerate((smooth, np.full((16, 16, 3), 0x3D, np.uint8), random_pixels(16, 16, 3))):
        write_lmdb(tmp_path / str(i), [picture.tobytes()])
        assert np.array_equal(as_bytes(open_dataset(tmp_path / str(i)))[0], picture.transpose(2, 0, 1))
