// The inner loops of the depthwise kernels: a tile of stationary pixels in registers, the scanned row read
// once, every tap of a row of the kernel (and its gradient) in registers. Include it in
// csrc/cpu/depthwise_conv2d*.vec.cpp only.
#pragma once
#include "depthwise_conv2d_rows.h"

namespace nvae {
namespace NVAE_ISA {

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

// A segment for one row of stationary pixels and one vector of channels. row[k]: where the scanned pixel of
// J = 0 and l = 0 is.
template <class S>
struct TapRows {
  const S* const* row;
  int rows;
  const S* taps;   // [row][column][lane]
  S* gradients;    // likewise
  int64_t step;    // between neighbouring columns, in scalars
  const S* h;      // stationary input, backward
  S* out;          // y or dh
  int64_t stride;  // between stationary pixels of this phase, in scalars
  int64_t count;   // of them
  bool add;        // to what is in out
};

template <class V, int cols, int scale, bool data, bool weight, int tile>
NVAE_INLINE void tap_tile(const TapRows<typename V::Scalar>& a, int64_t at) {
  using S = typename V::Scalar;
  V sum[tile], h[tile];
  S* const out = a.out + at * a.stride;
  auto start = NVAE_EACH(i) {
    constexpr int j = decltype(i)::value;
    if constexpr (data) sum[j] = a.add ? V::load(out + j * a.stride) : V(S(0));
    if constexpr (weight) h[j] = V::load(a.h + (at + j) * a.stride);
  };
  unroll<tile>(start);
  for (int k = 0; k < a.rows; ++k) {
    V tap[cols], gradient[cols];
    const S* const taps = a.taps + k * cols * V::size;
    S* const gradients = a.gradients + k * cols * V::size;
    auto fetch = NVAE_EACH(l) {
      constexpr int c = decltype(l)::value;
      if constexpr (data) tap[c] = V::load(taps + c * V::size);
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
          if constexpr (data) sum[j] = fma(tap[c], v, sum[j]);
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
    if constexpr (data) sum[j].store(out + j * a.stride);
  };
  unroll<tile>(finish);
}

template <class V, int cols, int scale, bool data, bool weight, int tile>
NVAE_INLINE void tap_tails(const TapRows<typename V::Scalar>& a, int64_t at) {
  if constexpr (tile > 0) {
    if (a.count - at >= tile) {
      tap_tile<V, cols, scale, data, weight, tile>(a, at);
      at += tile;
    }
    tap_tails<V, cols, scale, data, weight, tile / 2>(a, at);
  }
}

template <class V, int cols, int scale, bool data, bool weight>
static void tap_rows(const TapRows<typename V::Scalar>& a) {
  // Of 32 registers: tile sums, tile inputs, two for each column and one. Of 16, half of that.
  constexpr int tile = (NVAE_CAPABILITY == 2 || !weight) ? 8 : 4;
  int64_t at = 0;
  for (; at + tile <= a.count; at += tile) tap_tile<V, cols, scale, data, weight, tile>(a, at);
  tap_tails<V, cols, scale, data, weight, tile / 2>(a, at);
}

// By the number of columns (1 to kDepthwiseColumns).
template <class V, int scale, bool data, bool weight>
static void run_taps(int cols, const TapRows<typename V::Scalar>& a) {
  switch (cols) {
    case 1:
      return tap_rows<V, 1, scale, data, weight>(a);
    case 2:
      return tap_rows<V, 2, scale, data, weight>(a);
    case 3:
      return tap_rows<V, 3, scale, data, weight>(a);
    case 4:
      return tap_rows<V, 4, scale, data, weight>(a);
    case 5:
      return tap_rows<V, 5, scale, data, weight>(a);
    case 6:
      return tap_rows<V, 6, scale, data, weight>(a);
    default:
      return tap_rows<V, 7, scale, data, weight>(a);
  }
}

// Scanned rows of one group of vectors, by their number modulo the rows held; zeros on both sides.
template <class S>
struct Ring {
  S* data;
  int64_t rows, width, lanes;  // width: with the zeros
  int left;
  // Pixel 0 of a row of vector g.
  S* at(int g, int64_t row) const { return data + ((g * rows + row % rows) * width + left) * lanes; }
  int64_t vector() const { return rows * width * lanes; }
};

template <class V>
static int64_t ring_size(const DepthwiseArgs& a, int64_t width) {
  return a.group * a.ring() * (a.plan.left + width + a.plan.right) * V::size;
}
template <class V>
static Ring<typename V::Scalar> make_ring(const DepthwiseArgs& a, int64_t width, typename V::Scalar* data) {
  const int64_t size = ring_size<V>(a, width);
  for (int64_t i = 0; i < size; ++i) data[i] = 0;
  return {data, a.ring(), a.plan.left + width + a.plan.right, V::size, a.plan.left};
}

// One row of a phase, for vector g: every segment whose scanned rows are inside the image. `rows` is the
// height of the scanned map, `width` that of the stationary one.
template <class V, bool data, bool weight>
static void run_phase(const DepthwiseArgs& a, const DepthwisePhase& phase, int64_t R, int64_t rows,
                      int64_t width, const Ring<typename V::Scalar>& ring, int g,
                      const typename V::Scalar* taps, typename V::Scalar* gradients,
                      const typename V::Scalar* h, typename V::Scalar* out) {
  using S = typename V::Scalar;
  constexpr int kBatch = 16;  // rows of taps at a time
  const DepthwisePlan& plan = a.plan;
  TapRows<S> t;
  t.step = plan.step * V::size;
  t.stride = plan.col_phases * V::size;
  t.count = (width - phase.col + plan.col_phases - 1) / plan.col_phases;
  t.h = weight ? h + phase.col * V::size : nullptr;
  t.out = data ? out + phase.col * V::size : nullptr;
  t.add = false;
  for (int i = 0; i < phase.count; ++i) {
    const DepthwiseSegment& segment = phase.segments[i];
    const S* row[kBatch];
    int k = 0;
    while (k < segment.rows) {
      t.rows = 0;
      int first = k;
      for (; k < segment.rows && t.rows < kBatch; ++k) {
        const int64_t scanned = R * plan.row_scale + segment.row[k];
        if (scanned < 0) first = k + 1;
        if (scanned >= 0 && scanned < rows) row[t.rows++] = ring.at(g, scanned) + segment.col * V::size;
      }
      if (t.rows == 0) continue;
      const int64_t tap = (segment.first + first * segment.cols) * V::size;
      t.row = row;
      t.taps = data ? taps + tap : nullptr;
      t.gradients = weight ? gradients + tap : nullptr;
      if (plan.col_scale == 1)
        run_taps<V, 1, data, weight>(segment.cols, t);
      else
        run_taps<V, 2, data, weight>(segment.cols, t);
      t.add = true;
    }
  }
  if (data && !t.add)  // no tap reaches this row
    for (int64_t j = 0; j < t.count; ++j) V(S(0)).store(t.out + j * t.stride);
}

}  // namespace NVAE_ISA
}  // namespace nvae
