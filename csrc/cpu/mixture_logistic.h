// The per-capability kernels of mixture_logistic.vec.cpp and mixture_logistic_sample.vec.cpp, and their
// arguments.
#pragma once
#include "../capability.h"
#include "../maps.h"

namespace nvae {

struct MixtureLogistic {
  int64_t batches = 0, pixels = 0, mixtures = 0;
  bool channels_last = false;  // of params and their gradient
  Dtype dtype;                 // of params, their gradient, sample and mean
  Packed params;
  // log_prob and its backward pass
  Packed image;                // float64 for float64 params, else float32
  double levels = 255.0;       // 2^bits - 1
  const void* grad = nullptr;  // (B, H, W), dense, as image
  // sample
  uint64_t component_seed = 0, noise_seed = 0;
  double temperature = 1.0;
  // (B, H, W) as image; gradient of params, dense; (B, 3, H, W), contiguous
  void* out = nullptr;

  static constexpr int64_t kSpan = 128;  // pixels of a task, all of one image
  int64_t spans() const { return (pixels + kSpan - 1) / kSpan; }
  int64_t tasks() const { return batches * spans(); }
  int64_t channels() const { return 10 * mixtures; }

  // Scratch of one thread, in bytes: a tile of at most 16 lanes of every parameter, of two numbers a
  // component and of the 16 channels that a tile may overrun by; the words of a span.
  int64_t scratch() const { return 64 * (12 * mixtures + 16) + 4 * kSpan * (mixtures + 4); }
};

// Tasks begin .. end - 1; scratch is aligned to 64 bytes.
NVAE_PER_ISA(void mixture_logistic_log_prob(const MixtureLogistic& args, int64_t begin, int64_t end,
                                            void* scratch))
NVAE_PER_ISA(void mixture_logistic_log_prob_backward(const MixtureLogistic& args, int64_t begin, int64_t end,
                                                     void* scratch))
NVAE_PER_ISA(void mixture_logistic_mean(const MixtureLogistic& args, int64_t begin, int64_t end,
                                        void* scratch))
NVAE_PER_ISA(void mixture_logistic_sample(const MixtureLogistic& args, int64_t begin, int64_t end,
                                          void* scratch))

}  // namespace nvae
