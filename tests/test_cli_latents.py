"""The commands `interpolate` and `reconstruct`, and `sample` into a folder, as a user types them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import failing
from training_runs import TINY_TRAINING, tiny_model

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.training import checkpoint, run_folder
from nvae_fast.training.pictures import draw_images

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
image = pytest.importorskip("PIL.Image")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on the digits."""
    folder = tmp_path_factory.mktemp("latents") / "run"
    folder.mkdir()
    config = TINY_TRAINING.replace(max_steps=1)
    data = nf.data.open_dataset("digits")
    nf.training.Trainer(tiny_model(), config, data, folder, quiet=True, data=("digits", None)).run()
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of small RGB images."""
    model = tiny_model(dataset="photos", num_mixture_dec=1, image_size=16)
    state = {"model_config": model.config.to_dict(), "model": model.state_dict()}
    return checkpoint.save(state, tmp_path_factory.mktemp("photos"), name="photos.pt")


def size_of(picture: Path) -> tuple[int, int]:
    """(height, width) in a PNG's header."""
    width, height = struct.unpack(">II", picture.read_bytes()[16:24])
    return height, width


def assert_grid(picture: Path, rows: int, columns: int) -> None:
    """Images of 32 pixels are three times as large, below a title."""
    height, width = size_of(picture)
    assert width == columns * 98 - 2
    assert rows * 98 < height < rows * 98 + 24


def words(*given: object) -> list[str]:
    return [str(word) for word in given]


# ------------------------------------------------------------------------------------------ interpolate


def cells(picture: Path, rows: int, columns: int, side: int) -> np.ndarray:
    """The images of a labelled grid (rows, columns, side, side): its lower right part."""
    pixels = np.asarray(image.open(picture))
    step = side + 2
    grid = np.pad(pixels[-(rows * step - 2) :, -(columns * step - 2) :], ((0, 2), (0, 2)))
    return grid.reshape(rows, step, columns, step).transpose(0, 2, 1, 3)[:, :, :side, :side]


def shown(images: torch.Tensor) -> np.ndarray:
    """What a picture of 32-pixel images holds: uint8, each pixel three times."""
    pixels = np.floor(images[:, 0].double().numpy() * 255 + 0.5).astype(np.uint8)
    return pixels.repeat(3, axis=1).repeat(3, axis=2)


