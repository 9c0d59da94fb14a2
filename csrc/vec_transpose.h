// Transposes a square of vectors: between maps whose pixels are adjacent and kernels that hold channels in
// lanes.
#pragma once
#include "vec.h"

namespace nvae {
namespace NVAE_ISA {

// z[i] lane j <-> z[j] lane i, for V::size vectors.
NVAE_INLINE void transpose(VecD*) {}
NVAE_INLINE void transpose(VecF* z) {
  // Chunks of four lanes first: t[4q + j] chunk c = lanes 4c + j of z[4q .. 4q + 3]. Then the chunks.
  VecF t[VecF::size];
  for (int q = 0; q < VecF::size; q += 4) transpose_chunks(z[q], z[q + 1], z[q + 2], z[q + 3], t + q);
  for (int j = 0; j < 4; ++j) {
#if NVAE_CAPABILITY == 2
    const __m512 ab = _mm512_shuffle_f32x4(t[j].v, t[4 + j].v, 0x44),
                 AB = _mm512_shuffle_f32x4(t[j].v, t[4 + j].v, 0xee),
                 cd = _mm512_shuffle_f32x4(t[8 + j].v, t[12 + j].v, 0x44),
                 CD = _mm512_shuffle_f32x4(t[8 + j].v, t[12 + j].v, 0xee);
    z[j] = _mm512_shuffle_f32x4(ab, cd, 0x88);
    z[4 + j] = _mm512_shuffle_f32x4(ab, cd, 0xdd);
    z[8 + j] = _mm512_shuffle_f32x4(AB, CD, 0x88);
    z[12 + j] = _mm512_shuffle_f32x4(AB, CD, 0xdd);
#elif NVAE_CAPABILITY == 1
    z[j] = _mm256_permute2f128_ps(t[j].v, t[4 + j].v, 0x20);
    z[4 + j] = _mm256_permute2f128_ps(t[j].v, t[4 + j].v, 0x31);
#else
    z[j] = t[j];
#endif
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
