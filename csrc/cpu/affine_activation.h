// The per-capability kernels of affine_activation.vec.cpp and their arguments.
#pragma once
#include "../capability.h"
#include "../maps.h"

namespace nvae {

// u = scale x + shift. Maps are dense, coefficients (C) are float32, or float64 for float64 maps.
struct AffineActivationArgs : MapShape {
  Dtype dtype;
  Activation activation;
  const void* x = nullptr;
  const void *scale = nullptr, *shift = nullptr;

  void* y = nullptr;  // act(u), may be null in the backward kernels

  // Backward: g = grad act'(u).
  const void* grad = nullptr;
  const void* pivot = nullptr;
  void* g = nullptr;                           // may be null
  double *sum_g = nullptr, *sum_gx = nullptr;  // of g and g (x - pivot), a part each: [part * channels + c]

  // grad_x = alpha g + beta x + gamma; beta and gamma may both be null.
  const void *alpha = nullptr, *beta = nullptr, *gamma = nullptr;
  void* grad_x = nullptr;
};

NVAE_PER_ISA(void affine_activation_forward(const AffineActivationArgs& args, int64_t begin, int64_t end))
NVAE_PER_ISA(void affine_activation_sums(const AffineActivationArgs& args, int64_t begin, int64_t end))
NVAE_PER_ISA(void affine_activation_gradient(const AffineActivationArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
