"""Distributions for models built elsewhere: the classes of NVAE-type models, on this package's kernels.

:class:`Normal`, :class:`DiscMixLogistic`, :class:`NormalDecoder` and :class:`Bernoulli` take the raw tensors a network emits
and the arguments such code already uses. The constructor checks its arguments and computes nothing; a value is computed on
first use. ``log_prob`` takes images in [0, 1], :meth:`DiscMixLogistic.log_p` images in [-1, 1].

Elementwise values (``mu``, ``sigma``, ``kl``, ``log_p``) are plain PyTorch. Their sums over pixels are methods that run one
kernel each: :meth:`Normal.kl_per_channel`, :meth:`Normal.log_p_per_channel`, and
:meth:`Normal.sample_with_kl`, which samples as well. Raw mu and raw log sigma are usually the two halves of one convolution's
output: the kernels then read that tensor where it is. Arithmetic and every result but samples are float32 for half-precision
parameters.

:func:`draw_gaussian`, :func:`gaussian_analytical_kl` and :func:`draw_gaussian_with_kl` are the plain Gaussian pair of very deep
VAEs (arXiv 2011.10650): no clamp, no floor. The formulas of the others: NVAE (arXiv 2007.03898), sections 3.2 and 4.
"""

from nvae_fast.distributions.bernoulli import Bernoulli
from nvae_fast.distributions.gaussian_pair import draw_gaussian, draw_gaussian_with_kl, gaussian_analytical_kl
from nvae_fast.distributions.mixture_logistic import DiscMixLogistic
from nvae_fast.distributions.normal import Normal
from nvae_fast.distributions.normal_decoder import NormalDecoder

__all__ = [
    "Bernoulli",
    "DiscMixLogistic",
    "Normal",
    "NormalDecoder",
    "draw_gaussian",
    "draw_gaussian_with_kl",
    "gaussian_analytical_kl",
]
