// Elements of tensors on the GPU, and the activations.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../types.h"

// Marks what follows in this block as a region of which the compiler emits so many copies, by unrolling, per
// call of its function; 0: whatever its caller's region has. The stand-in of the tests counts how often
// threads enter a region, which together with the SASS instructions of its lines gives the issue slots of a
// kernel. It generates no code for the GPU.
#ifndef NVAE_REGION
#define NVAE_REGION(copies)
#endif

namespace nvae {
namespace cuda {

template <Dtype D>
struct Word {
  using Type = unsigned short;
  using Four = uint2;  // four elements
};
template <>
struct Word<Dtype::f32> {
  using Type = unsigned int;
  using Four = uint4;
};
template <Dtype D>
constexpr int kBytes = static_cast<int>(sizeof(typename Word<D>::Type));

template <Dtype D>
__device__ __forceinline__ float widen(typename Word<D>::Type bits) {
  if constexpr (D == Dtype::f32) return __uint_as_float(bits);
  if constexpr (D == Dtype::f16) return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

template <Dtype D>
__device__ __forceinline__ typename Word<D>::Type narrow(float value) {
  if constexpr (D == Dtype::f32) return __float_as_uint(value);
  if constexpr (D == Dtype::f16) return __half_as_ushort(__float2half_rn(value));
  return static_cast<typename Word<D>::Type>(__bfloat16_as_ushort(__float2bfloat16_rn(value)));
}

// Two elements of 16 bits in one instruction, the first in the lower half; converting one alone runs at a quarter
// of the speed.
template <Dtype D>
__device__ __forceinline__ unsigned narrow_pair(float a, float b) {
#ifdef __CUDA_ARCH__
  unsigned both;
  if constexpr (D == Dtype::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
  return both;
#else
  return static_cast<unsigned>(narrow<D>(a)) | static_cast<unsigned>(narrow<D>(b)) << 16;
#endif
}
template <Dtype D>
__device__ __forceinline__ void narrow_two(float a, float b, typename Word<D>::Type* to) {
  if constexpr (D == Dtype::f32) {
    to[0] = narrow<D>(a);
    to[1] = narrow<D>(b);
  } else {
    const unsigned both = narrow_pair<D>(a, b);
    to[0] = static_cast<unsigned short>(both);
    to[1] = static_cast<unsigned short>(both >> 16);
  }
}

template <Dtype D>
__device__ __forceinline__ float4 widen_four(typename Word<D>::Four w) {
  if constexpr (D == Dtype::f32) {
    return make_float4(__uint_as_float(w.x), __uint_as_float(w.y), __uint_as_float(w.z),
                       __uint_as_float(w.w));
  } else {
    if constexpr (D == Dtype::bf16)  // in place, which takes no conversion
      return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u),
                         __uint_as_float(w.y << 16), __uint_as_float(w.y & 0xffff0000u));
    using Bits = typename Word<D>::Type;
    return make_float4(widen<D>(static_cast<Bits>(w.x)), widen<D>(static_cast<Bits>(w.x >> 16)),
                       widen<D>(static_cast<Bits>(w.y)), widen<D>(static_cast<Bits>(w.y >> 16)));
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
    case Dtype::bf16:
      return static_cast<S>(widen<Dtype::bf16>(static_cast<const unsigned short*>(data)[i]));
    default:
      return static_cast<S>(widen<Dtype::f16>(static_cast<const unsigned short*>(data)[i]));
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
    case Dtype::bf16:
      static_cast<unsigned short*>(data)[i] = narrow<Dtype::bf16>(static_cast<float>(value));
      break;
    default:
      static_cast<unsigned short*>(data)[i] = narrow<Dtype::f16>(static_cast<float>(value));
  }
}

constexpr int kIdentity = 0, kSwish = 1, kElu = 2;

// 2^x and 1/x to two units in the last place, subnormal numbers taken for zero: one instruction each.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}
__device__ __forceinline__ float sigmoid(float u) {
  return reciprocal(1.f + power_of_two(u * -1.442695041f));
}
// swish(u) * kSwishUnit of u * kSwishUnit, which is what the exponential needs.
constexpr float kSwishUnit = -1.442695041f;
__device__ __forceinline__ float swish_of_units(float v) { return v * reciprocal(1.f + power_of_two(v)); }
// 1/x of moderate x by Newton's method: the compiler's division is a call, around which registers are
// spilled.
__device__ __forceinline__ double reciprocal(double x) {
  double r = reciprocal(static_cast<float>(x));
  r = r * (2.0 - x * r);
  return r * (2.0 - x * r);
}
__device__ __forceinline__ double sigmoid(double u) {
  const double d = 1.0 + exp(-u);
  return d > 1e37 ? exp(u) : reciprocal(d);
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
__device__ __forceinline__ S activate(S u, int activation, S& derivative) {
  derivative = S(1);
  if (activation == kSwish) {
    const S s = sigmoid(u);
    derivative = s + s * (u - u * s);
    return u * s;
  }
  if (activation == kElu && !(u > S(0))) {
    const S e = exp_minus_one(u);
    derivative = e + S(1);
    return e;
  }
  return u;
}

// The same for N values at once: one branch for all.
template <int N>
__device__ __forceinline__ void activate_all(float* u, int activation) {
  if (activation == kSwish) {
    NVAE_REGION(0);
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = u[i] * sigmoid(u[i]);
  } else if (activation == kElu) {
    NVAE_REGION(0);
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = u[i] > 0.f ? u[i] : exp_minus_one(u[i]);
  }
}
template <int N>
__device__ __forceinline__ void activate_all(float* u, float* derivative, int activation) {
  if (activation == kSwish) {
    NVAE_REGION(0);
#pragma unroll
    for (int i = 0; i < N; ++i) u[i] = activate(u[i], kSwish, derivative[i]);
  } else if (activation == kElu) {
    NVAE_REGION(0);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float e = exp_minus_one(u[i]);
      derivative[i] = u[i] > 0.f ? 1.f : e + 1.f;
      u[i] = u[i] > 0.f ? u[i] : e;
    }
  } else {
    NVAE_REGION(0);
#pragma unroll
    for (int i = 0; i < N; ++i) derivative[i] = 1.f;
  }
}

// Copies 8 or 16 bytes from global to shared memory without registers. wait_copies() waits for the copies of
// the calling thread; other threads may read them after a barrier that follows it.
template <class Four>
__device__ __forceinline__ void copy_async(Four* shared, const void* global) {
#ifdef __CUDA_ARCH__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (sizeof(Four) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
#elif defined(NVAE_CUDA_SHIM)
  shim_copy_async(shared, global, sizeof(Four));
#endif
}
__device__ __forceinline__ void wait_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#elif defined(NVAE_CUDA_SHIM)
  shim_wait_copies();
#endif
}

}  // namespace cuda
}  // namespace nvae
