"""Training on images of one's own without a preset: what is chosen, what is refused, and which images are held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import image_folder, png_bytes, random_pixels
from training_runs import TINY

import nvae_fast as nf
from nvae_fast import cli
from nvae_fast.cli.choice import choose
from nvae_fast.cli.dry_run import activation_bytes, describe
from nvae_fast.data.held_out import HeldOut, validation_part
from nvae_fast.data.inspection import ImageKind, inspect_images, nearest_power
from nvae_fast.models.config import NVAEConfig
from nvae_fast.training import TrainingConfig, checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "--num-channels-enc", "4", "--num-channels-dec", "4", "--num-groups-per-scale", "1", "--num-mixture-dec", "1",
    "--sample-readjust-passes", "0", "--max-steps", "1", "--quiet",
]  # fmt: skip
RGB = ImageKind(size=64, channels=3, binary=False, published=False, resized=True, side=70)


def found(path: Path, **options) -> ImageKind:
    return inspect_images(nf.data.open_dataset(path, binarize=False, **options))


def write_images(folder: Path, pictures: list[np.ndarray]) -> Path:
    folder.mkdir()
    for number, picture in enumerate(pictures):
        (folder / f"{number:03}.png").write_bytes(png_bytes(picture))
    return folder


def error_of(capsys, *words) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------- what the images are


def test_files_are_rgb_gray_or_black_and_white(tmp_path):
    colour = random_pixels(5, 20, 30, 3)
    gray = random_pixels(5, 17, 17)
    binary = (gray > 100).astype(np.uint8) * np.uint8(255)
    kinds = {
        "colour": (list(colour), "RGB", 16),
        "gray": (list(gray), "gray", 16),
        "as_rgb": ([np.stack([p] * 3, -1) for p in gray], "gray", 16),
        "binary": (list(binary), "black and white", 16),
        "mixed": ([*gray, colour[0]], "RGB", 16),
        "large": (list(random_pixels(3, 200, 150, 3)), "RGB", 64),
    }
    for name, (pictures, kind, size) in kinds.items():
        seen = found(write_images(tmp_path / name, pictures))
        assert (seen.name, seen.size, seen.resized) == (kind, size, True), name
    np.save(tmp_path / "images.npy", random_pixels(4, 48, 48, 3))
    assert found(tmp_path / "images.npy") == ImageKind(48, 3, False, False, False, 48)
    np.save(tmp_path / "bits.npy", random_pixels(4, 16, 16) > 127)
    assert found(tmp_path / "bits.npy").name == "black and white"


def test_the_size_is_the_nearest_power_of_two_up_to_64():
    assert [nearest_power(n) for n in (1, 20, 23, 40, 47, 86, 400)] == [8, 16, 32, 32, 64, 64, 64]


# ---------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize("side", [8, 12, 16, 25, 28, 32, 48, 64, 96, 256])
@pytest.mark.parametrize("machine", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "given", [{}, {"num_latent_scales": 1}, {"num_preprocess_blocks": 1}, {"num_postprocess_blocks": 0}]
)
def test_the_choice_is_a_model_for_every_size(side, machine, given):
    if side % 2 and given.get("num_preprocess_blocks"):
        pytest.skip("images of an odd size cannot be halved")
    kind = ImageKind(side, 3, False, False, False, side)
    chosen = choose(kind, 20, "x", False, given, torch.device(machine))
    model = NVAEConfig(**{**chosen.model, **given})
    assert (model.resolution, model.channels, model.likelihood_name) == (side, 3, "mixture_logistic")
    assert model.num_groups > 1
    assert chosen.training["batch_size"] == 16
    assert not given.keys() & chosen.model.keys()


@pytest.mark.parametrize(
    ("channels", "binary", "published", "likelihood"),
    [(3, False, False, "mixture_logistic"), (1, False, False, "normal"), (1, True, False, "bernoulli"),
     (1, False, True, "bernoulli")],
)  # fmt: skip
def test_the_likelihood_follows_from_the_images(channels, binary, published, likelihood):
    kind = ImageKind(32, channels, binary, published, True, 30)
    chosen = choose(kind, 500, "x", False, {}, torch.device("cpu"))
    assert chosen.model["likelihood"] == likelihood
    assert f"--image-size 32 --image-channels {channels} --likelihood {likelihood}" in chosen.line
    assert f"x holds {kind.name} images of about 30 pixels" in chosen.line


def test_options_given_are_not_chosen_and_not_named():
    given = {"image_size": 32, "likelihood": "normal", "batch_size": 4, "num_channels_enc": 24}
    chosen = choose(RGB, 500, "x", False, given, torch.device("cpu"))
    assert not given.keys() & {**chosen.model, **chosen.training}.keys()
    assert not [name for name in given if f"--{name.replace('_', '-')} " in chosen.line]
    assert (
        NVAEConfig(**{**chosen.model, **{k: v for k, v in given.items() if k != "batch_size"}}).resolution
        == 32
    )
    assert "dataset" not in choose(RGB, 500, "x", False, {"dataset": "cifar10"}, torch.device("cpu")).model
    larger = choose(RGB, 500, "x", False, {}, torch.device("cuda")).model
    assert (
        larger["num_channels_enc"]
        > choose(RGB, 500, "x", False, {}, torch.device("cpu")).model["num_channels_enc"]
    )


def test_one_command_trains_a_model_of_colours(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos_of_mine", list(random_pixels(9, 14, 19, 3)))
    assert cli.main(["train", "--data", "photos_of_mine", *SMALL[:-1]]) == 0
    text = capsys.readouterr().err
    assert "photos_of_mine holds RGB images of about 14 pixels. Chosen for them" in text
    assert "--image-size 16 --image-channels 3 --likelihood normal" in text
    state = checkpoint.load(tmp_path / "runs/nvae")
    assert state["model_config"]["image_channels"] == 3
    assert state["data"]["images"] == 8
    assert state["data"]["source"] == str(tmp_path / "photos_of_mine")
    assert state["validation"]["images"] == 1
    image = pytest.importorskip("PIL.Image")
    with image.open(tmp_path / "runs/nvae/samples.png") as picture:
        assert picture.mode == "RGB"


def test_the_size_is_that_of_the_crop(tmp_path, capsys):
    image_folder(tmp_path / "images", size=64)
    for words, size in (([], 64), (["--crop", "20"], 16)):
        assert cli.main(["train", "--data", str(tmp_path / "images"), "--dry-run", *words]) == 0
        assert f'"image_size": {size}' in capsys.readouterr().out


# ---------------------------------------------------------------------------- what is refused


def test_colours_are_refused_by_a_model_of_something_else(tmp_path, capsys):
    image_folder(tmp_path / "colour")
    train = ["train", "--data", tmp_path / "colour", "--out", tmp_path / "run", *SMALL]
    for words in (["--dataset", "mnist"], ["--preset", "mnist"]):
        text = error_of(capsys, *train, *words)
        assert "the model has one channel: give --image-channels 3 --likelihood mixture_logistic" in text
        assert "--image-channels 1 to train on gray copies" in text
    text = error_of(capsys, *train, "--likelihood", "bernoulli")
    assert "the Bernoulli likelihood is for black and white ones: give --likelihood mixture_logistic" in text
    assert not (tmp_path / "run").exists()
    assert cli.main([*map(str, train), "--image-channels", "1"]) == 0  # as the message says
    assert checkpoint.load(tmp_path / "run")["model_config"]["likelihood"] == "normal"


def test_a_folder_named_like_a_built_in_set_is_an_error_that_names_both(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "digits")
    text = error_of(capsys, "train", "--data", "digits", *SMALL)
    assert "write ./digits for what is there, or give --data-kind digits for the built-in set" in text
    assert len(nf.data.open_dataset("./digits")) == 6
    assert len(nf.data.open_dataset("digits", kind="digits")) == 1500
    assert cli.main(["train", "--data", "./digits", *SMALL]) == 0
    assert cli.main(["train", "--data", "digits", "--data-kind", "digits", "--out", "b", *SMALL]) == 0
    assert cli.main(["evaluate", "b", "--max-images", "2", "--quiet"]) == 0


# ---------------------------------------------------------------------------- the held-out part


def test_the_parts_are_apart_whole_and_the_same_every_time(tmp_path):
    pixels = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    write_images(tmp_path / "images", list(pixels))
    np.save(tmp_path / "images.npy", pixels)
    for path in (tmp_path / "images", tmp_path / "images.npy"):

        def numbers(split: str, path: Path = path, **options) -> list[int]:
            options = options or {"val_fraction": 0.1}
            images = nf.data.open_dataset(path, split=split, binarize=False, **options)
            assert images.own_split
            batch = images.batch(torch.arange(len(images)), 0)
            return (batch[:, 0, 0, 0] * 255).round().int().tolist()

        train, validation = numbers("train"), numbers("validation")
        assert len(validation) == 5
        assert sorted(train + validation) == list(range(50))
        assert train != sorted(validation + train)[: len(train)]  # not the last images
        assert numbers("test") == validation == numbers("validation")
        recorded = nf.data.open_dataset(path, val_fraction=0.1, binarize=False).held_out
        again = HeldOut(**json.loads(json.dumps(recorded.to_dict())))
        assert numbers("validation", held_out=again) == validation
    # Images added later: none of the training images is held out.
    recorded = nf.data.open_dataset(tmp_path / "images", val_fraction=0.1).held_out
    for number in range(50, 90):
        (tmp_path / f"images/{number:03}.png").write_bytes(png_bytes(np.full((8, 8), number, np.uint8)))
    later = nf.data.open_dataset(tmp_path / "images", split="test", held_out=recorded, binarize=False)
    held = set((later.batch(torch.arange(len(later)), 0)[:, 0, 0, 0] * 255).round().int().tolist())
    train_before = set(range(50)) - held
    assert len(train_before) == 45


def test_data_with_parts_are_not_split(tmp_path):
    for part in ("train", "test"):
        image_folder(tmp_path / part)
    images = nf.data.open_dataset(tmp_path, val_fraction=0.5)
    assert (len(images), images.held_out) == (6, None)


@pytest.mark.parametrize("value", [1.0, -0.1, True, float("nan")])
def test_a_wrong_fraction_is_an_error(value, tmp_path):
    image_folder(tmp_path / "images")
    with pytest.raises((TypeError, ValueError), match=r"val_fraction \(--val-fraction\): expected"):
        nf.data.open_dataset(tmp_path / "images", val_fraction=value)


def test_one_image_cannot_be_split(tmp_path):
    image_folder(tmp_path / "images", count=1)
    with pytest.raises(ValueError, match="one image alone cannot be split"):
        nf.data.open_dataset(tmp_path / "images", val_fraction=0.1)
    two = nf.data.open_dataset(tmp_path / "images")
    assert two.held_out is None


def test_evaluation_and_resuming_use_the_images_that_were_held_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images", count=20)
    words = [*SMALL, "--batch-size", "4"]
    assert cli.main(["train", "--data", "images", "--out", "run", "--val-fraction", "0.2", *words]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["data"]["val_fraction"] == 0.2
    assert cli.main(["evaluate", "run"]) == 0
    assert "4 images of" in (out := capsys.readouterr().out)
    assert "(validation)" in out
    assert cli.main(["evaluate", "run", "--data", "images"]) == 0
    assert "4 images of images (validation)" in capsys.readouterr().out
    image_folder(tmp_path / "others", count=20)
    assert cli.main(["evaluate", "run", "--data", "others"]) == 0
    assert "20 images of others (test)" in capsys.readouterr().out, (
        "the split is that of the run's own images"
    )
    assert "--val-fraction cannot change when a run is resumed: it has 0.2, 0.3 was asked for" in error_of(
        capsys, "train", "--resume", "--out", "run", "--val-fraction", "0.3"
    )
    assert cli.main(["train", "--resume", "--out", "run", "--max-steps", "2", "--quiet"]) == 0
    assert checkpoint.load(tmp_path / "run")["data"]["images"] == 16
    assert cli.main(["train", "--config", "run", "--out", "again", "--quiet"]) == 0
    assert checkpoint.load(tmp_path / "again")["data"]["held_out"]["fraction"] == 0.2


def test_a_fraction_does_not_matter_to_data_with_parts(tmp_path, capsys):
    run = ["--out", str(tmp_path / "run"), "--val-fraction", "0.3"]
    assert cli.main(["train", "--data", "digits", *run, *SMALL]) == 0
    assert cli.main(["train", "--resume", *run, "--max-steps", "2", "--quiet"]) == 0
    assert checkpoint.load(tmp_path / "run")["data"]["held_out"] is None
    assert "--val-fraction: expected" in error_of(capsys, "train", "--resume", *run[:2], "--val-fraction", 2)


def test_a_folder_is_opened_once_for_training_and_validation(tmp_path, monkeypatch):
    image_folder(tmp_path / "images", count=20)
    (tmp_path / "images/damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    opened, shown, skipped = [], [], []
    train = cli.train
    real_open, real_grid = train.open_images, train.pictures.write_reconstructions
    monkeypatch.setattr(train, "open_images", lambda *given: opened.append(given[2]) or real_open(*given))
    monkeypatch.setattr(
        train.pictures,
        "write_reconstructions",
        lambda model, images, path: shown.append(len(images)) or real_grid(model, images, path),
    )
    monkeypatch.setattr(train, "report_skipped", lambda dataset, say: skipped.append(len(dataset.skipped)))
    words = [
        "--batch-size",
        "4",
        "--max-skipped-images",
        "0.5",
        "--val-fraction",
        "0.2",
        "--validate-every",
        "1",
    ]
    run = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]
    assert cli.main(["train", *run, *SMALL, *words, "--max-steps", "5"]) == 0
    assert opened == ["train"]
    assert shown == [4]
    assert skipped == [1]
    held = nf.data.open_dataset(tmp_path / "images", val_fraction=0.2, max_skipped=0.5)
    again = nf.data.open_dataset(tmp_path / "images", split="validation", val_fraction=0.2, max_skipped=0.5)
    part = validation_part(held)
    assert (part.split, part.own_split, part.held_out) == (again.split, again.own_split, again.held_out)
    assert torch.equal(part.batch(range(4), 0), again.batch(range(4), 0))


def test_training_images_are_not_evaluated_as_a_test_part(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "images")
    assert cli.main(["train", "--data", "images", "--out", "run", "--val-fraction", "0", *SMALL]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "run"]) == 0
    printed = capsys.readouterr()
    assert "has no test part: these are the images that the model was trained on" in printed.err
    assert "(train)" in printed.out
    text = error_of(capsys, "evaluate", "run", "--split", "test")
    assert "has no such part, and the model was trained on all of its images: give --split train" in text


# ---------------------------------------------------------------------------- dry run, presets


def test_a_dry_run_prints_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data", "digits", "--dry-run", "--num-channels-enc", "12"]) == 0
    text = capsys.readouterr().out
    assert '"num_channels_enc": 12' in text
    model = json.loads(text[text.index("{") : text.rindex("}") + 1])["model"]
    count = sum(p.numel() for p in nf.NVAE(NVAEConfig(**model)).parameters())
    assert f"\n{count} parameters in 3 latent groups\n" in text
    assert "estimated memory of a training step: " in text
    assert not list(tmp_path.iterdir())
    assert cli.main(["train", "--preset", "celeba_256", "--dry-run", "--data", "digits"]) == 2
    assert "--batch-size 5000" in error_of(
        capsys, "train", "--data", "digits", "--dry-run", "--batch-size", "5000"
    )
    assert cli.main(["train", "--preset", "digits_demo", "--dry-run", "--device", "cpu"]) == 0
    assert '"autocast": null' in capsys.readouterr().out, "what a run would record"


def test_the_memory_of_a_dry_run_is_that_of_plain_pytorch():
    config = NVAEConfig(**TINY)
    model, x = nf.NVAE(config).train(), torch.rand(3, 1, 32, 32).round()
    parameters = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with nf.use_backend("reference"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x, seed=0)
        model.reconstruction_loss(out.logits, x).sum() + out.kl.sum()
    with torch.device("meta"):
        found = activation_bytes(nf.NVAE(config).train(), 3)
    assert found == pytest.approx(sum(storage.nbytes() for storage in kept.values()), rel=0.01)


def test_the_memory_of_weights_counts_their_average(monkeypatch):
    monkeypatch.setattr("nvae_fast.cli.dry_run._size", str)
    config = NVAEConfig(**TINY)
    count = sum(p.numel() for p in nf.NVAE(config).parameters())
    for ema, copies in ((None, 4), (0.9, 5)):
        text = describe(config, TrainingConfig(batch_size=1, ema=ema))
        assert f"({copies * 4 * count} for weights, gradients and optimizer, " in text


def test_a_dry_run_of_a_run_to_resume_writes_nothing(tmp_path, capsys):
    run = tmp_path / "run"
    assert cli.main(["train", "--data", "digits", "--out", str(run), *SMALL]) == 0
    words = ["train", "--resume", "--out", str(run), "--max-steps", "2", "--dry-run"]

    def state() -> dict[str, object]:
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in run.iterdir()}

    before, folder = state(), run.stat().st_mtime_ns
    assert cli.main(words) == 0
    assert '"max_steps": 2' in capsys.readouterr().out
    assert (state(), run.stat().st_mtime_ns) == (before, folder)
    (run / checkpoint.NAME).write_bytes(before[checkpoint.NAME][0][:300])
    before, folder = state(), run.stat().st_mtime_ns
    assert "is truncated or damaged" in error_of(capsys, *words)
    assert (state(), run.stat().st_mtime_ns) == (before, folder)


def test_presets_shows_what_each_sets(capsys):
    assert cli.main(["presets"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{text}" for name in nf.training.PRESETS)
    assert cli.main(["presets", "cifar10"]) == 0
    text = capsys.readouterr().out
    for line in ("--num-groups-per-scale       30", "--horizontal-flip            yes", "--autocast "):
        assert line in text
    assert "--num-postprocess-cells      2" in text
    assert "unknown preset 'cifar'" in error_of(capsys, "presets", "cifar")
