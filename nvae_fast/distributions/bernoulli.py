"""The Bernoulli distribution of :mod:`nvae_fast.distributions`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nvae_fast.distributions.gaussian_pair import Seed
from nvae_fast.distributions.lazy import Lazy
from nvae_fast.ops import _checks
from nvae_fast.ops._pixels import check_unit_range
from nvae_fast.ops.mixture_logistic import uniform


class Bernoulli(Lazy):
    """Independent binary pixels with probability ``sigmoid(logits / temp)`` of being 1; plain PyTorch.

    Args:
        logits: (B, C, H, W).
        temp: temperature, > 0.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
    """

    def __init__(self, logits: torch.Tensor, temp: float = 1.0) -> None:
        _checks.feature_map("Bernoulli", "logits", logits)
        _checks.temperature("Bernoulli", temp, zero=False)
        self._keep(logits=logits)
        self.temp = temp

    @property
    def logits(self) -> torch.Tensor:
        """Logits over the temperature (B, C, H, W), float32 or float64."""
        self._check_unchanged()  # always: what is kept may be the raw tensor
        return self._get("logits", self._logits)

    def _logits(self) -> torch.Tensor:
        raw = self._raw["logits"]
        wide = raw.to(_checks.accumulate_dtype(raw.dtype))
        return wide if self.temp == 1 else wide / self.temp

    def log_prob(self, samples: torch.Tensor) -> torch.Tensor:
        """Log-probability of every pixel of ``samples`` (B, C, H, W) in [0, 1]: (B, C, H, W) in nats.

        Raises:
            TypeError, ValueError: ``samples`` is not such a floating tensor on the logits' device, or has values outside
                [0, 1].
        """
        raw = self._raw["logits"]
        _checks.shape("Bernoulli.log_prob", "samples", samples, tuple(raw.shape), raw)
        check_unit_range("Bernoulli.log_prob", "samples", samples)
        logits = self.logits
        return -F.binary_cross_entropy_with_logits(logits, samples.to(logits.dtype), reduction="none")

    def sample(self, t: float = 1.0, seed: Seed = None) -> torch.Tensor:
        """Zeros and ones (B, C, H, W), float32 or float64; not differentiable.

        Args:
            t: temperature, > 0: divides the logits once more.
            seed: as in :meth:`Normal.sample`.

        Raises:
            TypeError, ValueError: ``t`` or ``seed`` is something else.
        """
        _checks.temperature("Bernoulli.sample", t, zero=False, name="t")
        logits = self.logits
        seed_tensor = _checks.seed("Bernoulli.sample", seed, logits.device)
        probability = self.mean if t == 1 else torch.sigmoid(logits / t)
        return (uniform(seed_tensor, tuple(logits.shape), logits.dtype) < probability).to(logits.dtype)

    @property
    def mean(self) -> torch.Tensor:
        """The probabilities of a 1, (B, C, H, W), float32 or float64."""
        return torch.sigmoid(self.logits)
