"""Images of a torch Dataset, a DataLoader or a tensor, as a source of an `ImageDataset`."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from .dataset import ImageDataset

# Rounding of float16 and of resizing stays within it.
_TOLERANCE = 0.01


def as_images(value: Any, name: str = "dataset") -> Any:
    """``value`` as data that training and evaluation read.

    value: an `ImageDataset` or an object with its `batch`, taken as it is; else a map-style torch Dataset, a DataLoader of one,
    or a tensor (N,C,H,W). An entry is an image (C,H,W), a floating-point tensor with values in [0,1], square, of 1 or 3
    channels, alone or first in a tuple. Images are read with 8 bits for each colour. name: of the argument, in messages. Raises
    TypeError or ValueError that says what was expected, what came and what to do.
    """
    if hasattr(value, "batch") and hasattr(value, "channels"):
        return value
    if isinstance(value, np.ndarray):
        raise TypeError(
            f"{name}: expected a Dataset of images, got numpy.ndarray: give a tensor (N, C, H, W) with values in [0, 1] "
            f"(torch.from_numpy), or save uint8 pixels with numpy.save and open them with nvae_fast.data.open_dataset"
        )
    if isinstance(value, DataLoader):
        value = _dataset_of(value, name)
    if isinstance(value, IterableDataset) or not (
        hasattr(value, "__getitem__") and hasattr(value, "__len__")
    ):
        raise TypeError(
            f"{name}: expected an ImageDataset, or a map-style Dataset with __getitem__ and __len__, got "
            f"{type(value).__name__}"
        )
    if not len(value):
        raise ValueError(f"{name}: {type(value).__name__} holds no images")
    return ImageDataset(TorchImages(value, name), split=str(getattr(value, "split", "train")), binarize=None)


def _dataset_of(loader: DataLoader[Any], name: str) -> Any:
    """The data set of a loader. Its order and batches are those of training; another choice of images cannot be kept."""
    if isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    sampler, dataset = cast(Any, loader.sampler), cast(Any, loader.dataset)
    if (
        loader.batch_size is None and loader.batch_sampler is not None
    ):  # a batch_sampler was given, which replaces sampler
        sampler = getattr(loader.batch_sampler, "sampler", loader.batch_sampler)
    plain = isinstance(sampler, SequentialSampler | RandomSampler)
    if not plain or len(sampler) != len(dataset) or getattr(sampler, "replacement", False):
        raise ValueError(
            f"{name}: the DataLoader chooses images with {type(sampler).__name__}, which training does not use: give "
            "the Dataset of the images to train on, such as a torch.utils.data.Subset"
        )
    return dataset


class TorchImages:
    """The images of a map-style data set, as 8-bit pixels; each is checked when it is read."""

    def __init__(self, dataset: Any, argument: str) -> None:
        self.dataset, self.argument = dataset, argument
        self.name = type(dataset).__name__
        self.skipped: list[tuple[str, str]] = []
        # One-channel images become black and white for a Bernoulli likelihood without a warning.
        self.binary_format = True
        first = self._image(0)
        self.shape: tuple[int, int, int] = (first.shape[0], first.shape[1], first.shape[2])

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, indices: np.ndarray) -> np.ndarray:
        out = np.empty((len(indices), *self.shape), dtype=np.uint8)
        for row, index in enumerate(indices.tolist()):
            image = self._image(index)
            if tuple(image.shape) != self.shape:
                raise ValueError(
                    f"{self.argument}[{index}]: expected an image of shape {self.shape} like the first one, got "
                    f"{tuple(image.shape)}: resize and crop the images to one size"
                )
            out[row] = (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        return out

    def _image(self, index: int) -> Tensor:
        where, item = f"{self.argument}[{index}]", self.dataset[index]
        if isinstance(item, tuple | list) and item:
            item = item[0]
        if not isinstance(item, Tensor):
            advice = (
                "return torch.from_numpy(image).permute(2, 0, 1) / 255 for uint8 pixels (H, W, C)"
                if isinstance(item, np.ndarray)
                else "give the data set a transform that returns tensors, such as torchvision.transforms.ToTensor()"
            )
            raise TypeError(
                f"{where}: expected a tensor (C, H, W), alone or first in a tuple, got {type(item).__name__}: {advice}"
            )
        if item.dim() != 3 or item.shape[0] not in (1, 3) or item.shape[1] != item.shape[2]:
            raise ValueError(
                f"{where}: expected a square image (C, H, W) of 1 or 3 channels, got {tuple(item.shape)}"
            )
        if not item.is_floating_point():
            raise TypeError(
                f"{where}: expected floating-point values in [0, 1], got {item.dtype}: return image.float() / 255"
            )
        low, high = torch.stack(torch.aminmax(item.detach())).tolist()
        if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):  # also where there is a NaN
            advice = (
                "return image / 255"
                if low >= 0 and high <= 255.5
                else "leave transforms.Normalize out, or return (image + 1) / 2"
                if low >= -1 - _TOLERANCE
                else "undo the normalisation of the images"
            )
            raise ValueError(
                f"{where}: expected values in [0, 1], got values from {low:.4g} to {high:.4g}: {advice}"
            )
        return item
