// The per-capability kernels of normal_log_prob.vec.cpp and their arguments.
#pragma once
#include "../capability.h"
#include "../maps.h"
#include "../squash.h"

namespace nvae {

struct NormalLogProbArgs : MapShape {
  Squash squash;
  Dtype dtype;  // of z and params
  Packed z;     // mu's place is z's; there is no log sigma
  Packed params;
  double* partial = nullptr;                       // forward
  const double* grad = nullptr;                    // backward: (B, Z)
  void *grad_z = nullptr, *grad_params = nullptr;  // each may be null
};

NVAE_PER_ISA(void normal_log_prob_forward(const NormalLogProbArgs& args, int64_t begin, int64_t end))
NVAE_PER_ISA(void normal_log_prob_backward(const NormalLogProbArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
