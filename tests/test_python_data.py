"""Training, evaluation and loops of one's own with torch's Datasets, DataLoaders and tensors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from data_files import memory_dataset
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from training_runs import TINY_TRAINING, tiny_model

import nvae_fast as nf
from nvae_fast.data.torch_dataset import as_images
from nvae_fast.models.states import not_finite
from nvae_fast.training import RunFolderError, Trainer, evaluate

pytestmark = pytest.mark.usefixtures("one_thread")
RGB = dict(
    dataset="custom", image_size=16, image_channels=3, likelihood="mixture_logistic", num_mixture_dec=2
)


def pixels(count: int = 9, channels: int = 3, size: int = 16) -> torch.Tensor:
    return (
        torch.randint(0, 256, (count, channels, size, size), generator=torch.Generator().manual_seed(0)) / 255
    )


class Pairs(Dataset):
    """Images with labels, as torchvision's data sets are."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], 7


def forms(x: torch.Tensor) -> dict[str, object]:
    return {
        "tensor": x,
        "dataset": Pairs(x),
        "tensor dataset": TensorDataset(x),
        "subset": Subset(Pairs(torch.cat([x, x])), range(len(x))),
        "loader": DataLoader(Pairs(x), batch_size=2, shuffle=True),
        "loader of single images": DataLoader(Pairs(x), batch_size=None),
        "loader of batches": DataLoader(Pairs(x), batch_sampler=BatchSampler(SequentialSampler(x), 2, False)),
    }


@pytest.mark.parametrize("form", list(forms(pixels(2))))
def test_evaluation_takes_any_kind_of_data_set(form):
    x, model = pixels(), tiny_model(**RGB).eval()
    ours = nf.data.ImageDataset(
        nf.data.dataset.MemoryImages("ours", (x * 255).round().byte().numpy()), split="test", binarize=None
    )
    assert evaluate(model, forms(x)[form], batch_size=4) == evaluate(model, ours, batch_size=4)


@pytest.mark.parametrize("form", list(forms(pixels(2))))
def test_a_trainer_takes_any_kind_of_data_set_and_makes_its_folder(form, tmp_path):
    config = TINY_TRAINING.replace(max_steps=2, validate_every=1, validate_final_samples=0)
    folder = str(tmp_path / "new" / "run")
    trainer = Trainer(
        tiny_model(**RGB), config, forms(pixels())[form], folder, validation=Pairs(pixels(4)), quiet=True
    )
    assert not (tmp_path / "new").exists()
    assert trainer.run().step == 2
    assert (tmp_path / "new/run/checkpoint.pt").exists()
    assert trainer.validation.step == 2
    assert not_finite(trainer.model.state_dict().items()) is None


def test_a_run_that_is_there_is_not_written_over(tmp_path):
    config = TINY_TRAINING.replace(max_steps=1)
    first = Trainer(tiny_model(**RGB), config, pixels(), tmp_path, quiet=True)
    first.run()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(
        RunFolderError, match="holds the checkpoint of another run: give another folder, or state="
    ):
        Trainer(tiny_model(**RGB), config, pixels(), tmp_path, quiet=True).run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_gray_images_are_drawn_black_and_white_for_a_bernoulli_likelihood():
    x = pixels(5, 1)
    fitted = nf.training.evaluation.fitted(
        tiny_model(dataset="custom", image_size=16, image_channels=1, likelihood="bernoulli").config, Pairs(x)
    )
    drawn = fitted.batch(torch.arange(5), 0)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


class Broken(Dataset):
    def __init__(self, item: object) -> None:
        self.item = item

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> object:
        return self.item


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (
            np.zeros((16, 16, 3), np.uint8),
            TypeError,
            r"got ndarray: return torch.from_numpy\(image\).permute",
        ),
        ("x.png", TypeError, r"got str: give the data set a transform that returns tensors"),
        (
            torch.zeros(3, 16, 16, dtype=torch.uint8),
            TypeError,
            r"got torch.uint8: return image.float\(\) / 255",
        ),
        (torch.full((3, 16, 16), 255.0), ValueError, r"values from 255 to 255: return image / 255"),
        (
            torch.full((3, 16, 16), -1.0),
            ValueError,
            r"leave transforms.Normalize out, or return \(image \+ 1\) / 2",
        ),
        (torch.full((3, 16, 16), torch.nan), ValueError, r"expected values in \[0, 1\], got values from nan"),
        (
            torch.zeros(16, 16),
            ValueError,
            r"expected a square image \(C, H, W\) of 1 or 3 channels, got \(16, 16\)",
        ),
        (torch.zeros(4, 16, 16), ValueError, r"got \(4, 16, 16\)"),
        (torch.zeros(3, 16, 17), ValueError, r"got \(3, 16, 17\)"),
    ],
)
def test_a_wrong_image_is_named_with_what_to_do(item, error, message, tmp_path):
    with pytest.raises(error, match=r"dataset\[0\]: .*" + message):
        evaluate(tiny_model(**RGB), Broken(item))
    with pytest.raises(error, match=r"validation\[0\]"):
        Trainer(tiny_model(**RGB), TINY_TRAINING, pixels(), tmp_path, validation=Broken(item))
    assert not list(tmp_path.iterdir())


