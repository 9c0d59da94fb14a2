"""FID and KID: streamed statistics, the distance, files of statistics, the command; against torch-fidelity where it is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import together
from torch import nn
from training_runs import digits_of, tiny_model, trainer

import nvae_fast
from nvae_fast import cli, training
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
    with pytest.raises(ValueError, match=rf"statistics file \(--stats\) .*x\.npz: .*{message}"):
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
    with pytest.raises(ValueError, match=r"\(--stats\) .*x\.npz: not an .npz file of mu and sigma"):
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
    with pytest.raises(FileNotFoundError, match=r"\(--inception\) at .*none\.pth"):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"layer \(--layer\) must be one of 64, 192, 768, 2048, got 'pool3'"):
        load_inception(tmp_path / "none.pth", layer="pool3")


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fid") / "run"
    trainer(folder, open_dataset("digits", image_size=32)).save()
    return folder


@pytest.fixture
def command(run, tmp_path, monkeypatch, capsys):
    """Runs `fid` with the small extractor; returns (exit code, what stdout has, the last line of stderr)."""
    (tmp_path / "w.pth").write_bytes(b"weights")
    monkeypatch.setattr(fid, "load_inception", lambda path, layer, device: Features())

    def go(*words: str) -> tuple[int, str, str]:
        fixed = ["fid", str(run), "--inception", str(tmp_path / "w.pth"), "--layer", "64", "--device", "cpu"]
        code = cli.main([*fixed, "--batch-size", "16", *(str(word) for word in words)])
        text = capsys.readouterr()
        return code, text.out, (text.err.splitlines() or [""])[-1]

    return go


def test_fid_writes_statistics_and_reads_them_again(command, tmp_path):
    options = ["--number", "40", "--max-images", "70", "--seed", "2", "--quiet"]
    code, out, _ = command("--stats", tmp_path / "s.npz", *options, "--json")
    assert code == 0
    first = json.loads(out)
    assert (first["images"], first["features"], first["reference"]["images"]) == (40, WIDTH, 70)
    assert first["reference"]["split"] == "train"
    code, out, _ = command("--stats", tmp_path / "s.npz", *options, "--json", tmp_path / "r.json")
    assert (code, out) == (0, "")
    assert json.loads((tmp_path / "r.json").read_text())["fid"] == first["fid"]
    code, out, _ = command(*options)
    assert f"FID  {first['fid']:.4f}" in out
    assert "40 samples and 70 images of digits" in out
    # The statistics are of the images themselves, also of those that the model takes in black and white.
    grey = open_dataset("digits", image_size=32, binarize=False)
    truth = dataset_statistics(grey, Features(), max_images=70, batch_size=16)
    assert np.array_equal(FeatureStatistics.load(tmp_path / "s.npz").mu, truth.mu)


def test_fid_says_when_there_are_few_images(command):
    _, _, line = command("--number", "40", "--max-images", "100")
    assert "40 images (--number) give a covariance of 64 features without full rank" in line
    _, _, line = command("--number", "100", "--max-images", "64")
    assert "64 images (--data) give a covariance" in line


def test_fid_takes_the_statistics_of_other_programs(command, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    code, out, _ = command("--stats", tmp_path / "s.npz", "--number", "20", "--json", "--quiet")
    assert code == 0
    assert json.loads(out)["reference"] == {"stats": str(tmp_path / "s.npz"), "images": None}


def test_statistics_of_images_of_another_size_are_refused(command, tmp_path):
    facts = {"image_size": 64}
    FeatureStatistics(np.zeros(WIDTH), np.eye(WIDTH), 100, facts).save(tmp_path / "s.npz")
    code, _, line = command("--stats", tmp_path / "s.npz", "--number", "20")
    assert code == 2
    assert "is of images of 64 pixels a side, those of the model have 32" in line


def test_statistics_of_something_else_are_refused(command, tmp_path):
    options = ["--number", "20", "--max-images", "70", "--quiet"]
    assert command("--stats", tmp_path / "s.npz", *options)[0] == 0
    for words, message in (
        (["--data", "photos"], "was made with --data digits, not photos: leave --data out"),
        (["--data-kind", "npy"], "was made with --data-kind None, not npy"),
        (["--split", "test"], "was made with --split train, not test"),
        (["--max-images", "71"], "was made with --max-images 70, not 71"),
        (["--kid", "10"], "--kid needs the features of the images, which --stats"),
    ):
        code, _, line = command("--stats", tmp_path / "s.npz", *options, *words)
        assert code == 2
        assert message in line
    (tmp_path / "w.pth").write_bytes(b"other weights")
    assert (
        "was made with other weights than --inception" in command("--stats", tmp_path / "s.npz", *options)[2]
    )
    np.savez(tmp_path / "s.npz", mu=np.zeros(5), sigma=np.eye(5))
    assert "has 5 features, --layer 64 has 64" in command("--stats", tmp_path / "s.npz", *options)[2]


def test_images_are_read_as_evaluate_reads_them(command, tmp_path):
    """With the same crop, filter and share of damaged files; the statistics say with which."""
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 40, 3), dtype=np.uint8)
    for index, picture in enumerate(pixels):
        image.fromarray(picture).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    data = ["--data", tmp_path / "images", "--number", "20", "--resample", "bilinear", "--quiet"]
    code, _, line = command(*data, "--max-skipped-images", "0")
    assert code == 2
    assert "(--max-skipped-images" in line
    stats = ["--max-skipped-images", "0.5", "--stats", tmp_path / "s.npz"]
    assert command(*data, "--crop", "36", *stats)[0] == 0
    found = FeatureStatistics.load(tmp_path / "s.npz")
    assert (found.facts["crop"], found.facts["resample"]) == (36, "bilinear")
    options = {"image_size": 32, "channels": 1, "crop": 36, "resample": "bilinear", "max_skipped": 0.5}
    images = open_dataset(tmp_path / "images", num_bits=8, binarize=False, **options)
    truth = dataset_statistics(images, Features(), batch_size=16)
    assert np.array_equal(found.mu, truth.mu)
    line = command(*data, "--crop", "30", *stats)[2]
    assert "was made with --crop 36, not 30: leave --crop out" in line


@pytest.mark.parametrize(
    "words, message",
    [
        (["--number", "1"], "--number must be at least 2, got 1"),
        (["--number", "1e18"], "--number must be at most 1000000000, got 10"),
        (["--max-images", "1"], "--max-images must be at least 2, got 1"),
        (["--kid", "1"], "--kid must be at least 2, got 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--temperature", "0"], "--temperature must be greater than 0, got 0"),
        (["--temperature", "0.6:inf"], "--temperature must be finite, got inf"),
        (["--pixel-temperature", "nan"], "--pixel-temperature must be finite, got nan"),
        (["--pixel-temperature", "1"], "--pixel-temperature needs another likelihood: of binary images"),
        (["--threads", "100000"], "--threads must be at most"),
        (["--split", "validation"], "digits has train and test images, no validation images"),
        (["--crop", "0"], "crop (--crop): expected a positive integer or None, got 0"),
        (["--stats", "s.txt"], "--stats must be an .npz file, got s.txt"),
        (
            ["--stats", "none/s.npz"],
            "--stats none/s.npz: there is no folder none that files can be written to",
        ),
        (["--kid", "--number", "10"], "--kid must be at most the number of images, 10, got 1000"),
        (["--data", "none"], "(--data): no file or folder 'none'"),
        (["--json", "none/r.json"], "the folder of none/r.json does not exist"),
    ],
)
def test_bad_options_are_named(command, words, message):
    code, _, line = command("--number", "20", *words)
    assert code == 2
    assert message in line


def test_the_lines_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "load_inception", lambda path, device: Features())
    page = (Path(__file__).parent.parent / "docs" / "train.md").read_text(encoding="utf-8")
    (block,) = re.findall(
        r"^```python\n(from nvae_fast.training import dataset_statistics.*?)^```$", page, re.M | re.S
    )
    names = {"nvae_fast": nvae_fast, "PATH": "digits", "model": tiny_model().eval()}
    exec(block.replace("50_000", "20"), names)
    assert names["fid"] > 0
    assert (tmp_path / "cifar10.npz").exists()


def test_kid_with_the_command(command):
    library()
    options = ["--number", "40", "--max-images", "30", "--json", "--quiet"]
    code, out, _ = command(*options, "--kid", "20")
    assert code == 0
    assert np.isfinite(json.loads(out)["kid"])
    assert "--kid must be at most the number of images, 30, got 31" in command(*options, "--kid", "31")[2]
