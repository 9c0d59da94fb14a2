"""Mixed precision of training: which one a device takes, and the scaling of the loss that float16 needs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nvae_fast.training.config import TrainingConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SHOWN = {None: "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast with a gradient scaler"}
# A gradient that overflows at this scale, or at a smaller one, does so because of the weights, not because of the scale.
_SMALLEST_SCALE = 1.0


def autocast(name: str | None, device: torch.device) -> torch.autocast:
    """Context manager for the network: None for full precision, "bf16" or "fp16". Raises ValueError for other names."""
    if name is not None and name not in DTYPES:
        raise ValueError(f"autocast must be None, 'bf16' or 'fp16', got {name!r}")
    return torch.autocast(device.type, dtype=DTYPES.get(name or "bf16"), enabled=name is not None)


def chosen(name: str | None, device: torch.device) -> str | None:
    """What "auto" means on a device: "bf16" on a GPU that computes in it, "fp16" on another GPU, None on a CPU; other names are
    what they say."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def resolved(config: TrainingConfig, device: torch.device) -> TrainingConfig:
    """`config` with its "auto" replaced by what it means on `device`, so that a checkpoint records what was computed."""
    name = chosen(config.autocast, device)
    return config if name == config.autocast else config.replace(autocast=name)


def described(name: str | None) -> str:
    """The precision of a run in words."""
    return _SHOWN[name]


class LossScaling:
    """PyTorch's gradient scaler (`torch.amp.GradScaler`) for a step that decides by itself whether it is undone.

    Small gradients are zero in float16: the loss is multiplied by a scale and the gradients are divided by it. The scale
    doubles after 2000 steps without overflow and is halved by each step with one. device: where the loss is.
    """

    def __init__(self, device: torch.device) -> None:
        self.scaler = torch.amp.GradScaler(device.type)

    @property
    def scale(self) -> float:
        """The present scale. Waits for the device."""
        return self.scaler.get_scale()

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss to differentiate."""
        result: Tensor = self.scaler.scale(loss)
        return result

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the optimizer's gradients by the scale, once per step, before anything looks at them."""
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step with gradients that are finite."""
        self.scaler.step(optimizer)
        self.scaler.update()

    def undone(self, *, loss_is_finite: bool) -> bool:
        """Adapt the scale to a step that was undone; returns whether the scale was too large, which explains the step.

        The scale has no part in a loss that is not finite, and is then left alone.
        """
        before = self.scale
        if not loss_is_finite:
            self.scaler.update(before)
            return False
        self.scaler.update()
        return self.scale < before and before > _SMALLEST_SCALE

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return self.scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state` returned. Raises ValueError for a scale that is none."""
        if not 0 < state["scale"] < math.inf:
            raise ValueError(f"its loss scale must be positive and finite, got {state['scale']!r}")
        self.scaler.load_state_dict(state)
