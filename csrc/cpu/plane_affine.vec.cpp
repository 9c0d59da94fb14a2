// plane_affine and plane_dots, compiled once per capability. Maps of two memory formats are combined in
// square tiles that are transposed in registers.
#include "plane_affine.h"

#include "plane_loops.h"

namespace nvae {
namespace NVAE_ISA {

template <class S>
NVAE_INLINE const S* of_sample(const PlaneCoefficients& k, int64_t b) {
  return k.data ? static_cast<const S*>(k.data) + b * k.batch : nullptr;
}

// a x + b y + c, where y, b and c may be missing.
template <class V>
NVAE_INLINE V combine(V a, V x, bool has_y, V y, const V* b, const V* c) {
  V sum = c ? fma(a, x, *c) : a * x;
  if (has_y) sum = b ? fma(*b, y, sum) : sum + y;
  return sum;
}

template <class V, class T>
static void affine_rows(const PlaneAffineArgs& args, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const T *const x = static_cast<const T*>(args.x), *const y = static_cast<const T*>(args.y);
  T* const out = static_cast<T*>(args.out);
  each_row(args, begin, end, [&](int64_t sample, int64_t channel, int64_t, int64_t at, int64_t count) {
    const S *b0 = of_sample<S>(args.b, sample), *c0 = of_sample<S>(args.c, sample);
    const V a(of_sample<S>(args.a, sample)[channel]), b(b0 ? b0[channel] : S(1)), c(c0 ? c0[channel] : S(0));
    if (y)
      each_vector<V>(count, [&](int64_t i, int n) {
        prefetch(x + at + i);
        prefetch(y + at + i);
        prefetch_for_write(out + at + i);
        const V u = load_n<V>(x + at + i, n), v = load_n<V>(y + at + i, n);
        store_n(combine(a, u, true, v, b0 ? &b : nullptr, c0 ? &c : nullptr), out + at + i, n);
      });
    else
      each_vector<V>(count, [&](int64_t i, int n) {
        prefetch(x + at + i);
        prefetch_for_write(out + at + i);
        store_n(combine(a, load_n<V>(x + at + i, n), false, a, &b, c0 ? &c : nullptr), out + at + i, n);
      });
  });
}

template <class V, class T>
static void affine_channels(const PlaneAffineArgs& args, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const T *const x = static_cast<const T*>(args.x), *const y = static_cast<const T*>(args.y);
  T* const out = static_cast<T*>(args.out);
  each_run(args, begin, end, [&](int64_t sample, int64_t, int64_t pixel, int64_t count) {
    const S *a0 = of_sample<S>(args.a, sample), *b0 = of_sample<S>(args.b, sample),
            *c0 = of_sample<S>(args.c, sample);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (pixel + i) * args.channels;
      each_vector<V>(args.channels, [&](int64_t channel, int n) {
        prefetch(x + at + channel);
        prefetch_for_write(out + at + channel);
        V sum = load_n<V>(a0 + channel, n) * load_n<V>(x + at + channel, n);
        if (c0) sum = sum + load_n<V>(c0 + channel, n);
        if (y) {
          prefetch(y + at + channel);
          const V v = load_n<V>(y + at + channel, n);
          sum = b0 ? fma(load_n<V>(b0 + channel, n), v, sum) : sum + v;
        }
        store_n(sum, out + at + channel, n);
      });
    }
  });
}

// Walks a task in tiles of V::size channels and pixels: run(channel, n_channels, pixel, n_pixels); full tiles
// with constants.
constexpr int64_t kStrip = 64;  // pixels whose channels are all done before the next
template <class V, class F>
NVAE_INLINE void each_tile(int64_t channels, int64_t first, int64_t count, F run) {
  for (int64_t strip = 0; strip < count; strip += kStrip) {
    const int64_t width = count - strip < kStrip ? count - strip : kStrip;
    for (int64_t c = 0; c < channels; c += V::size) {
      const int n = channels - c < V::size ? static_cast<int>(channels - c) : V::size;
      each_vector<V>(width, [&](int64_t p, int m) {
        if (n == V::size && m == V::size)
          run(c, V::size, first + strip + p, V::size);
        else
          run(c, n, first + strip + p, m);
      });
    }
  }
}
// `rows` vectors of `lanes` elements, `step` apart, turned: tile[j] lane k = row k lane j.
template <class V, class T>
NVAE_INLINE void load_turned(const T* from, int64_t step, int rows, int lanes, V* tile) {
  for (int k = 0; k < V::size; ++k)
    tile[k] = k < rows ? load_n<V>(from + k * step, lanes) : V(typename V::Scalar(0));
  transpose(tile);
}

template <class V, class T>
static void affine_mixed(const PlaneAffineArgs& args, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const T *const x = static_cast<const T*>(args.x), *const y = static_cast<const T*>(args.y);
  T* const out = static_cast<T*>(args.out);
  const int64_t channels = args.channels, pixels = args.pixels;
  MapShape walk = args;
  walk.channels_last = true;
  each_run(walk, begin, end, [&](int64_t sample, int64_t, int64_t pixel, int64_t count) {
    const S *a0 = of_sample<S>(args.a, sample), *b0 = of_sample<S>(args.b, sample),
            *c0 = of_sample<S>(args.c, sample);
    const int64_t first = sample * pixels;
    each_tile<V>(channels, pixel - first, count, [&](int64_t channel, int n, int64_t p, int m) {
      V tile[V::size];
      const int64_t row = (sample * channels + channel) * pixels + p, run = (first + p) * channels + channel;
      if (args.channels_last) {
        load_turned<V>(x + row, pixels, n, m, tile);
        const V a = load_n<V>(a0 + channel, n), b = b0 ? load_n<V>(b0 + channel, n) : V(S(1)),
                c = c0 ? load_n<V>(c0 + channel, n) : V(S(0));
        for (int k = 0; k < m; ++k) {
          const V v = load_n<V>(y + run + k * channels, n);
          store_n(combine(a, tile[k], true, v, b0 ? &b : nullptr, c0 ? &c : nullptr),
                  out + run + k * channels, n);
        }
      } else {
        load_turned<V>(x + run, channels, m, n, tile);
        for (int k = 0; k < n; ++k) {
          const V a(a0[channel + k]), b(b0 ? b0[channel + k] : S(1)), c(c0 ? c0[channel + k] : S(0));
          const V v = load_n<V>(y + row + k * pixels, m);
          store_n(combine(a, tile[k], true, v, b0 ? &b : nullptr, c0 ? &c : nullptr), out + row + k * pixels,
                  m);
        }
      }
    });
  });
}

// Steps of a sum in single precision, which loses half a bit with every doubling of their number.
constexpr int64_t kLongestSum = 128;

template <class V, class T>
static void dots_rows(const PlaneDotsArgs& args, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const T *const x = static_cast<const T*>(args.x), *const y = static_cast<const T*>(args.y);
  const int64_t spans = args.spans();
  each_row(args, begin, end, [&](int64_t b, int64_t c, int64_t s, int64_t at, int64_t count) {
    const V pivot(args.pivot ? static_cast<const S*>(args.pivot)[c] : S(0));
    double total_x = 0, total_xy = 0;
    for (int64_t first = 0; first < count; first += kLongestSum * V::size) {
      V sum_x(S(0)), sum_xy(S(0));
      const int64_t left = count - first, length = kLongestSum * V::size;
      each_vector<V>(left < length ? left : length, [&](int64_t i, int n) {
        const int64_t place = at + first + i;
        prefetch(x + place);
        prefetch(y + place);
        const V u = load_n<V>(x + place, n);
        V v = load_n<V>(y + place, n) - pivot;
        if (n < V::size) v = first_lanes(v, n);
        sum_x = sum_x + u;
        sum_xy = fma(u, v, sum_xy);
      });
      total_x += sum(sum_x);
      total_xy += sum(sum_xy);
    }
    const int64_t out = (b * spans + s) * args.channels + c;
    args.sum_x[out] = total_x;
    args.sum_xy[out] = total_xy;
  });
}

template <class V, class T>
static void dots_channels(const PlaneDotsArgs& args, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const S* const pivots = static_cast<const S*>(args.pivot);
  each_run(args, begin, end, [&](int64_t, int64_t task, int64_t pixel, int64_t count) {
    BlockSums<V, 2> block;
    for (int64_t first = 0; first < args.channels; first += kBlock) {
      const int64_t width = args.channels - first < kBlock ? args.channels - first : kBlock;
      const T* const x = static_cast<const T*>(args.x) + pixel * args.channels + first;
      const T* const y = static_cast<const T*>(args.y) + pixel * args.channels + first;
      block.run(width, count, [&](int64_t c, int n, int64_t i, int pixels, V* totals) {
        const V pivot = pivots ? load_n<V>(pivots + first + c, n) : V(S(0));
        for (int k = 0; k < pixels; ++k) {
          const int64_t at = (i + k) * args.channels + c;
          __builtin_prefetch(x + at + kGroup * args.channels);
          __builtin_prefetch(y + at + kGroup * args.channels);
          const V u = load_n<V>(x + at, n);
          totals[0] = totals[0] + u;
          totals[1] = fma(u, load_n<V>(y + at, n) - pivot, totals[1]);
        }
      });
      for (int64_t c = 0; c < width; ++c) {
        args.sum_x[task * args.channels + first + c] = block.sums[0][c];
        args.sum_xy[task * args.channels + first + c] = block.sums[1][c];
      }
    }
  });
}

template <class V, class T>
static void dots_mixed(const PlaneDotsArgs& args, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const T *const x = static_cast<const T*>(args.x), *const y = static_cast<const T*>(args.y);
  const T *const rows = args.x_channels_last ? y : x, *const runs = args.x_channels_last ? x : y;
  const int64_t channels = args.channels, pixels = args.pixels;
  each_run(args, begin, end, [&](int64_t sample, int64_t task, int64_t pixel, int64_t count) {
    double *sum_x = args.sum_x + task * channels, *sum_xy = args.sum_xy + task * channels;
    for (int64_t c = 0; c < channels; ++c) sum_x[c] = sum_xy[c] = 0;
    const int64_t first = sample * pixels;
    each_tile<V>(channels, pixel - first, count, [&](int64_t c, int n, int64_t p, int m) {
      V tile[V::size];
      load_turned<V>(rows + (sample * channels + c) * pixels + p, pixels, n, m, tile);
      const V pivot = args.pivot ? load_n<V>(static_cast<const S*>(args.pivot) + c, n) : V(S(0));
      V total(S(0)), product(S(0));
      for (int k = 0; k < m; ++k) {
        const V other = load_n<V>(runs + (first + p + k) * channels + c, n);
        const V u = args.x_channels_last ? other : tile[k], v = args.x_channels_last ? tile[k] : other;
        total = total + u;
        product = fma(u, v - pivot, product);
      }
      S lanes[2][V::size];
      total.store(lanes[0]);
      product.store(lanes[1]);
      for (int k = 0; k < n; ++k) {
        sum_x[c + k] += lanes[0][k];
        sum_xy[c + k] += lanes[1][k];
      }
    });
  });
}

void plane_affine_forward(const PlaneAffineArgs& args, int64_t begin, int64_t end) {
  with_types(args.dtype, [&](auto types) {
    using V = typename decltype(types)::Vector;
    using T = typename decltype(types)::Element;
    if (args.mixed) return affine_mixed<V, T>(args, begin, end);
    args.channels_last ? affine_channels<V, T>(args, begin, end) : affine_rows<V, T>(args, begin, end);
  });
}

void plane_dots_parts(const PlaneDotsArgs& args, int64_t begin, int64_t end) {
  with_types(args.dtype, [&](auto types) {
    using V = typename decltype(types)::Vector;
    using T = typename decltype(types)::Element;
    if (args.mixed) return dots_mixed<V, T>(args, begin, end);
    args.channels_last ? dots_channels<V, T>(args, begin, end) : dots_rows<V, T>(args, begin, end);
  });
}

}  // namespace NVAE_ISA
}  // namespace nvae
