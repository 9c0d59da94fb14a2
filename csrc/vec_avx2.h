// vec.h for AVX2 with FMA and F16C: 8 lanes.
#pragma once
#include <immintrin.h>

namespace nvae {
namespace NVAE_ISA {

struct Mask {
  __m256 m;
};
NVAE_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.m, b.m)}; }
NVAE_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.m, b.m)}; }
NVAE_INLINE Mask operator~(Mask a) {
  return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
NVAE_INLINE bool any(Mask a) { return _mm256_movemask_ps(a.m) != 0; }
NVAE_INLINE bool all(Mask a) { return _mm256_movemask_ps(a.m) == 0xff; }

struct Bits {
  __m256i v;
  Bits() = default;
  NVAE_INLINE Bits(__m256i x) : v(x) {}
  NVAE_INLINE explicit Bits(uint32_t x) : v(_mm256_set1_epi32(static_cast<int>(x))) {}
  NVAE_INLINE static Bits load(const uint32_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  NVAE_INLINE void store(uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};
NVAE_INLINE Bits operator+(Bits a, Bits b) { return _mm256_add_epi32(a.v, b.v); }
NVAE_INLINE Bits operator-(Bits a, Bits b) { return _mm256_sub_epi32(a.v, b.v); }
NVAE_INLINE Bits operator&(Bits a, Bits b) { return _mm256_and_si256(a.v, b.v); }
NVAE_INLINE Bits operator|(Bits a, Bits b) { return _mm256_or_si256(a.v, b.v); }
NVAE_INLINE Bits operator^(Bits a, Bits b) { return _mm256_xor_si256(a.v, b.v); }
template <int n>
NVAE_INLINE Bits shift_left(Bits a) {
  return _mm256_slli_epi32(a.v, n);
}
template <int n>
NVAE_INLINE Bits shift_right(Bits a) {
  return _mm256_srli_epi32(a.v, n);
}
template <int n>
NVAE_INLINE Bits shift_right_signed(Bits a) {
  return _mm256_srai_epi32(a.v, n);
}
NVAE_INLINE Mask operator==(Bits a, Bits b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
// True where any bit of a & b is set.
NVAE_INLINE Mask test(Bits a, Bits b) { return ~((a & b) == Bits(0u)); }

template <>
struct Vec<float> {
  static constexpr int size = 8;
  using Scalar = float;
  __m256 v;
  Vec() = default;
  NVAE_INLINE Vec(__m256 x) : v(x) {}
  NVAE_INLINE Vec(float x) : v(_mm256_set1_ps(x)) {}
  NVAE_INLINE static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  NVAE_INLINE static __m256 of_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
  }
  NVAE_INLINE __m128i to_bf16() const {
    __m256i b = _mm256_castps_si256(v);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(b, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x400000));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    __m256i packed = _mm256_packus_epi32(high, high);  // per half: words 0-3 twice
    return _mm_unpacklo_epi64(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
  }
  // Two-byte and eight-byte tails go through memory: they are rare, and AVX2 has no masked moves for them.
  template <class T>
  NVAE_INLINE static Vec load_tail(const T* p, int n) {
    T full[8] = {};
    std::memcpy(full, p, static_cast<size_t>(n) * sizeof(T));
    return load(full);
  }
  template <class T>
  NVAE_INLINE void store_tail(T* p, int n) const {
    T full[8];
    store(full);
    std::memcpy(p, full, static_cast<size_t>(n) * sizeof(T));
  }

  NVAE_INLINE static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  NVAE_INLINE static Vec load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
  NVAE_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  NVAE_INLINE void store(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }

  NVAE_INLINE static Vec load(const bf16* p) {
    return of_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  NVAE_INLINE static Vec load(const bf16* p, int n) { return load_tail(p, n); }
  NVAE_INLINE void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  NVAE_INLINE void store(bf16* p, int n) const { store_tail(p, n); }

  NVAE_INLINE static Vec load(const f16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  NVAE_INLINE static Vec load(const f16* p, int n) { return load_tail(p, n); }
  NVAE_INLINE void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  NVAE_INLINE void store(f16* p, int n) const { store_tail(p, n); }

  NVAE_INLINE static Vec load(const double* p) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(_mm256_loadu_pd(p))),
                                _mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)), 1);
  }
  NVAE_INLINE static Vec load(const double* p, int n) { return load_tail(p, n); }
  NVAE_INLINE void store(double* p) const {
    _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  }
  NVAE_INLINE void store(double* p, int n) const { store_tail(p, n); }
};
using VecF = Vec<float>;

