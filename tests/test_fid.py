"""FID and KID: streamed statistics, the distance, files of statistics; against torch-fidelity where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import together
from torch import nn
from training_runs import digits_of, tiny_model

from nvae_fast.data import open_dataset
from nvae_fast.training import (
    FeatureStatistics,
    World,
    dataset_statistics,
    fid,
    frechet_distance,
    kernel_distance,
    load_inception,
    model_statistics,
)

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 64


class Features(nn.Module):
    """A small feature extractor: a fixed random projection of the pixels."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("weight", torch.randn(3 * size * size, WIDTH, generator=generator) / 50)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        assert images.shape[1] == 3
        return (images.flatten(1).float() / 255) @ self.weight


def library():
    return pytest.importorskip("torch_fidelity", reason="torch-fidelity is not installed", exc_type=Exception)


@pytest.fixture(scope="module")
def grey():
    return open_dataset("digits", image_size=32, binarize=False)


# ---------------------------------------------------------------------------- statistics


def test_moments_are_those_of_all_at_once_far_from_zero():
    """Sums of squares would lose all digits here: the mean is 1e7 standard deviations."""
    values = torch.randn(103, 5, dtype=torch.float64) + 1e7
    moments = fid.Moments()
    for part in values.split([1, 40, 0, 60, 2]):
        moments.add(part)
    mean, covariance = moments.result()
    centred = (values - 1e7).numpy()
    np.testing.assert_allclose(mean - 1e7, centred.mean(0), atol=1e-8)
    np.testing.assert_allclose(covariance, np.cov(centred, rowvar=False), atol=1e-8)
    assert moments.count == 103


def test_dataset_statistics_take_the_images_as_they_are(grey):
    images = []

    def extract(pixels):
        images.append(pixels)
        return Features()(pixels)

    done = []
    found = dataset_statistics(
        grey, extract, max_images=50, batch_size=16, keep_features=True, on_batch=done.append
    )
    pixels = torch.from_numpy(grey.source.read(np.arange(50)))
    assert torch.equal(torch.cat(images), pixels.expand(-1, 3, -1, -1))
    features = Features()(torch.cat(images)).double()
    np.testing.assert_allclose(found.mu, features.mean(0).numpy(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.sigma, np.cov(features.numpy(), rowvar=False), rtol=1e-5, atol=1e-6)
    assert (found.images, done, found.features.shape) == (50, [16, 32, 48, 50], (50, WIDTH))


COLOURS = {"dataset": "photos", "num_mixture_dec": 1, "image_size": 32}  # whose pixels are drawn


@pytest.mark.parametrize(
    "model, temperatures",
    [
        ({}, {"temperature": 0.8}),
        (COLOURS, {"temperature": 0.7}),
        (COLOURS, {"temperature": [0.7, 1.0], "pixel_temperature": 0.5}),
        (COLOURS, {"pixels": "mean"}),
    ],
)
def test_model_statistics_are_of_the_images_that_sample_draws(model, temperatures):
    from nvae_fast.training.pictures import draw_images

    model = tiny_model(**model).eval()
    options = {"batch_size": 4, "seed": 5, **temperatures}
    found = model_statistics(model, Features(), 10, keep_features=True, **options)
    images = draw_images(model, 10, **options)
    pixels = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    torch.testing.assert_close(found.features, Features()(pixels), rtol=1e-5, atol=1e-5)


def _shared(rank: int, size: int):
    torch.manual_seed(0)
    world = World(rank, size)
    few = digits_of(open_dataset("digits", image_size=32, binarize=False), 11)
    done: list[int] = []
    options = {"batch_size": 4, "keep_features": True, "world": world}
    real = dataset_statistics(few, Features(), on_batch=done.append, **options)
    drawn = model_statistics(tiny_model().eval(), Features(), 4, **options)  # none for the second process
    kept = None if real.features is None else (real.features, drawn.features)
    return real.mu, real.sigma, drawn.mu, drawn.sigma, kept, done


def test_several_processes_give_the_bits_of_one(tmp_path):
    one = _shared(0, 1)
    for rank, found in enumerate(together(_shared, 2, tmp_path)):
        for mine, other in zip(one[:4], found[:4], strict=True):
            assert np.array_equal(mine, other)
        assert (found[4] is None) == (rank > 0), "the first process keeps the features, for KID"
        assert found[5] == [8, 11]
        if rank == 0:
            assert all(torch.equal(a, b) for a, b in zip(one[4], found[4], strict=True))


@pytest.mark.parametrize(
    "extract, message",
    [
        (
            lambda x: x,
            r"extract must return floating-point features \(N,D\) of 4 images, got torch.uint8 \(4, 3, 32, 32\)",
        ),
        (lambda x: x[:2].flatten(1).float(), r"of 4 images, got torch.float32 \(2, 3072\)"),
        (lambda x: None, "got NoneType"),
        (
            lambda x: x.flatten(1)[:, :3].float() * torch.inf,
            "features of some images are not finite: .*--inception",
        ),
    ],
)
def test_bad_features_are_refused(grey, extract, message):
    with pytest.raises(ValueError, match=message):
        dataset_statistics(grey, extract, max_images=8, batch_size=4)


def test_bad_arguments_are_refused(grey):
    with pytest.raises(ValueError, match="dataset_statistics: a covariance needs at least 2 images, got 1"):
        dataset_statistics(grey, Features(), max_images=1)
    with pytest.raises(ValueError, match="model_statistics: batch_size must be at least 1, got 0"):
        model_statistics(tiny_model(), Features(), 4, batch_size=0)


# ---------------------------------------------------------------------------- distances


def statistics(features: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics(features.mean(0), np.cov(features, rowvar=False), len(features))


def test_frechet_distance_of_normals_whose_distance_is_known():
    first = FeatureStatistics(np.array([1.0, 2.0, 3.0]), np.diag([4.0, 9.0, 0.0]))
    second = FeatureStatistics(np.array([1.0, 0.0, 6.0]), np.diag([1.0, 16.0, 25.0]))
    # |difference|^2 = 4 + 9; (2 - 1)^2 + (3 - 4)^2 + (0 - 5)^2 for covariances that commute.
    assert frechet_distance(first, second) == pytest.approx(13 + 1 + 1 + 25, rel=1e-12)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-12)


def test_frechet_distance_of_normals_that_do_not_commute():
    generator = np.random.default_rng(0)
    first, second = (
        statistics(generator.normal(size=(40, 6)) @ generator.normal(size=(6, 6))) for _ in range(2)
    )
    # The same trace by symmetric roots.
    values, vectors = np.linalg.eigh(first.sigma)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ second.sigma @ root)).sum()
    truth = ((first.mu - second.mu) ** 2).sum() + np.trace(first.sigma) + np.trace(second.sigma) - 2 * trace
    assert frechet_distance(first, second) == pytest.approx(truth, rel=1e-10)
    assert frechet_distance(second, first) == pytest.approx(truth, rel=1e-10)


