"""How well a model explains images: the evidence bound, and the tighter importance-weighted bound.

    log p(x)  >=  E log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x),     z_k ~ q(z | x)

For K = 1 this is the evidence lower bound with sampled KL; `negative_elbo` uses the analytic KL where there
is one. Memory does not grow with K: the sum over k is a running logsumexp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nvae_fast.training import seeds
from nvae_fast.training.objective import full_precision
from nvae_fast.training.pictures import evaluation

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE

# A latent channel is in use when it carries more than this many nats an image on average.
ACTIVE_CHANNEL_NATS = 0.1


@dataclass(frozen=True)
class Evaluation:
    """Averages over the images, in nats an image unless the name says bits per dimension.

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
    """`log 1/K sum_k exp(v_k)` of tensors that come one at a time, keeping two of their size."""

    def __init__(self) -> None:
        self.count = 0
        self._peak: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, value: Tensor) -> None:
        """Take in v_k; computed in float64."""
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
        """The result for everything added so far."""
        if self._peak is None or self._sum is None:
            raise ValueError("OnlineLogMeanExp: nothing was added")
        return self._peak + torch.log(self._sum) - math.log(self.count)


@torch.no_grad()
def importance_bound(
    model: NVAE, x: Tensor, samples: int, *, seed: int = 0, autocast: str | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The bound on log p(x) of every image, (B,) float64, from `samples` draws; model in evaluation mode.

    x: (B,C,H,W) in [0,1] on the model's device. autocast: None or "bf16", for the network alone. Also returns
    sums over the batch, averaged over the draws: "reconstruction", "kl", "kl_per_group" (G,),
    "kl_per_channel" (channels of all groups). seed: of the draws; the same seed gives the same bound.

        bound = logsumexp_k( log p(x | z_k) + log p(z_k) - log q(z_k | x) ) - log K,     z_k ~ q(z | x)

    Raises ValueError when samples is below 1. Burda, Grosse, Salakhutdinov, arXiv 1509.00519.
    """
    if samples < 1:
        raise ValueError(f"importance_bound: samples must be at least 1, got {samples}")
    bound = OnlineLogMeanExp()
    reconstruction: Any = 0.0
    per_group: Any = 0.0
    per_channel: Any = 0.0
    for k in range(samples):
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=autocast == "bf16"):
            out = model(x, seed=seeds.mix_seed(seed, k))
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
) -> Evaluation:
    """Evaluate `model` on `dataset`, the same numbers for the same seed and batch size.

    samples: K, draws of z for every image. batch_size: images at a time. seed: of the draws. max_images: only the
    first so many. autocast: None or "bf16". on_batch(images done, negative bound so far) is called after every
    batch. Raises ValueError for bad arguments. The model comes back in the mode it was in.
    """
    for name, value in (("samples", samples), ("batch_size", batch_size), ("max_images", max_images)):
        if value is not None and value < 1:
            raise ValueError(f"evaluate: {name} must be at least 1, got {value}")
    check_fit(model.config, dataset)
    total = len(dataset) if max_images is None else min(max_images, len(dataset))
    if total == 0:
        raise ValueError(f"evaluate: {dataset.name} has no images")
    device = next(model.parameters()).device
    # Sums over the images: numbers to begin with, tensors after the first batch.
    bound: Any = 0.0
    recon: Any = 0.0
    kl: Any = 0.0
    channels: Any = 0.0
    data_seed = seeds.mix_seed(seed, seeds.DATA)
    with evaluation(model):
        for start in range(0, total, batch_size):
            indices = torch.arange(start, min(start + batch_size, total))
            x = dataset.batch(indices, data_seed).to(device)
            values, sums = importance_bound(
                model, x, samples, seed=seeds.mix_seed(seed, seeds.EVALUATION, start), autocast=autocast
            )
            bound = bound + values.sum()
            recon = recon + sums["reconstruction"]
            kl = kl + sums["kl_per_group"]
            channels = channels + sums["kl_per_channel"]
            if on_batch is not None:
                done = int(indices[-1]) + 1
                on_batch(done, -float(bound) / done)
    kl_per_group = (kl / total).tolist()
    elbo = float(recon) / total + sum(kl_per_group)
    nll = -float(bound) / total
    dims = model.config.dims
    return Evaluation(
        images=total,
        samples=samples,
        negative_elbo=elbo,
        negative_elbo_bits_per_dim=bits_per_dim(elbo, dims),
        negative_log_likelihood=nll,
        negative_log_likelihood_bits_per_dim=bits_per_dim(nll, dims),
        reconstruction=float(recon) / total,
        kl=sum(kl_per_group),
        kl_per_group=kl_per_group,
        active_channels=int((channels / total > ACTIVE_CHANNEL_NATS).sum()),
        latent_channels=channels.numel(),
        seed=seed,
    )


def check_fit(model_config: Any, dataset: Any) -> None:
    """Raise ValueError when the images are not of the model's size or channels."""
    wanted = (model_config.channels, model_config.resolution, model_config.resolution)
    got = (dataset.channels, dataset.image_size, dataset.image_size)
    if wanted != got:
        raise ValueError(
            f"the model takes images of (channels, height, width) {wanted}, {dataset.name} has {got}: choose "
            "a preset or --dataset of that size, or set --image-size and --image-channels"
        )


def bits_per_dim(nats: float, dims: int) -> float:
    """Nats an image as bits per dimension: `nats / (log 2 * dims)`."""
    return nats / (math.log(2.0) * dims)
