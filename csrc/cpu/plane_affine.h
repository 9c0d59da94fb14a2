// The per-capability kernels of plane_affine.vec.cpp and their arguments.
#pragma once
#include "../capability.h"
#include "../maps.h"

namespace nvae {

// Coefficients of planes: element b * batch + c; float32, or float64 for float64 maps.
struct PlaneCoefficients {
  const void* data = nullptr;
  int64_t batch = 0;
};

struct PlaneAffineArgs : MapShape {  // channels_last: of y and out
  Dtype dtype;
  bool mixed = false;  // x is dense in the other memory format than y
  const void *x = nullptr, *y = nullptr;
  PlaneCoefficients a, b, c;  // b, c may be null
  void* out = nullptr;
};

struct PlaneDotsArgs : MapShape {  // channels_last: of x, and of y when not mixed; true when mixed
  Dtype dtype;
  bool mixed = false, x_channels_last = false;
  const void *x = nullptr, *y = nullptr;
  const void* pivot = nullptr;                 // (C), may be null
  double *sum_x = nullptr, *sum_xy = nullptr;  // a part each: [part * channels + channel]
};

NVAE_PER_ISA(void plane_affine_forward(const PlaneAffineArgs& args, int64_t begin, int64_t end))
NVAE_PER_ISA(void plane_dots_parts(const PlaneDotsArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
