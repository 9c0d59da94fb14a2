// Philox normals and words, compiled once per capability.
#include "../philox.h"

#include "philox.h"

namespace nvae {
namespace NVAE_ISA {

void philox_fill(uint64_t seed, uint64_t first, int64_t count, Dtype dtype, void* out) {
  const NormalStream stream(seed);
  switch (dtype) {
    case Dtype::f32:
      return stream.fill(first, count, static_cast<float*>(out));
    case Dtype::f64:
      return stream.fill(first, count, static_cast<double*>(out));
    case Dtype::bf16:
      return stream.fill(first, count, static_cast<bf16*>(out));
    case Dtype::f16:
      return stream.fill(first, count, static_cast<f16*>(out));
  }
}

// rows: `channels` rows of `pixels` normals, `stride` floats apart -> out[p * c + channel].
template <class T>
static void store_transposed(const float* rows, int64_t stride, int64_t channels, int64_t pixels, T* out,
                             int64_t c) {
  int64_t k = 0;
  for (; k + 4 <= channels; k += 4) {
    const float* row = rows + k * stride;
    int64_t p = 0;
    for (; p + VecF::size <= pixels; p += VecF::size) {
      VecF z[4];
      T four[VecF::size];
      transpose_chunks(VecF::load(row + p), VecF::load(row + stride + p), VecF::load(row + 2 * stride + p),
                       VecF::load(row + 3 * stride + p), z);
      for (int j = 0; j < 4; ++j) {  // chunk q of z[j]: pixel p + 4q + j, channels k .. k + 3
        z[j].store(four);
        for (int q = 0; q < VecF::size / 4; ++q)
          std::memcpy(out + (p + 4 * q + j) * c + k, four + 4 * q, 4 * sizeof(T));
      }
    }
    for (; p < pixels; ++p)
      for (int j = 0; j < 4; ++j) store_float(out + p * c + k + j, row[j * stride + p]);
  }
  for (; k < channels; ++k)
    for (int64_t p = 0; p < pixels; ++p) store_float(out + p * c + k, rows[k * stride + p]);
}

template <class T>
static void tiles_of(uint64_t seed, const ChannelsLastTiles& t, int64_t begin, int64_t end, T* out) {
  const NormalStream stream(seed);
  float rows[ChannelsLastTiles::kBuffer];
  for (int64_t i = begin; i < end; ++i) {
    const int64_t span = i % t.spans, group = i / t.spans % t.groups, n = i / t.spans / t.groups;
    const int64_t channel = group * t.group, pixel = span * t.span;
    const int64_t channels = t.c - channel < t.group ? t.c - channel : t.group;
    const int64_t pixels = t.pixels - pixel < t.span ? t.pixels - pixel : t.span;
    const uint64_t first = static_cast<uint64_t>((n * t.c + channel) * t.pixels + pixel);
    int64_t stride = t.pixels;
    if (t.spans == 1) {  // whole channels: one run of elements
      stream.fill(first, channels * t.pixels, rows);
    } else {
      stride = t.span + 16;  // rows not a power of two apart, or they would share cache sets
      for (int64_t k = 0; k < channels; ++k)
        stream.fill(first + static_cast<uint64_t>(k * t.pixels), pixels, rows + k * stride);
    }
    store_transposed(rows, stride, channels, pixels, out + (n * t.pixels + pixel) * t.c + channel, t.c);
  }
}

void philox_tiles(uint64_t seed, const ChannelsLastTiles& tiles, int64_t begin, int64_t end, Dtype dtype,
                  void* out) {
  switch (dtype) {
    case Dtype::f32:
      return tiles_of(seed, tiles, begin, end, static_cast<float*>(out));
    case Dtype::f64:
      return tiles_of(seed, tiles, begin, end, static_cast<double*>(out));
    case Dtype::bf16:
      return tiles_of(seed, tiles, begin, end, static_cast<bf16*>(out));
    case Dtype::f16:
      return tiles_of(seed, tiles, begin, end, static_cast<f16*>(out));
  }
}

void philox_blocks(uint64_t seed, uint32_t stream, uint64_t first_block, int64_t count, int64_t* out) {
  const BlockLanes order;
  while (count > 0) {
    const uint64_t upper_half = first_block >> 32, left = ((upper_half + 1) << 32) - first_block;
    const int64_t n = static_cast<uint64_t>(count) < left ? count : static_cast<int64_t>(left);
    const PhiloxKey key(seed, static_cast<uint32_t>(upper_half), stream);
    for (int64_t done = 0; done < n; done += VecF::size) {
      const Words64 base(first_block + static_cast<uint64_t>(done));
      Bits w[4];
      uint32_t lanes[4][VecF::size];
      philox_words(base + Words64::load(order.even), base + Words64::load(order.odd), key, w);
      for (int k = 0; k < 4; ++k) w[k].store(lanes[k]);
      for (int lane = 0; lane < VecF::size; ++lane) {
        const int64_t block = done + BlockLanes::block_of_lane(lane);
        for (int k = 0; k < 4 && block < n; ++k) out[4 * block + k] = lanes[k][lane];
      }
    }
    first_block += static_cast<uint64_t>(n);
    out += 4 * n;
    count -= n;
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