NVAE_INLINE VecF operator+(VecF a, VecF b) { return _mm256_add_ps(a.v, b.v); }
NVAE_INLINE VecF operator-(VecF a, VecF b) { return _mm256_sub_ps(a.v, b.v); }
NVAE_INLINE VecF operator*(VecF a, VecF b) { return _mm256_mul_ps(a.v, b.v); }
NVAE_INLINE VecF operator/(VecF a, VecF b) { return _mm256_div_ps(a.v, b.v); }
NVAE_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
NVAE_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm256_fnmadd_ps(a.v, b.v, c.v); }
NVAE_INLINE VecF sqrt(VecF a) { return _mm256_sqrt_ps(a.v); }
NVAE_INLINE VecF min(VecF a, VecF b) { return _mm256_min_ps(a.v, b.v); }
NVAE_INLINE VecF max(VecF a, VecF b) { return _mm256_max_ps(a.v, b.v); }
NVAE_INLINE VecF round_even(VecF a) {
  return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NVAE_INLINE Mask operator<(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
NVAE_INLINE Mask operator<=(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
NVAE_INLINE Mask operator>(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
NVAE_INLINE Mask operator>=(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
NVAE_INLINE Mask operator==(VecF a, VecF b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
NVAE_INLINE VecF select(Mask m, VecF yes, VecF no) { return _mm256_blendv_ps(no.v, yes.v, m.m); }
NVAE_INLINE Bits select(Mask m, Bits yes, Bits no) {
  return _mm256_blendv_epi8(no.v, yes.v, _mm256_castps_si256(m.m));
}

NVAE_INLINE Bits bits(VecF a) { return _mm256_castps_si256(a.v); }
NVAE_INLINE VecF from_bits(Bits b) { return _mm256_castsi256_ps(b.v); }
NVAE_INLINE VecF int_to_float(Bits b) { return _mm256_cvtepi32_ps(b.v); }
NVAE_INLINE VecF uint_to_float(Bits b) {
  // Both halves convert exactly, so the sum is the only rounding.
  VecF high = int_to_float(shift_right<16>(b)), low = int_to_float(b & Bits(0xffffu));
  return fma(high, VecF(65536.f), low);
}
NVAE_INLINE Bits to_int(VecF a) { return _mm256_cvtps_epi32(a.v); }

// Lanes of 64 bits, each holding one 32-bit factor (the upper half is ignored by mul32).
struct Words64 {
  __m256i v;
  static constexpr int size = 4;
  Words64() = default;
  NVAE_INLINE Words64(__m256i x) : v(x) {}
  NVAE_INLINE explicit Words64(uint64_t x) : v(_mm256_set1_epi64x(static_cast<long long>(x))) {}
  NVAE_INLINE static Words64 load(const uint64_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
};
NVAE_INLINE Words64 operator+(Words64 a, Words64 b) { return _mm256_add_epi64(a.v, b.v); }
NVAE_INLINE Words64 operator^(Words64 a, Words64 b) { return _mm256_xor_si256(a.v, b.v); }
NVAE_INLINE Words64 mul32(Words64 a, Words64 b) { return _mm256_mul_epu32(a.v, b.v); }
NVAE_INLINE Words64 upper(Words64 a) { return _mm256_srli_epi64(a.v, 32); }
NVAE_INLINE Words64 xor3(Words64 a, Words64 b, Words64 c) {
  return _mm256_xor_si256(a.v, _mm256_xor_si256(b.v, c.v));
}
// Lower halves side by side: lane 2i from a, lane 2i + 1 from b.
NVAE_INLINE Bits merge(Words64 a, Words64 b) {
  return _mm256_blend_epi32(a.v, _mm256_slli_epi64(b.v, 32), 0xaa);
}

// Within each chunk of four lanes, transpose four vectors: out[j] lane 4c + k = z_k lane 4c + j.
NVAE_INLINE void transpose_chunks(VecF z0, VecF z1, VecF z2, VecF z3, VecF* out) {
  __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(z0.v, z1.v)),
          b = _mm256_castps_pd(_mm256_unpackhi_ps(z0.v, z1.v));
  __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(z2.v, z3.v)),
          d = _mm256_castps_pd(_mm256_unpackhi_ps(z2.v, z3.v));
  out[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
  out[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  out[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
  out[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}

// Row j lane k = row k lane j, in place.
NVAE_INLINE void transpose(VecF* rows) {
  VecF low[4], high[4];
  transpose_chunks(rows[0], rows[1], rows[2], rows[3], low);
  transpose_chunks(rows[4], rows[5], rows[6], rows[7], high);
  for (int j = 0; j < 4; ++j) {
    rows[j] = _mm256_permute2f128_ps(low[j].v, high[j].v, 0x20);
    rows[4 + j] = _mm256_permute2f128_ps(low[j].v, high[j].v, 0x31);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
