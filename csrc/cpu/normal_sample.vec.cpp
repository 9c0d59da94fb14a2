// normal_sample, compiled once per capability: z = mu + temperature * sigma * eps.
#include "normal_sample.h"

#include "map_loops.h"

namespace nvae {
namespace NVAE_ISA {

// n lanes at element i of a segment. map and packed: of the first lane, in dense maps and dense packed
// parameters.
template <class V, class T>
struct Sampler {
  using S = typename V::Scalar;
  const NormalSampleArgs& a;
  Squasher<V> squash;
  S temperature;
  explicit Sampler(const NormalSampleArgs& args)
      : a(args), squash(args.squash), temperature(static_cast<S>(args.temperature)) {}

  NVAE_INLINE Squashed<V> at(const Raw<T>& raw, int64_t i, int n) const {
    return squash(load<V>(raw.mu + i * raw.step, n), load<V>(raw.log_sigma + i * raw.step, n));
  }
  NVAE_INLINE void forward(const Raw<T>& raw, int64_t i, V eps, int64_t map, int64_t, int64_t, int n) const {
    const Squashed<V> q = at(raw, i, n);
    store(fma(V(temperature) * q.sigma, eps, q.mu), static_cast<T*>(a.z) + map, n);
  }
  NVAE_INLINE void backward(const Raw<T>& raw, int64_t i, V eps, int64_t map, int64_t packed,
                            int64_t log_sigma, int n) const {
    const Squashed<V> q = at(raw, i, n);
    const V grad = load<V>(static_cast<const T*>(a.grad_z) + map, n), hot = grad * V(temperature);
    if (T* out = static_cast<T*>(a.grad_params)) {
      store(grad * q.d_mu, out + packed, n);
      store(hot * eps * q.d_sigma, out + packed + log_sigma, n);
    }
    if (a.grad_noise) store_as(hot * q.sigma, a.grad_noise, a.noise.dtype, map, n);
  }
};

// step(raw, i, eps, map, packed, log_sigma, n) for all of a map.
template <class V, class T, class F>
static void walk(const NormalSampleArgs& a, int64_t begin, int64_t end, F step) {
  using S = typename V::Scalar;
  if (a.channels_last) {
    for_channels<V>(a, &a.noise, begin, end, [&](const Segment<S>& s, int n) {
      const Raw<T> raw(a.params, a.channels, s.b, s.c, s.p);
      for (int64_t i = 0; i < s.count; ++i)
        step(raw, i, V::load(s.eps + i * V::size), s.map + i * a.channels, s.packed + i * 2 * a.channels,
             a.channels, n);
    });
    return;
  }
  for_rows<V>(a, &a.noise, begin, end, [&](const Segment<S>& s) {
    Raw<T> raw(a.params, a.channels, s.b, s.c, s.p);
    raw.step = 1;
    const int64_t log_sigma = a.channels * a.pixels;
    int64_t i = 0;
    for (; i + V::size <= s.count; i += V::size)
      step(raw, i, V::load(s.eps + i), s.map + i, s.packed + i, log_sigma, V::size);
    if (const int n = static_cast<int>(s.count - i))
      step(raw, i, V::load(s.eps + i, n), s.map + i, s.packed + i, log_sigma, n);
  });
}

template <class V, class T>
static void run(const NormalSampleArgs& a, int64_t begin, int64_t end, bool backward) {
  const Sampler<V, T> sampler(a);
  if (backward)
    walk<V, T>(a, begin, end, [&](auto... args) { sampler.backward(args...); });
  else
    walk<V, T>(a, begin, end, [&](auto... args) { sampler.forward(args...); });
}

static void run_as(const NormalSampleArgs& a, int64_t begin, int64_t end, bool backward) {
  switch (a.dtype) {
    case Dtype::f32:
      return run<VecF, float>(a, begin, end, backward);
    case Dtype::f64:
      return run<VecD, double>(a, begin, end, backward);
    case Dtype::bf16:
      return run<VecF, bf16>(a, begin, end, backward);
    case Dtype::f16:
      return run<VecF, f16>(a, begin, end, backward);
  }
}

void normal_sample_forward(const NormalSampleArgs& a, int64_t begin, int64_t end) {
  run_as(a, begin, end, false);
}
void normal_sample_backward(const NormalSampleArgs& a, int64_t begin, int64_t end) {
  run_as(a, begin, end, true);
}

}  // namespace NVAE_ISA
}  // namespace nvae
