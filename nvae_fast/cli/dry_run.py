"""`train --dry-run`: the configuration of a run, its parameters and the memory that a step needs."""

from __future__ import annotations

import json

import torch

from nvae_fast.models.config import NVAEConfig
from nvae_fast.models.nvae import NVAE
from nvae_fast.training.config import TrainingConfig

# Of every parameter: itself, its gradient and two states of the optimizer; with --ema the average as well.
_COPIES = 4


def describe(model_config: NVAEConfig, config: TrainingConfig) -> str:
    """All options as JSON, the number of parameters and the memory of a training step, on several lines."""
    with torch.device("meta"):
        model = NVAE(model_config).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    copies = _COPIES + (config.ema is not None)
    weights = 4 * parameters * copies
    images = -(-config.batch_size // config.accumulate)
    maps = activation_bytes(model, images)
    options = {"model": model_config.to_dict(), "training": config.to_dict()}
    return (
        f"{json.dumps(options, indent=2)}\n"
        f"{parameters} parameters in {model_config.num_groups} latent groups\n"
        f"estimated memory of a training step: {_size(weights + maps)} ({_size(weights)} for weights, gradients and optimizer, "
        f"{_size(maps)} for the feature maps of {images} images in float32 with plain PyTorch; fused operations keep fewer)"
    )


def activation_bytes(model: NVAE, images: int) -> int:
    """Bytes that autograd keeps of a forward pass in float32, with the operations of PyTorch, which are what runs on the meta
    device. model: on that device, in training mode."""
    config, kept = model.config, {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # which keeps it, so that no other one gets its address
        return tensor

    x = torch.empty(images, config.channels, config.resolution, config.resolution, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x, seed=0)
        model.reconstruction_loss(out.logits, x).sum() + out.kl.sum()
    return sum(storage.nbytes() for storage in kept.values())


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
