"""Frechet inception distance (FID) and kernel inception distance (KID) between a model's images and a dataset's.

    extract = load_inception("weights-inception-2015-12-05-6726825d.pth")
    real = dataset_statistics(dataset, extract)
    drawn = model_statistics(model, extract, 50_000)
    fid = frechet_distance(drawn, real)

The feature extractor is InceptionV3 of torch-fidelity, with weights from a local file; nothing is downloaded. Images are
streamed: the features of a batch update their mean and covariance and are dropped. Heusel et al., arXiv 1706.08500;
Binkowski et al., arXiv 1801.01401.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nvae_fast.io import atomic_file
from nvae_fast.training.distributed import World
from nvae_fast.training.pictures import chosen_pixels
from nvae_fast.training.sampler import Sampler

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

LAYERS = ("64", "192", "768", "2048")
INSTALL = "pip install torch-fidelity"

Extractor = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    mu, sigma: float64 arrays (D,) and (D,D); the covariance is the unbiased one. images: how many images, None when the
    file did not say. facts: where the images and the features came from, plain values. features: the features
    themselves, float32 (N,D), where they were kept.
    """

    mu: np.ndarray
    sigma: np.ndarray
    images: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    features: Tensor | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `mu` and `sigma` to an .npz file, as other FID programs read it, with `images` and `facts` beside them.

        path: of the file, which takes its name only when it is whole.
        """
        with atomic_file(path) as handle:
            facts = json.dumps({**self.facts, "images": self.images})
            np.savez(handle, mu=self.mu, sigma=self.sigma, facts=np.array(facts))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FeatureStatistics:
        """Read an .npz file with `mu` (D,) and `sigma` (D,D), ours or that of another FID program.

        path: of the file. Raises FileNotFoundError, or ValueError when an array is missing, not floating point, of
        another shape or not finite, or when `sigma` is no covariance.
        """
        name = f"path (--stats): {os.fspath(path)}"
        arrays = _read_arrays(path, name)
        mu, sigma = arrays["mu"], arrays["sigma"]
        if mu.ndim != 1 or mu.size == 0 or sigma.shape != (mu.size, mu.size):
            raise ValueError(f"{name}: expected mu (D,) and sigma (D,D), got {mu.shape} and {sigma.shape}")
        for key, array in (("mu", mu), ("sigma", sigma)):
            if array.dtype not in (np.float32, np.float64):
                raise ValueError(f"{name}: {key} must be float32 or float64, got {array.dtype}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name}: {key} holds values that are not finite")
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
        variances = sigma.diagonal()
        if variances.min() < 0 or np.abs(sigma - sigma.T).max() > 1e-4 * variances.max():
            raise ValueError(
                f"{name}: sigma is no covariance, which is symmetric with a diagonal of at least 0"
            )
        try:
            facts = dict(json.loads(str(arrays["facts"]))) if "facts" in arrays else {}
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{name}: facts, which nvae_fast writes as JSON, cannot be read: {error}"
            ) from error
        return cls(mu, sigma, facts.pop("images", None), facts)


class Moments:
    """Mean and sum of squared deviations of vectors that come in batches, in float64 (Chan's formula)."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, batch: Tensor) -> None:
        """Take in vectors (N,D). Raises ValueError when one is not finite."""
        if not batch.shape[0]:
            return
        batch = batch.double()
        if not torch.isfinite(batch).all():
            raise ValueError(
                "the features of some images are not finite: check the weights given with --inception, and the images"
            )
        if self._mean is None or self._squares is None:
            self._mean = batch.new_zeros(batch.shape[1])
            self._squares = batch.new_zeros(batch.shape[1], batch.shape[1])
        mean = batch.mean(0)
        batch = batch - mean
        shift = mean - self._mean
        total = self.count + batch.shape[0]
        self._squares.addmm_(batch.T, batch)
        self._squares.addr_(shift, shift, alpha=self.count * batch.shape[0] / total)
        self._mean += shift * (batch.shape[0] / total)
        self.count = total

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, unbiased covariance). Raises ValueError for fewer than two vectors."""
        if self._mean is None or self._squares is None or self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self._mean.cpu().numpy(), (self._squares / (self.count - 1)).cpu().numpy()


class Inception(nn.Module):
    """Features of InceptionV3 as torch-fidelity computes them: uint8 images (N,3,H,W) to float32 (N,D)."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """The features of a batch."""
        return self.network(images)[0]


def load_inception(
    path: str | os.PathLike[str], *, layer: str = "2048", device: str | torch.device = "cpu"
) -> nn.Module:
    """The InceptionV3 of torch-fidelity with weights from a file: a module that takes uint8 images (N,3,H,W) to (N,D).

    path: the state dict that FID programs for PyTorch use (torch-fidelity's `weights-inception-2015-12-05-6726825d.pth` or
    pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`, which hold the same weights). layer: "64", "192", "768" or
    "2048", which is the FID that papers report; the number is D. device: where to compute. Nothing is downloaded.
    Raises FileNotFoundError, ImportError with the command to run when torch-fidelity is missing, ValueError for
    another layer or weights that do not fit.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer (--layer) must be one of {', '.join(LAYERS)}, got {layer!r}")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path (--inception): no file of InceptionV3 weights at {file}")
    library = _library()
    try:
        # The library reads the file again, without this restriction to tensors.
        torch.load(file, map_location="cpu", weights_only=True)
        network = library.FeatureExtractorInceptionV3(
            "inception-v3-compat", [layer], feature_extractor_weights_path=str(file)
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[:2]
        raise ValueError(
            f"path (--inception): {file} does not hold the weights of the InceptionV3 of FID, as in torch-fidelity's "
            f"weights-inception-2015-12-05-6726825d.pth: {' '.join(line.strip() for line in reason)[:200]}"
        ) from error
    return Inception(network).to(device)


def dataset_statistics(
    dataset: Any,
    extract: Extractor,
    *,
    max_images: int | None = None,
    batch_size: int = 32,
    keep_features: bool = False,
    on_batch: Callable[[int], None] | None = None,
    world: World | None = None,
) -> FeatureStatistics:
    """The statistics of the features of a dataset's images.

    dataset: an `ImageDataset`; open it with `num_bits=8, binarize=False` for the images as they are. extract: takes uint8
    images (N,3,H,W) on the device of its weights, returns features (N,D); :func:`load_inception` makes it. max_images: only
    the first so many. batch_size: images at a time. keep_features: keep them for :func:`kernel_distance`, on the first
    process. on_batch(images done) is called after every batch. world: several processes share the images out, each
    returns the whole result, bit for bit that of one. Raises ValueError for bad arguments or features that are not finite.
    """
    total = len(dataset) if max_images is None else min(max_images, len(dataset))

    def read(first: int, count: int) -> Tensor:
        return dataset.batch(torch.arange(first, first + count), 0)

    return _statistics("dataset_statistics", read, total, extract, batch_size, keep_features, on_batch, world)


def model_statistics(
    model: NVAE,
    extract: Extractor,
    number: int,
    *,
    temperature: float | Sequence[float] = 1.0,
    pixel_temperature: float = 1.0,
    pixels: str = "auto",
    seed: int = 0,
    batch_size: int = 32,
    keep_features: bool = False,
    on_batch: Callable[[int], None] | None = None,
    world: World | None = None,
) -> FeatureStatistics:
    """The statistics of the features of images drawn from a model, in memory that does not grow with their number.

    model: an NVAE. extract: see :func:`dataset_statistics`. number: images to draw, at least 2. temperature,
    pixel_temperature, pixels: as in `python -m nvae_fast sample`, of whose images these are the statistics. seed: image i
    depends on (seed, i) alone. batch_size, keep_features, on_batch, world: see :func:`dataset_statistics`. Raises
    ValueError for bad arguments or features that are not finite.
    """
    pixels = chosen_pixels(model, pixels)
    sampler = Sampler(model, temperature=temperature, pixel_temperature=pixel_temperature, pixels=pixels)

    def draw(first: int, count: int) -> Tensor:
        return sampler(count, seed=seed, first=first).float()

    return _statistics("model_statistics", draw, number, extract, batch_size, keep_features, on_batch, world)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """The Frechet distance between two normal distributions: the FID when these are of Inception features.

        |mu_1 - mu_2|^2 + tr(sigma_1) + tr(sigma_2) - 2 tr((sigma_1 sigma_2)^(1/2))

    first, second: their statistics, of the same number of features. The trace of the root is the sum of the roots of the
    eigenvalues, as in torch-fidelity. Raises ValueError for statistics of different sizes.
    """
    if first.mu.shape != second.mu.shape:
        raise ValueError(
            f"frechet_distance: both must have as many features, got {first.mu.size} and {second.mu.size}"
        )
    shift = first.mu - second.mu
    eigenvalues = np.linalg.eigvals(first.sigma @ second.sigma).astype(np.complex128)
    traces = np.trace(first.sigma) + np.trace(second.sigma)
    return float(shift @ shift + traces - 2 * np.sqrt(eigenvalues).real.sum())


def kernel_distance(
    first: FeatureStatistics,
    second: FeatureStatistics,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """The kernel inception distance (KID) as torch-fidelity computes it: (mean, standard deviation) over random subsets.

    first, second: statistics with their features (`keep_features=True`). subsets, size: how many subsets, and images in
    each. seed: of their choice, below 2^32. Raises ValueError when there are no features or fewer images than `size`,
    ImportError with the command to run when torch-fidelity is missing.
    """
    _library()
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    if first.features is None or second.features is None:
        raise ValueError("kernel_distance: both statistics must have their features: keep_features=True")
    fewest = min(len(first.features), len(second.features))
    if not 1 < size <= fewest:
        raise ValueError(
            f"kernel_distance: size (--kid) must be from 2 to {fewest}, the number of images, got {size}"
        )
    found = kid_features_to_metric(
        first.features,
        second.features,
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


@torch.no_grad()
def _statistics(
    name: str,
    images: Callable[[int, int], Tensor],
    total: int,
    extract: Extractor,
    batch_size: int,
    keep_features: bool,
    on_batch: Callable[[int], None] | None,
    world: World | None,
) -> FeatureStatistics:
    """The statistics of `total` images; images(first, count) makes (count,C,H,W) in [0,1]."""
    world = world or World()
    weights = [*extract.parameters(), *extract.buffers()] if isinstance(extract, nn.Module) else []
    device = weights[0].device if weights else world.device
    if batch_size < 1:
        raise ValueError(f"{name}: batch_size must be at least 1, got {batch_size}")
    if total < 2:
        raise ValueError(f"{name}: a covariance needs at least 2 images, got {total}")
    world.agree({"the number of images": total, "--batch-size": batch_size})
    moments, kept, width = Moments(), [], 0
    for start in range(0, total, batch_size * world.size):
        # Batches are those of one process, dealt out in turn and taken in order: the sums are bit for bit the same.
        mine = start + batch_size * world.rank
        count = min(batch_size, max(total - mine, 0))
        found = _features(name, images(mine, count), extract, device) if count else None
        if world.size == 1 and found is not None:
            blocks = [found]
        else:
            width = width or int(world.largest(0 if found is None else found.shape[1])[0])
            padded = torch.zeros(batch_size, width, dtype=torch.float64, device=device)
            if found is not None:
                padded[:count] = found
            left = [min(batch_size, max(total - start - r * batch_size, 0)) for r in range(world.size)]
            blocks = [block[:size] for block, size in zip(world.gather(padded), left, strict=True)]
        for block in blocks:
            moments.add(block)
        if keep_features and world.is_main:
            kept += [block.float().cpu() for block in blocks]
        if on_batch is not None:
            on_batch(min(start + batch_size * world.size, total))
    mu, sigma = moments.result()
    return FeatureStatistics(mu, sigma, total, features=torch.cat(kept) if kept else None)


def _features(name: str, images: Tensor, extract: Extractor, device: torch.device) -> Tensor:
    """The features (N,D) of images (N,C,H,W) in [0,1], as the uint8 colours that are in a picture file of them."""
    pixels = (images * 255).round().clamp(0, 255).to(device, torch.uint8).expand(-1, 3, -1, -1)
    found = extract(pixels)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.shape[:-1] != (len(pixels),):
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"{name}: extract must return floating-point features (N,D) of {len(pixels)} images, got {got}"
        )
    return found


def _read_arrays(path: str | os.PathLike[str], name: str) -> dict[str, np.ndarray]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array without a name")
        with archive:
            found: dict[str, np.ndarray] = {
                key: archive[key] for key in ("mu", "sigma", "facts") if key in archive.files
            }
    except FileNotFoundError:
        raise FileNotFoundError(f"no {name}") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{name}: not an .npz file of mu and sigma that can be read: {error}") from error
    missing = [key for key in ("mu", "sigma") if key not in found]
    if missing:
        raise ValueError(f"{name}: no array {' and no array '.join(missing)} in it")
    return found


def _library() -> Any:
    """The torch_fidelity module."""
    try:
        import torch_fidelity
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another PyTorch
        raise ImportError(
            f"FID and KID need torch-fidelity, which could not be imported ({error}): {INSTALL}"
        ) from error
    return torch_fidelity
