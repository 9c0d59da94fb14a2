// vec.h for AVX-512 (F, BW, DQ, VL): 16 lanes.
#pragma once
#include <immintrin.h>

namespace nvae {
namespace NVAE_ISA {

struct Mask {
  __mmask16 m;
};
NVAE_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.m & b.m)}; }
NVAE_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.m | b.m)}; }
NVAE_INLINE Mask operator~(Mask a) { return {static_cast<__mmask16>(~a.m)}; }
NVAE_INLINE bool any(Mask a) { return a.m != 0; }
NVAE_INLINE bool all(Mask a) { return a.m == 0xffff; }

struct Bits {
  __m512i v;
  Bits() = default;
  NVAE_INLINE Bits(__m512i x) : v(x) {}
  NVAE_INLINE explicit Bits(uint32_t x) : v(_mm512_set1_epi32(static_cast<int>(x))) {}
  NVAE_INLINE static Bits load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  NVAE_INLINE void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
};
NVAE_INLINE Bits operator+(Bits a, Bits b) { return _mm512_add_epi32(a.v, b.v); }
NVAE_INLINE Bits operator-(Bits a, Bits b) { return _mm512_sub_epi32(a.v, b.v); }
NVAE_INLINE Bits operator&(Bits a, Bits b) { return _mm512_and_si512(a.v, b.v); }
NVAE_INLINE Bits operator|(Bits a, Bits b) { return _mm512_or_si512(a.v, b.v); }
NVAE_INLINE Bits operator^(Bits a, Bits b) { return _mm512_xor_si512(a.v, b.v); }
template <int n>
NVAE_INLINE Bits shift_left(Bits a) {
  return _mm512_slli_epi32(a.v, n);
}
template <int n>
NVAE_INLINE Bits shift_right(Bits a) {
  return _mm512_srli_epi32(a.v, n);
}
template <int n>
NVAE_INLINE Bits shift_right_signed(Bits a) {
  return _mm512_srai_epi32(a.v, n);
}
NVAE_INLINE Mask operator==(Bits a, Bits b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
// True where any bit of a & b is set.
NVAE_INLINE Mask test(Bits a, Bits b) { return {_mm512_test_epi32_mask(a.v, b.v)}; }

template <>
struct Vec<float> {
  static constexpr int size = 16;
  using Scalar = float;
  __m512 v;
  Vec() = default;
  NVAE_INLINE Vec(__m512 x) : v(x) {}
  NVAE_INLINE Vec(float x) : v(_mm512_set1_ps(x)) {}
  NVAE_INLINE static __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
  NVAE_INLINE static __m512 of_bf16(__m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
  }
  NVAE_INLINE static __m512 of_doubles(__m512d low, __m512d high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
  }
  NVAE_INLINE __m256i to_bf16() const {
    const __m512i b = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(b, _mm512_set1_epi32(0x10000));
    __m512i rounded = _mm512_add_epi32(b, _mm512_set1_epi32(0x7fff));
    rounded = _mm512_mask_add_epi32(rounded, odd, rounded, _mm512_set1_epi32(1));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, b, _mm512_set1_epi32(0x400000));
    // The upper half of every lane.
    const __m512i halves = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019,
                                             0x1f001d, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(halves, rounded));
  }

  NVAE_INLINE static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  NVAE_INLINE static Vec load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
  NVAE_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  NVAE_INLINE void store(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }

  NVAE_INLINE static Vec load(const bf16* p) {
    return of_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  NVAE_INLINE static Vec load(const bf16* p, int n) { return of_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  NVAE_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  NVAE_INLINE void store(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }

  NVAE_INLINE static Vec load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  NVAE_INLINE static Vec load(const f16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }
  NVAE_INLINE void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  NVAE_INLINE void store(f16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  NVAE_INLINE static Vec load(const double* p) {
    return of_doubles(_mm512_loadu_pd(p), _mm512_loadu_pd(p + 8));
  }
  NVAE_INLINE static Vec load(const double* p, int n) {
    const __mmask16 m = first(n);
    return of_doubles(_mm512_maskz_loadu_pd(static_cast<__mmask8>(m), p),
                      _mm512_maskz_loadu_pd(static_cast<__mmask8>(m >> 8), p + 8));
  }
  NVAE_INLINE void store(double* p) const { store(p, 16); }
  NVAE_INLINE void store(double* p, int n) const {
    const __mmask16 m = first(n);
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(m), _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    _mm512_mask_storeu_pd(p + 8, static_cast<__mmask8>(m >> 8),
                          _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
};
using VecF = Vec<float>;

NVAE_INLINE VecF operator+(VecF a, VecF b) { return _mm512_add_ps(a.v, b.v); }
NVAE_INLINE VecF operator-(VecF a, VecF b) { return _mm512_sub_ps(a.v, b.v); }
NVAE_INLINE VecF operator*(VecF a, VecF b) { return _mm512_mul_ps(a.v, b.v); }
NVAE_INLINE VecF operator/(VecF a, VecF b) { return _mm512_div_ps(a.v, b.v); }
NVAE_INLINE VecF fma(VecF a, VecF b, VecF c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
NVAE_INLINE VecF fnma(VecF a, VecF b, VecF c) { return _mm512_fnmadd_ps(a.v, b.v, c.v); }
NVAE_INLINE VecF sqrt(VecF a) { return _mm512_sqrt_ps(a.v); }
NVAE_INLINE VecF min(VecF a, VecF b) { return _mm512_min_ps(a.v, b.v); }
NVAE_INLINE VecF max(VecF a, VecF b) { return _mm512_max_ps(a.v, b.v); }
NVAE_INLINE VecF round_even(VecF a) {
  return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
NVAE_INLINE Mask operator<(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
NVAE_INLINE Mask operator<=(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
NVAE_INLINE Mask operator>(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
NVAE_INLINE Mask operator>=(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
NVAE_INLINE Mask operator==(VecF a, VecF b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
NVAE_INLINE VecF select(Mask m, VecF yes, VecF no) { return _mm512_mask_blend_ps(m.m, no.v, yes.v); }
NVAE_INLINE Bits select(Mask m, Bits yes, Bits no) { return _mm512_mask_blend_epi32(m.m, no.v, yes.v); }

NVAE_INLINE Bits bits(VecF a) { return _mm512_castps_si512(a.v); }
NVAE_INLINE VecF from_bits(Bits b) { return _mm512_castsi512_ps(b.v); }
NVAE_INLINE VecF int_to_float(Bits b) { return _mm512_cvtepi32_ps(b.v); }
NVAE_INLINE VecF uint_to_float(Bits b) { return _mm512_cvtepu32_ps(b.v); }
NVAE_INLINE Bits to_int(VecF a) { return _mm512_cvtps_epi32(a.v); }

// a * 2^n for integral n, rounded once: overflow and gradual underflow included.
NVAE_INLINE VecF scale_by_power(VecF a, VecF n) { return _mm512_scalef_ps(a.v, n.v); }

// Lanes of 64 bits, each holding one 32-bit factor (the upper half is ignored by mul32).
struct Words64 {
  __m512i v;
  static constexpr int size = 8;
  Words64() = default;
  NVAE_INLINE Words64(__m512i x) : v(x) {}
  NVAE_INLINE explicit Words64(uint64_t x) : v(_mm512_set1_epi64(static_cast<long long>(x))) {}
  NVAE_INLINE static Words64 load(const uint64_t* p) { return _mm512_loadu_si512(p); }
};
NVAE_INLINE Words64 operator+(Words64 a, Words64 b) { return _mm512_add_epi64(a.v, b.v); }
NVAE_INLINE Words64 operator^(Words64 a, Words64 b) { return _mm512_xor_si512(a.v, b.v); }
NVAE_INLINE Words64 mul32(Words64 a, Words64 b) { return _mm512_mul_epu32(a.v, b.v); }
NVAE_INLINE Words64 upper(Words64 a) { return _mm512_srli_epi64(a.v, 32); }
NVAE_INLINE Words64 xor3(Words64 a, Words64 b, Words64 c) {
  return _mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96);
}
// Lower halves side by side: lane 2i from a, lane 2i + 1 from b.
NVAE_INLINE Bits merge(Words64 a, Words64 b) {
  return _mm512_mask_shuffle_epi32(a.v, 0xaaaa, b.v, static_cast<_MM_PERM_ENUM>(0xa0));
}

// Within each chunk of four lanes, transpose four vectors: out[j] lane 4c + k = z_k lane 4c + j.
NVAE_INLINE void transpose_chunks(VecF z0, VecF z1, VecF z2, VecF z3, VecF* out) {
  __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(z0.v, z1.v)),
          b = _mm512_castps_pd(_mm512_unpackhi_ps(z0.v, z1.v));
  __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(z2.v, z3.v)),
          d = _mm512_castps_pd(_mm512_unpackhi_ps(z2.v, z3.v));
  out[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  out[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  out[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  out[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

// Row j lane k = row k lane j, in place.
NVAE_INLINE void transpose(VecF* rows) {
  VecF part[4][4];
  for (int i = 0; i < 4; ++i)
    transpose_chunks(rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3], part[i]);
  for (int j = 0; j < 4; ++j) {
    const __m512 even01 = _mm512_shuffle_f32x4(part[0][j].v, part[1][j].v, 0x88);
    const __m512 odd01 = _mm512_shuffle_f32x4(part[0][j].v, part[1][j].v, 0xdd);
    const __m512 even23 = _mm512_shuffle_f32x4(part[2][j].v, part[3][j].v, 0x88);
    const __m512 odd23 = _mm512_shuffle_f32x4(part[2][j].v, part[3][j].v, 0xdd);
    rows[j] = _mm512_shuffle_f32x4(even01, even23, 0x88);
    rows[4 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
    rows[8 + j] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
    rows[12 + j] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
