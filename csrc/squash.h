// The squashing of raw parameters that the normal kernels share:
//   mu = clamp tanh(raw_mu / clamp),  sigma = exp(clamp tanh(raw_log_sigma / clamp)) + floor
// and the derivatives of both. Include it in csrc/cpu/<op>.vec.cpp files.
#pragma once
#include "vec.h"

namespace nvae {

struct Squash {
  bool clamped;
  double clamp, floor;
};

namespace NVAE_ISA {

constexpr double kLogSqrt2Pi = 0.91893853320467274178;

// clamp tanh(raw / clamp). Network outputs are of the size of 1, so raw nearly always lies within [-clamp,
// clamp]: there it is raw plus an odd polynomial (the result is good to 0.93 units in the last place of
// tanh), with clamp folded into the coefficients; only a vector with a lane outside also runs the general
// function.
template <class V>
struct SoftClamp;
template <>
struct SoftClamp<VecF> {
  static constexpr int kTerms = 7;
  float clamp, inverse, coefficient[kTerms];
  NVAE_INLINE explicit SoftClamp(double c)
      : clamp(static_cast<float>(c)), inverse(static_cast<float>(1.0 / c)) {
    const double tanh_terms[kTerms] = {-0x1.55553cp-2, 0x1.110be6p-3, -0x1.b96286p-5, 0x1.600bc0p-6,
                                       -0x1.0466f8p-7, 0x1.2db66ep-9, -0x1.7803d8p-12};
    double power = 1.0;
    for (int i = 0; i < kTerms; ++i) {
      power /= c * c;
      coefficient[i] = static_cast<float>(tanh_terms[i] * power);
    }
  }
  // u = clamp tanh(raw / clamp) and t = tanh(raw / clamp), which the derivative 1 - t^2 wants with all its
  // digits.
  NVAE_INLINE VecF operator()(VecF raw, VecF& t) const {
    const VecF square = raw * raw;
    VecF p(coefficient[kTerms - 1]);
    for (int i = kTerms - 2; i >= 0; --i) p = fma(p, square, VecF(coefficient[i]));
    const VecF inner = fma(p, square * raw, raw);
    const Mask inside = abs(raw) <= VecF(clamp);
    t = inner * VecF(inverse);
    if (__builtin_expect(all(inside), 1)) return inner;
    const VecF outer = tanh(raw * VecF(inverse));
    t = select(inside, t, outer);
    return select(inside, inner, VecF(clamp) * outer);
  }
};
template <>
struct SoftClamp<VecD> {
  double clamp, inverse;
  NVAE_INLINE explicit SoftClamp(double c) : clamp(c), inverse(1.0 / c) {}
  NVAE_INLINE VecD operator()(VecD raw, VecD& t) const {
    t = tanh(raw / VecD(clamp));
    return VecD(clamp) * t;
  }
};

NVAE_INLINE VecD exp_moderate(VecD x) { return exp(x); }
// exp for |x| <= 80 or NaN: no overflow to look after. Adding 1.5 * 2^23 rounds to an integer and leaves it
// in the low bits.
NVAE_INLINE VecF exp_moderate(VecF x) {
  const VecF magic(12582912.f), shifted = fma(x, VecF(0x1.715476p+0f), magic), n = shifted - magic;
  const VecF r = fnma(n, VecF(kLn2Low), fnma(n, VecF(kLn2High), x));
  return exp_reduced(r) * from_bits(shift_left<23>(bits(shifted)) + Bits(0x3f800000u));
}

template <class V>
struct Squasher {
  using S = typename V::Scalar;
  bool clamped, moderate;
  SoftClamp<V> bend;
  S floor;

  NVAE_INLINE explicit Squasher(const Squash& s)
      : clamped(s.clamped),
        moderate(s.clamped && s.clamp <= 80.0),
        bend(s.clamped ? s.clamp : 1.0),
        floor(static_cast<S>(s.floor)) {}

  // The clamped value, and its derivative with respect to raw (free when it is not used).
  NVAE_INLINE V soft_clamp(V raw, V& slope) const {
    slope = V(S(1));
    if (!clamped) return raw;
    V t;
    const V u = bend(raw, t);
    slope = fnma(t, t, slope);
    return u;
  }
  NVAE_INLINE V exponential(V u) const { return moderate ? exp_moderate(u) : exp(u); }
  NVAE_INLINE V mu(V raw, V& slope) const { return soft_clamp(raw, slope); }
  NVAE_INLINE V sigma(V raw, V& slope) const {
    const V e = exponential(soft_clamp(raw, slope));
    slope = slope * e;
    return e + V(floor);
  }
  NVAE_INLINE V mu(V raw) const {
    V slope;
    return mu(raw, slope);
  }
  NVAE_INLINE V sigma(V raw) const {
    V slope;
    return sigma(raw, slope);
  }
};

}  // namespace NVAE_ISA
}  // namespace nvae
