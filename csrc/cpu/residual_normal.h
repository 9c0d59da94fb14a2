// The per-capability kernels of residual_normal.vec.cpp and what they are told.
#pragma once
#include <cstdint>

#include "../capability.h"
#include "../squash.h"
#include "../types.h"

namespace nvae {

// Packed raw parameters (B, 2Z, pixels): element (b, c, p) stands at b * batch + c * channel + p * pixel.
struct Packed {
  const void* data = nullptr;
  int64_t batch = 0, channel = 0, pixel = 0;
};

struct ResidualNormalArgs {
  int64_t batches, channels, pixels;  // B, Z, H * W
  bool channels_last;                 // of z and every dense map below; a pixel's channels are then adjacent
  bool residual;
  Squash squash;
  Dtype dtype;       // of parameters, z and grad_z
  Packed posterior;  // unit stride over pixels, or over channels when channels_last
  Packed prior;      // data is null for raw zeros
  const void* noise = nullptr;  // dense like z; null: drawn from seed
  Dtype noise_dtype = Dtype::f32;
  uint64_t seed = 0;

  // Forward. z is dense. Tasks leave their sums in partial[task][kSums][lane], see tasks().
  void* z = nullptr;
  double* partial = nullptr;

  // Backward. Each may be null. grad_z is dense like z; the others are (B, Z), float64.
  const void* grad_z = nullptr;
  const double *grad_kl = nullptr, *grad_log_q = nullptr, *grad_log_p = nullptr;
  void *grad_posterior = nullptr, *grad_prior = nullptr;  // (B, 2Z, pixels) dense, in z's layout
  void* grad_noise = nullptr;                             // dense like z, noise_dtype

  static constexpr int kSums = 3;           // kl, log_q, log_p
  static constexpr int64_t kSpan = 2048;    // pixels of a task, rows
  static constexpr int64_t kPixels = 256;   // pixels of a task, channels_last
  // A task is a span of one (b, channel) row, or with channels_last of all channels of one b.
  int64_t spans() const {
    const int64_t span = channels_last ? kPixels : kSpan;
    return (pixels + span - 1) / span;
  }
  int64_t tasks() const { return (channels_last ? batches : batches * channels) * spans(); }
  int64_t lanes() const { return channels_last ? channels : 1; }
};

NVAE_PER_ISA(void residual_normal_forward(const ResidualNormalArgs& args, int64_t begin, int64_t end))
NVAE_PER_ISA(void residual_normal_backward(const ResidualNormalArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
