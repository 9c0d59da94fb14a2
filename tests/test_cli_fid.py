"""The command `fid`, and the lines about it in docs/train.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from test_fid import WIDTH, Features, library
from training_runs import tiny_model, trainer

import nvae_fast
from nvae_fast import cli, training
from nvae_fast.data import open_dataset
from nvae_fast.training import (
    FeatureStatistics,
    dataset_statistics,
    fid,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert "more than the 0 that --max-skipped-images 0 allows" in line
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
        (["--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["--temperature", "0.6:inf"], "--temperature must be finite, got inf"),
        (["--pixel-temperature", "nan"], "--pixel-temperature must be finite, got nan"),
        (["--pixel-temperature", "1"], "--pixel-temperature needs another likelihood: of binary images"),
        (["--threads", "100000"], "--threads must be at most"),
        (["--split", "validation"], "digits has train and test images, no validation images"),
        (["--crop", "0"], "--crop: expected a positive integer or None, got 0"),
        (["--stats", "s.txt"], "--stats must be an .npz file, got s.txt"),
        (
            ["--stats", "none/s.npz"],
            "--stats none/s.npz: there is no folder none that files can be written to",
        ),
        (["--kid", "--number", "10"], "--kid must be at most the number of images, 10, got 1000"),
        (["--data", "none"], "--data: no file or folder 'none'"),
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
