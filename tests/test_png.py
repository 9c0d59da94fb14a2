"""Grids of images as PNG files."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from data_files import (
    random_pixels,
)

from nvae_fast.data import save_grid
from nvae_fast.data.png import make_grid

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
    assert (got[6:8] == 128).all()
    assert (got[8:, 12:] == 128).all()
    assert os.listdir(tmp_path) == ["grid.png"]


def test_grid_shapes_and_types(tmp_path):
    assert make_grid(torch.zeros(5, 1, 2, 2)).shape == (2 * 2 + 2, 3 * 2 + 4)
    assert make_grid(torch.zeros(2, 3, 2, 2), columns=9).shape == (2, 2 * 2 + 2, 3)
    x = torch.rand(4, 3, 8, 8).to(torch.bfloat16).requires_grad_()
    save_grid(x.to(memory_format=torch.channels_last), tmp_path / "x.png")
    nearest = make_grid(torch.tensor([0.5, 0.0019, 0.002]).view(1, 1, 1, 3))
    assert nearest.tolist() == [[128, 0, 1]]
    assert make_grid(torch.tensor([1.0005, -0.0005]).view(1, 1, 1, 2)).tolist() == [[255, 0]]


def read(path):
    image = pytest.importorskip("PIL.Image")
    with image.open(path) as opened:
        return np.asarray(opened)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("side", "scale"), [(32, 3), (16, 6), (64, 2), (96, 1), (128, 1)])
def test_images_below_a_title_are_enlarged(tmp_path, channels, side, scale):
    pixels = random_pixels(4, channels, side, side)
    images = torch.from_numpy(pixels).float() / 255
    save_grid(images, tmp_path / "grid.png", columns=4, title="temperature 0.7")
    got = read(tmp_path / "grid.png")
    grid = make_grid(images, 4, scale)
    assert (got[-grid.shape[0] :] == grid).all()
    above = got[: -grid.shape[0]]
    assert 8 < above.shape[0] < 24
    assert above.min() < 100, "dark letters"
    assert (above == 255).mean() > 0.8, "on white"
    first = grid[: side * scale : scale, : side * scale : scale].reshape(side, side, channels)
    assert (first == pixels[0].transpose(1, 2, 0)).all()


def test_the_size_of_a_grid_is_limited_and_a_title_is_never_cut(tmp_path):
    save_grid(torch.rand(3600, 1, 32, 32), tmp_path / "many.png", title="many")
    assert read(tmp_path / "many.png").shape[1] == 60 * 66 - 2, "3 would be more than 4096 pixels"
    save_grid(
        torch.rand(1, 1, 32, 32),
        tmp_path / "one.png",
        title="a title that is wider than the only image of the grid",
    )
    got = read(tmp_path / "one.png")
    assert got.shape[1] > 200
    assert (got[:, -4:] == 255).all()
    save_grid(torch.rand(2, 1, 4, 4), tmp_path / "asked.png", scale=5, columns=1)
    assert read(tmp_path / "asked.png").shape == (2 * 22 - 2, 20)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(scale=0), ValueError, "scale: expected a positive integer or None, got 0"),
        (dict(scale=2.5), ValueError, "scale: expected a positive integer or None, got 2.5"),
        (dict(title=3), TypeError, "title: expected a string or None, got 3"),
    ],
)
def test_bad_scales_and_titles(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        save_grid(torch.zeros(1, 1, 2, 2), tmp_path / "x.png", **options)
    assert not os.listdir(tmp_path)


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
    assert target.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["grid.png"]


def test_grid_write_is_atomic(tmp_path, monkeypatch):
    target = tmp_path / "grid.png"
    target.write_bytes(b"older")

    def full(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_grid(torch.zeros(1, 1, 2, 2), target)
    assert target.read_bytes() == b"older"
    assert os.listdir(tmp_path) == ["grid.png"]
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere' does not exist"):
        save_grid(torch.zeros(1, 1, 2, 2), tmp_path / "nowhere" / "grid.png")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        save_grid(torch.zeros(1, 1, 2, 2), tmp_path)
    save_grid(torch.zeros(1, 1, 2, 2), target)
    assert target.stat().st_mode & 0o777 == 0o644
