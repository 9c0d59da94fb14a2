// float functions on Vec<float>, written once over the primitives of the three instruction sets.
//
// Largest error found over every seventh float32 input (tests/test_vec.py repeats a thinner sweep and asserts
// the bounds), in units in the last place of the exact result:
//
//                  AVX-512, AVX2   baseline    bound
//   exp                     1.01       0.98     1.25
//   log, log_positive       0.85       0.85     1.25
//   tanh                    1.33       1.33     1.75
//   sigmoid                 2.33       2.33     2.75
//   exp_negative            1.01       0.96     1.25
//     its expm1             0.93       0.90     1.25
//   log1p_positive          1.36       1.36     1.75
//   sincos_turn             1.34       2.37     2 (baseline 3: no fma)
//
// Special values are the C library's: exp(-inf) = 0, exp overflows to inf and underflows gradually; log(0) =
// -inf, log(x < 0) = NaN, log of subnormals is exact to the same error; tanh(+-0) = +-0; NaN gives NaN. The
// polynomials are minimax fits with coefficients rounded one after the other to float32.
#pragma once

namespace nvae {
namespace NVAE_ISA {

NVAE_INLINE VecF operator-(VecF a) { return from_bits(bits(a) ^ Bits(0x80000000u)); }
NVAE_INLINE VecF abs(VecF a) { return from_bits(bits(a) & Bits(0x7fffffffu)); }
NVAE_INLINE VecF copysign(VecF a, VecF b) {
  return from_bits((bits(a) & Bits(0x7fffffffu)) | (bits(b) & Bits(0x80000000u)));
}

// Lanes pairwise: the first half plus the second, until one is left.
NVAE_INLINE float sum(VecF a) {
#if NVAE_CAPABILITY > 0
#if NVAE_CAPABILITY == 2
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  const __m256 eight = a.v;
#endif
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
#else
  float x[VecF::size];
  a.store(x);
  for (int half = VecF::size / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
#endif
}
NVAE_INLINE float max_lane(VecF a) {
  float x[VecF::size];
  a.store(x);
  float largest = x[0];
  for (int i = 1; i < VecF::size; ++i) largest = x[i] > largest ? x[i] : largest;
  return largest;
}

#if NVAE_CAPABILITY != 2
// a * 2^n for integral |n| < 254, rounded once: overflow and gradual underflow included.
NVAE_INLINE VecF scale_by_power(VecF a, VecF n) {
  Bits whole = to_int(n), half = shift_right_signed<1>(whole);
  VecF first = from_bits(shift_left<23>(half + Bits(127u)));
  VecF second = from_bits(shift_left<23>((whole - half) + Bits(127u)));
  return (a * first) * second;
}
#endif

// ln 2 in two parts; the first has 15 bits, so that its product with an exponent is exact without fma.
constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;

// exp(r) - 1 and exp(r) for x = n ln 2 + r, |r| <= ln 2 / 2.
NVAE_INLINE VecF expm1_reduced(VecF r) {
  VecF q(0x1.6a4d70p-10f);
  q = fma(q, r, VecF(0x1.12398ap-7f));
  q = fma(q, r, VecF(0x1.5558b0p-5f));
  q = fma(q, r, VecF(0x1.555492p-3f));
  q = fma(q, r, VecF(0x1.fffffcp-2f));
  return fma(q, r * r, r);
}
NVAE_INLINE VecF exp_reduced(VecF r) { return expm1_reduced(r) + VecF(1.f); }

NVAE_INLINE VecF exp(VecF x) {
  // Beyond these the result is 0 or infinity anyway; max(x, .) second so that NaN passes through.
  VecF t = min(VecF(89.f), max(VecF(-104.f), x));
  VecF n = round_even(t * VecF(0x1.715476p+0f));
  VecF r = fnma(n, VecF(kLn2Low), fnma(n, VecF(kLn2High), t));
  return scale_by_power(exp_reduced(r), n);
}

// exp(x) and exp(x) - 1 for x <= 0 (or NaN), the latter good to an ulp near 0 too; below -80 as at -80.
NVAE_INLINE void exp_and_less_one(VecF x, VecF& e, VecF& less_one) {
  const VecF t = max(VecF(-80.f), x);
  const VecF n = round_even(t * VecF(0x1.715476p+0f));
  const VecF r = fnma(n, VecF(kLn2Low), fnma(n, VecF(kLn2High), t));
  const VecF q = expm1_reduced(r);
  const VecF power = from_bits(shift_left<23>(to_int(n) + Bits(127u)));
  e = fma(q, power, power);
  less_one = fma(q, power, power - VecF(1.f));
}

// log of a positive normal number, no other input.
NVAE_INLINE VecF log_positive(VecF x) {
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)).
  Bits shifted = bits(x) - Bits(0x3f3504f3u);
  Bits exponent = shift_right_signed<23>(shifted);
  VecF f = from_bits(bits(x) - shift_left<23>(exponent)) - VecF(1.f), e = int_to_float(exponent);
  VecF p(-0x1.38cf20p-4f);
  p = fma(p, f, VecF(0x1.05602ep-3f));
  p = fma(p, f, VecF(-0x1.0d81f2p-3f));
  p = fma(p, f, VecF(0x1.22d8f8p-3f));
  p = fma(p, f, VecF(-0x1.54728cp-3f));
  p = fma(p, f, VecF(0x1.99a01ep-3f));
  p = fma(p, f, VecF(-0x1.000226p-2f));
  p = fma(p, f, VecF(0x1.555554p-2f));
  VecF square = f * f;
  VecF tail = fma(p, square * f, e * VecF(kLn2Low));
  tail = fnma(VecF(0.5f), square, tail);
  return fma(e, VecF(kLn2High), f + tail);
}

NVAE_INLINE VecF log(VecF x) {
  const VecF smallest(0x1p-126f);
  Mask tiny = x < smallest;
  // Zero, negative numbers and NaN go through with some value and are replaced below.
  VecF y = log_positive(select(tiny, x * VecF(0x1p23f), x));
  y = select(tiny, y - VecF(23 * 0.693147180559945f), y);
  y = select(x > VecF(0x1.fffffep127f), x, y);
  y = select(x == VecF(0.f), VecF(-__builtin_inff()), y);
  return select(x >= VecF(0.f), y, VecF(__builtin_nanf("")));
}

NVAE_INLINE VecF tanh(VecF x) {
  VecF a = abs(x);
  // Large: 1 - 2 / (exp(2a) + 1), which is 1 in float32 from 9.02 on. min second so that NaN passes through.
  VecF t = min(VecF(9.5f), a);
  VecF n = round_even(t * VecF(0x1.715476p+1f));
  VecF two = t + t;
  VecF r = fnma(n, VecF(kLn2Low), fnma(n, VecF(kLn2High), two));
  VecF power = from_bits(shift_left<23>(to_int(n) + Bits(127u)));
  VecF large = VecF(1.f) - VecF(2.f) / fma(exp_reduced(r), power, VecF(1.f));
  // Small: an odd polynomial, which keeps the relative error where the formula above cancels.
  VecF square = a * a;
  VecF p(-0x1.753152p-8f);
  p = fma(p, square, VecF(0x1.51ffcep-6f));
  p = fma(p, square, VecF(-0x1.b83676p-5f));
  p = fma(p, square, VecF(0x1.1106fap-3f));
  p = fma(p, square, VecF(-0x1.555532p-2f));
  VecF small = fma(p, square * a, a);
  return copysign(select(a < VecF(0.625f), small, large), x);
}

// exp(x) for x <= 0, and exp(x) - 1 to full relative accuracy. Below -86 the result stays exp(-86), a normal
// number: what is added to 1 or divided by does not see the difference.
NVAE_INLINE VecF exp_negative(VecF x, VecF& minus_one) {
  const VecF t = max(VecF(-86.f), x), magic(0x1.8p+23f);
  const VecF shifted = fma(t, VecF(0x1.715476p+0f), magic), n = shifted - magic;
  const VecF r = fnma(n, VecF(kLn2Low), fnma(n, VecF(kLn2High), t));
  VecF q(0x1.6a4d70p-10f);
  q = fma(q, r, VecF(0x1.12398ap-7f));
  q = fma(q, r, VecF(0x1.5558b0p-5f));
  q = fma(q, r, VecF(0x1.555492p-3f));
  q = fma(q, r, VecF(0x1.fffffcp-2f));
  q = fma(q, r * r, r);
  const Bits exponent =
      shift_left<23>(bits(shifted));  // n of the lowest bits, where the magic number has none
  const VecF power = from_bits(exponent + Bits(0x3f800000u));
  minus_one = fma(q, power, power - VecF(1.f));
  return from_bits(bits(q + VecF(1.f)) + exponent);
}
NVAE_INLINE VecF exp_negative(VecF x) {
  VecF unused;
  return exp_negative(x, unused);
}

// log(1 + x) for finite x >= 0. NaN gives some number.
NVAE_INLINE VecF log1p_positive(VecF x) {
  const VecF u = VecF(1.f) + x;
  // What rounding u lost, divided (roughly) by u; further on it is below the last place.
  const VecF lost = (x - (u - VecF(1.f))) * max(VecF(1.f) - x, VecF(0.4f));
  return log_positive(u) + select(x < VecF(3.f), lost, VecF(0.f));
}

// 1 / (1 + exp(-x)), as exp(x) / (1 + exp(x)) for negative x: no overflow, and tiny results keep their
// digits.
NVAE_INLINE VecF sigmoid(VecF x) {
  VecF e = exp(-abs(x));
  return select(x < VecF(0.f), e, VecF(1.f)) / (VecF(1.f) + e);
}

// Cosine and sine of 2 pi w / 2^32. The reduction to [-pi/4, pi/4] is exact, in integers; the polynomials are
// in t = angle / (pi/2), which float32 holds without a rounding of its own, and pi/2 enters in two parts.
NVAE_INLINE void sincos_turn(Bits w, VecF& cosine, VecF& sine) {
  Bits turned = w + Bits(0x20000000u);  // its two top bits: the quarter turn q
  VecF t = int_to_float((turned & Bits(0x3fffffffu)) - Bits(0x20000000u)) * VecF(0x1p-30f);
  VecF square = t * t;
  VecF s(-0x1.2da0d0p-8f);
  s = fma(s, square, VecF(0x1.465ee8p-4f));
  s = fma(s, square, VecF(-0x1.4abbbap-1f));
  s = fma(s, square, VecF(-0x1.a30830p-25f));
  s = fma(t, VecF(0x1.921fb6p+0f), s * t);
  VecF c(0x1.d4f7eap-11f);
  c = fma(c, square, VecF(-0x1.55b2b6p-6f));
  c = fma(c, square, VecF(0x1.03c1b0p-2f));
  c = fma(c, square, VecF(-0x1.3bd3ccp+0f));
  c = fma(c, square, VecF(1.f));
  Mask odd = test(turned, Bits(0x40000000u));
  // The sine is negative in quarters 2 and 3, the cosine in 1 and 2.
  Bits sine_sign = turned & Bits(0x80000000u), cosine_sign = (turned + Bits(0x40000000u)) & Bits(0x80000000u);
  cosine = from_bits(bits(select(odd, s, c)) ^ cosine_sign);
  sine = from_bits(bits(select(odd, c, s)) ^ sine_sign);
}

}  // namespace NVAE_ISA
}  // namespace nvae