def test_an_image_of_another_shape_is_named():
    images = [*pixels(2), *pixels(1, size=8)]
    with pytest.raises(
        ValueError, match=r"dataset\[2\]: expected an image of shape \(3, 16, 16\) like the first one"
    ):
        evaluate(tiny_model(**RGB), images)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(pixels())


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (pixels().numpy(), TypeError, r"got numpy.ndarray: give a tensor \(N, C, H, W\)"),
        (Stream(), TypeError, "a map-style Dataset with __getitem__ and __len__, got Stream"),
        (DataLoader(Stream()), TypeError, "got Stream"),
        (3, TypeError, "got int"),
        (pixels(0), ValueError, "holds no images"),
        (
            DataLoader(Pairs(pixels()), sampler=WeightedRandomSampler([1.0] * 9, 4)),
            ValueError,
            "chooses images with WeightedRandomSampler, which training does not use: give the Dataset",
        ),
        (
            DataLoader(
                Pairs(pixels()), batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 9, 4), 2, False)
            ),
            ValueError,
            "chooses images with WeightedRandomSampler",
        ),
        (DataLoader(Pairs(pixels()), batch_sampler=[[0, 1], [2]]), ValueError, "chooses images with list"),
    ],
)
def test_what_is_no_data_set_of_images_is_refused(data, error, message):
    with pytest.raises(error, match="dataset: .*" + message if error is TypeError else message):
        evaluate(tiny_model(**RGB), data)


def test_an_object_with_batches_is_taken_as_it_is(digits):
    assert as_images(digits) is digits


def test_an_image_dataset_is_a_torch_dataset():
    ours = memory_dataset(10)
    assert isinstance(ours, Dataset)
    assert torch.equal(ours[3], ours.batch([3], 0)[0])
    assert torch.equal(ours[-1], ours[9])
    with pytest.raises(IndexError, match="expected -10 to 9 for memory, got 10"):
        ours[10]
    batches = list(DataLoader(ours, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), ours.batch(torch.arange(10), 0))
    assert len(list(ours)) == 10
    black = memory_dataset(10, channels=1, binarize=True)
    torch.manual_seed(1)
    first, second = black[0], black[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(black[0], first)


def test_a_batch_loader_is_an_iterable():
    loader = nf.data.BatchLoader(memory_dataset(10), 4, seed=0)
    for epoch in range(2):
        assert all(torch.equal(a, b) for a, b in zip(loader, loader.epoch(epoch), strict=True))
    assert not torch.equal(next(iter(loader)), next(loader.epoch(0)))


def test_sampling_in_training_mode_warns_and_readjusting_does_not():
    model = tiny_model()
    with pytest.warns(
        UserWarning, match=r"NVAE.sample: the model is in training mode.*call model.eval\(\) first"
    ):
        model.sample(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.readjust_batch_norm(1.0, passes=1, batch=4)
        model.eval().sample(2)


def test_an_array_in_place_of_a_tensor_says_what_to_do():
    model = tiny_model().eval()
    array = np.zeros((2, 1, 32, 32), np.float32)
    advice = "torch.from_numpy makes a tensor of it"
    for call in (
        model,
        model.encode,
        lambda x: nf.training.importance_bound(model, x, 1),
        nf.normal_log_prob,
    ):
        with pytest.raises(TypeError, match=advice):
            call(array)
    with pytest.raises(TypeError, match=r"got torch.uint8: give x.float\(\) / 255"):
        model(torch.zeros(2, 1, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"got values from 200 to 200: divide by 255"):
        model(torch.full((2, 1, 32, 32), 200.0))
