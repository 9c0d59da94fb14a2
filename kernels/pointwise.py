"""Arithmetic that the kernels of the normal distributions share: the soft clamp, the squashing of raw parameters, and
the derivatives of both. The definition is nvae_fast/ops/_squash.py; all of it is float32. ``CLAMP`` is a compile-time
number, folded into the coefficients; 0 means that nothing is clamped.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG_SQRT_2PI = tl.constexpr(0.9189385332046727)  # log(2 pi) / 2


@triton.jit
def reciprocal(x):
    """``1 / x`` for x of [2^-60, 2^60], to an ulp: one instruction, where Triton's division takes nine to look after
    denormals. The interpreter has no instructions and divides."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log_positive(x):
    """``log x`` of a positive normal number, which it does not check: half the instructions of Triton's. As csrc/vec_math.h."""
    # x = 2^e m with m in [sqrt(1/2), sqrt(2)); e is in units of 2^-23.
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.sub(bits, 0x3F3504F3, sanitize_overflow=False) & -0x800000
    f = tl.sub(bits, exponent, sanitize_overflow=False).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    p = tl.fma(f, -0.07636940479278564, 0.12762485444545746)
    p = tl.fma(p, f, -0.13159550726413727)
    p = tl.fma(p, f, 0.14201539754867554)
    p = tl.fma(p, f, -0.1662341058254242)
    p = tl.fma(p, f, 0.2000124305486679)
    p = tl.fma(p, f, -0.2500081956386566)
    p = tl.fma(p, f, 0.3333333134651184)
    square = f * f
    tail = tl.fma(square, -0.5, tl.fma(p, square * f, e * 1.7030319754245127e-13))
    return tl.fma(e, 8.262941264547408e-08, f + tail)


