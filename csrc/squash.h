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

NVAE_INLINE VecD tanh_of(VecD x) { return tanh(x); }
// Network outputs are of the size of 1, and raw / clamp nearly always lies within [-1, 1]: there an odd
// polynomial does (0.93 units in the last place), and the general function runs only for a vector that has a
// lane outside.
NVAE_INLINE VecF tanh_of(VecF x) {
  const VecF square = x * x;
  VecF p(-0x1.7803d8p-12f);
  p = fma(p, square, VecF(0x1.2db66ep-9f));
  p = fma(p, square, VecF(-0x1.0466f8p-7f));
  p = fma(p, square, VecF(0x1.600bc0p-6f));
  p = fma(p, square, VecF(-0x1.b96286p-5f));
  p = fma(p, square, VecF(0x1.110be6p-3f));
  p = fma(p, square, VecF(-0x1.55553cp-2f));
  const VecF inner = fma(p, square * x, x);
  const Mask inside = abs(x) <= VecF(1.f);
  if (all(inside)) return inner;
  return select(inside, inner, tanh(x));
}

template <class V>
struct Squasher {
  bool clamped;
  V clamp, inverse, floor;

  NVAE_INLINE explicit Squasher(const Squash& s)
      : clamped(s.clamped),
        clamp(static_cast<typename V::Scalar>(s.clamp)),
        inverse(static_cast<typename V::Scalar>(s.clamped ? 1.0 / s.clamp : 1.0)),
        floor(static_cast<typename V::Scalar>(s.floor)) {}

  NVAE_INLINE V soft_clamp(V raw) const { return clamped ? clamp * tanh_of(raw * inverse) : raw; }
  // The value, and its derivative with respect to raw.
  NVAE_INLINE V soft_clamp(V raw, V& slope) const {
    if (!clamped) {
      slope = V(1);
      return raw;
    }
    const V t = tanh_of(raw * inverse);
    slope = fnma(t, t, V(1));
    return clamp * t;
  }
  NVAE_INLINE V mu(V raw) const { return soft_clamp(raw); }
  NVAE_INLINE V mu(V raw, V& slope) const { return soft_clamp(raw, slope); }
  NVAE_INLINE V sigma(V raw) const { return exp(soft_clamp(raw)) + floor; }
  NVAE_INLINE V sigma(V raw, V& slope) const {
    const V e = exp(soft_clamp(raw, slope));
    slope = slope * e;
    return e + floor;
  }
};

}  // namespace NVAE_ISA
}  // namespace nvae
