// Tiles of a map (B, C, pixels) for kernels that work on pixels side by side and need all channels of one: V::size
// pixels of one image, element (channel, pixel) at tile[channel * V::size + pixel], whatever the map's layout.
// For csrc/cpu/<op>.vec.cpp files.
#pragma once
#include "../maps.h"
#include "../vec.h"

namespace nvae {
namespace NVAE_ISA {

template <class V, class T>
NVAE_INLINE V load_lanes(const T* p, int n) {
  return n == V::size ? V::load(p) : V::load(p, n);
}
template <class V, class T>
NVAE_INLINE void store_lanes(V v, T* p, int n) {
  if (n == V::size)
    v.store(p);
  else
    v.store(p, n);
}

// Four pixels of up to VecF::size channels: rows[k] + i is channel i of pixel k, tile[i * VecF::size + k] too.
template <class T>
NVAE_INLINE void transpose_in(const T* const rows[4], int n, float* tile) {
  VecF z[4];
  float lanes[VecF::size];
  transpose_chunks(load_lanes<VecF>(rows[0], n), load_lanes<VecF>(rows[1], n), load_lanes<VecF>(rows[2], n),
                   load_lanes<VecF>(rows[3], n), z);
  for (int j = 0; j < 4; ++j) {  // chunk q of z[j] is channel 4q + j
    z[j].store(lanes);
    for (int q = 0; 4 * q + j < n; ++q)
      std::memcpy(tile + (4 * q + j) * VecF::size, lanes + 4 * q, 4 * sizeof(float));
  }
}
template <class T>
NVAE_INLINE void transpose_out(const float* tile, int n, T* const rows[4], int pixels) {
  VecF z[4], row[4];
  float lanes[VecF::size];
  for (int j = 0; j < 4; ++j) {
    for (int q = 0; q < VecF::size / 4; ++q)
      if (4 * q + j < n)
        std::memcpy(lanes + 4 * q, tile + (4 * q + j) * VecF::size, 4 * sizeof(float));
      else
        std::memset(lanes + 4 * q, 0, 4 * sizeof(float));
    z[j] = VecF::load(lanes);
  }
  transpose_chunks(z[0], z[1], z[2], z[3], row);
  for (int k = 0; k < pixels; ++k) store_lanes(row[k], rows[k], n);
}

// The first n pixels from pixel p of image b on, `channels` channels. The other lanes repeat the last pixel, so that
// every lane holds numbers of the map.
template <class T>
static void load_tile(const Packed& from, int64_t b, int64_t p, int n, int64_t channels, float* tile) {
  const T* base = static_cast<const T*>(from.data) + b * from.batch + p * from.pixel;
  if (from.pixel == 1) {
    for (int64_t c = 0; c < channels; ++c)
      load_lanes<VecF>(base + c * from.channel, n).store(tile + c * VecF::size);
    return;
  }
  for (int k = 0; k < VecF::size; k += 4) {
    const T* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = base + (k + i < n ? k + i : n - 1) * from.pixel;
    for (int64_t c = 0; c < channels; c += VecF::size) {
      const int m = channels - c < VecF::size ? static_cast<int>(channels - c) : VecF::size;
      transpose_in(rows, m, tile + c * VecF::size + k);
      for (auto& row : rows) row += m;
    }
  }
}
template <class T>
static void load_tile(const Packed& from, int64_t b, int64_t p, int, int64_t channels, double* tile) {
  const T* base = static_cast<const T*>(from.data) + b * from.batch + p * from.pixel;
  for (int64_t c = 0; c < channels; ++c) tile[c] = base[c * from.channel];
}

// To a dense map in the layout of its `channels` and pixels.
template <class T>
static void store_tile(const float* tile, void* data, const MapShape& map, int64_t b, int64_t p, int n) {
  T* to = static_cast<T*>(data) + b * map.channels * map.pixels;
  if (!map.channels_last) {
    for (int64_t c = 0; c < map.channels; ++c)
      store_lanes(VecF::load(tile + c * VecF::size), to + c * map.pixels + p, n);
    return;
  }
  for (int k = 0; k < n; k += 4) {
    T* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = to + (p + k + i) * map.channels;
    const int pixels = n - k < 4 ? n - k : 4;
    for (int64_t c = 0; c < map.channels; c += VecF::size) {
      const int m = map.channels - c < VecF::size ? static_cast<int>(map.channels - c) : VecF::size;
      transpose_out(tile + c * VecF::size + k, m, rows, pixels);
      for (auto& row : rows) row += m;
    }
  }
}
template <class T>
static void store_tile(const double* tile, void* data, const MapShape& map, int64_t b, int64_t p, int) {
  T* to = static_cast<T*>(data) + b * map.channels * map.pixels;
  for (int64_t c = 0; c < map.channels; ++c)
    to[map.channels_last ? p * map.channels + c : c * map.pixels + p] = tile[c];
}

}  // namespace NVAE_ISA
}  // namespace nvae
