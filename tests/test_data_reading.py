"""How images are cropped and resized, what is published for a data set, and what a run remembers of it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from data_files import as_bytes, image_folder, random_pixels, write_lmdb

from nvae_fast.cli import parser
from nvae_fast.cli.common import image_options, open_images
from nvae_fast.cli.program import main
from nvae_fast.data import open_dataset
from nvae_fast.models.config import DATASETS, NVAEConfig
from nvae_fast.training import checkpoint

FACES = random_pixels(4, 218, 178, 3)


def expected(faces: np.ndarray, crop: int, resample: str, size: int = 64) -> np.ndarray:
    image = pytest.importorskip("PIL.Image")
    left, top = (faces.shape[2] - crop) // 2, (faces.shape[1] - crop) // 2
    pictures = [
        image.fromarray(face[top : top + crop, left : left + crop]).resize(
            (size, size), image.Resampling[resample.upper()]
        )
        for face in faces
    ]
    return np.stack([np.asarray(picture).transpose(2, 0, 1) for picture in pictures])


def write_faces(path, encoded: bool) -> None:
    image = pytest.importorskip("PIL.Image")
    values = []
    for face in FACES:
        buffer = io.BytesIO()
        image.fromarray(face).save(buffer, "PNG")
        values.append(buffer.getvalue() if encoded else face.tobytes())
    write_lmdb(path, values)


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize(
    ("options", "crop", "resample"),
    [
        ({}, 178, "lanczos"),
        ({"dataset": "celeba_64"}, 148, "bilinear"),
        ({"dataset": "celeba_64", "resample": "lanczos"}, 148, "lanczos"),
        ({"dataset": "celeba_64", "crop": 100}, 100, "bilinear"),
        ({"dataset": "ffhq"}, 178, "lanczos"),
        ({"crop": 148, "resample": "bilinear"}, 148, "bilinear"),
    ],
)
def test_faces_of_celeba(tmp_path, encoded, options, crop, resample):
    write_faces(tmp_path, encoded)
    dataset = open_dataset(tmp_path, image_size=64, channels=3, **options)
    assert np.array_equal(as_bytes(dataset), expected(FACES, crop, resample))


def test_the_published_crop_is_for_aligned_faces_only(tmp_path):
    pixels = image_folder(tmp_path, 4, size=64)
    dataset = open_dataset(tmp_path, image_size=64, dataset="celeba_64")
    assert np.array_equal(as_bytes(dataset), pixels.transpose(0, 3, 1, 2))


def test_crop_of_a_folder(tmp_path):
    pixels = image_folder(tmp_path / "images", 4, size=10)
    dataset = open_dataset(tmp_path / "images", crop=6)
    assert np.array_equal(as_bytes(dataset), pixels[:, 2:8, 2:8].transpose(0, 3, 1, 2))
    assert dataset.reading == {"crop": 6, "resample": "lanczos", "only": None}
    write_lmdb(tmp_path / "raw", [picture.tobytes() for picture in pixels])
    x = as_bytes(open_dataset(tmp_path / "raw", image_size=10, crop=6, resample="bilinear"))
    assert np.array_equal(x, expected(pixels, 6, "bilinear", 10))
    with pytest.raises(
        ValueError, match=r"crop \(--crop\): 11 is more than the short side of an image of 10x10"
    ):
        open_dataset(tmp_path / "images", crop=11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 0}, r"crop \(--crop\): expected a positive integer or None, got 0"),
        ({"crop": 2.0}, "crop .*got 2.0"),
        (
            {"resample": "nearest"},
            r"resample \(--resample\): expected one of lanczos, bilinear, got 'nearest'",
        ),
        ({"crop": 8}, r"digits holds images that are taken as they are"),
        ({"resample": "lanczos"}, r"digits holds images that are taken as they are"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        open_dataset("digits", **options)


def test_names_of_published_configurations():
    sizes = {name: format.size for name, format in DATASETS.items() if name.startswith(("lsun", "imagenet"))}
    assert sizes["imagenet_64"] == 64
    assert sizes["lsun_bedroom_256"] == 256
    assert sizes["lsun_church_64"] == sizes["lsun_tower_64"] == 64
    assert NVAEConfig(dataset="lsun_tower_128").resolution == 128
    assert NVAEConfig.from_official({"dataset": "lsun_church_64"}).likelihood_name == "mixture_logistic"


SMALL = "--num-channels-enc 4 --num-channels-dec 4 --num-groups-per-scale 1 --num-latent-per-group 2 --batch-size 2"
STEPS = "--num-preprocess-cells 1 --num-postprocess-cells 1 --max-steps 1 --quiet --num-mixture-dec 1 --device cpu"


def test_a_run_remembers_how_images_are_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "db").mkdir()
    for name in ("train", "validation"):
        write_faces(tmp_path / "db" / f"{name}.lmdb", False)
    train = f"train --preset celeba_64 --num-latent-scales 1 --num-nf 0 --data db --out run {SMALL} {STEPS}".split()
    assert main(train) == 0, capsys.readouterr().err
    state = checkpoint.load_training(tmp_path / "run")
    assert state["data"]["reading"] == {"crop": 148, "resample": "bilinear", "only": (178, 218)}
    assert main([*train, "--resume", "--crop", "100"]) == 2
    assert "--crop and --resample cannot change when a run is resumed" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["evaluate", "run", "--max-images", "2", "--batch-size", "2", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split"] == "validation"
    arguments = parser.parse(["evaluate", "run"])
    config = NVAEConfig(**state["model_config"])
    how = image_options(arguments, config, state["data"])
    assert open_images("db", None, "train", config, how).reading["crop"] == 148
    # A run of 0.1.0 did not say how: it read as all images were read then.
    how = image_options(arguments, config, {"source": "db", "images": 4})
    assert open_images("db", None, "train", config, how).reading["crop"] is None
    # An official checkpoint says nothing about its data: as published.
    how = image_options(arguments, config, {})
    assert open_images("db", None, "train", config, how).reading["crop"] == 148


@pytest.mark.parametrize("words", [["--resample", "lanczos"], ["--crop", "100"]])
def test_images_are_read_again_as_the_run_and_its_config_say(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "db").mkdir()
    write_faces(tmp_path / "db" / "train.lmdb", False)
    train = f"train --preset celeba_64 --num-latent-scales 1 --num-nf 0 --data db --out run {SMALL} {STEPS}".split()
    assert main([*train, *words]) == 0, capsys.readouterr().err
    state = checkpoint.load_training(tmp_path / "run")
    config, reading = NVAEConfig(**state["model_config"]), state["data"]["reading"]
    how = image_options(parser.parse(["evaluate", "run"]), config, state["data"])
    assert open_images("db", None, "train", config, how).reading == reading
    assert main(["train", "--config", "run/config.json", "--out", "again", "--quiet", "--device", "cpu"]) == 0
    assert checkpoint.load_training(tmp_path / "again")["data"]["reading"] == reading


def test_without_the_published_part_the_test_part_is_taken(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train", "test"):
        image_folder(tmp_path / "images" / name, 4, size=64)
    train = f"train --preset celeba_64 --num-latent-scales 1 --num-nf 0 --data images --out run {SMALL} {STEPS}".split()
    assert main(train) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["evaluate", "run", "--max-images", "2", "--batch-size", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["split"] == "test"
    assert "the test part is taken, celeba_64 was published on the validation part" in captured.err


def test_images_that_were_trained_on_are_not_the_published_part(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", 6, size=64)
    train = f"train --preset celeba_64 --num-latent-scales 1 --num-nf 0 --data images --out run {SMALL} {STEPS}".split()
    assert main([*train, "--val-fraction", "0"]) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["evaluate", "run", "--max-images", "2", "--batch-size", "2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["split"] == "train"
    assert "images has no test part: these are the images that the model was trained on" in captured.err


def test_the_share_of_skipped_images_is_an_option(tmp_path, capsys):
    image_folder(tmp_path / "images", 20, size=64)
    for i in (3, 5):
        (tmp_path / "images" / "a" / f"00{i}.png").write_bytes(b"<html></html>")
    train = f"train --preset celeba_64 --num-latent-scales 1 --num-nf 0 --data {tmp_path / 'images'} {SMALL} {STEPS}"
    words = [*train.split(), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert "2 of 20 images cannot be read" in capsys.readouterr().err
    assert main([*words, "--max-skipped-images", "2"]) == 2
    assert "--max-skipped-images: expected a share from 0 to 1, got 2.0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*words, "--max-skipped-images", "0.2"]) == 0
