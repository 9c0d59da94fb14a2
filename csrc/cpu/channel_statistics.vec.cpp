// channel_statistics, compiled once per capability: mean and sum of squared deviations of every span of
// pixels. Sums are of deviations from a pivot near the mean, the average of the span's first values, so that
// nothing is lost where |mean| is far above the spread. The pivot is rounded to the dtype of x: differences
// of two short numbers are exact, where the same few values would otherwise be rounded the same way every
// time.
#include "channel_statistics.h"

#include "plane_loops.h"

namespace nvae {
namespace NVAE_ISA {

// From the sums of d and d * d, d = x - pivot; share is 1 / count.
NVAE_INLINE void leave(double pivot, double sum, double squares, double share, double* mean, double* m2) {
  const double shift = sum * share, spread = squares - sum * shift;
  *mean = pivot + shift;
  *m2 = spread < 0 ? 0 : spread;
}

template <class T>
NVAE_INLINE double load_as_double(const T* p) {
  return load_float(p);
}
NVAE_INLINE double load_as_double(const double* p) { return *p; }

constexpr int64_t kStretch = 32;  // vectors

template <class V, class T>
static void rows(const ChannelStatisticsArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const int64_t spans = a.spans();
  const double whole = 1.0 / static_cast<double>(a.span());
  each_row(a, begin, end, [&](int64_t b, int64_t c, int64_t s, int64_t at, int64_t count) {
    const T* x = static_cast<const T*>(a.x) + at;
    const int head = count < V::size ? static_cast<int>(count) : V::size;
    S pivot = sum(load_n<V>(x, head) * V(S(1) / static_cast<S>(head)));
    if (!(pivot - pivot == S(0))) pivot = 0;  // the mean of infinity is infinity, not NaN
    T rounded;
    store_n(V(pivot), &rounded, 1);
    pivot = sum(load_n<V>(&rounded, 1));
    const V p(pivot);
    V s0(S(0)), s1(S(0)), q0(S(0)), q1(S(0));
    const int64_t full = count - count % V::size;
    int64_t i = 0;
    while (i < full) {  // partial sums of a run first: fewer roundings
      const int64_t end = full - i < kStretch * V::size ? full : i + kStretch * V::size;
      V t0(S(0)), t1(S(0)), r0(S(0)), r1(S(0));
      for (; i + 2 * V::size <= end; i += 2 * V::size) {
        prefetch(x + i);
        if (2 * V::size * sizeof(T) > 64) prefetch(x + i + V::size);
        const V d0 = V::load(x + i) - p, d1 = V::load(x + i + V::size) - p;
        t0 = t0 + d0;
        t1 = t1 + d1;
        r0 = fma(d0, d0, r0);
        r1 = fma(d1, d1, r1);
      }
      for (; i < end; i += V::size) {
        const V d = V::load(x + i) - p;
        t0 = t0 + d;
        r0 = fma(d, d, r0);
      }
      s0 = s0 + t0;
      s1 = s1 + t1;
      q0 = q0 + r0;
      q1 = q1 + r1;
    }
    if (const int n = static_cast<int>(count - i)) {
      const V d = first_lanes(V::load(x + i, n) - p, n);
      s1 = s1 + d;
      q1 = fma(d, d, q1);
    }
    const int64_t out = (b * spans + s) * a.channels + c;
    const double share = count == a.span() ? whole : 1.0 / static_cast<double>(count);
    leave(pivot, sum(s0 + s1), sum(q0 + q1), share, a.mean + out, a.m2 + out);
  });
}

template <class V, class T>
static void channels(const ChannelStatisticsArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  each_run(a, begin, end, [&](int64_t, int64_t task, int64_t pixel, int64_t count) {
    BlockSums<V, 2> block;
    T pivot[kBlock];
    for (int64_t first = 0; first < a.channels; first += kBlock) {
      const int64_t width = a.channels - first < kBlock ? a.channels - first : kBlock;
      const T* x = static_cast<const T*>(a.x) + pixel * a.channels + first;
      const int64_t head = count < kGroup ? count : kGroup;
      each_vector<V>(width, [&](int64_t c, int n) {
        V average(S(0));
        const V share(S(1) / static_cast<S>(head));
        for (int64_t i = 0; i < head; ++i)
          average = fma(load_n<V>(x + i * a.channels + c, n), share, average);
        average = select(average - average == V(S(0)), average, V(S(0)));
        store_n(average, pivot + c, n);
      });
      block.run(width, count, [&](int64_t c, int n, int64_t i, int pixels, V* totals) {
        const T* at = x + i * a.channels + c;
        const V p = load_n<V>(pivot + c, n);
        for (int k = 0; k < pixels; ++k) {
          __builtin_prefetch(at + (k + kGroup) * a.channels);
          const V d = load_n<V>(at + k * a.channels, n) - p;
          totals[0] = totals[0] + d;
          totals[1] = fma(d, d, totals[1]);
        }
      });
      const int64_t out = task * a.channels + first;
      const double share = 1.0 / static_cast<double>(count);
      for (int64_t c = 0; c < width; ++c)
        leave(load_as_double(pivot + c), block.sums[0][c], block.sums[1][c], share, a.mean + out + c,
              a.m2 + out + c);
    }
  });
}

template <class V, class T>
static void mean_rows(const ChannelStatisticsArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const int64_t spans = a.spans();
  const double whole = 1.0 / static_cast<double>(a.span());
  each_row(a, begin, end, [&](int64_t b, int64_t c, int64_t s, int64_t at, int64_t count) {
    const T* x = static_cast<const T*>(a.x) + at;
    V sums[4] = {V(S(0)), V(S(0)), V(S(0)), V(S(0))};
    int64_t i = 0;
    for (; i + 4 * V::size <= count; i += 4 * V::size)
      for (int k = 0; k < 4; ++k) {
        prefetch(x + i + k * V::size);
        sums[k] = sums[k] + V::load(x + i + k * V::size);
      }
    each_vector<V>(count - i, [&](int64_t j, int n) { sums[0] = sums[0] + load_n<V>(x + i + j, n); });
    const double share = count == a.span() ? whole : 1.0 / static_cast<double>(count);
    a.mean[(b * spans + s) * a.channels + c] =
        static_cast<double>(sum((sums[0] + sums[1]) + (sums[2] + sums[3]))) * share;
  });
}

template <class V, class T>
static void mean_channels(const ChannelStatisticsArgs& a, int64_t begin, int64_t end) {
  each_run(a, begin, end, [&](int64_t, int64_t task, int64_t pixel, int64_t count) {
    BlockSums<V, 1> block;
    for (int64_t first = 0; first < a.channels; first += kBlock) {
      const int64_t width = a.channels - first < kBlock ? a.channels - first : kBlock;
      const T* x = static_cast<const T*>(a.x) + pixel * a.channels + first;
      block.run(width, count, [&](int64_t c, int n, int64_t i, int pixels, V* totals) {
        for (int k = 0; k < pixels; ++k) {
          const T* at = x + (i + k) * a.channels + c;
          __builtin_prefetch(at + kGroup * a.channels);
          totals[0] = totals[0] + load_n<V>(at, n);
        }
      });
      double* out = a.mean + task * a.channels + first;
      for (int64_t c = 0; c < width; ++c) out[c] = block.sums[0][c] / static_cast<double>(count);
    }
  });
}

void channel_statistics_parts(const ChannelStatisticsArgs& a, int64_t begin, int64_t end) {
  with_types(a.dtype, [&](auto types) {
    using V = typename decltype(types)::Vector;
    using T = typename decltype(types)::Element;
    if (!a.m2) return a.channels_last ? mean_channels<V, T>(a, begin, end) : mean_rows<V, T>(a, begin, end);
    a.channels_last ? channels<V, T>(a, begin, end) : rows<V, T>(a, begin, end);
  });
}

}  // namespace NVAE_ISA
}  // namespace nvae
