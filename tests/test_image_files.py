"""Samples in a folder: the same images whatever the batches and processes, resumed, refused, in constant memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import ranks
from training_runs import tiny_model

import nvae_fast as nf
from nvae_fast.training import image_files, sample_to_folder
from nvae_fast.training.pictures import draw_images

pytestmark = pytest.mark.usefixtures("one_thread")

RGB = {"dataset": "photos", "num_mixture_dec": 1, "image_size": 16}


def model_of(**changes: Any) -> nf.NVAE:
    return tiny_model(**{**RGB, **changes}).eval()


def pixels_of(folder: Path) -> np.ndarray:
    """All images of a folder, uint8 (N, H, W, C)."""
    shards = sorted(folder.glob("*.npz"))
    if shards:
        return np.concatenate([np.load(shard)["arr_0"] for shard in shards])
    image = pytest.importorskip("PIL.Image")
    pictures = [np.asarray(image.open(file)) for file in sorted(folder.glob("*.png"))]
    return np.stack([p if p.ndim == 3 else p[..., None] for p in pictures])


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def shards_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "_SHARD_IMAGES", 4)


@pytest.mark.parametrize("changes", [{}, {"dataset": "digits"}], ids=["rgb", "binary"])
def test_files_hold_the_images_of_the_model(
    changes: dict[str, Any], tmp_path: Path, shards_of_four: None
) -> None:
    model = model_of(**changes)
    expected = draw_images(model, 6, temperature=0.7, seed=3, batch_size=6)
    expected = np.floor(expected.numpy() * 255.0 + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)
    for name, options in {"a": dict(batch_size=6), "b": dict(batch_size=4), "c": dict(format="npz")}.items():
        done = sample_to_folder(model, tmp_path / name, 6, temperature=0.7, seed=3, **options)
        assert (done.written, done.kept, done.note) == (6, 0, None)
        np.testing.assert_array_equal(pixels_of(tmp_path / name), expected)
    assert len(list((tmp_path / "a").glob("*.png"))) == 6
    assert [len(np.load(f)["arr_0"]) for f in sorted((tmp_path / "c").glob("*.npz"))] == [4, 2]
    assert len(nf.data.open_dataset(tmp_path / "a", image_size=16, channels=model.config.channels)) == 6
    assert len(nf.data.open_dataset(tmp_path / "c" / "00000.npz")) == 4


def test_the_pixels_have_a_temperature_of_their_own(tmp_path: Path) -> None:
    model = model_of()
    found = {}
    for temperature, pixel in ((0.5, 1.0), (0.5, 0.5), ([0.5, 0.5], 1.0), ([0.5, 1.0], 1.0)):
        sampler = nf.training.Sampler(model, temperature=temperature, pixel_temperature=pixel)
        found[str((temperature, pixel))] = sampler(3, seed=1, pixel_seed=2)
        logits = model.sample(3, temperature, seed=1)
        expected = model.likelihood(logits).sample(temperature=pixel, seed=2)
        torch.testing.assert_close(found[str((temperature, pixel))], expected.detach(), rtol=1e-4, atol=1e-4)
    one, cold, list_, range_ = found.values()
    assert torch.equal(one, list_)
    assert not torch.equal(one, cold)
    assert not torch.equal(one, range_)
    # By default, Sampler uses one temperature for both; with one per group, pixels have 1.
    assert torch.equal(nf.training.Sampler(model, temperature=0.5)(3, seed=1, pixel_seed=2), cold)
    assert torch.equal(nf.training.Sampler(model, temperature=[0.5, 1.0])(3, seed=1, pixel_seed=2), range_)
    # Whole images are drawn at 1, as published ones.
    warm = draw_images(model, 3, temperature=0.5, seed=1, batch_size=3)
    assert torch.equal(
        warm, draw_images(model, 3, temperature=0.5, pixel_temperature=1.0, seed=1, batch_size=3)
    )
    assert not torch.equal(
        warm, draw_images(model, 3, temperature=0.5, pixel_temperature=0.5, seed=1, batch_size=3)
    )


@pytest.mark.parametrize("format", ["png", "npz"])
def test_an_interrupted_folder_is_completed(format: str, tmp_path: Path, shards_of_four: None) -> None:
    model = model_of()
    options: dict[str, Any] = dict(seed=1, batch_size=2, format=format)
    sample_to_folder(model, tmp_path / "whole", 14, **options)
    whole = files_of(tmp_path / "whole")

    def stop(done: int) -> None:
        if done >= 6:
            raise KeyboardInterrupt

    folder = tmp_path / "part"
    with pytest.raises(KeyboardInterrupt):
        sample_to_folder(model, folder, 14, on_batch=stop, **options)
    before = files_of(folder)
    assert 1 < len(before) < len(whole)
    (folder / f".000001.{format}.99.tmp").write_bytes(b"half")  # of a killed process
    first, second = sorted(name for name in whole if name.endswith(format))[:2]
    damaged = {"png": whole[second][:-20], "npz": whole[first][:-20]}[format]
    (folder / {"png": second, "npz": first}[format]).write_bytes(damaged)
    kept = {
        name: (folder / name).stat().st_mtime_ns
        for name, data in files_of(folder).items()
        if whole.get(name) == data
    }
    assert kept
    done = sample_to_folder(model, folder, 14, **options)
    assert done.written + done.kept == 14
    assert files_of(folder) == whole
    assert all((folder / name).stat().st_mtime_ns == time for name, time in kept.items()), (
        "a complete file was written again"
    )
    again = sample_to_folder(model, folder, 14, **options)
    assert (again.written, again.kept) == (0, 14)
    # More images: those before stay; fewer: nothing is removed.
    more = sample_to_folder(model, folder, 17, **options)
    assert more.written + more.kept == 17
    np.testing.assert_array_equal(pixels_of(folder)[:14], pixels_of(tmp_path / "whole"))
    assert len(pixels_of(folder)) == 17
    assert sample_to_folder(model, folder, 3, **options).written == 0
    assert len(pixels_of(folder)) == 17


def test_a_file_of_another_size_is_not_complete(tmp_path: Path) -> None:
    sample_to_folder(model_of(), tmp_path / "a", 2)
    sample_to_folder(model_of(image_size=32), tmp_path / "b", 2)
    own = (tmp_path / "a" / "000001.png").read_bytes()
    (tmp_path / "a" / "000001.png").write_bytes((tmp_path / "b" / "000001.png").read_bytes())
    assert sample_to_folder(model_of(), tmp_path / "a", 2).written == 1
    assert (tmp_path / "a" / "000001.png").read_bytes() == own


def test_other_settings_are_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    model, folder = model_of(), tmp_path / "s"
    sample_to_folder(model, folder, 3, seed=1)
    before = files_of(folder)
    other = model_of(seed=1)
    for changes, name in [
        (dict(seed=2), "seed is 1 there, 2 now"),
        (dict(temperature=0.5), r"temperature is \[1.0, 1.0\] there, \[0.5, 0.5\] now"),
        (dict(pixel_temperature=0.5), "pixel_temperature is 1.0 there, 0.5 now"),
        (dict(pixels="mean"), 'pixels is "sample" there, "mean" now'),
        (dict(format="npz"), 'format is "png" there, "npz" now'),
        (dict(model=other), "weights is"),
    ]:
        options: dict[str, Any] = {"model": model, "seed": 1, **changes}
        with pytest.raises(ValueError, match=f"holds images of other settings: {name}"):
            sample_to_folder(options.pop("model"), folder, 3, **options)
    assert files_of(folder) == before
    done = sample_to_folder(model, folder, 3, seed=2, overwrite=True)
    (aside,) = tmp_path.glob("s.replaced-*")
    assert files_of(aside) == before
    assert str(aside) in str(done.note)
    assert (done.written, done.kept) == (3, 0)
    # The same weights elsewhere, in another memory format, by another version: the same settings.
    (folder / "000001.png").unlink()
    settings = json.loads((folder / "samples.json").read_text())
    assert settings["nvae_fast"] == nf.__version__
    (folder / "samples.json").write_text(json.dumps({**settings, "nvae_fast": "0.0.1"}))
    assert sample_to_folder(model_of().to(memory_format=torch.channels_last), folder, 3, seed=2).written == 1


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    model = model_of()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty and has no samples.json: give another folder"):
        sample_to_folder(model, tmp_path, 2)
    for text in ("{", "[1]", '{"kind": "other"}'):
        (tmp_path / "samples.json").write_text(text)
        with pytest.raises(ValueError, match=r"samples.json is damaged or something else"):
            sample_to_folder(model, tmp_path, 2)
    with pytest.raises(ValueError, match="is a file, a folder is needed"):
        sample_to_folder(model, tmp_path / "notes.txt", 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["notes.txt", "samples.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(count=0), "count must be at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(format="jpg"), "format must be one of png, npz, got 'jpg'"),
        (dict(pixels="dots"), "pixels must be auto, mean or sample, got 'dots'"),
        (dict(temperature=[1.0]), r"temperature must be one number or one per group \(2\), got 1 numbers"),
        (dict(pixel_temperature=0), "pixel_temperature must be a finite number > 0, got 0"),
        (dict(seed=1.5), "seed must be an int, got 1.5"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    options = {"count": 2, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        sample_to_folder(model_of(), tmp_path / "s", **options)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_says_what_is_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    real = image_files.encode_png
    calls: list[int] = []

    def full(pixels: np.ndarray) -> bytes:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return real(pixels)

    monkeypatch.setattr(image_files, "encode_png", full)
    with pytest.raises(
        OSError, match=r"cannot write .*000002.png: No space left on device; the images written before"
    ):
        sample_to_folder(model, tmp_path / "s", 5)
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == [
        "000000.png",
        "000001.png",
        "samples.json",
    ]
    done = sample_to_folder(model, tmp_path / "s", 5)
    assert (done.written, done.kept) == (3, 2)


def test_no_more_than_a_batch_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many images: of the tensors that the sampler returned, only the newest is alive."""
    import weakref

    alive: list[Any] = []
    real = nf.training.Sampler.__call__

    def watched(self: Any, n: int, **options: Any) -> torch.Tensor:
        assert sum(reference() is not None for reference in alive) <= 1
        images = real(self, n, **options)
        alive.append(weakref.ref(images))
        return images

    monkeypatch.setattr(nf.training.Sampler, "__call__", watched)
    sample_to_folder(model_of(), tmp_path / "s", 20, batch_size=2)
    assert len(alive) == 10


SHARED = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from test_image_files import model_of
from nvae_fast.training import image_files, sample_to_folder, start_world
image_files._SHARD_IMAGES = 4
world = start_world("cpu")
for format in ("png", "npz"):
    done = sample_to_folder(model_of(), sys.argv[1] + "/" + format, 14, seed=1, batch_size=2, format=format, world=world)
    assert (done.written, done.kept) == (14, 0), done
world.close()
"""


def test_processes_share_the_images(tmp_path: Path, shards_of_four: None) -> None:
    started = ranks(3, [str(tmp_path)], start=SHARED.format(tests=str(Path(__file__).parent)))
    for process in started:
        _, text = process.communicate(timeout=300)
        assert process.returncode == 0, text
    for format in ("png", "npz"):
        sample_to_folder(model_of(), tmp_path / f"{format} alone", 14, seed=1, batch_size=2, format=format)
        assert files_of(tmp_path / format) == files_of(tmp_path / f"{format} alone")
