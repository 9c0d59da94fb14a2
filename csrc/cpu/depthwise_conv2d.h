// The per-capability kernels of depthwise_conv2d*.vec.cpp and their arguments.
//
// Forward and backward are one computation. A row of a stationary map (y forward; x and its gradient
// backward) is combined with rows of a scanned map (h = act(scale x + shift) forward; dy backward), which are
// in scratch memory as vectors of channels, with zeros to their left and right. A plan
// (depthwise_conv2d_plan.h) says which scanned pixel is multiplied by which tap; stride, dilation and
// upsampling differ in their plans only.
#pragma once
#include <cstdint>

#include "../capability.h"
#include "../types.h"

namespace nvae {

// (B, C, H, W) with unit stride over channels (channels_last) or over the pixels of a row.
struct DepthwiseMap {
  void* data = nullptr;
  int64_t batch = 0, channel = 0, row = 0, pixel = 0;
  bool channels_last = false;
  int64_t height = 0, width = 0;
};

// A rectangle of taps: for rows k < rows and columns l < cols, tap first + k * cols + l connects the stationary
// pixel (R, J) of a phase with the scanned pixel (R * row_scale + row[k], col + (J * col_scale + l) * step).
struct DepthwiseSegment {
  const int* row;
  int rows, cols, col, first;
};

// Stationary pixels (R * row_phases + row, J * col_phases + col).
struct DepthwisePhase {
  int row, col;
  const DepthwiseSegment* segments;
  int count;
};

struct DepthwisePlan {
  int row_phases = 1, col_phases = 1, row_scale = 1, col_scale = 1, step = 1;
  int first_row = 0, last_row = 0;         // smallest and largest entry of row[] in all segments
  int left = 0, right = 0;                 // zeros to the left and right of a scanned row
  const DepthwisePhase* phases = nullptr;  // row by row
  int taps = 0;
};

// Longest row of a segment that keeps its taps (and their gradients) in registers.
constexpr int kDepthwiseColumns = 7;

struct DepthwiseArgs {
  Dtype dtype = Dtype::f32;  // of the maps; everything else is float32, or float64 with float64 maps
  int activation = 0;        // 0 none, 1 swish, 2 elu
  int64_t batches = 0, channels = 0;
  DepthwisePlan plan;
  const void* taps = nullptr;  // [vector][tap][lane]
  // (C,) each, may be null
  const void *scale = nullptr, *shift = nullptr;

  // A task is a band of rows of `group` vectors of channels of one sample, groups fastest.
  int64_t vectors = 0, group = 1, groups = 0, band = 0, bands = 0;  // band: in R
  int64_t tasks() const { return batches * bands * groups; }
  int64_t ring() const { return plan.last_row - plan.first_row + 1; }  // scanned rows held

  // Forward: x -> y, and with `sums` per task [vector of the group][sum, sum of squares, pivot][lane], of
  // y - pivot.
  DepthwiseMap x, y;
  double* sums = nullptr;
  // With out_scale, y = out_activation(out_scale * convolution + out_shift), and no sums. (C,) each.
  const void *out_scale = nullptr, *out_shift = nullptr;
  int out_activation = 0;

  // Backward: dy = alpha grad + beta out + gamma, or grad alone. Null: not wanted. `sums` per task [vector of
  // the group][grad_scale, grad_shift][lane]; tap_gradients per task [vector of the group][tap][lane].
  DepthwiseMap grad, out, grad_x;
  const void *alpha = nullptr, *beta = nullptr, *gamma = nullptr, *pivot = nullptr;
  void* tap_gradients = nullptr;
};

// Lanes of a vector, and bytes of scratch memory that a thread needs (64-byte aligned).
NVAE_PER_ISA(int depthwise_lanes(Dtype dtype))
NVAE_PER_ISA(int64_t depthwise_forward_scratch(const DepthwiseArgs& args))
NVAE_PER_ISA(int64_t depthwise_backward_scratch(const DepthwiseArgs& args))
NVAE_PER_ISA(void depthwise_forward(const DepthwiseArgs& args, void* scratch, int64_t begin, int64_t end))
NVAE_PER_ISA(void depthwise_backward(const DepthwiseArgs& args, void* scratch, int64_t begin, int64_t end))

}  // namespace nvae
