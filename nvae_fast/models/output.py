"""What a model returns."""

from __future__ import annotations

from typing import NamedTuple

import torch


class NVAEOutput(NamedTuple):
    """Result of a forward pass, for a batch of B images and G latent groups.

    A named tuple, so that DataParallel, FSDP and torch.export find the tensors. ``logits``: parameters of the likelihood
    (B, head_channels, H, W). ``kl`` (B, G) in nats. ``kl_per_channel``: per group, (Z,) mean over the batch of the KL summed
    over pixels (a monitor, no gradient: a latent channel counts as active above 0.1). ``log_q``, ``log_p`` (B,):
    log-densities of the sample under posterior and prior, summed over groups. ``z``: per group the latent variable
    (B, Z, H, W) that enters the decoder, after the flows where there are any.
    """

    logits: torch.Tensor
    kl: torch.Tensor
    kl_per_channel: list[torch.Tensor]
    log_q: torch.Tensor
    log_p: torch.Tensor
    z: list[torch.Tensor]
