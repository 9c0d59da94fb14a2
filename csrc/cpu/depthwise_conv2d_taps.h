// Segments of taps (the inner loops of the depthwise kernels), and what passes rows of maps to them.
#pragma once
#include "depthwise_conv2d.h"

namespace nvae {

// A segment for one row of stationary pixels and one vector of channels. row[k]: where the scanned pixel of
// J = 0 and l = 0 is.
template <class S>
struct TapRows {
  const S* const* row;
  int rows;
  const S* taps;   // [row][column][lane]
  S* gradients;    // likewise; null: not wanted
  int64_t step;    // between neighbouring columns, in scalars
  const S* h;      // stationary input, with gradients
  S* out;          // y or dh
  int64_t stride;  // between stationary pixels of this phase, in scalars
  int64_t count;   // of them
  bool add;        // to what is in out
};

// Adds one segment; cols: 1 to kDepthwiseColumns, scale: 1 or 2 (scanned pixels between stationary ones).
NVAE_PER_ISA(void depthwise_taps(int cols, int scale, const TapRows<float>& rows))
NVAE_PER_ISA(void depthwise_taps(int cols, int scale, const TapRows<double>& rows))

}  // namespace nvae
