// The per-capability kernels of spectral_norm.vec.cpp and their arguments.
#pragma once
#include <cstdint>

#include "../capability.h"
#include "../types.h"

namespace nvae {

// One layer: a dense (rows, columns) matrix and its vectors, all float or all double.
struct SpectralLayer {
  const void* matrix = nullptr;
  int64_t rows = 0, columns = 0;
  bool is_double = false;
  void *u = nullptr, *v = nullptr;  // (rows), (columns); u has its initial value
  double* length = nullptr;         // ||W v||
  // Backward: what to write, `scale` u v'.
  void* gradient = nullptr;
  double scale = 0;
};

NVAE_PER_ISA(void spectral_iterate(const SpectralLayer& layer, int64_t iterations, double eps))
NVAE_PER_ISA(void spectral_outer(const SpectralLayer& layer, int64_t begin, int64_t end))

}  // namespace nvae
