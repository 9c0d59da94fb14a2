// Philox4x32-10 words and normals for kernels; the definition is the docstring of nvae_fast/ops/philox.py.
//
// Include it in csrc/cpu/<op>.vec.cpp files. The building blocks, from inside out:
//
//   PhiloxKey key(seed, upper, stream)    what is the same for all blocks whose number div 2^32 is `upper`
//   philox_words(even, odd, key, w)       words of VecF::size blocks, any block per lane
//   normals4(w, z)                        their normals: z[k] lane l = element k of the block in lane l
//   NormalStream(seed).fill(first, n, p)  elements first .. first + n - 1 in order, stored as any type
//
// Two vectors of 64-bit lanes carry the blocks: that of lane 2i is in even, that of lane 2i + 1 in odd. A
// kernel that walks pixels in channels_last order can give each lane another channel's block and needs no
// shuffles at all. Make the words of several batches first and the normals after (as fill does): one loop
// with both runs out of registers and is a quarter slower.
#pragma once
#include "vec.h"

namespace nvae {
namespace NVAE_ISA {

// Counter (block mod 2^32, upper, stream, 0). Only the first word differs between blocks, so that half of the
// first two rounds is the same for all of them and is computed here.
struct PhiloxKey {
  uint64_t k0[10], k1[10];
  uint64_t first1;                     // round 1: the key that meets the upper half of the product
  uint64_t second0, second2, second3;  // round 2: xored into words 0 and 2, word 3
  uint64_t upper;

  PhiloxKey() = default;
  NVAE_INLINE explicit PhiloxKey(uint64_t seed, uint32_t upper_half = 0, uint32_t stream = 0) {
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < 10; ++i) {
      k0[i] = a;
      k1[i] = b;
      a += 0x9E3779B9u;
      b += 0xBB67AE85u;
    }
    const uint64_t low = 0xffffffffu, product1 = static_cast<uint64_t>(0xCD9E8D57u) * stream;
    const uint64_t word0 = (product1 >> 32) ^ upper_half ^ k0[0],
                   product0 = static_cast<uint64_t>(0xD2511F53u) * word0;
    first1 = k1[0];
    second0 = (product1 & low) ^ k0[1];
    second2 = (product0 >> 32) ^ k1[1];
    second3 = product0 & low;
    upper = upper_half;
  }
};

struct PhiloxState {
  Words64 c0, c1, c2, c3;
};

// Of a 64-bit lane only the lower half counts, so the upper half of a product needs no clearing.
NVAE_INLINE PhiloxState philox_first_rounds(Words64 block, const PhiloxKey& key) {
  const Words64 m0(static_cast<uint64_t>(0xD2511F53u)), m1(static_cast<uint64_t>(0xCD9E8D57u));
  const Words64 p0 = mul32(m0, block), p1 = mul32(m1, upper(p0) ^ Words64(key.first1));
  return {upper(p1) ^ Words64(key.second0), p1, p0 ^ Words64(key.second2), Words64(key.second3)};
}
NVAE_INLINE void philox_round(PhiloxState& s, uint64_t k0, uint64_t k1) {
  const Words64 m0(static_cast<uint64_t>(0xD2511F53u)), m1(static_cast<uint64_t>(0xCD9E8D57u));
  const Words64 p0 = mul32(m0, s.c0), p1 = mul32(m1, s.c2);
  s = {xor3(upper(p1), s.c1, Words64(k0)), p1, xor3(upper(p0), s.c3, Words64(k1)), p0};
}

// The lower halves of the block numbers count; the upper half is the key's.
NVAE_INLINE void philox_words(Words64 even, Words64 odd, const PhiloxKey& key, Bits w[4]) {
  PhiloxState a = philox_first_rounds(even, key), b = philox_first_rounds(odd, key);
#pragma GCC unroll 8
  for (int i = 2; i < 10; ++i) {
    philox_round(a, key.k0[i], key.k1[i]);
    philox_round(b, key.k0[i], key.k1[i]);
  }
  w[0] = merge(a.c0, b.c0);
  w[1] = merge(a.c1, b.c1);
  w[2] = merge(a.c2, b.c2);
  w[3] = merge(a.c3, b.c3);
}

NVAE_INLINE void normals4(const Bits w[4], VecF z[4]) {
#pragma GCC unroll 2
  for (int pair = 0; pair < 2; ++pair) {
    VecF u = (uint_to_float(w[2 * pair]) + VecF(0.5f)) * VecF(0x1p-32f);
    VecF r = sqrt(VecF(-2.f) * log_positive(u)), cosine, sine;
    sincos_turn(w[2 * pair + 1], cosine, sine);
    z[2 * pair] = r * cosine;
    z[2 * pair + 1] = r * sine;
  }
}

// Blocks in such an order over the lanes that transpose_chunks puts their elements into memory order: lane 4c
// + j holds block chunks * j + c, where chunks = VecF::size / 4.
struct BlockLanes {
  uint64_t even[Words64::size], odd[Words64::size];
  NVAE_INLINE static int block_of_lane(int lane) { return VecF::size / 4 * (lane % 4) + lane / 4; }
  NVAE_INLINE BlockLanes() {
    for (int i = 0; i < Words64::size; ++i) {
      even[i] = static_cast<uint64_t>(block_of_lane(2 * i));
      odd[i] = static_cast<uint64_t>(block_of_lane(2 * i + 1));
    }
  }
};

class NormalStream {
 public:
  static constexpr int batch = 4 * VecF::size;  // elements made at a time
  static constexpr int stage = 8;               // batches whose words are made before their normals

