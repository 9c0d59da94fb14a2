// How the kernels of the normal distributions walk a map (B, Z, pixels): the shape and its cut into tasks.
// Plain data, for both sides: csrc/cpu/<op>.cpp and csrc/cpu/<op>.vec.cpp.
#pragma once
#include <cstdint>

#include "types.h"

namespace nvae {

// Packed raw parameters (B, 2Z, pixels): element (b, c, p) is at b * batch + c * channel + p * pixel.
struct Packed {
  const void* data = nullptr;
  int64_t batch = 0, channel = 0, pixel = 0;
};

// Noise for the map: dense like the map when data is not null, else drawn from seed.
struct Noise {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  uint64_t seed = 0;
};

struct MapShape {
  int64_t batches = 0, channels = 0, pixels = 0;  // B, Z, H * W
  bool channels_last = false;                     // of every dense map; a pixel's channels are then adjacent

  static constexpr int64_t kSpan = 2048;   // pixels of a task, rows
  static constexpr int64_t kPixels = 256;  // pixels of a task, channels_last
  // A task is a span of one (b, channel) row, or with channels_last of all channels of one b.
  int64_t span() const {
    const int64_t longest = channels_last ? kPixels : kSpan;
    return pixels < longest ? pixels : longest;
  }
  int64_t spans() const { return pixels ? (pixels + span() - 1) / span() : 0; }
  int64_t tasks() const {
    return channels == 0 ? 0 : (channels_last ? batches : batches * channels) * spans();
  }
  // Sums a task makes of each kind: one for its row, or one for each channel.
  int64_t lanes() const { return channels_last ? channels : 1; }
  int64_t rows() const { return batches * channels; }
};

}  // namespace nvae