@triton.jit
def _clamp(x, BOUND: tl.constexpr):
    """x within +-BOUND; NaN stays NaN."""
    return tl.clamp(x, -BOUND, BOUND, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _tanh_clamp(raw, C: tl.constexpr):
    """``C tanh(raw / C)`` for C within [0.01, 100], where its powers stay in range: ``x - D / Q`` of the clamped x, where
    D / Q is a minimax fit, weighted to where values are. What is subtracted is small below C, and the result good to an
    ulp; further out it loses digits, 5e-6 at worst. The fit ends 4e-6 above C, so that the last clamp makes everything
    from 7.5 C on exactly C."""
    c2: tl.constexpr = C * C
    x = _clamp(raw, 7.5 * C)
    s = x * x
    # -D: a change of sign would be an instruction of its own in some versions of Triton.
    d = tl.fma(s, -7.825490477841868e-09 / (c2 * c2 * c2 * c2), -0.00020340882474556565 / (c2 * c2 * c2))
    d = tl.fma(tl.fma(d, s, -0.02051684446632862 / (c2 * c2)), s, -0.33333325386047363 / c2)
    q = tl.fma(s, 0.00021145088248886168 / (c2 * c2 * c2), 0.023326003924012184 / (c2 * c2))
    q = tl.fma(tl.fma(q, s, 0.46154987812042236 / c2), s, 1.0)  # between 1 and 139
    return _clamp(tl.fma(d * (x * s), reciprocal(q), x), C)


@triton.jit
def _tanh_derivative(raw, C: tl.constexpr):
    """``1 - tanh^2`` at raw / C with all its digits: ``4 e / (1 + e)^2`` with ``e = exp(-2 |raw / C|)``, which fades as it
    should where the difference would leave the rounding of a 1."""
    e = tl.exp2(tl.fma(tl.abs(raw), -2.8853900817779268 / C, 2.0))  # four times e
    i = reciprocal(tl.fma(e, 0.25, 1.0))
    return e * i * i


@triton.jit
def exponential(u, CLAMP: tl.constexpr):
    """``exp(u)``: a power of two by the hardware, times one plus what rounding the exponent lost."""
    y = u * 1.4426950408889634
    power = tl.exp2(y)
    low = tl.fma(y, -0.693147182464599609375, u)  # ln 2 in float32
    if (CLAMP == 0) | (CLAMP > 20.0):  # the rest of ln 2, and neither inf - inf nor 0 * inf
        exact = tl.fma(power, tl.fma(y, 1.904654299957767878e-9, low), power)
        return tl.where(tl.abs(y) < 200.0, exact, power)
    else:
        return tl.fma(power, low, power)


@triton.jit
def inverse(sigma, CLAMP: tl.constexpr):
    """``1 / sigma``."""
    if (CLAMP == 0) | (CLAMP > 40.0):
        return 1.0 / sigma
    else:
        return reciprocal(sigma)


@triton.jit
def soft_clamp(raw, CLAMP: tl.constexpr):
    """``CLAMP tanh(raw / CLAMP)``; the identity for 0."""
    if CLAMP == 0:
        return raw
    elif (CLAMP < 0.01) | (CLAMP > 100.0):
        return _tanh_clamp(raw / CLAMP, 1.0) * CLAMP
    else:
        return _tanh_clamp(raw, CLAMP)


@triton.jit
def soft_clamp_derivative(raw, CLAMP: tl.constexpr):
    """The derivative of :func:`soft_clamp`."""
    if CLAMP == 0:
        return tl.zeros_like(raw) + 1.0
    elif (CLAMP < 0.01) | (CLAMP > 100.0):
        return _tanh_derivative(raw / CLAMP, 1.0)
    else:
        return _tanh_derivative(raw, CLAMP)


@triton.jit
def squash(raw_mu, raw_log_sigma, floor, CLAMP: tl.constexpr):
    """Raw parameters -> mu, sigma."""
    return soft_clamp(raw_mu, CLAMP), exponential(soft_clamp(raw_log_sigma, CLAMP), CLAMP) + floor


@triton.jit
def squash_with_derivatives(raw_mu, raw_log_sigma, floor, CLAMP: tl.constexpr):
    """Raw parameters -> mu, sigma, d mu / d raw_mu, d sigma / d raw_log_sigma."""
    e = exponential(soft_clamp(raw_log_sigma, CLAMP), CLAMP)
    return (
        soft_clamp(raw_mu, CLAMP),
        e + floor,
        soft_clamp_derivative(raw_mu, CLAMP),
        soft_clamp_derivative(raw_log_sigma, CLAMP) * e,
    )


def shared_logs(clamp: float | None, sigma_floor: float) -> bool:
    """Whether four sigmas, or ratios of sigmas, may be multiplied before a logarithm is taken: with the clamp at 5 a ratio
    is within exp(+-10), and the product far from the ends of float32."""
    return clamp is not None and clamp <= 5.0 and sigma_floor <= 1.0


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    """``"swish"``: u sigmoid(u); ``"elu"``: u above 0, else exp(u) - 1; ``""``: u."""
    if ACTIVATION == "swish":
        return u / (1.0 + tl.exp(-u))
    elif ACTIVATION == "elu":
        return tl.where(u > 0.0, u, _expm1(u))
    else:
        return u


@triton.jit
def activation_derivative(u, ACTIVATION: tl.constexpr):
    """The derivative of :func:`activate`."""
    if ACTIVATION == "swish":
        s = 1.0 / (1.0 + tl.exp(-u))
        return s * (1.0 + u * (1.0 - s))
    elif ACTIVATION == "elu":
        return tl.where(u > 0.0, 1.0, tl.exp(u))
    else:
        return tl.zeros_like(u) + 1.0


@triton.jit
def _expm1(u):
    """``exp(u) - 1`` for u <= 0, by its series where the difference would lose digits."""
    series = u * (1.0 + u * (0.5 + u * (0.16666667163372040 + u * 0.041666667908430099)))
    return tl.where(u > -0.03, series, tl.exp(u) - 1.0)
