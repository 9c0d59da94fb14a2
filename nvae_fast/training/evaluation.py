"""Likelihood bounds of images under a model: the evidence bound, and the tighter importance-weighted bound.

    log p(x)  >=  E log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x),     z_k ~ q(z | x)

For K = 1 this is the evidence lower bound with sampled KL; `negative_elbo` uses the analytic KL where there is
one. Memory does not grow with K: the sum over k is a running logsumexp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.data.torch_dataset import as_images
from nvae_fast.models.frozen import freeze
from nvae_fast.ops import _checks
from nvae_fast.training import precision, seeds
from nvae_fast.training.distributed import World, fingerprint
from nvae_fast.training.objective import full_precision

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

# A latent channel is in use when it carries more than this many nats per image on average.
ACTIVE_CHANNEL_NATS = 0.1


@dataclass(frozen=True)
class Evaluation:
    """Averages over the images, in nats per image unless the name says bits per dimension.

    images, samples, seed: how many images, draws of z for each, and the seed the numbers belong to. negative_elbo,
    negative_elbo_bits_per_dim: `reconstruction + kl`, the KL analytic where there is one. negative_log_likelihood,
    negative_log_likelihood_bits_per_dim: the importance-weighted bound with `samples` draws. reconstruction: -log p(x | z).
    kl, kl_per_group: of all groups, and of each (G,), coarsest scale first. active_channels, latent_channels: latent
    channels that carry more than 0.1 nats, and all of them.
    """

    images: int
    samples: int
    negative_elbo: float
    negative_elbo_bits_per_dim: float
    negative_log_likelihood: float
    negative_log_likelihood_bits_per_dim: float
    reconstruction: float
    kl: float
    kl_per_group: list[float]
    active_channels: int
    latent_channels: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class OnlineLogMeanExp:
    """`log 1/K sum_k exp(v_k)` of tensors that are added one at a time; keeps two tensors of their size."""

    def __init__(self) -> None:
        self.count = 0
        self._peak: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """Add v_k, in float64."""
        value = value.double()
        self.count += 1
        if self._peak is None or self._sum is None:
            self._peak, self._sum = value.clone(), torch.ones_like(value)
            return
        peak = torch.maximum(self._peak, value)
        # Where both are -inf their difference is NaN, though the sum of two zeros is well defined.
        base = torch.where(torch.isinf(peak) & (peak < 0), torch.zeros_like(peak), peak)
        self._sum = self._sum * torch.exp(self._peak - base) + torch.exp(value - base)
        self._peak = peak

    def value(self) -> Tensor:
        """The result for all tensors added so far."""
        if self._peak is None or self._sum is None:
            raise ValueError("OnlineLogMeanExp: nothing was added")
        return self._peak + torch.log(self._sum) - math.log(self.count)


@torch.no_grad()
def importance_bound(
    model: NVAE, x: Tensor, samples: int, *, seed: int | Sequence[int] = 0, autocast: str | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The bound on log p(x) of every image, (B,) float64, from `samples` draws; model in evaluation mode.

    x: (B,C,H,W) in [0,1] on the model's device. seed: of the draws, one for the batch or one per image; with one per image,
    the noise of an image does not depend on the rest of the batch. autocast: None, "bf16" or "fp16", for the network alone.
    Also returns sums over the batch, averaged over the draws: "reconstruction", "kl", "kl_per_group" (G,),
    "kl_per_channel" (channels of all groups).

        bound = logsumexp_k( log p(x | z_k) + log p(z_k) - log q(z_k | x) ) - log K,     z_k ~ q(z | x)

    Raises ValueError when samples is below 1, or when there are neither one nor B seeds. Burda, Grosse, Salakhutdinov,
    arXiv 1509.00519.
    """
    if samples < 1:
        raise ValueError(f"importance_bound: samples must be at least 1, got {samples}")
    if not isinstance(x, Tensor):
        raise TypeError(
            f"importance_bound: x must be a torch.Tensor, got {type(x).__name__}" + _checks.how_to_convert(x)
        )
    if not isinstance(seed, int) and len(seed) != x.shape[0]:
        raise ValueError(f"importance_bound: seed must be one number or {x.shape[0]}, got {len(seed)}")
    bound = OnlineLogMeanExp()
    reconstruction: Any = 0.0
    per_group: Any = 0.0
    per_channel: Any = 0.0
    for k in range(samples):
        with precision.autocast(autocast, x.device):
            out = model(x, seed=_draw_seed(seed, k, x.device))
        # The likelihood in full precision: it is a sum over all pixels.
        recon = model.reconstruction_loss(full_precision(out.logits), x)
        bound.add(out.log_p.double() - out.log_q.double() - recon.double())
        reconstruction = reconstruction + recon.double().sum()
        per_group = per_group + out.kl.double().sum(0)
        per_channel = per_channel + torch.cat([c.double() for c in out.kl_per_channel]) * x.shape[0]
    sums = {
        "reconstruction": reconstruction / samples,
        "kl_per_group": per_group / samples,
        "kl_per_channel": per_channel / samples,
    }
    sums["kl"] = sums["kl_per_group"].sum()
    return bound.value(), sums


def _draw_seed(seed: int | Sequence[int], k: int, device: torch.device) -> int | Tensor:
    if isinstance(seed, int):
        return seeds.mix_seed(seed, k)
    return torch.tensor([seeds.mix_seed(own, k) for own in seed], dtype=torch.int64).to(device)


