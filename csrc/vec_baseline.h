// vec.h for any processor: 4 lanes of compiler vectors (GCC and Clang), which become SSE2 or NEON
// instructions.
#pragma once
#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace nvae {
namespace NVAE_ISA {

typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint64_t U2 __attribute__((vector_size(16)));

struct Mask {
  I4 m;  // all ones or zero
};
NVAE_INLINE Mask operator&(Mask a, Mask b) { return {a.m & b.m}; }
NVAE_INLINE Mask operator|(Mask a, Mask b) { return {a.m | b.m}; }
NVAE_INLINE Mask operator~(Mask a) { return {~a.m}; }
NVAE_INLINE bool any(Mask a) { return (a.m[0] | a.m[1] | a.m[2] | a.m[3]) != 0; }
NVAE_INLINE bool all(Mask a) { return (a.m[0] & a.m[1] & a.m[2] & a.m[3]) != 0; }

struct Bits {
  U4 v;
  Bits() = default;
  NVAE_INLINE Bits(U4 x) : v(x) {}
  NVAE_INLINE explicit Bits(uint32_t x) : v(U4{x, x, x, x}) {}
  NVAE_INLINE static Bits load(const uint32_t* p) {
    U4 x;
    std::memcpy(&x, p, 16);
    return x;
  }
  NVAE_INLINE void store(uint32_t* p) const { std::memcpy(p, &v, 16); }
};
NVAE_INLINE Bits operator+(Bits a, Bits b) { return a.v + b.v; }
NVAE_INLINE Bits operator-(Bits a, Bits b) { return a.v - b.v; }
NVAE_INLINE Bits operator&(Bits a, Bits b) { return a.v & b.v; }
NVAE_INLINE Bits operator|(Bits a, Bits b) { return a.v | b.v; }
NVAE_INLINE Bits operator^(Bits a, Bits b) { return a.v ^ b.v; }
template <int n>
NVAE_INLINE Bits shift_left(Bits a) {
  return a.v << n;
}
template <int n>
NVAE_INLINE Bits shift_right(Bits a) {
  return a.v >> n;
}
template <int n>
NVAE_INLINE Bits shift_right_signed(Bits a) {
  return (U4)((I4)a.v >> n);
}
NVAE_INLINE Mask operator==(Bits a, Bits b) { return {(I4)(a.v == b.v)}; }
// True where any bit of a & b is set.
NVAE_INLINE Mask test(Bits a, Bits b) { return {(I4)((a.v & b.v) != U4{0, 0, 0, 0})}; }

template <>
struct Vec<float> {
  static constexpr int size = 4;
  using Scalar = float;
  F4 v;
  Vec() = default;
  NVAE_INLINE Vec(F4 x) : v(x) {}
  NVAE_INLINE Vec(float x) : v(F4{x, x, x, x}) {}

