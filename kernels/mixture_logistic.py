"""mixture_logistic in Triton; formulas are the docstring of nvae_fast/ops/mixture_logistic.py, the arithmetic is that of
csrc/cpu/mixture_logistic.vec.cpp.

A thread is a pixel and walks its components, so that nothing is exchanged between threads and two runs are equal bit for
bit. The log-probability reads every parameter once (and the logits twice); its backward pass computes everything again
from the same inputs, in two rounds: first the log-probability, then the gradients, each written once. Arithmetic is float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from nvae_fast.kernels.launch import check_dtype, launch
from nvae_fast.kernels.philox import philox_words
from nvae_fast.kernels.pointwise import exponential, reciprocal
from nvae_fast.ops._squash import empty_map

BLOCK = 128  # a pixel a thread of 4 warps
_INT32_LIMIT = 2**31 - 2**22  # of offsets: leaves space for the masked elements of the last program
NEAR = tl.constexpr(12.0)
SPLIT = tl.constexpr(0x53504C54)  # the third counter word of split_seed


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exp_below(x):
    """exp(x) and exp(x) - 1, the latter to full relative accuracy, for x <= 0; below -86 that of -86."""
    t = _larger(x, -86.0)
    y = t * 1.4426950408889634
    power = tl.exp2(y)
    low = tl.fma(y, 1.904654299957767878e-9, tl.fma(y, -0.693147182464599609375, t))
    e = tl.fma(power, low, power)
    q = tl.fma(t, 0.0013820743188261986, 0.008368675597012043)
    q = tl.fma(tl.fma(q, t, 0.04166826605796814), t, 0.1666652113199234)
    q = tl.fma(tl.fma(q, t, 0.4999999403953552), t * t, t)
    return e, tl.where(t > -0.34, q, e - 1.0)


@triton.jit
def _tanh(x):
    _, t = _exp_below(-2.0 * tl.abs(x))
    size = -t * reciprocal(2.0 + t)
    return tl.where(x < 0, -size, size)


@triton.jit
def _log1p(x):
    """For finite x >= 0: see log1p_positive in csrc/vec_math.h."""
    u = 1.0 + x
    lost = (x - (u - 1.0)) * tl.maximum(1.0 - x, 0.4)
    return tl.log(u) + tl.where(x < 3.0, lost, 0.0)


@triton.jit
def _clamp(x):
    return tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pixels(count, pixels, BLOCK: tl.constexpr, OFFSETS64: tl.constexpr):
    """Sample and pixel of every lane, and which lanes are pixels."""
    first = tl.program_id(0)
    if OFFSETS64:
        first = first.to(tl.int64)
    i = first * BLOCK + tl.arange(0, BLOCK)
    b = i // pixels
    return i, b, i - b * pixels, i < count


@triton.jit
def _load(place, mask):
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _largest(row, step, mask, M: tl.constexpr):
    largest = _load(row, mask)
    for m in range(1, M):
        largest = tl.maximum(largest, _load(row + m * step, mask))
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _normaliser(row, step, mask, M: tl.constexpr):
    """logsumexp of the logits, as the largest and what is added to it."""
    largest = _largest(row, step, mask, M)
    total = tl.zeros_like(largest)
    for m in range(M):
        total += exponential(_load(row + m * step, mask) - largest, 0)
    return largest, tl.log(total)


@triton.jit
def _terms(value, mean, raw_log_scale, half, log_density, FAR: tl.constexpr, GRADIENT: tl.constexpr):
    """One colour of one component: num, rest, shift of ``P = num / (num + rest) exp(shift)``; with GRADIENT the
    derivatives of log P by the mean and by the log-scale. csrc/cpu/mixture_logistic.vec.cpp has the derivation."""
    log_scale = _larger(raw_log_scale, -7.0)
    inverse = exponential(-log_scale, 0)
    centred = value - mean
    m = inverse * centred
    d = inverse * half
    size = tl.abs(m)
    size_e = size
    d_g = d
    difference = d - size
    if FAR:
        difference = inverse * (half - tl.abs(centred))
        smaller = tl.minimum(tl.minimum(size, d), NEAR)
        size_e = smaller + _larger(-difference, 0.0)
        d_g = smaller + _larger(difference, 0.0)
    g, minus_one = _exp_below(-d_g)
    e, _ = _exp_below(-size_e)
    gap = -minus_one * (1.0 + g)
    eg = e * g
    both_e = e + g
    far = 1.0 + eg
    inside_num = e * gap
    inside_den = far * both_e
    inside = inside_num > 1e-5 * inside_den
    low = value < -0.999
    high = value > 0.99
    edge = low | high
    own = (low & (m >= 0.0)) | (high & (m <= 0.0))
    num = tl.where(inside, inside_num, 1.0)
    num = tl.where(edge, tl.where(own, 1.0, _larger(g, e)), num)
    rest = tl.where(inside, g * tl.fma(e, tl.fma(g, 2.0, e), 1.0), e * (2.0 + e))
    rest = tl.where(edge, tl.where(own, eg, tl.minimum(g, e)), rest)
    shift = tl.where(inside, 0.0, log_density - log_scale - size)
    beyond = tl.minimum(difference, 0.0, propagate_nan=tl.PropagateNan.ALL)
    shift = tl.where(edge, tl.where(own, 0.0, beyond), shift)
    if GRADIENT:
        safe_gap = tl.maximum(gap, 1e-10)
        den = tl.where(inside, inside_den * safe_gap, 1.0 + e)
        quotient = reciprocal(tl.where(edge, tl.where(own, far, both_e), den))
        d_e = (1.0 - e) * quotient
        through = safe_gap * quotient
        u = eg * both_e * through
        w = g * far * through
        by_size = tl.where(inside, (e - 1.0) * (e + 1.0) * g * through, -d_e)
        widths = 2.0 * d * (g * g) * inside_den * quotient
        by_log = tl.where(inside, -((size + d) * u + difference * w + widths), tl.fma(size, d_e, -1.0))
        pull = tl.where(own, eg, g) * quotient
        by_m = tl.where(m < 0, -by_size, by_size)
        by_m = tl.where(low, pull, tl.where(high, -pull, by_m))
        by_log = tl.where(edge, -(tl.where(own, size + d, difference) * pull), by_log)
        by_log = tl.where(raw_log_scale >= -7.0, by_log, 0.0)
        return num, rest, shift, -inverse * by_m, by_log
    else:
        return num, rest, shift, inverse, inverse


@triton.jit
def _component(
    row, m, step, mask, red, green, blue, half, log_density,
    M: tl.constexpr, FAR: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """log P of all colours of component m, the derivatives of log P (mean, log-scale of R, G, B), the coefficients."""
    at = row + (M + m) * step
    kind = M * step
    r_mean = _load(at, mask)
    r_scale = _load(at + kind, mask)
    c0 = _load(at + 2 * kind, mask)
    g_mean = _load(at + 3 * kind, mask)
    g_scale = _load(at + 4 * kind, mask)
    c1 = _load(at + 5 * kind, mask)
    b_mean = _load(at + 6 * kind, mask)
    b_scale = _load(at + 7 * kind, mask)
    c2 = _load(at + 8 * kind, mask)
    c0 = _tanh(c0)
    c1 = _tanh(c1)
    c2 = _tanh(c2)
    g_mean = tl.fma(c0, red, g_mean)
    b_mean = tl.fma(c2, green, tl.fma(c1, red, b_mean))
    num, rest, shift, r_m, r_s = _terms(red, r_mean, r_scale, half, log_density, FAR, GRADIENT)
    num_g, rest_g, shift_g, g_m, g_s = _terms(green, g_mean, g_scale, half, log_density, FAR, GRADIENT)
    num_b, rest_b, shift_b, b_m, b_s = _terms(blue, b_mean, b_scale, half, log_density, FAR, GRADIENT)
    den = (num + rest) * (num_g + rest_g)
    rest = tl.fma(rest, num_g, (num + rest) * rest_g)
    num = num * num_g
    rest = tl.fma(rest, num_b, den * rest_b)
    log_p = (shift + shift_g) + (shift_b - _log1p(rest * reciprocal(num * num_b)))
    return log_p, r_m, r_s, g_m, g_s, b_m, b_s, c0, c1, c2


@triton.jit
def _image(x, b, p, x_batch, x_channel, x_pixel, mask):
    """The colours of the pixels, in [-1, 1]."""
    at = x + b * x_batch + p * x_pixel
    red = tl.fma(_load(at, mask), 2.0, -1.0)
    green = tl.fma(_load(at + x_channel, mask), 2.0, -1.0)
    return red, green, tl.fma(_load(at + 2 * x_channel, mask), 2.0, -1.0)


@triton.jit
def _log_prob(
    row, step, mask, red, green, blue, half, log_density, top, rest, M: tl.constexpr, FAR: tl.constexpr
):
    """logsumexp over the components, one after the other, as :func:`_normaliser` gives it."""
    largest = tl.zeros_like(top) - float("inf")
    total = tl.zeros_like(top)
    for m in range(M):
        log_p, _, _, _, _, _, _, _, _, _ = _component(
            row, m, step, mask, red, green, blue, half, log_density, M, FAR, False
        )
        log_p += _load(row + m * step, mask) - top - rest
        next_largest = tl.maximum(largest, log_p)
        base = tl.where(next_largest == float("-inf"), 0.0, next_largest)
        total = total * exponential(largest - base, 0) + exponential(log_p - base, 0)
        largest = next_largest
    return tl.where(largest == float("-inf"), 0.0, largest), tl.log(total)


@triton.jit(do_not_specialize=["count"])
def log_prob_kernel(
    parameters, x, out, count, pixels, half, log_density, batch, channel, pixel, x_batch, x_channel, x_pixel,
    M: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    i, b, p, mask = _pixels(count, pixels, BLOCK, OFFSETS64)
    row = parameters + b * batch + p * pixel
    red, green, blue = _image(x, b, p, x_batch, x_channel, x_pixel, mask)
    top, rest = _normaliser(row, channel, mask, M)
    largest, more = _log_prob(row, channel, mask, red, green, blue, half, log_density, top, rest, M, FAR)
    tl.store(out + i, largest + more, mask=mask)


@triton.jit
def _store(place, value, mask):
    tl.store(place, value.to(place.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def log_prob_backward_kernel(
    grad, parameters, x, out, count, pixels, half, log_density, grad_batch, grad_pixel, batch, channel, pixel, x_batch,
    x_channel, x_pixel, out_batch, out_channel, out_pixel,
    M: tl.constexpr, FAR: tl.constexpr, BLOCK: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    _, b, p, mask = _pixels(count, pixels, BLOCK, OFFSETS64)
    row = parameters + b * batch + p * pixel
    red, green, blue = _image(x, b, p, x_batch, x_channel, x_pixel, mask)
    upstream = _load(grad + b * grad_batch + p * grad_pixel, mask)
    top, rest = _normaliser(row, channel, mask, M)
    largest, more = _log_prob(row, channel, mask, red, green, blue, half, log_density, top, rest, M, FAR)
    to = out + b * out_batch + p * out_pixel
    kind = M * out_channel
    for m in range(M):
        log_p, r_m, r_s, g_m, g_s, b_m, b_s, c0, c1, c2 = _component(
            row, m, channel, mask, red, green, blue, half, log_density, M, FAR, True
        )
        log_weight = _load(row + m * channel, mask) - top - rest
        share = upstream * exponential(log_weight + log_p - largest - more, 0)
        _store(to + m * out_channel, share - upstream * exponential(log_weight, 0), mask)
        at = to + (M + m) * out_channel
        to_green = g_m * share
        to_blue = b_m * share
        _store(at, r_m * share, mask)
        _store(at + kind, r_s * share, mask)
        _store(at + 2 * kind, to_green * red * tl.fma(-c0, c0, 1.0), mask)
        _store(at + 3 * kind, to_green, mask)
        _store(at + 4 * kind, g_s * share, mask)
        _store(at + 5 * kind, to_blue * red * tl.fma(-c1, c1, 1.0), mask)
        _store(at + 6 * kind, to_blue, mask)
        _store(at + 7 * kind, b_s * share, mask)
        _store(at + 8 * kind, to_blue * green * tl.fma(-c2, c2, 1.0), mask)


@triton.jit
def _store_colours(out, b, p, pixels, red, green, blue, c0, c1, c2, mask):
    """The autoregression over colours, each clamped before it feeds the next; (B, 3, H, W), contiguous."""
    red = _clamp(red)
    green = _clamp(green + c0 * red)
    blue = _clamp(blue + c1 * red + c2 * green)
    at = out + b * 3 * pixels + p
    _store(at, tl.fma(red, 0.5, 0.5), mask)
    _store(at + pixels, tl.fma(green, 0.5, 0.5), mask)
    _store(at + 2 * pixels, tl.fma(blue, 0.5, 0.5), mask)


@triton.jit(do_not_specialize=["count"])
def mean_kernel(
    parameters,
    out,
    count,
    pixels,
    batch,
    channel,
    pixel,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSETS64: tl.constexpr,
):
    _, b, p, mask = _pixels(count, pixels, BLOCK, OFFSETS64)
    row = parameters + b * batch + p * pixel
    top, rest = _normaliser(row, channel, mask, M)
    red = tl.zeros_like(top)
    green = tl.zeros_like(top)
    blue = tl.zeros_like(top)
    c0 = tl.zeros_like(top)
    c1 = tl.zeros_like(top)
    c2 = tl.zeros_like(top)
    kind = M * channel
    for m in range(M):
        weight = exponential(_load(row + m * channel, mask) - top - rest, 0)
        at = row + (M + m) * channel
        red = tl.fma(weight, _load(at, mask), red)
        c0 = tl.fma(weight, _tanh(_load(at + 2 * kind, mask)), c0)
        green = tl.fma(weight, _load(at + 3 * kind, mask), green)
        c1 = tl.fma(weight, _tanh(_load(at + 5 * kind, mask)), c1)
        blue = tl.fma(weight, _load(at + 6 * kind, mask), blue)
        c2 = tl.fma(weight, _tanh(_load(at + 8 * kind, mask)), c2)
    _store_colours(out, b, p, pixels, red, green, blue, c0, c1, c2, mask)


@triton.jit
def _uniform(seed, element):
    """Word number ``element`` of the stream: the middle of one of 2^23 cells of (0, 1), exactly."""
    w0, w1, w2, w3 = philox_words(seed, element >> 2)
    k = element & 3
    word = tl.where(k < 2, tl.where(k == 0, w0, w1), tl.where(k == 2, w2, w3))
    return ((word >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _sub_seed(seed, block):
    """Element ``block`` of split_seed(seed)."""
    w0, w1, _, _ = philox_words(seed, block, SPLIT)
    return w0.to(tl.int64) | ((w1 & 0x7FFFFFFF).to(tl.int64) << 32)


@triton.jit(do_not_specialize=["seed", "count"])
def sample_kernel(
    parameters, seed, out, count, pixels, temperature, batch, channel, pixel,
    M: tl.constexpr, BLOCK: tl.constexpr, OFFSETS64: tl.constexpr,
):  # fmt: skip
    _, b, p, mask = _pixels(count, pixels, BLOCK, OFFSETS64)
    row = parameters + b * batch + p * pixel
    parent = tl.load(seed)
    zero = tl.program_id(0) * 0
    component_seed = _sub_seed(parent, zero)
    noise_seed = _sub_seed(parent, zero + 1)
    element = b * (M * pixels) + p
    best = tl.div_rn(_load(row, mask), tl.zeros_like(p).to(tl.float32) + temperature)
    best -= tl.log(-tl.log(_uniform(component_seed, element)))
    chosen = tl.zeros_like(p)
    for m in range(1, M):
        score = tl.div_rn(_load(row + m * channel, mask), tl.zeros_like(best) + temperature)
        score -= tl.log(-tl.log(_uniform(component_seed, element + m * pixels)))
        # NaN counts as largest, as in argmax.
        better = ((score > best) | (score != score)) & (best == best)
        best = tl.where(better, score, best)
        chosen = tl.where(better, m, chosen)
    at = row + (M + chosen) * channel
    kind = M * channel
    element = b * (3 * pixels) + p
    red = _draw(at, kind, noise_seed, element, temperature, mask)
    green = _draw(at + 3 * kind, kind, noise_seed, element + pixels, temperature, mask)
    blue = _draw(at + 6 * kind, kind, noise_seed, element + 2 * pixels, temperature, mask)
    c0 = _tanh(_load(at + 2 * kind, mask))
    c1 = _tanh(_load(at + 5 * kind, mask))
    c2 = _tanh(_load(at + 8 * kind, mask))
    _store_colours(out, b, p, pixels, red, green, blue, c0, c1, c2, mask)


@triton.jit
def _draw(at, kind, seed, element, temperature, mask):
    """mean + scale * temperature * logistic noise."""
    u = _uniform(seed, element)
    scale = exponential(_larger(_load(at + kind, mask), -7.0), 0)
    return _load(at, mask) + scale * temperature * (tl.log(u) - tl.log(1.0 - u))


# Launching.


def _view(t: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """``t`` (B, C, H, W), or a copy where its pixels are not one stride apart, and the strides of B, C and pixels."""
    h, w = t.shape[2:]
    if h > 1 and w > 1 and t.stride(2) != w * t.stride(3):
        t = t.contiguous()
    return t, (t.stride(0), t.stride(1), t.stride(3) if w > 1 else t.stride(2))


def _reach(t: torch.Tensor) -> int:
    return sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride(), strict=True))


def _count(op: str, params: torch.Tensor) -> int:
    check_dtype(op, params.dtype)
    return params.shape[0] * params.shape[2] * params.shape[3]


def _run(kernel: Any, count: int, tensors: tuple[torch.Tensor, ...], *args: Any, **constants: Any) -> None:
    """One program for each BLOCK pixels; ``tensors``: what the kernel touches."""
    offsets64 = max(_reach(t) for t in tensors) > _INT32_LIMIT
    device = tensors[0].device
    launch(kernel, triton.cdiv(count, BLOCK), device, *args, BLOCK=BLOCK, OFFSETS64=offsets64, **constants)


def _levels(num_bits: int) -> tuple[float, float, bool]:
    """Half a bin, log(2 / levels), and whether a bin can be more than NEAR of the smallest scales."""
    levels = 2**num_bits - 1
    return 1.0 / levels, math.log(2.0 / levels), 1097.0 / levels > NEAR.value


def mixture_logistic_log_prob(
    params: torch.Tensor, x: torch.Tensor, num_mixtures: int, num_bits: int
) -> torch.Tensor:
    """(B, H, W), float32, of the operator's arguments."""
    b, _, h, w = params.shape
    out = params.new_empty((b, h, w), dtype=torch.float32)
    if count := _count("mixture_logistic_log_prob", params):
        (params, strides), (x, x_strides) = _view(params), _view(x)
        half, log_density, far = _levels(num_bits)
        _run(
            log_prob_kernel, count, (params, x, out),
            params, x, out, count, h * w, half, log_density, *strides, *x_strides, M=num_mixtures, FAR=far,
        )  # fmt: skip
    return out


