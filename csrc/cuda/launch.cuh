// Starts a kernel. The CPU stand-in of the tests (tests/cuda_shim) defines NVAE_LAUNCH before this file is
// read.
#pragma once
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace nvae {

// The most shared memory that a block may have on this device. The driver is asked once per device.
inline cudaError_t shared_memory_limit(int64_t device, int64_t& bytes) {
  constexpr int64_t kDevices = 64;
  static std::atomic<int> known[kDevices];
  int found = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (found == 0) {
    const cudaError_t error =
        cudaDeviceGetAttribute(&found, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(device));
    if (error != cudaSuccess) return error;
    if (device < kDevices) known[device].store(found, std::memory_order_relaxed);
  }
  bytes = found;
  return cudaSuccess;
}

// More than 48 KB of shared memory per block must be requested before the launch.
template <class Kernel>
inline cudaError_t allow_shared(Kernel* kernel, size_t bytes, int64_t device) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  int64_t limit = 0;
  const cudaError_t error = shared_memory_limit(device, limit);
  if (error != cudaSuccess) return error;
  if (static_cast<int64_t>(bytes) > limit) return cudaErrorInvalidConfiguration;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace nvae

#ifndef NVAE_LAUNCH
#define NVAE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif
