// A thin float vector: one source, three instruction sets.
//
// Include it in csrc/cpu/<op>.vec.cpp files only. setup.py compiles such a file once per capability with
// -DNVAE_CAPABILITY=0 (baseline: SSE2 or NEON through compiler vectors), 1 (AVX2, FMA, F16C), 2 (AVX-512 F,
// BW, DQ, VL), and everything here lives in a namespace of that name (NVAE_ISA), so that the copies never
// mix. Keep such files free of standard-library templates for the same reason: the linker would merge their
// copies.
//
//   Vec<float>   size lanes of float32
//   Vec<double>  one lane with the same interface, for float64 kernels and gradcheck
//   Bits         size lanes of uint32; arithmetic wraps
//   Words64      size / 2 lanes of uint64, whose lower halves are factors of 32 bits
//   Mask         one truth value per lane
//
//   Vec(x)  V::load(p)  V::load(p, n)     p: float, double, bf16 or f16, converted; n < size lanes, the rest 0
//   v.store(p)  v.store(p, n)             converted, rounded to nearest even
//   + - * /  unary -  sqrt  abs
//   fma(a, b, c) = a * b + c              fused where the instruction set has it
//   fnma(a, b, c) = c - a * b             likewise
//   min(a, b)  max(a, b)                  b when either is NaN
//   copysign  select(mask, yes, no)
//   < <= > >= ==                          give a Mask, false where either is NaN
//   & | ~ any all                         of masks
//   round_even  bits(v)  from_bits(b)  to_int(v)  to_float(Bits read as int32 or as uint32)
//   sum(v)  max_lane(v)                   over the lanes, in a fixed order
//   exp  log  log_positive  tanh  sigmoid  sincos_turn      vec_math.h, with the largest measured errors
//
// -ffp-contract=off: only fma() fuses, so a formula gives the same result wherever it is inlined.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

#ifndef NVAE_CAPABILITY
#define NVAE_CAPABILITY 0
#endif
#if NVAE_CAPABILITY == 2
#define NVAE_ISA avx512
#elif NVAE_CAPABILITY == 1
#define NVAE_ISA avx2
#else
#define NVAE_ISA baseline
#endif

#define NVAE_INLINE inline __attribute__((always_inline))

namespace nvae {
namespace NVAE_ISA {

template <class T>
struct Vec;

// Scalar conversions, for tails, the baseline and float64.

NVAE_INLINE float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
NVAE_INLINE uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}
NVAE_INLINE uint16_t bf16_from_float(float f) {
  uint32_t b = float_to_bits(f);
  if ((b & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((b >> 16) | 0x40);  // NaN stays NaN
  return static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
}
NVAE_INLINE float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }

NVAE_INLINE uint16_t f16_from_float(float f) {
  uint32_t b = float_to_bits(f), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
  if (a >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (a < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 makes the floating-point unit round at bit 2^-24.
    return static_cast<uint16_t>(sign | (float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}
NVAE_INLINE float f16_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, a = h & 0x7fffu;
  if (a >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (a << 13));
  if (a < 0x400u) return bits_to_float(sign | float_to_bits(static_cast<float>(a) * 0x1p-24f));
  return bits_to_float(sign | ((a << 13) + 0x38000000u));
}

NVAE_INLINE float load_float(const float* p) { return *p; }
NVAE_INLINE float load_float(const double* p) { return static_cast<float>(*p); }
NVAE_INLINE float load_float(const bf16* p) { return bf16_to_float(p->bits); }
NVAE_INLINE float load_float(const f16* p) { return f16_to_float(p->bits); }
NVAE_INLINE void store_float(float* p, float v) { *p = v; }
NVAE_INLINE void store_float(double* p, float v) { *p = v; }
NVAE_INLINE void store_float(bf16* p, float v) { p->bits = bf16_from_float(v); }
NVAE_INLINE void store_float(f16* p, float v) { p->bits = f16_from_float(v); }

}  // namespace NVAE_ISA
}  // namespace nvae

#if NVAE_CAPABILITY == 2
#include "vec_avx512.h"
#elif NVAE_CAPABILITY == 1
#include "vec_avx2.h"
#else
#include "vec_baseline.h"
#endif
#include "vec_double.h"
#include "vec_math.h"
