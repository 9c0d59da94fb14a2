// Power iteration on one matrix, compiled once per capability. A layer is read eight times a step and fits
// the cache: layer after layer, not iteration after iteration.
#include "spectral_norm.h"

#include "../vec.h"

namespace nvae {
namespace NVAE_ISA {

template <class V, class S>
static S dot(const S* a, const S* b, int64_t n) {
  V s0(S(0)), s1(S(0)), s2(S(0)), s3(S(0));
  int64_t i = 0;
  for (; i + 4 * V::size <= n; i += 4 * V::size) {
    s0 = fma(V::load(a + i), V::load(b + i), s0);
    s1 = fma(V::load(a + i + V::size), V::load(b + i + V::size), s1);
    s2 = fma(V::load(a + i + 2 * V::size), V::load(b + i + 2 * V::size), s2);
    s3 = fma(V::load(a + i + 3 * V::size), V::load(b + i + 3 * V::size), s3);
  }
  for (; i + V::size <= n; i += V::size) s0 = fma(V::load(a + i), V::load(b + i), s0);
  if (const int left = static_cast<int>(n - i)) s1 = fma(V::load(a + i, left), V::load(b + i, left), s1);
  return sum((s0 + s1) + (s2 + s3));
}

// to += sum_k c[k] rows[k], four rows at a time.
template <class V, class S>
static void accumulate(const S* const* rows, const S* c, S* to, int64_t n) {
  const V c0(c[0]), c1(c[1]), c2(c[2]), c3(c[3]);
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) {
    const V low = fma(c0, V::load(rows[0] + i), fma(c1, V::load(rows[1] + i), V::load(to + i)));
    fma(c2, V::load(rows[2] + i), fma(c3, V::load(rows[3] + i), low)).store(to + i);
  }
  for (; i < n; ++i) to[i] += c[0] * rows[0][i] + c[1] * rows[1][i] + c[2] * rows[2][i] + c[3] * rows[3][i];
}

template <class S>
static double normalize(S* x, int64_t n, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(x[i]) * x[i];
  const double length = std::sqrt(squares), by = length < eps ? eps : length;  // a NaN stays one
  for (int64_t i = 0; i < n; ++i) x[i] = static_cast<S>(x[i] / by);
  return length;
}

template <class V, class S>
static void iterate(const SpectralLayer& a, int64_t iterations, double eps) {
  const S* w = static_cast<const S*>(a.matrix);
  S *u = static_cast<S*>(a.u), *v = static_cast<S*>(a.v);
  const S zero[4] = {};
  for (int64_t k = 0; k < iterations; ++k) {
    for (int64_t j = 0; j < a.columns; ++j) v[j] = S(0);
    for (int64_t r = 0; r < a.rows; r += 4) {
      const S* rows[4];
      S c[4];
      for (int j = 0; j < 4; ++j) {
        const bool there = r + j < a.rows;
        rows[j] = w + (there ? r + j : r) * a.columns;
        c[j] = there ? u[r + j] : zero[j];
      }
      accumulate<V>(rows, c, v, a.columns);
    }
    normalize(v, a.columns, eps);
    for (int64_t r = 0; r < a.rows; ++r) u[r] = dot<V>(w + r * a.columns, v, a.columns);
    *a.length = normalize(u, a.rows, eps);
  }
}

template <class V, class S>
static void outer(const SpectralLayer& a, int64_t begin, int64_t end) {
  const S *u = static_cast<const S*>(a.u), *v = static_cast<const S*>(a.v);
  for (int64_t r = begin; r < end; ++r) {
    S* out = static_cast<S*>(a.gradient) + r * a.columns;
    const V factor(static_cast<S>(a.scale * u[r]));
    int64_t i = 0;
    for (; i + V::size <= a.columns; i += V::size) (factor * V::load(v + i)).store(out + i);
    if (const int left = static_cast<int>(a.columns - i))
      (factor * V::load(v + i, left)).store(out + i, left);
  }
}

void spectral_iterate(const SpectralLayer& a, int64_t iterations, double eps) {
  a.is_double ? iterate<VecD, double>(a, iterations, eps) : iterate<VecF, float>(a, iterations, eps);
}
void spectral_outer(const SpectralLayer& a, int64_t begin, int64_t end) {
  a.is_double ? outer<VecD, double>(a, begin, end) : outer<VecF, float>(a, begin, end);
}

}  // namespace NVAE_ISA
}  // namespace nvae