  NVAE_INLINE static Vec load(const float* p) {
    F4 x;
    std::memcpy(&x, p, 16);
    return x;
  }
  NVAE_INLINE void store(float* p) const { std::memcpy(p, &v, 16); }
  template <class T>
  NVAE_INLINE static Vec load(const T* p) {
    return F4{load_float(p), load_float(p + 1), load_float(p + 2), load_float(p + 3)};
  }
  template <class T>
  NVAE_INLINE static Vec load(const T* p, int n) {
    F4 x = {0, 0, 0, 0};
    for (int i = 0; i < n; ++i) x[i] = load_float(p + i);
    return x;
  }
  template <class T>
  NVAE_INLINE void store(T* p) const {
    for (int i = 0; i < 4; ++i) store_float(p + i, v[i]);
  }
  template <class T>
  NVAE_INLINE void store(T* p, int n) const {
    for (int i = 0; i < n; ++i) store_float(p + i, v[i]);
  }
};
using VecF = Vec<float>;

NVAE_INLINE VecF operator+(VecF a, VecF b) { return a.v + b.v; }
NVAE_INLINE VecF operator-(VecF a, VecF b) { return a.v - b.v; }
NVAE_INLINE VecF operator*(VecF a, VecF b) { return a.v * b.v; }
NVAE_INLINE VecF operator/(VecF a, VecF b) { return a.v / b.v; }
#ifdef __FP_FAST_FMAF
NVAE_INLINE VecF fma(VecF a, VecF b, VecF c) {
  F4 r;
  for (int i = 0; i < 4; ++i) r[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return r;
}
NVAE_INLINE VecF fnma(VecF a, VecF b, VecF c) { return fma(VecF(-a.v), b, c); }
#else
NVAE_INLINE VecF fma(VecF a, VecF b, VecF c) { return a.v * b.v + c.v; }
NVAE_INLINE VecF fnma(VecF a, VecF b, VecF c) { return c.v - a.v * b.v; }
#endif
NVAE_INLINE VecF sqrt(VecF a) {
#ifdef __SSE2__
  return (F4)_mm_sqrt_ps((__m128)a.v);
#else
  return F4{__builtin_sqrtf(a.v[0]), __builtin_sqrtf(a.v[1]), __builtin_sqrtf(a.v[2]),
            __builtin_sqrtf(a.v[3])};
#endif
}
NVAE_INLINE Mask operator<(VecF a, VecF b) { return {(I4)(a.v < b.v)}; }
NVAE_INLINE Mask operator<=(VecF a, VecF b) { return {(I4)(a.v <= b.v)}; }
NVAE_INLINE Mask operator>(VecF a, VecF b) { return {(I4)(a.v > b.v)}; }
NVAE_INLINE Mask operator>=(VecF a, VecF b) { return {(I4)(a.v >= b.v)}; }
NVAE_INLINE Mask operator==(VecF a, VecF b) { return {(I4)(a.v == b.v)}; }
NVAE_INLINE Bits select(Mask m, Bits yes, Bits no) { return ((U4)m.m & yes.v) | (~(U4)m.m & no.v); }
NVAE_INLINE VecF select(Mask m, VecF yes, VecF no) {
  return (F4)select(m, Bits((U4)yes.v), Bits((U4)no.v)).v;
}
NVAE_INLINE VecF min(VecF a, VecF b) { return select(a < b, a, b); }
NVAE_INLINE VecF max(VecF a, VecF b) { return select(a > b, a, b); }

NVAE_INLINE Bits bits(VecF a) { return (U4)a.v; }
NVAE_INLINE VecF from_bits(Bits b) { return (F4)b.v; }
NVAE_INLINE VecF int_to_float(Bits b) { return __builtin_convertvector((I4)b.v, F4); }
NVAE_INLINE VecF uint_to_float(Bits b) {
  // Both halves convert exactly, so the sum is the only rounding.
  VecF high = int_to_float(shift_right<16>(b)), low = int_to_float(b & Bits(0xffffu));
  return high * VecF(65536.f) + low;
}
// For |a| < 2^22: adding 1.5 * 2^23 leaves the rounded integer in the low bits.
NVAE_INLINE VecF round_even(VecF a) {
  const VecF magic(12582912.f);
  VecF r = (a + magic) - magic;
  return select(from_bits(bits(a) & Bits(0x7fffffffu)) < VecF(4194304.f), r, a);
}
NVAE_INLINE Bits to_int(VecF a) { return (U4) __builtin_convertvector(round_even(a).v, I4); }

// Lanes of 64 bits, each holding one 32-bit factor (the upper half is ignored by mul32).
struct Words64 {
  U2 v;
  static constexpr int size = 2;
  Words64() = default;
  NVAE_INLINE Words64(U2 x) : v(x) {}
  NVAE_INLINE explicit Words64(uint64_t x) : v(U2{x, x}) {}
  NVAE_INLINE static Words64 load(const uint64_t* p) {
    U2 x;
    std::memcpy(&x, p, 16);
    return x;
  }
};
NVAE_INLINE Words64 operator+(Words64 a, Words64 b) { return a.v + b.v; }
NVAE_INLINE Words64 operator^(Words64 a, Words64 b) { return a.v ^ b.v; }
NVAE_INLINE Words64 mul32(Words64 a, Words64 b) {
#ifdef __SSE2__
  return (U2)_mm_mul_epu32((__m128i)a.v, (__m128i)b.v);
#else
  return (a.v & 0xffffffffu) * (b.v & 0xffffffffu);
#endif
}
NVAE_INLINE Words64 upper(Words64 a) { return a.v >> 32; }
NVAE_INLINE Words64 xor3(Words64 a, Words64 b, Words64 c) { return a.v ^ b.v ^ c.v; }
// Lower halves side by side: lane 2i from a, lane 2i + 1 from b.
NVAE_INLINE Bits merge(Words64 a, Words64 b) {
  const U2 lower = {0xffffffffu, 0xffffffffu};
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  return (U4)((a.v << 32) | (b.v & lower));
#else
  return (U4)((a.v & lower) | (b.v << 32));
#endif
}

// Transpose four vectors: out[j] lane k = z_k lane j.
NVAE_INLINE void transpose_chunks(VecF z0, VecF z1, VecF z2, VecF z3, VecF* out) {
#ifdef __SSE2__
  __m128 a = (__m128)z0.v, b = (__m128)z1.v, c = (__m128)z2.v, d = (__m128)z3.v;
  _MM_TRANSPOSE4_PS(a, b, c, d);
  out[0] = (F4)a;
  out[1] = (F4)b;
  out[2] = (F4)c;
  out[3] = (F4)d;
#else
  for (int j = 0; j < 4; ++j) out[j] = F4{z0.v[j], z1.v[j], z2.v[j], z3.v[j]};
#endif
}

// Row j lane k = row k lane j, in place.
NVAE_INLINE void transpose(VecF* rows) {
  VecF turned[4];
  transpose_chunks(rows[0], rows[1], rows[2], rows[3], turned);
  for (int j = 0; j < 4; ++j) rows[j] = turned[j];
}

}  // namespace NVAE_ISA
}  // namespace nvae
