// Stands in for CUDA's header where kernels are compiled for the CPU and run there by the tests: a fiber per
// thread, so that barriers really let threads overtake each other. Only what csrc/cuda uses.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
void __syncthreads();

template <class To, class From>
inline To shim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return shim_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return shim_bits<unsigned>(value); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaErrorInvalidConfiguration = 9, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97;
constexpr int cudaSuccess = 0, cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
constexpr int kShimMostShared = 227 * 1024;  // of a block of sm_90
extern int shim_shared_limit;                // of the device that is imitated
inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return 1;
  *value = shim_shared_limit;
  return cudaSuccess;
}
inline int cudaFuncSetAttribute(const void*, int, int bytes) {
  return bytes > shim_shared_limit ? 1 : cudaSuccess;
}
inline int cudaSetDevice(int) { return cudaSuccess; }
int cudaGetLastError();
inline const char* cudaGetErrorString(int) { return "an error of the stand-in"; }
inline int cudaMemsetAsync(void* data, int value, size_t bytes, void*) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

// How often threads enter each marked region of the kernels, and how many copies of it a GPU's compiler makes.
struct ShimRegion {
  const char* file;
  int line, copies;
  long long count = 0;
  ShimRegion* next;
  ShimRegion(const char* file, int line, int copies);
};
#define NVAE_REGION(copies)                                      \
  do {                                                           \
    static ShimRegion shim_region(__FILE__, __LINE__, (copies)); \
    ++shim_region.count;                                         \
  } while (0)

void shim_launch(dim3 grid, unsigned threads, size_t shared, const std::function<void()>& kernel);
#define NVAE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), shim_launch((grid), (block), (shared), [&] { kernel(__VA_ARGS__); }))
