// Rows of a phase: scanned rows in a ring, and the segments that meet a row of stationary pixels. Include it in
// csrc/cpu/depthwise_conv2d*.vec.cpp only.
#pragma once
#include "depthwise_conv2d_rows.h"
#include "depthwise_conv2d_taps.h"

namespace nvae {
namespace NVAE_ISA {

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
template <class V>
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
  t.h = gradients ? h + phase.col * V::size : nullptr;
  t.out = out + phase.col * V::size;
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
      t.taps = taps + tap;
      t.gradients = gradients ? gradients + tap : nullptr;
      depthwise_taps(segment.cols, plan.col_scale, t);
      t.add = true;
    }
  }
  if (!t.add)  // no tap reaches this row
    for (int64_t j = 0; j < t.count; ++j) V(S(0)).store(t.out + j * t.stride);
}

}  // namespace NVAE_ISA
}  // namespace nvae
