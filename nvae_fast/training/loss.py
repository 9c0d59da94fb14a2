"""The loss of a training step as one module: network, likelihood, KL and regularisers over the images of all processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nvae_fast.nn.shared_weights import prepare_weights
from nvae_fast.training import precision
from nvae_fast.training.config import TrainingConfig
from nvae_fast.training.distributed import World
from nvae_fast.training.objective import balanced_kl, full_precision

if TYPE_CHECKING:
    from nvae_fast.models.nvae import NVAE


class Objective(nn.Module):
    """The loss as one module, so that DistributedDataParallel sees every use of a parameter."""

    def __init__(self, model: NVAE, config: TrainingConfig, world: World) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.world = world

    def forward(
        self,
        x: Tensor,
        seed: Tensor | int,
        coefficient: float | Tensor,
        weight: float | Tensor,
        count: float | Tensor | None = None,
        last: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """(loss, [loss, reconstruction, kl, spectral, batch_norm, KL of every latent channel]); the first carries the gradient.

        count: what the sums over images are divided by, by default how many there are. With the number of images of
        all parts and processes over the number of processes, the mean over processes of the sum over parts is the loss of
        the whole batch. last: False leaves the regularisers out: they belong to a step once.
        """
        with prepare_weights(self.model):
            return self._forward(x, seed, coefficient, weight, x.shape[0] if count is None else count, last)

    def _forward(
        self,
        x: Tensor,
        seed: Tensor | int,
        coefficient: float | Tensor,
        weight: float | Tensor,
        count: float | Tensor,
        last: bool,
    ) -> tuple[Tensor, Tensor]:
        with precision.autocast(self.config.autocast, x.device):
            out = self.model(x, seed=seed)
        # Likelihood and KL in full precision: they are sums over thousands of terms.
        reconstruction = self.model.reconstruction_loss(full_precision(out.logits), x)
        kl = full_precision(out.kl)
        if self.config.kl_balance:
            weighted = balanced_kl(kl, coefficient, self.model.config, average=self._average(kl))
        else:
            weighted = _as(coefficient, kl) * kl.sum(1)
        loss = (reconstruction + weighted).sum() / count
        parts = [reconstruction.sum() / count, kl.sum() / count]
        if last:
            spectral, batch_norm = self.model.regularization()
            penalty = spectral + batch_norm
            loss = loss + _as(weight, penalty) * penalty
            parts += [spectral.to(loss), batch_norm.to(loss)]
        else:
            parts += [torch.zeros_like(loss)] * 2
        # A mean over this process's images; without images it is NaN.
        channels = torch.cat(out.kl_per_channel).to(loss) * (x.shape[0] / count)
        channels = channels if x.shape[0] else torch.zeros_like(channels)
        return loss, torch.cat([torch.stack([loss, *parts]).detach(), channels])

    def _average(self, kl: Tensor) -> Callable[[Tensor], Tensor] | None:
        """A function from the mean |KL| of the groups on this process to that of all images; None with a single process."""
        if self.world.size == 1:
            return None
        sums = kl.detach().abs().sum(0)
        everyone = self.world.sum(torch.cat([sums, sums.new_full((1,), kl.shape[0])]))
        return lambda mean: everyone[:-1] / everyone[-1].clamp_min(1)


def _as(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A 0-d tensor in the dtype of `like`, so that it does not widen the result; a number as it is."""
    return value.to(like.dtype) if isinstance(value, Tensor) else value
