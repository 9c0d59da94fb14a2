"""Likelihoods of the decoder's output: log_prob, sample, mean (specification section 6). Images are in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from nvae_fast.models.seeds import check_per_image, is_per_image
from nvae_fast.ops import _checks
from nvae_fast.ops._pixels import check_unit_range
from nvae_fast.ops._squash import soft_clamp, unpack
from nvae_fast.ops.mixture_logistic import (
    mixture_logistic_log_prob,
    mixture_logistic_mean,
    mixture_logistic_sample,
    uniform,
)
from nvae_fast.ops.normal_log_prob import normal_log_prob
from nvae_fast.ops.normal_sample import normal_sample
from nvae_fast.ops.philox import as_seed

__all__ = ["Bernoulli", "Likelihood", "MixtureLogistic", "Normal"]


class Likelihood(Protocol):
    """Result of :meth:`nvae_fast.NVAE.likelihood`: one of the classes of this module."""

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-probability (log-density for the normal) of x (B, C, H, W) in [0, 1]: (B, H, W) in nats."""
        ...

    def sample(self, temperature: float = 1.0, seed: int | torch.Tensor | None = None) -> torch.Tensor:
        """An image (B, C, H, W) in [0, 1].

        Args:
            temperature: > 0, a factor on the noise.
            seed: int or 0-d int64 tensor of the Philox stream; None takes one from the device's default generator. An
                int64 tensor (B,) holds one per image, whose draw then does not depend on the rest of the batch.
        """
        ...

    def mean(self) -> torch.Tensor:
        """The mean image (B, C, H, W) in [0, 1]."""
        ...


def _check_range(op: str, x: torch.Tensor) -> None:
    """ValueError unless x is in [0, 1]; not on a GPU, which every call would wait for."""
    if isinstance(x, torch.Tensor) and not x.is_cuda:
        check_unit_range(op, "x", x)


def _each(
    params: torch.Tensor,
    seeds: torch.Tensor,
    draw: Callable[[torch.Tensor, torch.Tensor | int], torch.Tensor],
) -> torch.Tensor:
    """Images drawn one by one, each from the stream of its own seed."""
    check_per_image("sample", seeds, params.shape[0], params.device)
    images = (
        [draw(part, seed) for part, seed in zip(params.split(1), seeds.unbind(), strict=True)]
        if len(seeds)
        else []
    )
    return torch.cat(images) if images else draw(params, 0)


class Bernoulli:
    """Independent binary pixels with the given ``logits`` (B, C, H, W): ``p(x = 1) = sigmoid(logits)``.

    Raises:
        TypeError, ValueError: ``logits`` is not a floating (B, C, H, W) tensor.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        _checks.feature_map("Bernoulli", "logits", logits)
        self.logits = logits.to(_checks.accumulate_dtype(logits.dtype))

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-probability in nats of ``x`` (B, C, H, W) in [0, 1], summed over channels: (B, H, W).

        Raises:
            TypeError, ValueError: ``x`` is not such a floating tensor on the parameters' device.
        """
        _checks.shape("Bernoulli.log_prob", "x", x, tuple(self.logits.shape), self.logits)
        _check_range("Bernoulli.log_prob", x)
        return -F.binary_cross_entropy_with_logits(
            self.logits, x.to(self.logits.dtype), reduction="none"
        ).sum(1)

    def sample(self, temperature: float = 1.0, seed: int | torch.Tensor | None = None) -> torch.Tensor:
        """An image (B, C, H, W) in [0, 1]; ``temperature`` and ``seed`` as in :meth:`Likelihood.sample`.

        Raises:
            TypeError, ValueError: ``temperature`` or ``seed`` is something else.
        """
        _checks.temperature("Bernoulli.sample", temperature, zero=False)
        if is_per_image(seed):
            return _each(self.logits, seed, lambda part, own: Bernoulli(part).sample(temperature, own))
        u = uniform(as_seed(seed, self.logits.device), tuple(self.logits.shape), self.logits.dtype)
        return (u < torch.sigmoid(self.logits / temperature)).to(self.logits.dtype)

    def mean(self) -> torch.Tensor:
        """The mean image (B, C, H, W) in [0, 1]."""
        return torch.sigmoid(self.logits)


