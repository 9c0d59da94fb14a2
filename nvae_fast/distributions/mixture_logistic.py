"""The mixture of logistics of :mod:`nvae_fast.distributions`."""

from __future__ import annotations

import torch

from nvae_fast.distributions.gaussian_pair import Seed
from nvae_fast.ops import _checks
from nvae_fast.ops.mixture_logistic import (
    mixture_logistic_log_prob,
    mixture_logistic_mean,
    mixture_logistic_sample,
)


class DiscMixLogistic:
    """Mixture of discretised logistics over RGB pixels; formulas on the page of
    :func:`nvae_fast.mixture_logistic_log_prob`.

    Args:
        param: (B, 10 * num_mix, H, W).
        num_mix: components. num_bits: bits per colour, 1 to 16.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
    """

    def __init__(self, param: torch.Tensor, num_mix: int = 10, num_bits: int = 8) -> None:
        num_mix, num_bits = _checks.plain(num_mix), _checks.plain(num_bits)
        for name, value, most in (("num_mix", num_mix, None), ("num_bits", num_bits, 16)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"DiscMixLogistic: {name} must be an int, got {type(value).__name__}")
            if value < 1 or (most is not None and value > most):
                bounds = ">= 1" if most is None else f"between 1 and {most}"
                raise ValueError(f"DiscMixLogistic: {name} must be {bounds}, got {value}")
        _checks.feature_map("DiscMixLogistic", "param", param)
        if param.shape[1] != 10 * num_mix:
            raise ValueError(
                f"DiscMixLogistic: param must have 10 * num_mix = {10 * num_mix} channels, got shape {tuple(param.shape)}"
            )
        self.param, self.num_mix, self.num_bits = param, num_mix, num_bits

    def log_prob(self, samples: torch.Tensor) -> torch.Tensor:
        """Log-probability (B, H, W) in nats of pixels in [-1, 1]; one kernel, differentiable in ``param``.

        Args:
            samples: (B, 3, H, W) on the grid ``2 k / (2^num_bits - 1) - 1``. Where they ask for a gradient they get it, at the
                price of a copy of ``param``; :func:`nvae_fast.mixture_logistic_log_prob` takes pixels in [0, 1], as data.

        Raises:
            TypeError, ValueError: ``samples`` is not a floating (B, 3, H, W) tensor on ``param``'s device.
        """
        op = "DiscMixLogistic.log_prob"
        b, _, h, w = self.param.shape
        _checks.shape(op, "samples", samples, (b, 3, h, w), self.param)
        samples = samples.to(_checks.accumulate_dtype(self.param.dtype))
        differentiable = samples.requires_grad and torch.is_grad_enabled()
        param = self._followed_by_means(samples) if differentiable else self.param
        x = samples.detach() * 0.5 + 0.5
        return mixture_logistic_log_prob(param, x, num_mixtures=self.num_mix, num_bits=self.num_bits)

    def _followed_by_means(self, samples: torch.Tensor) -> torch.Tensor:
        """``param``, its means moved against ``samples`` by nothing: only differences of pixels and means matter, so that the
        gradients of the means, which the kernel has, are the pixels' as well."""
        b, _, h, w = samples.shape
        wide, m = self.param.to(samples.dtype), self.num_mix
        means, log_scales, coefficients = wide[:, m:].reshape(b, 3, 3, m, h, w).unbind(2)
        red, green, blue = (samples - samples.detach())[:, :, None].unbind(1)
        c0, c1, c2 = torch.tanh(coefficients.detach()).unbind(1)
        moved = torch.stack((-red.expand_as(c0), c0 * red - green, c1 * red + c2 * green - blue), dim=1)
        colours = torch.stack((means + moved, log_scales, coefficients), dim=2)
        return torch.cat((wide[:, :m], colours.reshape(b, 9 * m, h, w)), dim=1)

    def sample(self, temp: float = 1.0, seed: Seed = None) -> torch.Tensor:
        """An image (B, 3, H, W) in [0, 1]; one kernel, not differentiable.

        Args:
            temp: temperature, > 0: divides the logits of the components, multiplies the logistic noise.
            seed: as in :meth:`Normal.sample`.

        Raises:
            TypeError, ValueError: ``temp`` or ``seed`` is something else.
        """
        return mixture_logistic_sample(self.param, num_mixtures=self.num_mix, temperature=temp, seed=seed)

    def mean(self) -> torch.Tensor:
        """The mean image (B, 3, H, W) in [0, 1]; differentiable in ``param``."""
        return mixture_logistic_mean(self.param, num_mixtures=self.num_mix)
