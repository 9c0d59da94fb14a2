// The arguments of depthwise_conv2d that the CPU and the CUDA kernels share, checked and read once.
#pragma once
#include <vector>

#include "checks.h"

namespace nvae {

inline int64_t depthwise_extent(int64_t n, int64_t stride, int64_t upsample) {
  return (n * upsample + stride - 1) / stride;
}

inline void check_depthwise(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                            int64_t dilation, int64_t upsample,
                            const std::optional<std::vector<int64_t>>& taps) {
  NVAE_CHECK(x.dim() == 4, op, ": x must have shape (B, C, H, W), got ", shape_text(x));
  NVAE_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                 weight.size(2) == weight.size(3) && weight.size(2) % 2 == 1 && weight.size(2) < 1 << 15,
             op, ": weight must have shape (C, 1, K, K) with odd K < 32768 and ", x.size(1),
             " channels, got ", shape_text(weight));
  dtype_of(op, "x", x);
  dtype_of(op, "weight", weight);
  const auto one_or_two = [&](const char* name, int64_t n) {
    NVAE_CHECK(n == 1 || n == 2, op, ": ", name, " must be 1 or 2, got ", n);
  };
  one_or_two("stride", stride);
  one_or_two("dilation", dilation);
  one_or_two("upsample", upsample);
  NVAE_CHECK(upsample == 1 || stride == 1, op, ": upsample=2 needs stride=1, got stride=", stride);
  if (taps)
    for (const int64_t tap : *taps)
      NVAE_CHECK(tap >= 0 && tap < weight.size(2) * weight.size(3), op, ": taps must be in [0, K * K), got ",
                 tap);
}

// The gradient of the output, and what describes it: grad, or alpha grad + beta out + gamma.
inline void check_depthwise_backward(const char* op, const Tensor& grad, const std::optional<Tensor>& out,
                                     bool has_alpha, bool has_beta, bool has_gamma, const Tensor& x,
                                     int64_t stride, int64_t upsample) {
  check_floating(op, "grad", grad,
                 {x.size(0), x.size(1), depthwise_extent(x.size(2), stride, upsample),
                  depthwise_extent(x.size(3), stride, upsample)});
  NVAE_CHECK(has_alpha == has_beta && has_alpha == has_gamma && (!has_alpha || out), op,
             ": alpha, beta and gamma must be given together, with out");
  if (has_alpha) check_floating_like(op, "out", *out, "grad", grad);
}

}  // namespace nvae
