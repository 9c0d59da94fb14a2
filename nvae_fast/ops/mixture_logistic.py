"""Mixture of discretised logistics over RGB pixels: log-probability, sample, mean.

Parameters ``(B, 10 M, H, W)`` for M components: channels 0..M-1 are mixture logits; the rest, viewed as
``(B, 3, 3M, H, W)``, gives per colour M means, M log-scales (clamped below at -7) and M coefficients (through tanh).
Samples live in [-1, 1]; colours are autoregressive: mean of G += c0 R, mean of B += c1 R + c2 G.

With ``a = (x + h - mean) / s`` and ``b = (x - h - mean) / s``, ``h = 1 / (2^bits - 1)``, per colour::

    log P = log sigmoid(a)                          where x < -0.999
            log (1 - sigmoid(b))                    where x > 0.99
            log (sigmoid(a) - sigmoid(b))           where that difference exceeds 1e-5
            log-density at the centre - log((2^bits - 1) / 2)        elsewhere

summed over colours, plus log-softmax of the logits, logsumexp over components. PixelCNN++ (arXiv 1701.05517,
equations 2 and 3); NVAE (arXiv 2007.03898), section 4. The difference of the two sigmoids is taken as
``sigmoid(a) sigmoid(-b) (1 - exp(b - a))``, which does not cancel.

The gradient of the parameters, which the kernels compute from the inputs alone. With ``w_m`` the posterior weight of component
m (the softmax of its log-probabilities) and, of one colour's log P, the derivatives ``p`` by ``y = (x - mean) / s`` and ``q``
by ``log s``::

              p                                q
    low       sigmoid(-a)                      -a sigmoid(-a)
    high      -sigmoid(b)                      b sigmoid(b)
    between   sigmoid(-a) - sigmoid(b)         -a sigmoid(-a) + b sigmoid(b) - 2 (h/s) / (exp(2 h/s) - 1)
    density   -tanh(y / 2)                     y tanh(y / 2) - 1

    logits: g (w_m - softmax(logits)_m)     log-scale: g w_m q, 0 below the clamp
    mean: -g w_m p / s                      coefficient: the mean's of its colour, times R or G, times 1 - tanh^2
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.ops import _checks
from nvae_fast.ops._op import define_op
from nvae_fast.ops.philox import philox_words, split_seed

MIN_LOG_SCALE = -7.0
MIN_DIFFERENCE = 1e-5
LOWER_EDGE, UPPER_EDGE = -0.999, 0.99


def mixture_logistic_log_prob(
    params: Tensor, x: Tensor, *, num_mixtures: int = 10, num_bits: int = 8
) -> Tensor:
    """Log-probability of RGB pixels in nats, (B, H, W), float32 (float64 for float64 parameters).

    Args:
        params: (B, 10 * num_mixtures, H, W).
        x: (B, 3, H, W) in [0, 1], on the grid k / (2^num_bits - 1).
        num_mixtures: M. num_bits: bits per colour, 1 to 16.

    Differentiable in params (x is data).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    op = "mixture_logistic_log_prob"
    components = _check_params(op, params, num_mixtures)
    b, _, h, w = params.shape
    _checks.shape(op, "x", x, (b, 3, h, w), params)
    bits = _checks.whole(op, "num_bits", num_bits)
    if not 1 <= bits <= 16:
        raise ValueError(f"{op}: num_bits must be between 1 and 16, got {bits}")
    return _log_prob(params, x, components, bits)


def mixture_logistic_sample(
    params: Tensor, *, num_mixtures: int = 10, temperature: float = 1.0, seed: int | Tensor | None = None
) -> Tensor:
    """Sample RGB pixels (B, 3, H, W) in [0, 1], in the dtype of ``params``.

    The component is drawn by Gumbel-max over ``logits / temperature``; logistic noise is multiplied by the temperature;
    each colour is clamped to [-1, 1] before it feeds the next.

    Args:
        params: (B, 10 * num_mixtures, H, W).
        num_mixtures: M. temperature: > 0.
        seed: int or 0-d int64 tensor of the Philox stream; None takes one from the device's default generator.

    Not differentiable.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or value.
    """
    op = "mixture_logistic_sample"
    components = _check_params(op, params, num_mixtures)
    _checks.temperature(op, temperature, zero=False)
    return _sample(params.detach(), _checks.seed(op, seed, params.device), components, temperature)


def mixture_logistic_mean(params: Tensor, *, num_mixtures: int = 10) -> Tensor:
    """Mean image (B, 3, H, W) in [0, 1], in the dtype of ``params``.

    Means and tanh(coefficients) are averaged with the softmax weights of the components, each colour clamped to [-1, 1]
    before it feeds the next.

    Args:
        params: (B, 10 * num_mixtures, H, W).
        num_mixtures: M.

    Raises:
        TypeError, ValueError: ``params`` is not a floating (B, 10 * num_mixtures, H, W) tensor.
    """
    return _mean(params, _check_params("mixture_logistic_mean", params, num_mixtures))


def _check_params(op: str, params: Tensor, num_mixtures: int) -> int:
    """``num_mixtures`` as an int."""
    num_mixtures = _checks.whole(op, "num_mixtures", num_mixtures)
    if num_mixtures < 1:
        raise ValueError(f"{op}: num_mixtures must be >= 1, got {num_mixtures}")
    _checks.feature_map(op, "params", params)
    if params.shape[1] != 10 * num_mixtures:
        raise ValueError(
            f"{op}: params must have 10 * num_mixtures = {10 * num_mixtures} channels, got shape {tuple(params.shape)}"
        )
    return num_mixtures


