// Elements of tensors on the GPU, and the activations. Kernels are compiled for a storage width (2 or 4 bytes);
// which of the two half types it is they learn when they run, as only loads and stores care.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

namespace nvae {
namespace cuda {

template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using Type = unsigned short;
};
template <>
struct Word<4> {
  using Type = unsigned int;
};

template <int BYTES>
__device__ __forceinline__ float widen(typename Word<BYTES>::Type bits, bool half) {
  if constexpr (BYTES == 4) {
    return __uint_as_float(bits);
  } else {
    return half ? __half2float(__ushort_as_half(bits)) : __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
}

template <int BYTES>
__device__ __forceinline__ typename Word<BYTES>::Type narrow(float value, bool half) {
  if constexpr (BYTES == 4) {
    return __float_as_uint(value);
  } else {
    return half ? __half_as_ushort(__float2half_rn(value)) : __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

// Four elements of 16 bytes: the first four, or of 2-byte elements with part = 1 the others.
template <int BYTES>
__device__ __forceinline__ float4 widen_four(const uint4* from, int part, bool half) {
  if constexpr (BYTES == 4) {
    return *reinterpret_cast<const float4*>(from);
  } else {
    const uint2 w = reinterpret_cast<const uint2*>(from)[part];
    if (!half)
      return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u),
                         __uint_as_float(w.y << 16), __uint_as_float(w.y & 0xffff0000u));
    const auto one = [](unsigned bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); };
    return make_float4(one(w.x), one(w.x >> 16), one(w.y), one(w.y >> 16));
  }
}

// Any element of a small tensor, whatever its type. S is what sums are computed in.
template <class S>
__device__ __forceinline__ S load_any(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<S>(static_cast<const float*>(data)[i]);
    case Dtype::f64:
      return static_cast<S>(static_cast<const double*>(data)[i]);
    default:
      return static_cast<S>(widen<2>(static_cast<const unsigned short*>(data)[i], dtype == Dtype::f16));
  }
}
template <class S>
__device__ __forceinline__ void store_any(void* data, Dtype dtype, int64_t i, S value) {
  switch (dtype) {
    case Dtype::f32:
      static_cast<float*>(data)[i] = static_cast<float>(value);
      break;
    case Dtype::f64:
      static_cast<double*>(data)[i] = static_cast<double>(value);
      break;
    default:
      static_cast<unsigned short*>(data)[i] = narrow<2>(static_cast<float>(value), dtype == Dtype::f16);
  }
}

constexpr int kIdentity = 0, kSwish = 1, kElu = 2;

__device__ __forceinline__ float sigmoid(float u) { return __fdividef(1.f, 1.f + __expf(-u)); }
// By Newton's method from an estimate: the compiler's own division is a call, around which registers are spilled.
__device__ __forceinline__ double sigmoid(double u) {
  const double d = 1.0 + exp(-u);
  double r = __fdividef(1.f, static_cast<float>(d));
  r = r * (2.0 - d * r);
  r = r * (2.0 - d * r);
  return d > 1e37 ? exp(u) : r;
}
__device__ __forceinline__ float exp_minus_one(float u) { return expm1f(u); }
__device__ __forceinline__ double exp_minus_one(double u) { return expm1(u); }

template <class S>
__device__ __forceinline__ S activate(S u, int activation) {
  if (activation == kSwish) return u * sigmoid(u);
  if (activation == kElu) return u > S(0) ? u : exp_minus_one(u);
  return u;
}
// The activation and its derivative.
template <class S>
__device__ __forceinline__ S activate(S u, int activation, S& slope) {
  slope = S(1);
  if (activation == kSwish) {
    const S s = sigmoid(u);
    slope = s + s * (u - u * s);
    return u * s;
  }
  if (activation == kElu && !(u > S(0))) {
    const S e = exp_minus_one(u);
    slope = e + S(1);
    return e;
  }
  return u;
}

// 16 bytes from global to shared memory without passing through registers; wait_copies() waits for those of the
// calling thread, which alone may then read them without a barrier.
__device__ __forceinline__ void copy_async(uint4* shared, const void* global) {
#ifdef __CUDA_ARCH__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *shared = *static_cast<const uint4*>(global);
#endif
}
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace cuda
}  // namespace nvae