class MixtureLogistic:
    """Mixture of discretised logistics; formulas on the page of :func:`nvae_fast.mixture_logistic_log_prob`.

    Args:
        params: (B, 10 M, H, W), checked when they are used.
        num_mixtures: M.
        num_bits: bits per colour.
    """

    def __init__(self, params: torch.Tensor, num_mixtures: int, num_bits: int) -> None:
        self.params, self.num_mixtures, self.num_bits = params, num_mixtures, num_bits

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-probability in nats of ``x`` (B, C, H, W) in [0, 1], summed over channels: (B, H, W).

        Raises:
            TypeError, ValueError: ``x`` is not such a floating tensor on the parameters' device.
        """
        _check_range("MixtureLogistic.log_prob", x)
        return mixture_logistic_log_prob(
            self.params, x, num_mixtures=self.num_mixtures, num_bits=self.num_bits
        )

    def sample(self, temperature: float = 1.0, seed: int | torch.Tensor | None = None) -> torch.Tensor:
        """An image (B, C, H, W) in [0, 1]; ``temperature`` and ``seed`` as in :meth:`Likelihood.sample`.

        Raises:
            TypeError, ValueError: ``temperature`` or ``seed`` is something else.
        """
        if is_per_image(seed):
            make = partial(MixtureLogistic, num_mixtures=self.num_mixtures, num_bits=self.num_bits)
            return _each(self.params, seed, lambda part, own: make(part).sample(temperature, own))
        return mixture_logistic_sample(
            self.params, num_mixtures=self.num_mixtures, temperature=temperature, seed=seed
        )

    def mean(self) -> torch.Tensor:
        """The mean image (B, C, H, W) in [0, 1]."""
        return mixture_logistic_mean(self.params, num_mixtures=self.num_mixtures)


class Normal:
    """Independent normal pixels of ``2x - 1`` with packed raw ``params`` (B, 2C, H, W), squashed as in
    :func:`nvae_fast.normal_log_prob`; no Jacobian.

    Raises:
        TypeError, ValueError: ``params`` is not a floating (B, 2C, H, W) tensor.
    """

    def __init__(self, params: torch.Tensor) -> None:
        _checks.packed("Normal", "params", params)
        self.params = params.to(_checks.accumulate_dtype(params.dtype))

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """Log-probability in nats of ``x`` (B, C, H, W) in [0, 1], summed over channels: (B, H, W).

        Raises:
            TypeError, ValueError: ``x`` is not such a floating tensor on the parameters' device.
        """
        b, channels, h, w = self.params.shape
        _checks.shape("Normal.log_prob", "x", x, (b, channels // 2, h, w), self.params)
        _check_range("Normal.log_prob", x)
        # The operator sums over pixels; one "pixel" per batch entry keeps them apart: (B, 2C, H, W) -> (B H W, 2C, 1, 1).
        value = (
            (2.0 * x.to(self.params.dtype) - 1.0).permute(0, 2, 3, 1).reshape(b * h * w, channels // 2, 1, 1)
        )
        params = self.params.permute(0, 2, 3, 1).reshape(b * h * w, channels, 1, 1)
        return normal_log_prob(value, params).sum(1).view(b, h, w)

    def sample(self, temperature: float = 1.0, seed: int | torch.Tensor | None = None) -> torch.Tensor:
        """An image (B, C, H, W) in [0, 1]; ``temperature`` and ``seed`` as in :meth:`Likelihood.sample`.

        Raises:
            TypeError, ValueError: ``temperature`` or ``seed`` is something else.
        """
        if is_per_image(seed):
            return _each(self.params, seed, lambda part, own: Normal(part).sample(temperature, own))
        return self._to_image(normal_sample(self.params, temperature=temperature, seed=seed))

    def mean(self) -> torch.Tensor:
        """The mean image (B, C, H, W) in [0, 1]."""
        return self._to_image(soft_clamp(unpack(self.params)[0], 5.0))

    @staticmethod
    def _to_image(value: torch.Tensor) -> torch.Tensor:
        return (value * 0.5 + 0.5).clamp(0.0, 1.0)
