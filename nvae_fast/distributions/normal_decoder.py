"""Normal pixels of :mod:`nvae_fast.distributions`."""

from __future__ import annotations

import torch

from nvae_fast.distributions.gaussian_pair import Seed
from nvae_fast.distributions.mixture_logistic import check_bits
from nvae_fast.distributions.normal import Normal
from nvae_fast.ops import _checks
from nvae_fast.ops._pixels import check_unit_range


class NormalDecoder:
    """Independent normal pixels: ``2 x - 1`` of an image x in [0, 1] follows the :class:`Normal` of the packed parameters.

    Args:
        param: (B, 2 C, H, W), first C channels raw mu, last C raw log sigma.
        num_bits: bits per colour, 1 to 16. A density has no levels: it changes no value.

    Attributes:
        dist: the :class:`Normal` of ``2 x - 1``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or value.
    """

    def __init__(self, param: torch.Tensor, num_bits: int = 8) -> None:
        _checks.packed("NormalDecoder", "param", param)
        self.num_bits = check_bits("NormalDecoder", num_bits)
        self.dist = Normal.from_packed(param)

    def log_prob(self, samples: torch.Tensor) -> torch.Tensor:
        """Log-density of ``2 samples - 1``, without the Jacobian log 2: (B, C, H, W) in nats, plain PyTorch.

        Args:
            samples: (B, C, H, W) in [0, 1]; differentiable. The range is checked as in :meth:`DiscMixLogistic.log_prob`.

        Raises:
            TypeError, ValueError: ``samples`` is not such a floating tensor on the parameters' device, or has values outside
                [0, 1].
        """
        op = "NormalDecoder.log_prob"
        mu = self.dist.mu
        _checks.shape(op, "samples", samples, tuple(mu.shape), mu)
        check_unit_range(op, "samples", samples)
        return self.dist.log_p(2.0 * samples.to(mu.dtype) - 1.0)

    def sample(self, t: float = 1.0, seed: Seed = None) -> torch.Tensor:
        """An image (B, C, H, W), clamped to [0, 1], in the parameters' dtype.

        Args:
            t: temperature, >= 0, a factor on sigma.
            seed: as in :meth:`Normal.sample`.

        Raises:
            TypeError, ValueError: ``t`` or ``seed`` is something else.
        """
        _checks.temperature("NormalDecoder.sample", t, zero=True, name="t")
        eps = self.dist._draw(None, _checks.seed("NormalDecoder.sample", seed, self.dist._device))
        return _to_image(self.dist.sample_given_eps(eps if t == 1 else eps * t))

    def mean(self) -> torch.Tensor:
        """The means as an image (B, C, H, W), clamped to [0, 1], float32 or float64."""
        return _to_image(self.dist.mu)


def _to_image(value: torch.Tensor) -> torch.Tensor:
    return (value * 0.5 + 0.5).clamp(0.0, 1.0)
