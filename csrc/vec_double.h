// One lane of float64 with the interface of Vec<float>: kernel templates run on it unchanged, for float64
// tensors and gradcheck. Its functions are the C library's.
#pragma once

namespace nvae {
namespace NVAE_ISA {

struct Mask1 {
  bool m;
};
NVAE_INLINE Mask1 operator&(Mask1 a, Mask1 b) { return {a.m && b.m}; }
NVAE_INLINE Mask1 operator|(Mask1 a, Mask1 b) { return {a.m || b.m}; }
NVAE_INLINE Mask1 operator~(Mask1 a) { return {!a.m}; }
NVAE_INLINE bool any(Mask1 a) { return a.m; }
NVAE_INLINE bool all(Mask1 a) { return a.m; }

template <>
struct Vec<double> {
  static constexpr int size = 1;
  using Scalar = double;
  double v;
  Vec() = default;
  NVAE_INLINE Vec(double x) : v(x) {}
  NVAE_INLINE static Vec load(const double* p) { return *p; }
  NVAE_INLINE static Vec load(const double* p, int n) { return n ? *p : 0.0; }
  template <class T>
  NVAE_INLINE static Vec load(const T* p) {
    return static_cast<double>(load_float(p));
  }
  NVAE_INLINE void store(double* p) const { *p = v; }
  NVAE_INLINE void store(double* p, int n) const {
    if (n) *p = v;
  }
};
using VecD = Vec<double>;

NVAE_INLINE VecD operator+(VecD a, VecD b) { return a.v + b.v; }
NVAE_INLINE VecD operator-(VecD a, VecD b) { return a.v - b.v; }
NVAE_INLINE VecD operator*(VecD a, VecD b) { return a.v * b.v; }
NVAE_INLINE VecD operator/(VecD a, VecD b) { return a.v / b.v; }
NVAE_INLINE VecD operator-(VecD a) { return -a.v; }
NVAE_INLINE VecD fma(VecD a, VecD b, VecD c) { return a.v * b.v + c.v; }
NVAE_INLINE VecD fnma(VecD a, VecD b, VecD c) { return c.v - a.v * b.v; }
NVAE_INLINE VecD sqrt(VecD a) { return __builtin_sqrt(a.v); }
NVAE_INLINE VecD abs(VecD a) { return __builtin_fabs(a.v); }
NVAE_INLINE VecD copysign(VecD a, VecD b) { return __builtin_copysign(a.v, b.v); }
NVAE_INLINE VecD min(VecD a, VecD b) { return a.v < b.v ? a.v : b.v; }
NVAE_INLINE VecD max(VecD a, VecD b) { return a.v > b.v ? a.v : b.v; }
NVAE_INLINE Mask1 operator<(VecD a, VecD b) { return {a.v < b.v}; }
NVAE_INLINE Mask1 operator<=(VecD a, VecD b) { return {a.v <= b.v}; }
NVAE_INLINE Mask1 operator>(VecD a, VecD b) { return {a.v > b.v}; }
NVAE_INLINE Mask1 operator>=(VecD a, VecD b) { return {a.v >= b.v}; }
NVAE_INLINE Mask1 operator==(VecD a, VecD b) { return {a.v == b.v}; }
NVAE_INLINE VecD select(Mask1 m, VecD yes, VecD no) { return m.m ? yes : no; }
NVAE_INLINE double sum(VecD a) { return a.v; }
NVAE_INLINE double max_lane(VecD a) { return a.v; }
NVAE_INLINE VecD exp(VecD a) { return __builtin_exp(a.v); }
NVAE_INLINE VecD exp_negative(VecD a) { return __builtin_exp(a.v); }
NVAE_INLINE VecD exp_negative(VecD a, VecD& minus_one) {
  minus_one = __builtin_expm1(a.v);
  return __builtin_exp(a.v);
}
NVAE_INLINE VecD log1p_positive(VecD a) { return __builtin_log1p(a.v); }
NVAE_INLINE VecD log(VecD a) { return __builtin_log(a.v); }
NVAE_INLINE VecD log_positive(VecD a) { return __builtin_log(a.v); }
NVAE_INLINE VecD tanh(VecD a) { return __builtin_tanh(a.v); }
NVAE_INLINE void transpose(VecD*) {}
NVAE_INLINE void exp_and_less_one(VecD a, VecD& e, VecD& less_one) {
  e = __builtin_exp(a.v);
  less_one = __builtin_expm1(a.v);
}
NVAE_INLINE VecD sigmoid(VecD a) { return 1.0 / (1.0 + __builtin_exp(-a.v)); }

}  // namespace NVAE_ISA
}  // namespace nvae
