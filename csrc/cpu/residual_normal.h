// The per-capability kernels of residual_normal.vec.cpp and their arguments.
#pragma once
#include <cstdint>

#include "../capability.h"
#include "../maps.h"
#include "../squash.h"

namespace nvae {

struct ResidualNormalArgs : MapShape {
  bool residual = false;
  Squash squash;
  Dtype dtype;       // of parameters, z and grad_z
  Packed posterior;  // unit stride over pixels, or over channels when channels_last
  Packed prior;      // data is null for raw zeros
  Noise noise;

  // Forward. z is dense. Tasks leave their sums of kl, log_q and log_p in partial, see csrc/cpu/map_loops.h.
  void* z = nullptr;
  double* partial = nullptr;
  static constexpr int kSums = 3;

  // Backward. Each may be null. grad_z is dense like z; the others are (B, Z), float64.
  const void* grad_z = nullptr;
  const double *grad_kl = nullptr, *grad_log_q = nullptr, *grad_log_p = nullptr;
  void *grad_posterior = nullptr, *grad_prior = nullptr;  // (B, 2Z, pixels) dense, in z's layout
  void* grad_noise = nullptr;                             // dense like z, of the noise's dtype
};

NVAE_PER_ISA(void residual_normal_forward(const ResidualNormalArgs& args, int64_t begin, int64_t end))
NVAE_PER_ISA(void residual_normal_backward(const ResidualNormalArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
