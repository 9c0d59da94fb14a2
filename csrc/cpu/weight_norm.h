// The per-capability kernels of weight_norm.vec.cpp and their arguments: all layers at once.
#pragma once
#include "../capability.h"
#include "../types.h"

namespace nvae {

// One layer, as rows (output channels) of `columns` adjacent numbers each. Every tensor of a layer has its
// numbers in the same order.
struct WeightNormLayer {
  int64_t rows = 0, columns = 0;
  Dtype dtype = Dtype::f32;      // of weight, log norm, mask and their gradients
  Dtype out_dtype = Dtype::f32;  // of out and grad; that of weight when either is float64
  const void *weight = nullptr, *log_norm = nullptr, *mask = nullptr;  // no mask: null
  int64_t log_norm_step = 1;
  void* out = nullptr;                                    // forward
  const void* grad = nullptr;                             // backward, of out
  void *grad_weight = nullptr, *grad_log_norm = nullptr;  // backward; null where not wanted
};

// Rows [begin, end) of a layer.
struct WeightNormTask {
  int64_t layer, begin, end;
};

struct WeightNormArgs {
  const WeightNormLayer* layers;
  const WeightNormTask* tasks;
  double eps;
};

// Forward for layers with `out`, backward for the others.
NVAE_PER_ISA(void weight_norm_tasks(const WeightNormArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
