// The per-capability kernels of normal_sample.vec.cpp and their arguments.
#pragma once
#include "../capability.h"
#include "../maps.h"
#include "../squash.h"

namespace nvae {

struct NormalSampleArgs : MapShape {
  Squash squash;
  double temperature = 1.0;
  Dtype dtype;  // of params, z and grad_z
  Packed params;
  Noise noise;
  void* z = nullptr;                                   // forward: dense
  const void* grad_z = nullptr;                        // backward: dense like z
  void *grad_params = nullptr, *grad_noise = nullptr;  // each may be null
};

NVAE_PER_ISA(void normal_sample_forward(const NormalSampleArgs& args, int64_t begin, int64_t end))
NVAE_PER_ISA(void normal_sample_backward(const NormalSampleArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
