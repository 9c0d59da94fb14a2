// Tiles of a map (B, C, pixels) for kernels that work on pixels side by side and need all channels of one:
// V::size pixels of one image, element (channel, pixel) at tile[channel * V::size + pixel], whatever the
// map's layout. A tile has space for V::size - 1 channels more than it holds. For csrc/cpu/<op>.vec.cpp files.
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

// Chunk q of four lanes from or to p + q * stride. (Through memory, a whole vector would be read where parts
// of it were just written, which stalls.)
NVAE_INLINE VecF load_chunks(const float* p, int64_t stride) {
#if NVAE_CAPABILITY == 2
  const __m256 low =
      _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 2 * stride)),
                                           _mm_loadu_ps(p + 3 * stride), 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
#elif NVAE_CAPABILITY == 1
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
#else
  (void)stride;
  return VecF::load(p);
#endif
}
NVAE_INLINE void store_chunks(VecF v, float* p, int64_t stride) {
#if NVAE_CAPABILITY == 2
  _mm_storeu_ps(p, _mm512_castps512_ps128(v.v));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(v.v, 1));
  _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps(v.v, 2));
  _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps(v.v, 3));
#elif NVAE_CAPABILITY == 1
  _mm_storeu_ps(p, _mm256_castps256_ps128(v.v));
  _mm_storeu_ps(p + stride, _mm256_extractf128_ps(v.v, 1));
#else
  (void)stride;
  v.store(p);
#endif
}

// Four pixels of VecF::size channels, of which n are there: channel i of pixel k is rows[k][i] and
// tile[i * VecF::size + k].
template <class T>
NVAE_INLINE void transpose_in(const T* const rows[4], int n, float* tile) {
  VecF z[4];
  transpose_chunks(load_lanes<VecF>(rows[0], n), load_lanes<VecF>(rows[1], n), load_lanes<VecF>(rows[2], n),
                   load_lanes<VecF>(rows[3], n), z);
  // Chunk q of z[j] is channel 4q + j.
  for (int j = 0; j < 4; ++j) store_chunks(z[j], tile + j * VecF::size, 4 * VecF::size);
}
template <class T>
NVAE_INLINE void transpose_out(const float* tile, int n, T* const rows[4], int pixels) {
  VecF z[4];
  transpose_chunks(load_chunks(tile, 4 * VecF::size), load_chunks(tile + VecF::size, 4 * VecF::size),
                   load_chunks(tile + 2 * VecF::size, 4 * VecF::size),
                   load_chunks(tile + 3 * VecF::size, 4 * VecF::size), z);
  for (int k = 0; k < pixels; ++k) store_lanes(z[k], rows[k], n);
}

// The first n pixels from pixel p of image b on, `channels` channels. The other lanes repeat the last pixel,
// so that every lane holds numbers of the map.
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
