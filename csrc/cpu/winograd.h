// The per-capability kernels of winograd.vec.cpp and their arguments.
#pragma once
#include <cstdint>

#include "../capability.h"
#include "../types.h"

namespace nvae {

constexpr int kWinogradTile = 4;        // pixels of an output tile in each direction
constexpr int kWinogradPatch = 6;       // pixels of the input patch that it depends on
constexpr int kWinogradPoints = 36;     // products for each pair of channels
constexpr int64_t kWinogradGroup = 64;  // channels of a task of winograd_map

// A map (B, C, H, W) in channels_last, H and W multiples of 4, and its tiles, in float32.
struct WinogradArgs {
  Dtype dtype = Dtype::f32;  // of the map: f32 or bf16
  int64_t batches = 0, channels = 0, height = 0, width = 0;
  bool gradient = false;
  void* map = nullptr;
  // Written by winograd_tiles: [tile][point][channel]; read by winograd_map: [point][tile][channel].
  float* tiles = nullptr;
  const float* bias = nullptr;  // (C), winograd_map without gradient; may be null
  float* sums = nullptr;        // [task][channel], winograd_tiles with gradient: of the pixels; may be null
  int64_t tile_rows() const { return height / kWinogradTile; }
  int64_t tile_columns() const { return width / kWinogradTile; }
  int64_t count() const { return batches * tile_rows() * tile_columns(); }
  int64_t groups() const { return (channels + kWinogradGroup - 1) / kWinogradGroup; }
};

// A weight (C_out, C_in, 3, 3) and what it is transformed to, [point][C_out][C_in].
struct WinogradWeights {
  float *weight = nullptr, *points = nullptr;
  int64_t rows = 0, columns = 0;         // C_out, C_in
  int64_t row = 0, column = 0, tap = 0;  // strides of the weight
};

// Tasks are rows of tiles: batches * tile_rows().
NVAE_PER_ISA(void winograd_tiles(const WinogradArgs& a, int64_t begin, int64_t end))
// Tasks are groups of channels of an image: batches * groups(). scratch: kWinogradPatch * (width + 2) * kWinogradGroup floats.
NVAE_PER_ISA(void winograd_map(const WinogradArgs& a, float* scratch, int64_t begin, int64_t end))
// Tasks are rows of the weight. With gradient from points to weight, the adjoint.
NVAE_PER_ISA(void winograd_weights(const WinogradWeights& a, bool gradient, int64_t begin, int64_t end))

}  // namespace nvae