def test_frechet_distance_needs_as_many_features():
    with pytest.raises(ValueError, match="both must have as many features, got 2 and 3"):
        frechet_distance(*(FeatureStatistics(np.zeros(n), np.eye(n)) for n in (2, 3)))


# ---------------------------------------------------------------------------- files


def test_statistics_come_back_from_a_file(tmp_path, grey):
    found = dataset_statistics(grey, Features(), max_images=70)
    found.save(tmp_path / "a.npz")
    read = FeatureStatistics.load(tmp_path / "a.npz")
    assert np.array_equal(read.mu, found.mu)
    assert np.array_equal(read.sigma, found.sigma)
    assert (read.images, read.facts) == (70, {})
    # As other programs write them, in either precision.
    np.savez(tmp_path / "b.npz", mu=found.mu.astype(np.float32), sigma=found.sigma.astype(np.float32))
    other = FeatureStatistics.load(tmp_path / "b.npz")
    assert (other.mu.dtype, other.images) == (np.float64, None)
    assert frechet_distance(other, found) == pytest.approx(0, abs=1e-3)


FULL = {"mu": np.zeros(3), "sigma": np.eye(3)}
SKEW = np.array([[1.0, 5.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "no array sigma in it"),
        ({"mean": np.zeros(3), "cov": np.eye(3)}, "no array mu and no array sigma"),
        ({**FULL, "mu": np.zeros(4)}, r"expected mu \(D,\) and sigma \(D,D\), got \(4,\) and \(3, 3\)"),
        ({**FULL, "mu": np.zeros((1, 3))}, r"got \(1, 3\) and \(3, 3\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"got \(0,\)"),
        ({**FULL, "sigma": np.eye(3, dtype=np.int64)}, "sigma must be float32 or float64, got int64"),
        ({**FULL, "mu": np.zeros(3, dtype=np.complex128)}, "mu must be float32 or float64, got complex128"),
        ({**FULL, "mu": np.array([0.0, np.nan, 0.0])}, "mu holds values that are not finite"),
        ({**FULL, "sigma": np.full((3, 3), np.inf)}, "sigma holds values that are not finite"),
        ({**FULL, "sigma": SKEW}, "sigma is no covariance"),
        ({**FULL, "sigma": -np.eye(3)}, "sigma is no covariance"),
        ({**FULL, "facts": np.array("[1")}, "facts, which nvae_fast writes as JSON, cannot be read"),
        ({**FULL, "mu": np.array([object()] * 3)}, "not an .npz file of mu and sigma that can be read"),
    ],
)
def test_files_that_are_no_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"path \(--stats\): .*x\.npz: .*{message}"):
        FeatureStatistics.load(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK", b"text", b"\x93NUMPY", "array", "cut"])
def test_files_that_are_no_archives_are_refused(tmp_path, content):
    path = tmp_path / "x.npz"
    np.savez(path, **FULL)
    if content == "cut":
        content = path.read_bytes()[:300]
    if content == "array":
        with open(path, "wb") as handle:
            np.save(handle, np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\(--stats\): .*x\.npz: not an .npz file of mu and sigma"):
        FeatureStatistics.load(path)


# ---------------------------------------------------------------------------- torch-fidelity


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A file of random weights that fit the library's InceptionV3."""
    found = library()
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        module = sys.modules[found.FeatureExtractorInceptionV3.__module__]
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *a, **k: None)
        torch.manual_seed(0)
        network = found.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for module in network.modules():
        if isinstance(
            module, nn.Conv2d
        ):  # PyTorch's own initialisation lets the images vanish from layer to layer
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path


class Pictures(torch.utils.data.Dataset):
    """Images as the library takes them."""

    def __init__(self, dataset, first: int, count: int) -> None:
        self.images = torch.from_numpy(dataset.source.read(np.arange(first, first + count))).expand(
            -1, 3, -1, -1
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


class Second:
    """The images of a dataset from a number on."""

    def __init__(self, dataset, first: int, count: int) -> None:
        self.dataset, self.first, self.count = dataset, first, count

    def __len__(self) -> int:
        return self.count

    def batch(self, indices, seed):
        return self.dataset.batch(indices + self.first, seed)


def test_the_distances_are_those_of_the_library(weights, grey):
    """40 images against 36 others, on the 64 features that need the fewest layers."""
    found = library()
    theirs = found.calculate_metrics(
        input1=Pictures(grey, 0, 40), input2=Pictures(grey, 40, 36), fid=True, kid=True, cuda=False, verbose=False,
        feature_extractor_weights_path=str(weights), feature_layer_fid="64", feature_layer_kid="64",
        kid_subsets=10, kid_subset_size=30, rng_seed=7, cache=False, batch_size=20, save_cpu_ram=True,
    )  # fmt: skip
    extract = load_inception(weights, layer="64")
    options = {"batch_size": 20, "keep_features": True}
    ours = [dataset_statistics(Second(grey, *part), extract, **options) for part in ((0, 40), (40, 36))]
    assert theirs[found.KEY_METRIC_FID] > 1e-3
    assert theirs[found.KEY_METRIC_KID_MEAN] != 0
    # The library takes the mean in float32, ours is in float64.
    assert frechet_distance(*ours) == pytest.approx(theirs[found.KEY_METRIC_FID], rel=1e-5)
    mean, deviation = kernel_distance(*ours, subsets=10, size=30, seed=7)
    assert mean == theirs[found.KEY_METRIC_KID_MEAN]
    assert deviation == theirs[found.KEY_METRIC_KID_STD]
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    same = [{"mu": part.mu, "sigma": part.sigma} for part in ours]
    assert frechet_distance(*ours) == pytest.approx(
        fid_statistics_to_metric(*same, verbose=False)[found.KEY_METRIC_FID], rel=1e-12
    )


def test_the_features_of_fid_are_the_last_layer(weights):
    library()
    extract = load_inception(weights)
    assert extract(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2048)
    assert not any(parameter.requires_grad for parameter in extract.parameters())


def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    library()
    for content in ({"a": torch.zeros(1)}, torch.zeros(3), [1, 2], Path("x")):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"x\.pth \(--inception\) does not hold the weights"):
            load_inception(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"x\.pth \(--inception\) does not hold the weights"):
        load_inception(tmp_path / "x.pth")


def test_subsets_larger_than_the_images_are_refused():
    library()
    few = FeatureStatistics(np.zeros(2), np.eye(2), features=torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"size \(--kid\) must be from 2 to 5, the number of images, got 6"):
        kernel_distance(few, few, size=6)
    with pytest.raises(ValueError, match="must have their features"):
        kernel_distance(few, FeatureStatistics(np.zeros(2), np.eye(2)))


def test_a_missing_library_names_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "x.pth").write_bytes(b"")
    with pytest.raises(ImportError, match="pip install torch-fidelity"):
        load_inception(tmp_path / "x.pth")


def test_arguments_of_load_inception_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\(--inception\): .*none\.pth"):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"layer \(--layer\) must be one of 64, 192, 768, 2048, got 'pool3'"):
        load_inception(tmp_path / "none.pth", layer="pool3")
