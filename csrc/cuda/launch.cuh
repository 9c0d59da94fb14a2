// Starts a kernel. The CPU stand-in of the tests (tests/cuda_shim) defines NVAE_LAUNCH before this file is
// read.
#pragma once
#include <cuda_runtime.h>

namespace nvae {

// Blocks that need more than 48 KB of shared memory must say so before.
template <class Kernel>
inline cudaError_t allow_shared(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace nvae

#ifndef NVAE_LAUNCH
#define NVAE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<(grid), (block), (shared), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif
