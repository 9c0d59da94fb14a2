// Replaces CUDA's header where kernels are compiled for the CPU and run there by the tests. See
// __init__.py for what the stand-in checks. Only what csrc/cuda uses or may soon use.
#pragma once
#define NVAE_CUDA_SHIM
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

// Vector types, aligned as CUDA's are.
#define SHIM_VECTORS(T, NAME, TWO, FOUR)                     \
  struct alignas(TWO) NAME##2 { T x, y; };                   \
  struct alignas(FOUR) NAME##4 { T x, y, z, w; };            \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; } \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
SHIM_VECTORS(unsigned short, ushort, 4, 8)
SHIM_VECTORS(int, int, 8, 16)
SHIM_VECTORS(unsigned, uint, 8, 16)
SHIM_VECTORS(float, float, 8, 16)
#undef SHIM_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// Barriers are known by their place in the source, so that tests can leave one out.
void shim_barrier(const char* file, int line);
#define __syncthreads() shim_barrier(__FILE__, __LINE__)

// The lanes of `mask` meet; each leaves a value and gets that of `lane`.
uint64_t shim_exchange(unsigned mask, uint64_t value, int lane);
inline void __syncwarp(unsigned mask = 0xffffffffu) { shim_exchange(mask, 0, 0); }

template <class To, class From>
inline To shim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a change of type, not of size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int shim_lane() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize);
}
template <class T>
inline T shim_shuffle(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move at most 64 bits");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shim_exchange(mask, bits, lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return shim_shuffle(mask, value, (shim_lane() & ~(width - 1)) + (lane & (width - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
  const int from = shim_lane() ^ bits;
  return shim_shuffle(mask, value, from / width <= shim_lane() / width ? from : shim_lane());
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = warpSize) {
  const int from = shim_lane() + static_cast<int>(by);
  return shim_shuffle(mask, value, from / width == shim_lane() / width ? from : shim_lane());
}

template <class T>
inline T __ldg(const T* from) {
  return *from;
}
using std::max;
using std::min;
inline float __uint_as_float(unsigned bits) { return shim_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return shim_bits<unsigned>(value); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

// cp.async: `bytes` (4, 8 or 16) to shared memory, those from `used` on as zeros. The data arrives when the
// thread that asked for it waits: for all its copies, or for all but those of its last `groups` groups.
void shim_copy_async(void* shared, const void* global, int bytes = 16, int used = -1);
void shim_commit_copies();
void shim_wait_copies(int groups = -1);

// Whether the kernels, a copy that a test changed on purpose, are to take their n-th change.
bool shim_mutated(int n);

// How often threads enter each marked region of the kernels, and how many copies of it a GPU's compiler
// makes.
struct ShimRegion {
  const char* file;
  int line, copies;
  long long count;
  bool known;
  ShimRegion* next;
};
void shim_enter(ShimRegion& region);
#define NVAE_REGION(copies)                                                            \
  do {                                                                                 \
    static ShimRegion shim_region = {__FILE__, __LINE__, (copies), 0, false, nullptr}; \
    shim_enter(shim_region);                                                           \
  } while (0)

// The machine has a GPU for each limit of shared memory of a block: 0 an H200 (227 KB), 1 an A100 (163 KB), 2
// an L40 (99 KB, like RTX 30, 40 and 50, A10 and L4), 3 a T4 (64 KB).
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};
using cudaStream_t = void*;
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream = nullptr);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
// By threads and dynamic shared memory; the stand-in knows nothing of registers.
cudaError_t shim_occupancy(int* blocks, int threads, size_t shared);
template <class Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class Kernel>
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int threads,
                                                                 size_t shared) {
  return shim_occupancy(blocks, threads, shared);
}

// Arguments are worked out once, by the host. `call` runs the kernel in one thread, with those of
// `arguments`.
void shim_launch(const void* kernel, dim3 grid, dim3 block, size_t shared,
                 void (*call)(const void* arguments), const void* arguments);
template <class... P, class... A>
void shim_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... given) {
  using Arguments = std::tuple<void (*)(P...), P...>;
  const Arguments arguments(kernel, static_cast<P>(given)...);
  const auto call = [](const void* from) {
    std::apply([](auto* f, const auto&... a) { f(a...); }, *static_cast<const Arguments*>(from));
  };
  shim_launch(reinterpret_cast<const void*>(kernel), grid, block, shared, call, &arguments);
}
#define NVAE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), shim_launch((kernel), (grid), (block), (shared), __VA_ARGS__))
