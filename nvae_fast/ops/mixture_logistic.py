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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from nvae_fast.ops import _checks
from nvae_fast.ops._register import operator, room
from nvae_fast.ops._squash import empty_map
from nvae_fast.ops.philox import philox_words, split_seed

MIN_LOG_SCALE = -7.0
MIN_DIFFERENCE = 1e-5
LOWER_EDGE, UPPER_EDGE = -0.999, 0.99


def mixture_logistic_log_prob(
    params: torch.Tensor, x: torch.Tensor, *, num_mixtures: int = 10, num_bits: int = 8
) -> torch.Tensor:
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
    bits = _checks.whole(op, "num_bits", num_bits)
    return _log_prob(params, x, _checks.whole(op, "num_mixtures", num_mixtures), bits)


def mixture_logistic_sample(
    params: torch.Tensor,
    *,
    num_mixtures: int = 10,
    temperature: float = 1.0,
    seed: int | torch.Tensor | None = None,
) -> torch.Tensor:
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
    components = _checks.whole(op, "num_mixtures", num_mixtures)
    _check_params(op, params, components)
    params = params.detach()
    return _sample(params, _checks.seed(op, seed, params.device), components, temperature)


def mixture_logistic_mean(params: torch.Tensor, *, num_mixtures: int = 10) -> torch.Tensor:
    """Mean image (B, 3, H, W) in [0, 1], in the dtype of ``params``.

    Means and tanh(coefficients) are averaged with the softmax weights of the components, each colour clamped to [-1, 1]
    before it feeds the next.

    Args:
        params: (B, 10 * num_mixtures, H, W).
        num_mixtures: M.

    Raises:
        TypeError, ValueError: ``params`` is not a floating (B, 10 * num_mixtures, H, W) tensor.
    """
    return _mean(params, _checks.whole("mixture_logistic_mean", "num_mixtures", num_mixtures))


def _check_params(op: str, params: torch.Tensor, num_mixtures: int) -> None:
    if num_mixtures < 1:
        raise ValueError(f"{op}: num_mixtures must be >= 1, got {num_mixtures}")
    _checks.feature_map(op, "params", params)
    if params.shape[1] != 10 * num_mixtures:
        raise ValueError(
            f"{op}: params must have 10 * num_mixtures = {10 * num_mixtures} channels, got shape {tuple(params.shape)}"
        )


def _check_log_prob(params: torch.Tensor, x: torch.Tensor, num_mixtures: int, num_bits: int) -> None:
    op = "mixture_logistic_log_prob"
    _check_params(op, params, num_mixtures)
    b, _, h, w = params.shape
    _checks.shape(op, "x", x, (b, 3, h, w), params)
    if not 1 <= num_bits <= 16:
        raise ValueError(f"{op}: num_bits must be between 1 and 16, got {num_bits}")


def _check_sample(params: torch.Tensor, seed: torch.Tensor, num_mixtures: int, temperature: float) -> None:
    _check_params("mixture_logistic_sample", params, num_mixtures)
    _checks.temperature("mixture_logistic_sample", temperature, zero=False)


def _check_mean(params: torch.Tensor, num_mixtures: int) -> None:
    _check_params("mixture_logistic_mean", params, num_mixtures)


