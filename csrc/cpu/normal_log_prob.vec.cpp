// normal_log_prob, compiled once per capability: -((z - mu) / sigma)^2 / 2 - log(2 pi) / 2 - log sigma,
// summed over pixels.
#include "normal_log_prob.h"

#include "map_loops.h"

namespace nvae {
namespace NVAE_ISA {

// n lanes at element i of a segment.
template <class V, class T>
struct Density {
  using S = typename V::Scalar;
  const NormalLogProbArgs& a;
  Squasher<V> squash;
  explicit Density(const NormalLogProbArgs& args) : a(args), squash(args.squash) {}

  NVAE_INLINE Squashed<V> normal(const Raw<T>& raw, int64_t i, int n) const {
    if (!raw.mu) return {V(S(0)), V(S(1) + squash.floor()), V(S(0)), V(S(0))};
    return squash(load<V>(raw.mu + i * raw.step, n), load<V>(raw.log_sigma + i * raw.step, n));
  }
  NVAE_INLINE V log_prob(const Raw<T>& z, const Raw<T>& raw, int64_t i, int n) const {
    const Squashed<V> p = normal(raw, i, n);
    const V w = (load<V>(z.mu + i * z.step, n) - p.mu) / p.sigma;
    return fnma(w * V(S(0.5)), w, -log(p.sigma));
  }
  NVAE_INLINE void gradients(const Raw<T>& z, const Raw<T>& raw, int64_t i, V grad, int64_t map,
                             int64_t packed, int64_t log_sigma, int n) const {
    const Squashed<V> p = normal(raw, i, n);
    const V inverse = V(S(1)) / p.sigma, w = (load<V>(z.mu + i * z.step, n) - p.mu) * inverse,
            scaled = grad * inverse;
    if (a.grad_z) store(-(scaled * w), static_cast<T*>(a.grad_z) + map, n);
    if (T* out = static_cast<T*>(a.grad_params)) {
      store(scaled * w * p.d_mu, out + packed, n);
      store(scaled * fma(w, w, V(S(-1))) * p.d_sigma, out + packed + log_sigma, n);
    }
  }
};

template <class V, class T>
static void forward(const NormalLogProbArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Density<V, T> density(a);
  const auto places = [&](const Segment<S>& s, Raw<T>& z, Raw<T>& raw) {
    z = Raw<T>(a.z, 0, s.b, s.c, s.p);
    raw = Raw<T>(a.params, a.channels, s.b, s.c, s.p);
  };
  Raw<T> z(Packed{}, 0, 0, 0, 0), raw = z;
  if (a.channels_last)
    return for_channels<V>(a, nullptr, begin, end, [&](const Segment<S>& s, int n) {
      places(s, z, raw);
      V sums(S(0));
      for (int64_t i = 0; i < s.count; ++i) sums = sums + density.log_prob(z, raw, i, n);
      store_channel_sums(sums, kLogSqrt2Pi * static_cast<double>(s.count), a.partial, a, s.task, s.c, n, 1,
                         0);
    });
  for_rows<V>(a, nullptr, begin, end, [&](const Segment<S>& s) {
    places(s, z, raw);
    z.step = raw.step = 1;
    V sums(S(0));
    int64_t i = 0;
    for (; i + V::size <= s.count; i += V::size) sums = sums + density.log_prob(z, raw, i, V::size);
    if (const int n = static_cast<int>(s.count - i))
      sums = sums + keep(density.log_prob(z, raw, i, n), n, S(0));
    store_row_sum(sums, kLogSqrt2Pi * static_cast<double>(s.count), a.partial, s.task, 1, 0);
  });
}

template <class V, class T>
static void backward(const NormalLogProbArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Density<V, T> density(a);
  if (a.channels_last)
    return for_channels<V>(a, nullptr, begin, end, [&](const Segment<S>& s, int n) {
      const Raw<T> z(a.z, 0, s.b, s.c, s.p), raw(a.params, a.channels, s.b, s.c, s.p);
      const V grad = channel_gradients<V>(a.grad, s.row, n);
      for (int64_t i = 0; i < s.count; ++i)
        density.gradients(z, raw, i, grad, s.map + i * a.channels, s.packed + i * 2 * a.channels, a.channels,
                          n);
    });
  for_rows<V>(a, nullptr, begin, end, [&](const Segment<S>& s) {
    const Raw<T> z(a.z, 0, s.b, s.c, s.p), raw(a.params, a.channels, s.b, s.c, s.p);
    const V grad = row_gradient<V>(a.grad, s.row);
    const int64_t log_sigma = a.channels * a.pixels;
    for (int64_t i = 0; i < s.count; i += V::size) {
      const int n = s.count - i < V::size ? static_cast<int>(s.count - i) : V::size;
      density.gradients(z, raw, i, grad, s.map + i, s.packed + i, log_sigma, n);
    }
  });
}

void normal_log_prob_forward(const NormalLogProbArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return forward<VecF, float>(a, begin, end);
    case Dtype::f64:
      return forward<VecD, double>(a, begin, end);
    case Dtype::bf16:
      return forward<VecF, bf16>(a, begin, end);
    case Dtype::f16:
      return forward<VecF, f16>(a, begin, end);
  }
}

void normal_log_prob_backward(const NormalLogProbArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return backward<VecF, float>(a, begin, end);
    case Dtype::f64:
      return backward<VecD, double>(a, begin, end);
    case Dtype::bf16:
      return backward<VecF, bf16>(a, begin, end);
    case Dtype::f16:
      return backward<VecF, f16>(a, begin, end);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