def evaluate(
    model: NVAE,
    dataset: Any,
    *,
    samples: int = 1,
    batch_size: int = 32,
    seed: int = 0,
    max_images: int | None = None,
    autocast: str | None = None,
    on_batch: Callable[[int, float], None] | None = None,
    world: World | None = None,
) -> Evaluation:
    """Evaluate `model` on `dataset`. The noise of an image depends only on the seed and the index of the image: another batch
    size gives the same numbers up to rounding, another number of processes exactly the same numbers.

    dataset: an `ImageDataset`; or a map-style torch Dataset of images (C,H,W) in [0,1], alone or first in a tuple; or a
    DataLoader of one; or a tensor (N,C,H,W). samples: K, draws of z for every image. batch_size: images at a time. seed: of
    the draws. max_images: only the first images. autocast: None, "bf16" or "fp16". on_batch(images done, negative bound so
    far) is called after every batch, the same number of times on each process; an exception that it raises on all of them
    ends the evaluation. world: processes among which the images are divided; each returns the whole result. Raises ValueError
    for bad arguments, on every process when they differ. A frozen copy of the model computes (:func:`nvae_fast.freeze`); the
    model itself is not changed.
    """
    samples, batch_size = (
        _checks.whole("evaluate", "samples", samples),
        _checks.whole("evaluate", "batch_size", batch_size),
    )
    seed = _checks.whole("evaluate", "seed", seed)
    max_images = None if max_images is None else _checks.whole("evaluate", "max_images", max_images)
    for name, value in (("samples", samples), ("batch_size", batch_size), ("max_images", max_images)):
        if value is not None and value < 1:
            raise ValueError(f"evaluate: {name} must be at least 1, got {value}")
    dataset = fitted(model.config, dataset)
    total = len(dataset) if max_images is None else min(max_images, len(dataset))
    if total == 0:
        raise ValueError(f"evaluate: {dataset.name} has no images")
    frozen: Any = freeze(model)
    device: torch.device = frozen.top_feature.device
    world = world or World()
    if world.size > 1:
        world.agree(
            {
                "the number of images": len(dataset),
                "samples": samples,
                "batch_size": batch_size,
                "seed": seed,
                "max_images": max_images,
                "autocast": autocast,
                "the model's options": model.config.to_dict(),
                "the model's weights": fingerprint(model.state_dict()),
            }
        )
    data_seed = seeds.mix_seed(seed, seeds.DATA)
    # One row per batch: bound, reconstruction, KL of every group, of every channel. The batches are those of a single process,
    # and rows are added in order, so that the sums do not depend on the number of processes, bit for bit.
    starts = range(0, total, batch_size)
    groups, latent = model.config.num_groups, model.config.num_latent_per_group
    table = torch.zeros(len(starts), 2 + groups + groups * latent, dtype=torch.float64, device=device)
    mine = 0
    for first in range(0, len(starts), world.size):
        row = first + world.rank
        if row < len(starts):
            indices = torch.arange(starts[row], min(starts[row] + batch_size, total))
            x = dataset.batch(indices, data_seed).to(device)
            own = [seeds.mix_seed(seed, seeds.EVALUATION, int(i)) for i in indices]
            values, sums = importance_bound(frozen, x, samples, seed=own, autocast=autocast)
            head = torch.stack([values.sum(), sums["reconstruction"]])
            table[row] = torch.cat([head, sums["kl_per_group"], sums["kl_per_channel"]])
            mine += len(indices)
        if on_batch is not None:
            done = min((first + world.size) * batch_size, total)
            on_batch(done, -float(table[:, 0].sum()) / mine if mine else math.nan)
    means = world.sum(table).sum(0).cpu() / total
    bound, recon = means[:2].tolist()
    kl_per_group = means[2 : 2 + groups].tolist()
    channels = means[2 + groups :]
    elbo, nll = recon + sum(kl_per_group), -bound
    dims = model.config.dims
    return Evaluation(
        images=total,
        samples=samples,
        negative_elbo=elbo,
        negative_elbo_bits_per_dim=bits_per_dim(elbo, dims),
        negative_log_likelihood=nll,
        negative_log_likelihood_bits_per_dim=bits_per_dim(nll, dims),
        reconstruction=recon,
        kl=sum(kl_per_group),
        kl_per_group=kl_per_group,
        active_channels=int((channels > ACTIVE_CHANNEL_NATS).sum()),
        latent_channels=channels.numel(),
        seed=seed,
    )


def check_fit(model_config: Any, dataset: Any) -> None:
    """Raise ValueError when the images are not of the model's size or channels."""
    wanted = (model_config.channels, model_config.resolution, model_config.resolution)
    got = (dataset.channels, dataset.image_size, dataset.image_size)
    if wanted != got:
        raise ValueError(
            f"the model takes images of (channels, height, width) {wanted}, {dataset.name} has {got}: set "
            "image_size and image_channels (--image-size and --image-channels) of the model to those of the images"
        )


def fitted(model_config: Any, dataset: Any, name: str = "dataset") -> Any:
    """`dataset` as the model takes its images: binarised or not, with its bits per colour. Raises as :func:`check_fit` and
    :func:`as_images`."""
    dataset = as_images(dataset, name)
    check_fit(model_config, dataset)
    if not hasattr(dataset, "for_model"):  # a dataset of the user's own class
        return dataset
    return dataset.for_model(model_config.likelihood_name, model_config.num_x_bits)


def bits_per_dim(nats: float, dims: int) -> float:
    """Convert nats per image to bits per dimension: `nats / (log 2 * dims)`."""
    return nats / (math.log(2.0) * dims)
