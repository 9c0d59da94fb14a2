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

NVAE_INLINE VecD exp_moderate(VecD x) { return exp(x); }
// exp for |x| <= 80, or a NaN whose nine lowest bits are clear. Adding 1.5 * 2^23 rounds x / ln 2 to an
// integer and leaves it in the low bits. The polynomial is 2^r with its constant term exact (relative error
// 3e-9); the power of two enters through the exponent's bits.
NVAE_INLINE VecF exp_moderate(VecF x) {
#if NVAE_CAPABILITY == 0
  return exp(x);  // below, the product of x and 1 / ln 2 must not be rounded by itself
#else
  const VecF per_ln2(0x1.715476p+0f), magic(12582912.f);
  const VecF shifted = fma(x, per_ln2, magic);
  const VecF r = fma(x, VecF(0x1.4ae0bep-26f), fma(x, per_ln2, magic - shifted));
  VecF p(0x1.417810p-13f);
  p = fma(p, r, VecF(0x1.5f0950p-10f));
  p = fma(p, r, VecF(0x1.3b2dd4p-7f));
  p = fma(p, r, VecF(0x1.c6af7ap-5f));
  p = fma(p, r, VecF(0x1.ebfbdcp-3f));
  p = fma(p, r, VecF(0x1.62e430p-1f));
  p = fma(p, r, VecF(1.f));
  return from_bits(bits(p) + shift_left<23>(bits(shifted)));
#endif
}
NVAE_INLINE VecF plain_nan(VecF x) { return select(x == x, x, VecF(__builtin_nanf(""))); }
NVAE_INLINE VecD plain_nan(VecD x) { return x; }

// The two parameters of a normal and the derivatives of each by its raw parameter (free when not used).
template <class V>
struct Squashed {
  V mu, sigma, d_mu, d_sigma;
};

template <class V>
class Squasher {
  using S = typename V::Scalar;
  static constexpr int kTerms = 7;
  // Clamps between which the coefficients, of up to clamp^-14, are normal float32 numbers. For others no lane
  // counts as inside, and all take the general function.
  static constexpr double kLeast = 0x1p-7, kMost = 0x1p+7;
  bool clamped_, moderate_;
  S clamp_, inverse_, bound_, floor_, coefficient_[kTerms];

 public:
  NVAE_INLINE explicit Squasher(const Squash& s)
      : clamped_(s.clamped),
        moderate_(s.clamped && s.clamp <= 80.0),
        clamp_(static_cast<S>(s.clamped ? s.clamp : 1.0)),
        inverse_(static_cast<S>(1.0 / (s.clamped ? s.clamp : 1.0))),
        bound_(clamp_ >= S(kLeast) && clamp_ <= S(kMost) ? clamp_ : S(-1)),
        floor_(static_cast<S>(s.floor)) {
    const double tanh_terms[kTerms] = {-0x1.55553cp-2, 0x1.110be6p-3, -0x1.b96286p-5, 0x1.600bc0p-6,
                                       -0x1.0466f8p-7, 0x1.2db66ep-9, -0x1.7803d8p-12};
    double power = 1.0;
    for (int i = 0; i < kTerms; ++i) {
      if (s.clamped) power /= s.clamp * s.clamp;
      coefficient_[i] = static_cast<S>(tanh_terms[i] * power);
    }
  }
  NVAE_INLINE S floor() const { return floor_; }

  // u = clamp tanh(raw / clamp) of M raw parameters, and du/draw. Network outputs are of the size of 1, so
  // that raw is nearly always within [-clamp, clamp]: there u is raw plus an odd polynomial (good to 0.93
  // units in the last place of tanh), with clamp folded into the coefficients; only vectors with a lane
  // outside also run the general function. The M polynomials are interleaved, because each is a chain in which
  // every step waits for the previous one.
  template <int M>
  NVAE_INLINE void tanh_clamp(const V (&raw)[M], V (&u)[M], V (&derivative)[M]) const {
    if (!clamped_) {
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) u[i] = raw[i], derivative[i] = V(S(1));
      return;
    }
    V square[M];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) square[i] = raw[i] * raw[i];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) u[i] = V(coefficient_[kTerms - 1]);
#pragma GCC unroll 8
    for (int term = kTerms - 2; term >= 0; --term)
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) u[i] = fma(u[i], square[i], V(coefficient_[term]));
    auto inside = abs(raw[0]) <= V(bound_);
#pragma GCC unroll 4
    for (int i = 1; i < M; ++i) inside = inside & (abs(raw[i]) <= V(bound_));
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      u[i] = fma(u[i], square[i] * raw[i], raw[i]);
      const V t = u[i] * V(inverse_);
      derivative[i] = fnma(t, t, V(S(1)));
    }
    if (V::size == 1 || !__builtin_expect(all(inside), 1)) {
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) {
        const Clamped b = outside(raw[i], {u[i], derivative[i]}, bound_, clamp_, inverse_);
        u[i] = b.u;
        derivative[i] = b.derivative;
      }
    }
  }
  // exp of a clamped log sigma.
  NVAE_INLINE V exponential(V u) const { return moderate_ ? exp_moderate(u) : exp(u); }

  NVAE_INLINE Squashed<V> operator()(V raw_mu, V raw_log_sigma) const {
    const V raw[2] = {raw_mu, raw_log_sigma};
    V u[2], derivative[2];
    tanh_clamp(raw, u, derivative);
    const V e = exponential(u[1]);
    return {u[0], e + V(floor_), derivative[0], derivative[1] * e};
  }

 private:
  struct Clamped {
    V u, derivative;
  };
  // The lanes outside [-bound, bound], or every lane of float64; the others as they are. Never inlined: code
  // that rarely runs should not be between code that always does.
  __attribute__((noinline)) static Clamped outside(V raw, Clamped inner, S bound, S clamp, S inverse) {
    const auto inside = V::size > 1 ? abs(raw) <= V(bound) : abs(raw) < V(S(0));
    const V t = plain_nan(tanh(V::size > 1 ? raw * V(inverse) : raw / V(clamp)));
    return {select(inside, inner.u, V(clamp) * t), select(inside, inner.derivative, fnma(t, t, V(S(1))))};
  }
};

}  // namespace NVAE_ISA
}  // namespace nvae
