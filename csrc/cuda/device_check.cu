// Does this binary hold code for the current GPU? Asked of the runtime, which knows what it would load.
#include "device_check.h"

#include <cuda_runtime.h>

#include <cstdio>

namespace {

__global__ void nothing() {}

}  // namespace

extern "C" void nvae_device_check(char* text, size_t size) {
  int device = 0, major = 0, minor = 0;
  cudaFuncAttributes found = {};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) {
    std::snprintf(text, size, "no usable GPU: %s", cudaGetErrorString(error));
  } else if ((error = cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(nothing))) != cudaSuccess) {
    std::snprintf(text, size, "no code for sm_%d%d: %s", major, minor, cudaGetErrorString(error));
  } else {
    std::snprintf(text, size, "sm_%d%d runs code for sm_%d (from PTX %d)", major, minor, found.binaryVersion,
                  found.ptxVersion);
  }
  cudaGetLastError();  // leave no error behind for PyTorch to find
}
