// The per-capability kernel of adamax.vec.cpp and its arguments.
#pragma once
#include <cstdint>

#include "../capability.h"

namespace nvae {

// Elements [begin, end) of one parameter; the four tensors have their numbers in one order.
struct AdamaxTask {
  float* parameter;
  const float* grad;
  float *average, *norm;
  int64_t begin, end;
};

struct AdamaxArgs {
  const AdamaxTask* tasks;
  float rate, weight, beta2, eps, decay;  // weight: 1 - beta1
};

NVAE_PER_ISA(void adamax_tasks(const AdamaxArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
