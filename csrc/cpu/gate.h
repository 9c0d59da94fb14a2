// The per-capability kernels of gate.vec.cpp and their arguments; formulas in
// nvae_fast/ops/inverted_residual/coefficients.py. Arrays are dense, of float64 or of float32 numbers.
#pragma once
#include <cstdint>

#include "../capability.h"

namespace nvae {

struct GateArgs {
  bool is_double = false;
  int64_t channels = 0, units = 0;
  double residual_scale = 1;
  const void* mean = nullptr;                     // (B, C)
  const void *scale = nullptr, *shift = nullptr;  // (C), both null without a batch norm
  const double *w1 = nullptr, *w2 = nullptr;      // (units, C), the second transposed
  const void *b1 = nullptr, *b2 = nullptr;        // (units), (C)
  void *hidden = nullptr, *factor = nullptr;
  void *pooled = nullptr, *gate = nullptr, *offset = nullptr;  // may be null
};

struct GateGradientsArgs {
  bool is_double = false;
  int64_t channels = 0, units = 0;
  double residual_scale = 1;
  const void *sum_x = nullptr, *sum_xp = nullptr;  // (B, C)
  const void* plane_mean = nullptr;                // (B, C); this and the next four null without a batch norm
  const void *mean = nullptr, *rstd = nullptr, *weight = nullptr, *bias = nullptr;  // (C)
  const void *pooled = nullptr, *hidden = nullptr, *gate = nullptr;
  const double *w1 = nullptr, *w2 = nullptr;   // (units, C), the second transposed
  void *through = nullptr, *factor = nullptr;  // (B, C)
  // Added to: (units, C), (units), (units, C), (C), (C), (C).
  double *to_w1 = nullptr, *to_b1 = nullptr, *to_w2 = nullptr, *to_b2 = nullptr, *sum_y = nullptr,
         *dot_y = nullptr;
};

// Samples begin .. end - 1, in order; scratch: 2 C and 3 C numbers.
NVAE_PER_ISA(void gate_forward(const GateArgs& args, int64_t begin, int64_t end, double* scratch))
NVAE_PER_ISA(void gate_backward(const GateGradientsArgs& args, int64_t begin, int64_t end, double* scratch))

}  // namespace nvae