@pytest.mark.parametrize("mode", ["spherical", "linear"])
def test_interpolations_go_from_image_to_image(mode: str, run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "i.png"
    options = words(
        "--images", 3, 17, 8, 40, "--steps", 3, "--posterior", "mean", "--mode", mode, "--seed", 2
    )
    assert cli.main(words("interpolate", run, "--out", out, "--threads", 1, *options)) == 0
    assert f"wrote {out}: rows are images of digits (test) by number, {mode}" in capsys.readouterr().err
    found = cells(out, 2, 5, 96)
    assert size_of(out)[0] > 2 * 66 - 2, "labels above"
    assert size_of(out)[1] > 5 * 66 - 2, "labels at the left"
    model, _ = checkpoint.load_model(run)
    frozen = nf.freeze(model)
    binary = (found[:, 0] // 255)[:, ::3, ::3]  # the images themselves
    x = (
        torch.from_numpy(binary).float()[:, None],
        torch.from_numpy((found[:, 4] // 255)[:, ::3, ::3]).float()[:, None],
    )
    with torch.no_grad():
        start, end = (frozen.encode(part, sample=False) for part in x)
        for column, fraction in ((1, 0), (2, 0.5), (3, 1)):
            latents = nf.interpolate_latents(start, end, fraction, mode=mode)
            expected = shown(frozen.likelihood(frozen.decode(latents)).mean())
            assert np.abs(found[:, column].astype(int) - expected).max() <= 1
    data = nf.data.open_dataset("digits", split="test").source.read(np.array([3, 8]))
    assert (binary <= (data[:, 0] > 0)).all(), "no bit where the digit has no ink"
    assert (binary >= (data[:, 0] == 255)).all()


def test_an_image_is_encoded_alike_whatever_else_is_chosen(run: Path, tmp_path: Path) -> None:
    for name, chosen in {"a": [3, 17], "b": [8, 40, 3, 17]}.items():
        options = words("--images", *chosen, "--steps", 2, "--out", tmp_path / f"{name}.png", "--quiet")
        assert cli.main(words("interpolate", run, *options)) == 0
    np.testing.assert_array_equal(
        cells(tmp_path / "a.png", 1, 4, 96)[0], cells(tmp_path / "b.png", 2, 4, 96)[1]
    )


def test_images_are_chosen_by_the_seed(run: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        options = words(
            "--pairs", 1, "--steps", 2, "--seed", seed, "--out", tmp_path / f"{name}.png", "--quiet"
        )
        assert cli.main(words("interpolate", run, *options)) == 0
    files = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_an_rgb_model_and_other_data(photos: Path, tmp_path: Path, capsys) -> None:
    assert "does not say what it was trained on: give --data" in failing(
        capsys, "interpolate", photos, "--out", tmp_path / "i.png"
    )
    options = words("--data", "photos", "--split", "train", "--pairs", 1, "--steps", 2)
    assert cli.main(words("interpolate", photos, *options, "--out", tmp_path / "i.png")) == 0
    assert np.asarray(image.open(tmp_path / "i.png")).shape[2] == 3


# ------------------------------------------------------------------------------------------ reconstruct


def test_reconstructions_below_their_images(run: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "r.png"
    options = words(
        "--images", 5, 9, 30, "--groups", 1, "--temperature", "0.5:0.8", "--posterior", "mean", "--out", out
    )
    assert cli.main(words("reconstruct", run, *options)) == 0
    assert "columns are images of digits (test) by number" in capsys.readouterr().err
    found = cells(out, 3, 3, 96)
    frozen = nf.freeze(checkpoint.load_model(run)[0])
    x = torch.from_numpy((found[0] // 255)[:, ::3, ::3]).float()[:, None]
    with torch.no_grad():
        expected = shown(frozen.reconstruct(x, sample=False))
    assert np.abs(found[2].astype(int) - expected).max() <= 1
    assert not np.array_equal(found[1], found[2])


def test_ten_images_by_default(run: Path, tmp_path: Path) -> None:
    assert cli.main(words("reconstruct", run, "--out", tmp_path / "r.png", "--quiet")) == 0
    assert cells(tmp_path / "r.png", 2, 10, 96).shape == (2, 10, 96, 96)


# ------------------------------------------------------------------------------------------ sample


def test_a_name_without_a_picture_ending_is_a_folder(run: Path, tmp_path: Path, capsys) -> None:
    folder, grid = tmp_path / "samples-0.7", tmp_path / "g.png"
    base = words("sample", run, "-n", 5, "--out", folder, "--temperature", "0.6:1.0", "--batch-size", 4)
    assert cli.main([*base, "--grid", str(grid), "--columns", "5"]) == 0
    assert f"wrote 5 images into {folder}" in capsys.readouterr().err
    assert json.loads((folder / "samples.json").read_text())["temperature"] == [0.6, 1.0]
    pictures = [np.asarray(image.open(file)) for file in sorted(folder.glob("*.png"))]
    assert_grid(grid, rows=1, columns=5)
    np.testing.assert_array_equal(np.asarray(image.open(grid))[-96::3, :96:3], pictures[0])
    (folder / "000002.png").unlink()
    assert cli.main(base) == 0
    assert f"wrote 1 images into {folder}, 4 were complete before" in capsys.readouterr().err
    assert "holds images of other settings: seed is 0 there, 1 now" in failing(capsys, *base, "--seed", 1)
    assert cli.main([*base, "--seed", "1", "--overwrite"]) == 0
    assert "moved the old" in capsys.readouterr().err
    assert len(list(tmp_path.glob("samples-0.7.replaced-*/*.png"))) == 5
    shards = words("--out", tmp_path / "shards", "--format", "npz")
    assert cli.main(words("sample", run, "-n", 5, "--temperature", "0.6:1.0", *shards, "--quiet")) == 0
    (shard,) = (tmp_path / "shards").glob("*.npz")
    np.testing.assert_array_equal(np.load(shard)["arr_0"][..., 0], np.stack(pictures))


def test_a_folder_of_something_else_is_refused_at_once(tmp_path: Path, capsys) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and has no samples.json" in failing(capsys, "sample", "no.pt", "--out", tmp_path)
    assert "is a file, a folder is needed" in failing(
        capsys, "sample", "no.pt", "--out", tmp_path / "notes.txt"
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_a_run_trains_in_is_not_moved(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "metrics.jsonl").write_text("mine")
    descriptor = os.open(tmp_path / run_folder.LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as another process holds it
        words_of = words("sample", run, "-n", 2, "--out", tmp_path, "--overwrite")
        assert f"another process is training in {tmp_path}" in failing(capsys, *words_of)
    finally:
        os.close(descriptor)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_an_array_comes_with_a_grid_of_any_number(run: Path, tmp_path: Path, monkeypatch) -> None:
    """As in 0.1.0, where the grid was the only output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nvae_fast.cli.sample.FEW", 4)
    assert cli.main(words("sample", run, "-n", 5, "--npy", "images.npy", "--quiet")) == 0
    assert np.load("images.npy").shape == (5, 32, 32, 1)
    assert_grid(tmp_path / "samples.png", rows=2, columns=3)


def test_a_grid_where_few_are_asked_for(run: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nvae_fast.cli.sample.FEW", 4)
    assert cli.main(words("sample", run, "-n", 4, "--quiet")) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]
    assert cli.main(words("sample", run, "-n", 5, "--quiet")) == 0
    assert len(list((tmp_path / "samples").glob("*.png"))) == 5
    assert cli.main(words("sample", run, "-n", 5, "--quiet", "--out", "asked.png")) == 0
    assert_grid(tmp_path / "asked.png", rows=2, columns=3)


def test_pixels_are_drawn_at_temperature_one(photos: Path, tmp_path: Path) -> None:
    model, _ = checkpoint.load_model(photos)
    for name, more, pixel in (("a", [], 1.0), ("b", ["--pixel-temperature", "0.5"], 0.5)):
        base = words("sample", photos, "-n", 4, "--temperature", 0.7, "--out", tmp_path / f"{name}.png")
        assert cli.main([*base, "--npy", str(tmp_path / f"{name}.npy"), "--quiet", *more]) == 0
        expected = draw_images(model, 4, temperature=0.7, pixel_temperature=pixel)
        pixels = np.floor(expected.double().numpy() * 255 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), pixels)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("interpolate x --pairs 0", "--pairs must be at least 1, got 0"),
        ("interpolate x --steps 1", "--steps must be at least 2, got 1"),
        ("interpolate x --steps 1e6", "--steps must be at most 10000, got 1000000"),
        ("interpolate x --pairs 1e6", "--pairs must be at most 10000, got 1000000"),
        ("interpolate x --threads 100000", "--threads must be at most"),
        ("interpolate RUN --crop 0", "--crop: expected a positive integer or None, got 0"),
        ("reconstruct RUN --split validation", "digits has train and test images, no validation images"),
        ("interpolate x --images 1 2 3", "--images must be pairs, an even number of images, got 3"),
        ("interpolate x --images 1 2 --pairs 3", "--pairs and --images exclude each other"),
        ("interpolate x --mode cubic", "argument --mode: invalid choice: 'cubic'"),
        ("interpolate x --images one", "argument --images: invalid whole number value: 'one'"),
        ("interpolate x --out nowhere/i.png", "the folder of nowhere/i.png does not exist"),
        ("interpolate RUN --images 1 999", "--images must be from 0 to 296 for digits (test), got 999"),
        ("interpolate RUN --pairs 200", "400 images are needed, digits (test) has 297"),
        ("reconstruct x -n 0", "--number must be at least 1, got 0"),
        ("reconstruct x -n 1e6", "--number must be at most 10000, got 1000000"),
        ("reconstruct x -n 2 --images 1", "--number and --images exclude each other"),
        ("reconstruct x --temperature 0.7", "--temperature needs --groups"),
        ("reconstruct x --groups 1 --temperature 0:-1", "--temperature must be at least 0, got -1.0"),
        ("reconstruct RUN --groups 3", "--groups must be from 1 to 2, the groups of this model, got 3"),
        ("sample x --temperature 0.5:", "argument --temperature: invalid number or FIRST:LAST value: '0.5:'"),
        ("sample x --temperature 1:nan", "--temperature must be finite, got nan"),
        ("sample x --temperature inf", "--temperature must be finite, got inf"),
        ("sample x --pixel-temperature 0", "--pixel-temperature must be greater than 0, got 0"),
        ("sample x --pixel-temperature 1 --pixels mean", "--pixel-temperature needs --pixels sample"),
        ("sample RUN --pixel-temperature 1", "--pixel-temperature needs --pixels sample: of binary images"),
        ("sample x --out a.jpg", "--out must be a PNG file for a grid (.png), or a folder, got a.jpg"),
        ("sample x --out a.png -n 2e6", "--number must be at most 1000000, got 2000000"),
        ("sample x --out a.png --format npz", "--format is for a folder of images, --out a.png is a grid"),
        ("sample x --out a.png --grid b.png", "--grid is for a folder of images, --out a.png is a grid"),
        (
            "sample x --out a --npy b.npy",
            "--npy holds all images in memory, --out a is a folder: use --format npz",
        ),
        ("sample x --out a --columns 3", "--columns needs a grid, --out a is a folder: give --grid FILE too"),
        ("sample x --out a --grid no/b.png", "the folder of no/b.png does not exist"),
        ("sample x --out a --format tiff", "argument --format: invalid choice: 'tiff'"),
    ],
)
def test_wrong_options_are_named_and_nothing_is_written(
    given: str, message: str, run: Path, tmp_path: Path, monkeypatch, capsys
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in failing(capsys, *(str(run) if word == "RUN" else word for word in given.split()))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------ documentation


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "latents.md").read_text(encoding="utf-8")


def test_the_page_is_true(run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(run)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
        exec(block, names)
    assert torch.equal(names["logits"], names["model"](names["x"], seed=1).logits)
    assert names["images"].shape == (8, 1, 32, 32)
    assert size_of(tmp_path / "middle.png")[1] == 4 * 98 - 2
    commands = re.findall(r"^ +(?:torchrun\b.*)?(?:python )?-m nvae_fast (.*?)(?: +#.*)?$", PAGE, re.M)
    assert {line.split()[0] for line in commands} == {"interpolate", "reconstruct", "sample"}
    for line in commands:
        cli.parse(shlex.split(line))
