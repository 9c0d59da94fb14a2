"""The mixture of logistics of :mod:`nvae_fast.distributions`."""

from __future__ import annotations

import torch

from nvae_fast.distributions.gaussian_pair import Seed
from nvae_fast.ops import _checks
from nvae_fast.ops._pixels import check_symmetric_range, check_unit_range
from nvae_fast.ops.mixture_logistic import (
    MIN_LOG_SCALE,
    mixture_logistic_log_prob,
    mixture_logistic_mean,
    mixture_logistic_sample,
)


def check_bits(op: str, num_bits: int) -> int:
    """``num_bits`` as an int between 1 and 16."""
    num_bits = _checks.whole(op, "num_bits", num_bits)
    if not 1 <= num_bits <= 16:
        raise ValueError(f"{op}: num_bits must be between 1 and 16, got {num_bits}")
    return num_bits


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
        num_mix = _checks.whole("DiscMixLogistic", "num_mix", num_mix)
        if num_mix < 1:
            raise ValueError(f"DiscMixLogistic: num_mix must be >= 1, got {num_mix}")
        num_bits = check_bits("DiscMixLogistic", num_bits)
        _checks.feature_map("DiscMixLogistic", "param", param)
        if param.shape[1] != 10 * num_mix:
            raise ValueError(
                f"DiscMixLogistic: param must have 10 * num_mix = {10 * num_mix} channels, got shape {tuple(param.shape)}"
            )
        self.param, self.num_mix, self.num_bits = param, num_mix, num_bits

    @property
    def logit_probs(self) -> torch.Tensor:
        """Logits of the components (B, num_mix, H, W), float32 or float64."""
        return self.param[:, : self.num_mix].to(_checks.accumulate_dtype(self.param.dtype))

    @property
    def means(self) -> torch.Tensor:
        """Means of every colour and component, before other colours are added (B, 3, num_mix, H, W), float32 or float64."""
        return self._of_colours(0)

    @property
    def log_scales(self) -> torch.Tensor:
        """Log-scales, clamped below at -7 (B, 3, num_mix, H, W), float32 or float64."""
        return self._of_colours(1).clamp_min(MIN_LOG_SCALE)

    @property
    def coeffs(self) -> torch.Tensor:
        """``tanh`` of the raw coefficients (B, 3, num_mix, H, W), float32 or float64: of red in green, of red in blue, of green
        in blue."""
        return torch.tanh(self._of_colours(2))

    def _of_colours(self, index: int) -> torch.Tensor:
        b, _, h, w = self.param.shape
        m = self.num_mix
        colours = self.param[:, m:].reshape(b, 3, 3, m, h, w)
        return colours[:, :, index].to(_checks.accumulate_dtype(self.param.dtype))

    def log_prob(self, samples: torch.Tensor) -> torch.Tensor:
        """Log-probability (B, H, W) in nats of pixels in [0, 1]; one kernel, differentiable in ``param`` and ``samples``.

        Args:
            samples: (B, 3, H, W) on the grid ``k / (2^num_bits - 1)``. Their gradient costs a copy of ``param``. The check of
                their range waits for a GPU. It is left out inside torch.compile, CUDA graphs and torch.func transforms.

        Raises:
            TypeError, ValueError: ``samples`` is not a floating (B, 3, H, W) tensor on ``param``'s device, or has values
                outside [0, 1].
        """
        self._check_samples("log_prob", samples)
        check_unit_range("DiscMixLogistic.log_prob", "samples", samples)
        return self._log_prob(samples.to(_checks.accumulate_dtype(self.param.dtype)))

    def log_p(self, samples: torch.Tensor) -> torch.Tensor:
        """:meth:`log_prob` of ``(samples + 1) / 2``, for pixels in [-1, 1] on the grid ``2 k / (2^num_bits - 1) - 1``.

        Args:
            samples: (B, 3, H, W).

        Raises:
            TypeError, ValueError: as :meth:`log_prob`, for values outside [-1, 1].
        """
        self._check_samples("log_p", samples)
        check_symmetric_range("DiscMixLogistic.log_p", "samples", samples)
        return self._log_prob(samples.to(_checks.accumulate_dtype(self.param.dtype)) * 0.5 + 0.5)

    def _check_samples(self, method: str, samples: torch.Tensor) -> None:
        b, _, h, w = self.param.shape
        _checks.shape(f"DiscMixLogistic.{method}", "samples", samples, (b, 3, h, w), self.param)

    def _log_prob(self, x: torch.Tensor) -> torch.Tensor:
        differentiable = x.requires_grad and torch.is_grad_enabled()
        param = self._followed_by_means(2.0 * x - 1.0) if differentiable else self.param
        return mixture_logistic_log_prob(param, x.detach(), num_mixtures=self.num_mix, num_bits=self.num_bits)

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

    def sample(self, t: float = 1.0, seed: Seed = None, *, temp: float | None = None) -> torch.Tensor:
        """An image (B, 3, H, W) in [0, 1]; one kernel, not differentiable.

        Args:
            t: temperature, > 0: divides the logits of the components, multiplies the logistic noise.
            seed: as in :meth:`Normal.sample`.
            temp: another name of ``t``; None leaves it to ``t``.

        Raises:
            TypeError, ValueError: ``t``, ``temp`` or ``seed`` is something else.
        """
        t = t if temp is None else temp
        _checks.temperature("DiscMixLogistic.sample", t, zero=False, name="t" if temp is None else "temp")
        return mixture_logistic_sample(self.param, num_mixtures=self.num_mix, temperature=t, seed=seed)

    def mean(self) -> torch.Tensor:
        """The mean image (B, 3, H, W) in [0, 1]; differentiable in ``param``."""
        return mixture_logistic_mean(self.param, num_mixtures=self.num_mix)
