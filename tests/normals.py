"""Raw parameters of normals, what is to be computed of them, and which operators did it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import Tensors
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.distributions import (
    Normal,
)

SIZE = (2, 3, 4, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
COPIES = ("cat", "copy", "clone", "contiguous")


class Operators(TorchDispatchMode):
    """The names of the operators that ran inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func).removesuffix(".default"))
        return func(*args, **(kwargs or {}))

    @property
    def ours(self) -> list[str]:
        return [name.removeprefix("nvae_fast.") for name in self.names if name.startswith("nvae_fast.")]

    @property
    def copies(self) -> list[str]:
        return [name for name in self.names if any(copy in name for copy in COPIES)]


def inputs(size: tuple[int, int, int, int] = SIZE) -> Tensors:
    """Packed posterior and prior, samples and noise."""
    b, z, h, w = size
    generator = torch.Generator().manual_seed(6)

    def draw(channels: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn((b, channels, h, w), generator=generator, dtype=torch.float64)

    return {"posterior": draw(2 * z, 2.0), "prior": draw(2 * z, 1.5), "samples": draw(z), "noise": draw(z)}


def squashed(packed: torch.Tensor, temp: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    mu, log_sigma = packed.chunk(2, dim=1)
    return 5 * torch.tanh(mu / 5), temp * (torch.exp(5 * torch.tanh(log_sigma / 5)) + 0.01)


def kl_formula(posterior: torch.Tensor, prior: torch.Tensor, temps: tuple = (1.0, 1.0)) -> torch.Tensor:
    (mu, sigma), (mu_o, sigma_o) = squashed(posterior, temps[0]), squashed(prior, temps[1])
    ratio = sigma / sigma_o
    return 0.5 * (((mu - mu_o) / sigma_o).square() + ratio.square()) - 0.5 - ratio.log()


def log_p_formula(posterior: torch.Tensor, samples: torch.Tensor, temp: float = 1.0) -> torch.Tensor:
    mu, sigma = squashed(posterior, temp)
    return -0.5 * ((samples - mu) / sigma).square() - 0.5 * math.log(2 * math.pi) - sigma.log()


def made(packed: torch.Tensor, temp: float = 1.0, how: str = "halves") -> Normal:
    if how == "packed":
        return Normal.from_packed(packed, temp)
    mu, log_sigma = packed.chunk(2, dim=1)
    if how == "apart":
        mu, log_sigma = mu.clone(), log_sigma.clone()
    return Normal(mu, log_sigma, temp)


hows = pytest.mark.parametrize("how", ["halves", "packed", "apart"])