  NVAE_INLINE explicit NormalStream(uint64_t seed) : seed_(seed), key_(seed) {}

  // Elements first .. first + count - 1, rounded to T.
  template <class T>
  NVAE_INLINE void fill(uint64_t first, int64_t count, T* out) const {
    while (count > 0) {
      // Block numbers keep their upper half for 2^34 elements: nearly always, one turn of this loop.
      const uint64_t upper = first >> 34, left = ((upper + 1) << 34) - first;
      const int64_t n = static_cast<uint64_t>(count) < left ? count : static_cast<int64_t>(left);
      PhiloxKey other;
      const bool usual = upper == key_.upper;
      if (!usual) other = PhiloxKey(seed_, static_cast<uint32_t>(upper));
      run(usual ? key_ : other, first, n, out);
      first += static_cast<uint64_t>(n);
      count -= n;
      out += n;
    }
  }

 private:
  // Words of `batches` batches from `block` on, in the lane order of BlockLanes.
  NVAE_INLINE void make_words(const PhiloxKey& key, uint64_t block, int batches, uint32_t* words) const {
    const Words64 even = Words64::load(order_.even), odd = Words64::load(order_.odd);
    for (int i = 0; i < batches; ++i, block += VecF::size) {
      Bits w[4];
      philox_words(Words64(block) + even, Words64(block) + odd, key, w);
      for (int k = 0; k < 4; ++k) w[k].store(words + i * batch + k * VecF::size);
    }
  }
  // The normals of one batch, in memory order: element VecF::size * j + l in lane l of z[j].
  NVAE_INLINE static void make_normals(const uint32_t* words, VecF z[4]) {
    Bits w[4];
    VecF lanes[4];
    for (int k = 0; k < 4; ++k) w[k] = Bits::load(words + k * VecF::size);
    normals4(w, lanes);
    transpose_chunks(lanes[0], lanes[1], lanes[2], lanes[3], z);
  }

  template <class T>
  NVAE_INLINE void run(const PhiloxKey& key, uint64_t first, int64_t count, T* out) const {
    alignas(64) uint32_t words[stage * batch];
    VecF z[4];
    uint64_t block = first / 4;
    if (const int skip = static_cast<int>(first % 4)) {  // starts inside a block
      float whole[batch];
      make_words(key, block, 1, words);
      make_normals(words, z);
      for (int j = 0; j < 4; ++j) z[j].store(whole + j * VecF::size);
      const int n = count < batch - skip ? static_cast<int>(count) : batch - skip;
      for (int i = 0; i < n; ++i) store_float(out + i, whole[skip + i]);
      out += n;
      count -= n;
      block += VecF::size;
    }
    while (count > 0) {
      const int64_t needed = (count + batch - 1) / batch;
      const int batches = needed < stage ? static_cast<int>(needed) : stage;
      make_words(key, block, batches, words);
      block += static_cast<uint64_t>(batches) * VecF::size;
      for (int i = 0; i < batches; ++i, out += batch, count -= batch) {
        make_normals(words + i * batch, z);
        if (count >= batch) {
          for (int j = 0; j < 4; ++j) z[j].store(out + j * VecF::size);
        } else {
          for (int j = 0; j < 4 && count > j * VecF::size; ++j) {
            const int64_t n = count - j * VecF::size;
            if (n >= VecF::size)
              z[j].store(out + j * VecF::size);
            else
              z[j].store(out + j * VecF::size, static_cast<int>(n));
          }
        }
      }
    }
  }

  uint64_t seed_;
  PhiloxKey key_;
  BlockLanes order_;
};

}  // namespace NVAE_ISA
}  // namespace nvae