def _unpack(params: Tensor, num_mixtures: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (B, M, H, W); means, log_scales, coefficients (B, 3, M, H, W)."""
    raw = params.to(_checks.accumulate_dtype(params.dtype))
    b, _, h, w = raw.shape
    colours = raw[:, num_mixtures:].reshape(b, 3, 3 * num_mixtures, h, w)
    means, log_scales, coefficients = colours.split(num_mixtures, dim=2)
    return raw[:, :num_mixtures], means, log_scales.clamp_min(MIN_LOG_SCALE), torch.tanh(coefficients)


def _log_prob_of_colours(means: Tensor, log_scales: Tensor, c: Tensor, x: Tensor, levels: int) -> Tensor:
    """log P of every colour and component, (B, 3, M, H, W)."""
    value = (2.0 * x.detach().to(means.dtype) - 1.0)[:, :, None]  # (B, 3, 1, H, W)
    red, green = value[:, 0], value[:, 1]
    shift = torch.stack((torch.zeros_like(c[:, 0]), c[:, 0] * red, c[:, 1] * red + c[:, 2] * green), dim=1)
    centred = value - (means + shift)
    inverse_scale = torch.exp(-log_scales)
    middle = inverse_scale * centred
    log_cdf_upper = F.logsigmoid(inverse_scale * (centred + 1.0 / levels))
    log_survival_lower = F.logsigmoid(-inverse_scale * (centred - 1.0 / levels))
    # A scale so large that the two sigmoids coincide must not send log(0) into the branch that is not taken.
    gap = (-torch.expm1(inverse_scale * (-2.0 / levels))).clamp_min(1e-30)
    log_difference = log_cdf_upper + log_survival_lower + torch.log(gap)
    # (softplus would give up its last digits above 20.)
    log_density = middle - log_scales + 2.0 * F.logsigmoid(-middle) - math.log(levels / 2.0)
    inside = torch.where(log_difference > math.log(MIN_DIFFERENCE), log_difference, log_density)
    return torch.where(
        value < LOWER_EDGE, log_cdf_upper, torch.where(value > UPPER_EDGE, log_survival_lower, inside)
    )


def _log_prob_reference(params: Tensor, x: Tensor, num_mixtures: int, num_bits: int) -> Tensor:
    logits, means, log_scales, c = _unpack(params, num_mixtures)
    per_colour = _log_prob_of_colours(means, log_scales, c, x, 2**num_bits - 1)
    return torch.logsumexp(per_colour.sum(1) + F.log_softmax(logits, dim=1), dim=1)


def _log_prob_fake(params: Tensor, *_: Any) -> Tensor:
    b, _channels, h, w = params.shape
    return params.new_empty((b, h, w), dtype=_checks.accumulate_dtype(params.dtype))


def uniform(seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uniform draws strictly inside (0, 1), symmetric: the middle of one of 2^23 cells, word by word of the stream.

    With 2^24 cells the middle of the last one would round to 1 in float32.
    """
    count = math.prod(shape)
    words = philox_words(seed, -(-count // 4)).reshape(-1)[:count].reshape(shape)
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def _sample_reference(params: Tensor, seed: Tensor, num_mixtures: int, temperature: float) -> Tensor:
    logits, means, log_scales, coefficients = _unpack(params, num_mixtures)
    b, _, h, w = logits.shape
    seeds = split_seed(seed, 2)
    gumbel = -torch.log(-torch.log(uniform(seeds[0], (b, num_mixtures, h, w), logits.dtype)))
    chosen = (logits / temperature + gumbel).argmax(1)[:, None, None].expand(b, 3, 1, h, w)
    mean, log_scale, c = (t.gather(2, chosen).squeeze(2) for t in (means, log_scales, coefficients))
    u = uniform(seeds[1], (b, 3, h, w), logits.dtype)
    x = mean + torch.exp(log_scale) * temperature * (torch.log(u) - torch.log1p(-u))
    return _colours(x, c).to(params.dtype)


def _mean_reference(params: Tensor, num_mixtures: int) -> Tensor:
    logits, means, _, coefficients = _unpack(params, num_mixtures)
    weights = torch.softmax(logits, dim=1)[:, None]
    return _colours((means * weights).sum(2), (coefficients * weights).sum(2)).to(params.dtype)


def _colours(x: Tensor, c: Tensor) -> Tensor:
    """The autoregression over colours, clamped to [-1, 1], mapped to [0, 1]; x and c are (B, 3, H, W)."""
    red = x[:, 0].clamp(-1.0, 1.0)
    green = (x[:, 1] + c[:, 0] * red).clamp(-1.0, 1.0)
    blue = (x[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1.0, 1.0)
    return torch.stack((red, green, blue), dim=1) * 0.5 + 0.5


def _image_fake(params: Tensor, *_: Any) -> Tensor:
    b, _channels, h, w = params.shape
    return params.new_empty((b, 3, h, w))


_log_prob = define_op(
    "mixture_logistic_log_prob",
    _log_prob_reference,
    fake=_log_prob_fake,
    differentiable=("params",),
    triton="mixture_logistic",
    fused_backward=True,
)
_sample = define_op(
    "mixture_logistic_sample",
    _sample_reference,
    fake=_image_fake,
    differentiable=(),
    triton="mixture_logistic",
)
_mean = define_op(
    "mixture_logistic_mean",
    _mean_reference,
    fake=_image_fake,
    differentiable=("params",),
    triton="mixture_logistic",
)