def mixture_logistic_log_prob_backward(
    grad: torch.Tensor, params: torch.Tensor, x: torch.Tensor, num_mixtures: int, num_bits: int
) -> torch.Tensor:
    """The gradient of params, in their memory format."""
    out = empty_map(params, params.shape[1])
    if count := _count("mixture_logistic_log_prob", params):
        pixels = params.shape[2] * params.shape[3]
        (params, strides), (x, x_strides), (_, out_strides) = _view(params), _view(x), _view(out)
        grad, (grad_batch, _, grad_pixel) = _view(grad[:, None])
        half, log_density, far = _levels(num_bits)
        _run(
            log_prob_backward_kernel, count, (params, x, out, grad),
            grad, params, x, out, count, pixels, half, log_density, grad_batch, grad_pixel, *strides, *x_strides,
            *out_strides, M=num_mixtures, FAR=far,
        )  # fmt: skip
    return out


def mixture_logistic_sample(
    params: torch.Tensor, seed: torch.Tensor, num_mixtures: int, temperature: float
) -> torch.Tensor:
    """(B, 3, H, W), contiguous, in the dtype of params."""
    b, _, h, w = params.shape
    out = params.new_empty((b, 3, h, w))
    if count := _count("mixture_logistic_sample", params):
        params, strides = _view(params)
        _run(
            sample_kernel, count, (params, out),
            params, seed, out, count, h * w, float(temperature), *strides, M=num_mixtures,
        )  # fmt: skip
    return out


def mixture_logistic_mean(params: torch.Tensor, num_mixtures: int) -> torch.Tensor:
    """(B, 3, H, W), contiguous, in the dtype of params."""
    b, _, h, w = params.shape
    out = params.new_empty((b, 3, h, w))
    if count := _count("mixture_logistic_mean", params):
        params, strides = _view(params)
        _run(mean_kernel, count, (params, out), params, out, count, h * w, *strides, M=num_mixtures)
    return out
