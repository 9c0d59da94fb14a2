// The gate of squeeze-and-excitation and its gradient, compiled once per capability. Plain loops over channels, of which
// the compiler makes vectors; sums in double, over samples in order.
#include "gate.h"

#include "plane_loops.h"

namespace nvae {
namespace NVAE_ISA {

// In eight sums, of which the compiler makes a vector.
NVAE_INLINE double dot(const double* a, const double* b, int64_t n) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) sums[k] += a[i + k] * b[i + k];
  for (int k = 0; i < n; ++i, ++k) sums[k] += a[i] * b[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// to += factor * from
NVAE_INLINE void add(double factor, const double* __restrict from, double* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

template <class V>
static void forward(const GateArgs& a, int64_t begin, int64_t end, double* scratch) {
  using S = typename V::Scalar;
  const int64_t n = a.channels, units = a.units;
  double *const wide = scratch, *const logit = scratch + n;
  const S *s = static_cast<const S*>(a.scale), *t = static_cast<const S*>(a.shift);
  const S *b1 = static_cast<const S*>(a.b1), *b2 = static_cast<const S*>(a.b2);
  const V rs(static_cast<S>(a.residual_scale));
  for (int64_t b = begin; b < end; ++b) {
    const S* m = static_cast<const S*>(a.mean) + b * n;
    S *p = a.pooled ? static_cast<S*>(a.pooled) + b * n : nullptr, *h = static_cast<S*>(a.hidden) + b * units;
    S *f = static_cast<S*>(a.factor) + b * n, *g = a.gate ? static_cast<S*>(a.gate) + b * n : nullptr;
    S* o = a.offset ? static_cast<S*>(a.offset) + b * n : nullptr;
    for (int64_t i = 0; i < n; ++i) {
      const S x = s ? m[i] * s[i] + t[i] : m[i];
      if (p) p[i] = x;
      wide[i] = x;
      logit[i] = b2[i];
    }
    for (int64_t r = 0; r < units; ++r) {
      const double unit = b1[r] + dot(a.w1 + r * n, wide, n);
      h[r] = unit > 0 || unit != unit ? static_cast<S>(unit) : S(0);
      add(h[r], a.w2 + r * n, logit, n);
    }
    each_vector<V>(n, [&](int64_t i, int k) {
      const V open = sigmoid(load_n<V>(logit + i, k)), scaled = rs * open;
      if (g) store_n(open, g + i, k);
      store_n(s ? scaled * load_n<V>(s + i, k) : scaled, f + i, k);
      if (o) store_n(s ? scaled * load_n<V>(t + i, k) : V(S(0)), o + i, k);
    });
  }
}

template <class S>
static void backward(const GateGradientsArgs& a, int64_t begin, int64_t end, double* scratch) {
  const auto of = [](const void* data, int64_t at) {
    return data ? static_cast<const S*>(data) + at : nullptr;
  };
  const int64_t n = a.channels, units = a.units;
  double *const wide = scratch, *const logit = scratch + n, *const reached = scratch + 2 * n;
  const S *m = of(a.mean, 0), *r = of(a.rstd, 0), *w = of(a.weight, 0), *c = of(a.bias, 0);
  const S rs = static_cast<S>(a.residual_scale);
  for (int64_t b = begin; b < end; ++b) {
    const S *x = of(a.sum_x, b * n), *xp = of(a.sum_xp, b * n), *pm = of(a.plane_mean, b * n);
    const S *p = of(a.pooled, b * n), *h = of(a.hidden, b * units), *g = of(a.gate, b * n);
    S *t = static_cast<S*>(a.through) + b * n, *f = static_cast<S*>(a.factor) + b * n;
    for (int64_t i = 0; i < n; ++i) {
      const S to_gate = r ? w[i] * (rs * r[i] * xp[i]) + c[i] * (rs * x[i]) : rs * xp[i];
      wide[i] = p[i];
      reached[i] = 0;
      logit[i] = static_cast<double>(to_gate) * g[i] * (1.0 - g[i]);
      f[i] = rs * g[i];
    }
    add(1.0, logit, a.to_b2, n);
    for (int64_t k = 0; k < units; ++k) {
      double unit = dot(logit, a.w2 + k * n, n);
      if (!(h[k] > S(0))) unit *= 0;  // a NaN stays one
      a.to_b1[k] += unit;
      add(h[k], logit, a.to_w2 + k * n, n);
      add(unit, a.w1 + k * n, reached, n);
      add(unit, wide, a.to_w1 + k * n, n);
    }
    for (int64_t i = 0; i < n; ++i) t[i] = static_cast<S>(reached[i]);
    if (!r) continue;
    for (int64_t i = 0; i < n; ++i) {
      a.sum_y[i] += static_cast<double>(g[i] * (rs * x[i])) + reached[i];
      a.dot_y[i] += static_cast<double>(g[i] * (rs * r[i] * xp[i])) + reached[i] * (pm[i] - m[i]) * r[i];
    }
  }
}

void gate_forward(const GateArgs& a, int64_t begin, int64_t end, double* scratch) {
  a.is_double ? forward<VecD>(a, begin, end, scratch) : forward<VecF>(a, begin, end, scratch);
}

void gate_backward(const GateGradientsArgs& a, int64_t begin, int64_t end, double* scratch) {
  a.is_double ? backward<double>(a, begin, end, scratch) : backward<float>(a, begin, end, scratch);
}

}  // namespace NVAE_ISA
}  // namespace nvae