def _unpack(
    params: torch.Tensor, num_mixtures: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits (B, M, H, W); means, log_scales, coefficients (B, 3, M, H, W)."""
    wide = params.to(_checks.accumulate_dtype(params.dtype))
    b, _, h, w = wide.shape
    colours = wide[:, num_mixtures:].reshape(b, 3, 3 * num_mixtures, h, w)
    means, log_scales, coefficients = colours.split(num_mixtures, dim=2)
    return wide[:, :num_mixtures], means, log_scales.clamp_min(MIN_LOG_SCALE), torch.tanh(coefficients)


class _Colours(NamedTuple):
    """Of every colour and component, (B, 3, M, H, W); ``value`` (B, 3, 1, H, W) in [-1, 1]."""

    value: torch.Tensor
    inverse_scale: torch.Tensor
    upper: torch.Tensor  # a
    lower: torch.Tensor  # b
    middle: torch.Tensor
    log_cdf_upper: torch.Tensor
    log_survival_lower: torch.Tensor
    log_difference: torch.Tensor
    log_density: torch.Tensor

    def choose(
        self, low: torch.Tensor, high: torch.Tensor, difference: torch.Tensor, density: torch.Tensor
    ) -> torch.Tensor:
        inside = torch.where(self.log_difference > math.log(MIN_DIFFERENCE), difference, density)
        return torch.where(self.value < LOWER_EDGE, low, torch.where(self.value > UPPER_EDGE, high, inside))

    def log_prob(self) -> torch.Tensor:
        return self.choose(self.log_cdf_upper, self.log_survival_lower, self.log_difference, self.log_density)


def _colours_of(
    means: torch.Tensor, log_scales: torch.Tensor, c: torch.Tensor, x: torch.Tensor, levels: int
) -> _Colours:
    value = (2.0 * x.detach().to(means.dtype) - 1.0)[:, :, None]
    red, green = value[:, 0], value[:, 1]
    shift = torch.stack((torch.zeros_like(c[:, 0]), c[:, 0] * red, c[:, 1] * red + c[:, 2] * green), dim=1)
    centred = value - (means + shift)
    inverse_scale = torch.exp(-log_scales)
    upper = inverse_scale * (centred + 1.0 / levels)
    lower = inverse_scale * (centred - 1.0 / levels)
    middle = inverse_scale * centred
    log_cdf_upper = F.logsigmoid(upper)
    log_survival_lower = F.logsigmoid(-lower)
    # A scale so large that the two sigmoids coincide must not send log(0) into the branch that is not taken.
    gap = (-torch.expm1(inverse_scale * (-2.0 / levels))).clamp_min(1e-30)
    log_difference = log_cdf_upper + log_survival_lower + torch.log(gap)
    # (softplus would give up its last digits above 20.)
    log_density = middle - log_scales + 2.0 * F.logsigmoid(-middle) - math.log(levels / 2.0)
    return _Colours(
        value, inverse_scale, upper, lower, middle, log_cdf_upper, log_survival_lower, log_difference, log_density
    )  # fmt: skip


def _log_prob_reference(
    params: torch.Tensor, x: torch.Tensor, num_mixtures: int, num_bits: int
) -> torch.Tensor:
    logits, means, log_scales, c = _unpack(params, num_mixtures)
    per_colour = _colours_of(means, log_scales, c, x, 2**num_bits - 1).log_prob()
    return torch.logsumexp(per_colour.sum(1) + F.log_softmax(logits, dim=1), dim=1)


def _log_prob_fake(params: torch.Tensor, x: torch.Tensor, num_mixtures: int, num_bits: int) -> torch.Tensor:
    b, _, h, w = params.shape
    return params.new_empty((b, h, w), dtype=_checks.accumulate_dtype(params.dtype))


def _log_prob_backward_formula(
    grad: torch.Tensor, params: torch.Tensor, x: torch.Tensor, num_mixtures: int, num_bits: int
) -> torch.Tensor:
    """The gradient of ``params`` from the inputs alone; every fused backward kernel computes this.

    With ``w_m`` the posterior weight of component m (the softmax of its log-probabilities) and, of one colour's log P, the
    derivatives ``p`` by ``y = (x - mean) / s`` and ``q`` by ``log s``::

                  p                                q
        low       sigmoid(-a)                      -a sigmoid(-a)
        high      -sigmoid(b)                      b sigmoid(b)
        between   sigmoid(-a) - sigmoid(b)         -a sigmoid(-a) + b sigmoid(b) - 2 (h/s) / (exp(2 h/s) - 1)
        density   -tanh(y / 2)                     y tanh(y / 2) - 1

        logits: g (w_m - softmax(logits)_m)     log-scale: g w_m q, 0 below the clamp
        mean: -g w_m p / s                      coefficient: the mean's of its colour, times R or G, times 1 - tanh^2
    """
    levels = 2**num_bits - 1
    logits, means, log_scales, c = _unpack(params, num_mixtures)
    v = _colours_of(means, log_scales, c, x, levels)
    log_weights = F.log_softmax(logits, dim=1)
    upstream = grad.to(logits.dtype)[:, None]
    share = upstream * torch.softmax(v.log_prob().sum(1) + log_weights, dim=1)
    above, below = torch.sigmoid(-v.upper), torch.sigmoid(v.lower)
    slope = torch.tanh(0.5 * v.middle)
    width = v.inverse_scale * (2.0 / levels)
    p = v.choose(above, -below, above - below, -slope)
    low, high = -v.upper * above, v.lower * below
    q = v.choose(low, high, low + high - width / torch.expm1(width), v.middle * slope - 1.0)
    raw_log_scales = params[:, num_mixtures:].reshape(p.shape[0], 3, 3, *p.shape[2:])[:, :, 1]
    to_means = -v.inverse_scale * p * share[:, None]
    to_log_scales = torch.where(raw_log_scales >= MIN_LOG_SCALE, q * share[:, None], 0.0)
    red, green = v.value[:, 0], v.value[:, 1]
    to_c = torch.stack((to_means[:, 1] * red, to_means[:, 2] * red, to_means[:, 2] * green), dim=1)
    to_colours = torch.stack((to_means, to_log_scales, to_c * (1.0 - c.square())), dim=2)
    result = _log_prob_backward_fake(grad, params, x, num_mixtures, num_bits)
    result[:, :num_mixtures] = share - upstream * log_weights.exp()
    result[:, num_mixtures:] = to_colours.reshape(result[:, num_mixtures:].shape)
    return result


def _log_prob_backward_fake(
    grad: torch.Tensor, params: torch.Tensor, x: torch.Tensor, num_mixtures: int, num_bits: int
) -> torch.Tensor:
    return empty_map(params, params.shape[1])


def uniform(seed: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uniform draws strictly inside (0, 1), symmetric: the middle of one of 2^23 cells, word by word of the stream.

    With 2^24 cells the middle of the last one would round to 1 in float32.
    """
    count = math.prod(shape)
    words = philox_words(seed, -(-count // 4)).reshape(-1)[:count].reshape(shape)
    return ((words >> 9).to(dtype) + 0.5) * 2.0**-23


def _sample_reference(
    params: torch.Tensor, seed: torch.Tensor, num_mixtures: int, temperature: float
) -> torch.Tensor:
    logits, means, log_scales, coefficients = _unpack(params, num_mixtures)
    b, _, h, w = logits.shape
    seeds = split_seed(seed, 2)
    gumbel = -torch.log(-torch.log(uniform(seeds[0], (b, num_mixtures, h, w), logits.dtype)))
    chosen = (logits / temperature + gumbel).argmax(1)[:, None, None].expand(b, 3, 1, h, w)
    mean, log_scale, c = (t.gather(2, chosen).squeeze(2) for t in (means, log_scales, coefficients))
    u = uniform(seeds[1], (b, 3, h, w), logits.dtype)
    x = mean + torch.exp(log_scale) * temperature * (torch.log(u) - torch.log1p(-u))
    return _colours(x, c).to(params.dtype)


def _mean_reference(params: torch.Tensor, num_mixtures: int) -> torch.Tensor:
    logits, means, _, coefficients = _unpack(params, num_mixtures)
    weights = torch.softmax(logits, dim=1)[:, None]
    return _colours((means * weights).sum(2), (coefficients * weights).sum(2)).to(params.dtype)


def _colours(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The autoregression over colours, clamped to [-1, 1], mapped to [0, 1]; x and c are (B, 3, H, W)."""
    red = x[:, 0].clamp(-1.0, 1.0)
    green = (x[:, 1] + c[:, 0] * red).clamp(-1.0, 1.0)
    blue = (x[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1.0, 1.0)
    return torch.stack((red, green, blue), dim=1) * 0.5 + 0.5


def _image_fake(params: torch.Tensor, *_: Any) -> torch.Tensor:
    b, _channels, h, w = params.shape
    return params.new_empty((b, 3, h, w))


def _gpu(name: str, plain: Callable[..., torch.Tensor], params: int = 0) -> Callable[..., torch.Tensor]:
    """The launcher of a Triton kernel; with float64 for argument number ``params`` it is ``plain``,
    because the kernels compute in float32."""

    def run(*args: Any) -> torch.Tensor:
        if args[params].dtype == torch.float64:
            return plain(*args)
        from nvae_fast.kernels import mixture_logistic as kernels

        return getattr(kernels, name)(*args)

    return run


_log_prob_backward_operator = operator(
    "mixture_logistic_log_prob_backward",
    "(Tensor grad, Tensor params, Tensor x, int num_mixtures, int num_bits) -> Tensor",
    default=_log_prob_backward_formula,
    fake=_log_prob_backward_fake,
    gpu=_gpu("mixture_logistic_log_prob_backward", _log_prob_backward_formula, 1),
)


def _log_prob_backward(
    grads: Sequence[torch.Tensor | None], wanted: Sequence[int], *args: Any
) -> tuple[torch.Tensor]:
    return (_log_prob_backward_operator(grads[0], *args),)


_log_prob = room(
    "mixture_logistic_log_prob",
    "(Tensor params, Tensor x, int num_mixtures, int num_bits) -> Tensor",
    check=_check_log_prob,
    reference=_log_prob_reference,
    differentiable=(0,),
    fake=_log_prob_fake,
    backward=_log_prob_backward,
    gpu=_gpu("mixture_logistic_log_prob", _log_prob_reference),
)
_sample = room(
    "mixture_logistic_sample",
    "(Tensor params, Tensor seed, int num_mixtures, float temperature) -> Tensor",
    check=_check_sample,
    reference=_sample_reference,
    differentiable=(),
    fake=_image_fake,
    gpu=_gpu("mixture_logistic_sample", _sample_reference),
)
_mean = room(
    "mixture_logistic_mean",
    "(Tensor params, int num_mixtures) -> Tensor",
    check=_check_mean,
    reference=_mean_reference,
    differentiable=(0,),
    fake=_image_fake,
    gpu=_gpu("mixture_logistic_mean", _mean_reference),
)
