"""Pictures of training and of `sample`: large enough to be seen, labelled, without the noise of the likelihood in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.data import labels
from nvae_fast.data.png import make_grid
from nvae_fast.training import checkpoint, pictures
from nvae_fast.training.board import SAMPLES, show_pictures
from nvae_fast.training.seeds import mix_seed

image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The row labels and the title of every grid that is written."""
    found: list[dict[str, Any]] = []
    draw = labels.with_labels

    def look(
        grid: np.ndarray, rows: list[str], columns: list[str], height: int, width: int, title: str = ""
    ) -> np.ndarray:
        found.append(dict(rows=list(rows), columns=list(columns), title=title))
        return draw(grid, rows, columns, height, width, title)

    monkeypatch.setattr(labels, "with_labels", look)
    return found


def noisy_model() -> nf.NVAE:
    """A model of RGB images with a normal likelihood, whose noise is large before training."""
    return tiny_model(dataset="photos", num_mixture_dec=1, image_size=16).eval()


def test_samples_of_training_are_means_with_temperature_and_step(
    tmp_path: Path, texts: list[dict[str, Any]]
) -> None:
    model = noisy_model()
    pictures.write_samples(model, tmp_path / "s.png", count=4, temperature=0.8, seed=3, step=250)
    pictures.write_samples(model, tmp_path / "final.png", count=4, temperature=0.8, seed=3)
    assert [text["title"] for text in texts] == [
        "temperature 0.8, mean of the likelihood, step 250", "temperature 0.8, mean of the likelihood",
    ]  # fmt: skip
    expected = make_grid(pictures.draw_images(model, 4, temperature=0.8, seed=3, pixels="mean"), scale=6)
    got = np.asarray(image.open(tmp_path / "s.png"))
    assert np.array_equal(got[-expected.shape[0] :, : expected.shape[1]], expected)
    drawn = make_grid(pictures.draw_images(model, 4, temperature=0.8, seed=3), scale=6)
    assert not np.array_equal(drawn, expected)


def test_samples_in_tensorboard_are_means() -> None:
    class Board:
        def __init__(self) -> None:
            self.images: dict[str, np.ndarray] = {}

        def add_image(self, name: str, pixels: np.ndarray, step: int, dataformats: str) -> None:
            self.images[name] = pixels

    model, board = noisy_model(), Board()
    show_pictures(board, 1, model, nf.data.open_dataset("photos", image_size=16), seed=2)
    images = pictures.draw_images(model, 16, temperature=0.7, seed=mix_seed(2, SAMPLES), pixels="mean")
    assert np.array_equal(board.images["samples/temperature 0.7"], make_grid(images))


def test_reconstructions_are_labelled(tmp_path: Path, texts: list[dict[str, Any]]) -> None:
    model = noisy_model()
    pictures.write_reconstructions(model, torch.rand(16, 3, 16, 16), tmp_path / "r.png")
    assert texts[-1]["rows"] == ["image", "recon-\nstruction"] * 2
    assert np.asarray(image.open(tmp_path / "r.png")).shape[0] == 4 * 98 - 2
    pictures.write_reconstructions(model, torch.rand(3, 3, 16, 16), tmp_path / "few.png")
    assert texts[-1]["rows"] == ["image", "recon-\nstruction"]


@pytest.mark.parametrize(
    ("model", "options", "how", "advice"),
    [
        (noisy_model, [], "temperature 1, drawn from the likelihood", True),
        (noisy_model, ["--pixels", "mean", "--temperature", "0.7"], "temperature 0.7, mean of the likelihood", False),
        (noisy_model, ["--pixel-temperature", "0.5"], "temperature 1, drawn from the likelihood at 0.5", True),
        (tiny_model, [], "temperature 1, mean of the likelihood", False),
    ],
)  # fmt: skip
def test_sample_says_what_it_shows(
    tmp_path: Path, texts: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], model: Any, options: list[str],
    how: str, advice: bool,
) -> None:  # fmt: skip
    made = model()
    state = {"model_config": made.config.to_dict(), "model": made.state_dict()}
    path = checkpoint.save(state, tmp_path, name="model.pt")
    for out in ("s.png", "folder"):
        assert cli.main(["sample", str(path), "-n", "2", "--out", str(tmp_path / out), *options]) == 0
        said = capsys.readouterr().err
        assert f": {how}" in said
        assert ("--pixels mean" in said) == advice
    assert [text["title"] for text in texts] == [how]


def test_a_range_of_temperatures() -> None:
    assert pictures.described("mean", [0.9, 0.5, 0.7]) == "temperature 0.5 to 0.9, mean of the likelihood"
