// The noise of a kernel: given as a tensor, or drawn from a seed. Include it in csrc/cpu/<op>.vec.cpp files.
#pragma once
#include "maps.h"
#include "philox.h"

namespace nvae {
namespace NVAE_ISA {

template <class S, class T>
NVAE_INLINE void convert(const T* from, int64_t count, S* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = load_float(from + i);
}
NVAE_INLINE void convert(const double* from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// The first n lanes of v, rounded to dtype, at element `at` of out.
NVAE_INLINE void store_as(VecF v, void* out, Dtype dtype, int64_t at, int n) {
  switch (dtype) {
    case Dtype::f32:
      return v.store(static_cast<float*>(out) + at, n);
    case Dtype::f64:
      return v.store(static_cast<double*>(out) + at, n);
    case Dtype::bf16:
      return v.store(static_cast<bf16*>(out) + at, n);
    case Dtype::f16:
      return v.store(static_cast<f16*>(out) + at, n);
  }
}
NVAE_INLINE void store_as(VecD v, void* out, Dtype dtype, int64_t at, int n) {
  if (dtype == Dtype::f64)
    v.store(static_cast<double*>(out) + at, n);
  else
    store_as(VecF(static_cast<float>(v.v)), out, dtype, at, 1);
}

class NoiseSource {
 public:
  explicit NoiseSource(const Noise& noise)
      : given_(noise.data), dtype_(noise.dtype), stream_(noise.seed), key_(noise.seed) {}

  // Elements first .. first + count - 1, memory order of a contiguous sample.
  template <class S>
  void fill(int64_t first, int64_t count, S* out) const {
    if (given_)
      read(first, count, out);
    else
      stream_.fill(static_cast<uint64_t>(first), count, out);
  }

  // Of a channels_last sample (B, Z, pixels): n channels from c on (n <= lanes of V), pixels first .. first +
  // count - 1 of image b. out[i * V::size + j] = pixel first + i, channel c + j.
  void fill_channels(int64_t b, int64_t c, int n, int64_t channels, int64_t pixels, int64_t first,
                     int64_t count, float* out) const {
    const uint64_t block = static_cast<uint64_t>((b * channels + c) * pixels + first) / 4;
    const bool aligned =
        pixels % 4 == 0 && first % 4 == 0 && block + VecF::size * (pixels / 4) < (uint64_t(1) << 32);
    if (given_ || !aligned) return gather<VecF::size>(b, c, n, channels, pixels, first, count, out);
    // Lane j walks the blocks of channel c + j: four pixels a block, nothing to shuffle.
    uint64_t even[Words64::size], odd[Words64::size];
    for (int i = 0; i < Words64::size; ++i) {
      even[i] = block + static_cast<uint64_t>(2 * i) * static_cast<uint64_t>(pixels / 4);
      odd[i] = block + static_cast<uint64_t>(2 * i + 1) * static_cast<uint64_t>(pixels / 4);
    }
    const Words64 even_base = Words64::load(even), odd_base = Words64::load(odd);
    constexpr int kStage = 8;
    alignas(64) uint32_t words[kStage][4][VecF::size];
    for (int64_t quad = 0; 4 * quad < count; quad += kStage) {
      const int64_t left = (count - 4 * quad + 3) / 4;
      const int stage = left < kStage ? static_cast<int>(left) : kStage;
      for (int s = 0; s < stage; ++s) {
        const Words64 step(static_cast<uint64_t>(quad + s));
        Bits w[4];
        philox_words(even_base + step, odd_base + step, key_, w);
        for (int k = 0; k < 4; ++k) w[k].store(words[s][k]);
      }
      for (int s = 0; s < stage; ++s) {
        Bits w[4];
        VecF z[4];
        for (int k = 0; k < 4; ++k) w[k] = Bits::load(words[s][k]);
        normals4(w, z);
        for (int k = 0; k < 4; ++k) z[k].store(out + (4 * (quad + s) + k) * VecF::size);
      }
    }
  }
  void fill_channels(int64_t b, int64_t c, int n, int64_t channels, int64_t pixels, int64_t first,
                     int64_t count, double* out) const {
    gather<VecD::size>(b, c, n, channels, pixels, first, count, out);
  }

 private:
  template <class S>
  void read(int64_t first, int64_t count, S* out) const {
    switch (dtype_) {
      case Dtype::f32:
        return convert(static_cast<const float*>(given_) + first, count, out);
      case Dtype::f64:
        return convert(static_cast<const double*>(given_) + first, count, out);
      case Dtype::bf16:
        return convert(static_cast<const bf16*>(given_) + first, count, out);
      case Dtype::f16:
        return convert(static_cast<const f16*>(given_) + first, count, out);
    }
  }

  template <int kLanes, class S>
  void gather(int64_t b, int64_t c, int n, int64_t channels, int64_t pixels, int64_t first, int64_t count,
              S* out) const {
    if (given_) {
      for (int64_t i = 0; i < count; ++i) {
        read((b * pixels + first + i) * channels + c, n, out + i * kLanes);
        for (int j = n; j < kLanes; ++j) out[i * kLanes + j] = S(0);
      }
      return;
    }
    constexpr int64_t kRun = 256;
    S run[kRun];
    for (int j = 0; j < kLanes; ++j) {
      for (int64_t i = 0; i < count; i += kRun) {
        const int64_t m = count - i < kRun ? count - i : kRun;
        if (j < n) stream_.fill(static_cast<uint64_t>((b * channels + c + j) * pixels + first + i), m, run);
        for (int64_t k = 0; k < m; ++k) out[(i + k) * kLanes + j] = j < n ? run[k] : S(0);
      }
    }
  }

  const void* given_;
  Dtype dtype_;
  NormalStream stream_;
  PhiloxKey key_;
};

}  // namespace NVAE_ISA
}  // namespace nvae
