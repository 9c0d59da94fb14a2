// The inner loops of the depthwise kernels: a tile of stationary pixels in registers, the scanned row read
// once, every tap of a row of the kernel (and its gradient) in registers. Their many forms are compiled here
// once, for the forward and the backward kernel.
#include "depthwise_conv2d_taps.h"
#include "../vec.h"

namespace nvae {
namespace NVAE_ISA {
namespace {

template <int i>
struct Int {
  static constexpr int value = i;
};
// f(Int<0>()) ... f(Int<n - 1>()), unrolled: what they index must become registers.
template <int n, int i = 0, class F>
NVAE_INLINE void unroll(F& f) {
  if constexpr (i < n) {
    f(Int<i>());
    unroll<n, i + 1>(f);
  }
}
#define NVAE_EACH(i) [&](auto i) __attribute__((always_inline))

template <class V, int cols, int scale, bool weight, int tile>
NVAE_INLINE void tap_tile(const TapRows<typename V::Scalar>& a, int64_t at) {
  using S = typename V::Scalar;
  V sum[tile], h[tile];
  S* const out = a.out + at * a.stride;
  auto start = NVAE_EACH(i) {
    constexpr int j = decltype(i)::value;
    sum[j] = a.add ? V::load(out + j * a.stride) : V(S(0));
    if constexpr (weight) h[j] = V::load(a.h + (at + j) * a.stride);
  };
  unroll<tile>(start);
  for (int k = 0; k < a.rows; ++k) {
    V tap[cols], gradient[cols];
    const S* const taps = a.taps + k * cols * V::size;
    S* const gradients = a.gradients + k * cols * V::size;
    auto fetch = NVAE_EACH(l) {
      constexpr int c = decltype(l)::value;
      tap[c] = V::load(taps + c * V::size);
      if constexpr (weight) gradient[c] = V::load(gradients + c * V::size);
    };
    unroll<cols>(fetch);
    const S* scanned = a.row[k] + at * scale * a.step;
    auto scan = NVAE_EACH(t) {
      constexpr int p = decltype(t)::value;
      const V v = V::load(scanned);
      scanned += a.step;
      auto meet = NVAE_EACH(l) {
        constexpr int c = decltype(l)::value;
        if constexpr (p >= c && (p - c) % scale == 0 && (p - c) / scale < tile) {
          constexpr int j = (p - c) / scale;
          sum[j] = fma(tap[c], v, sum[j]);
          if constexpr (weight) gradient[c] = fma(h[j], v, gradient[c]);
        }
      };
      unroll<cols>(meet);
    };
    unroll<(tile - 1) * scale + cols>(scan);
    auto leave = NVAE_EACH(l) {
      constexpr int c = decltype(l)::value;
      if constexpr (weight) gradient[c].store(gradients + c * V::size);
    };
    unroll<cols>(leave);
  }
  auto finish = NVAE_EACH(i) {
    constexpr int j = decltype(i)::value;
    sum[j].store(out + j * a.stride);
  };
  unroll<tile>(finish);
}

template <class V, int cols, int scale, bool weight, int tile>
NVAE_INLINE void tap_tails(const TapRows<typename V::Scalar>& a, int64_t at) {
  if constexpr (tile > 0) {
    if (a.count - at >= tile) {
      tap_tile<V, cols, scale, weight, tile>(a, at);
      at += tile;
    }
    tap_tails<V, cols, scale, weight, tile / 2>(a, at);
  }
}

template <class V, int cols, int scale, bool weight>
void tap_rows(const TapRows<typename V::Scalar>& a) {
  // Of 32 registers: tile sums, tile inputs, two for each column and one. Of 16, half of that. float64 is for
  // tests of gradients: one pixel at a time halves the time that this file takes to compile.
  constexpr int tile = sizeof(typename V::Scalar) == 8 ? 1 : (NVAE_CAPABILITY == 2 || !weight) ? 8 : 4;
  int64_t at = 0;
  for (; at + tile <= a.count; at += tile) tap_tile<V, cols, scale, weight, tile>(a, at);
  tap_tails<V, cols, scale, weight, tile / 2>(a, at);
}

// By the number of columns (1 to kDepthwiseColumns).
template <class V, int scale, bool weight>
void run_taps(int cols, const TapRows<typename V::Scalar>& a) {
  switch (cols) {
    case 1:
      return tap_rows<V, 1, scale, weight>(a);
    case 2:
      return tap_rows<V, 2, scale, weight>(a);
    case 3:
      return tap_rows<V, 3, scale, weight>(a);
    case 4:
      return tap_rows<V, 4, scale, weight>(a);
    case 5:
      return tap_rows<V, 5, scale, weight>(a);
    case 6:
      return tap_rows<V, 6, scale, weight>(a);
    default:
      return tap_rows<V, 7, scale, weight>(a);
  }
}

template <class V>
void taps(int cols, int scale, const TapRows<typename V::Scalar>& a) {
  const bool weight = a.gradients != nullptr;
  const auto run = scale == 1 ? (weight ? run_taps<V, 1, true> : run_taps<V, 1, false>)
                              : (weight ? run_taps<V, 2, true> : run_taps<V, 2, false>);
  run(cols, a);
}

}  // namespace

void depthwise_taps(int cols, int scale, const TapRows<float>& rows) { taps<VecF>(cols, scale, rows); }
void depthwise_taps(int cols, int scale, const TapRows<double>& rows) { taps<VecD>(cols, scale, rows); }

}  // namespace NVAE_ISA
}  // namespace nvae
