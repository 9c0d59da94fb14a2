// The host's side of the stand-in: the machine's GPUs, their limits, errors.
#include <map>
#include <utility>

#include "checker.h"

namespace shim {

cudaError_t last_error = cudaSuccess;

namespace {

struct Device {
  int major, minor, multiprocessors;
  int shared_of_block, shared_of_multiprocessor;  // bytes; of a block: at most, when asked for
  int threads_of_multiprocessor, blocks_of_multiprocessor;
};
constexpr Device kDevices[] = {
    {9, 0, 132, 227 * 1024, 228 * 1024, 2048, 32},  // H200
    {8, 0, 108, 163 * 1024, 164 * 1024, 2048, 32},  // A100
    {8, 9, 142, 99 * 1024, 100 * 1024, 1536, 24},   // L40
    {7, 5, 40, 64 * 1024, 64 * 1024, 1024, 16},     // T4
};
constexpr int kCount = sizeof kDevices / sizeof *kDevices, kReserved = 1024;
constexpr int kUnasked = 48 * 1024;  // what a kernel may have without cudaFuncSetAttribute
int current;
std::map<std::pair<int, const void*>, size_t> allowed;

cudaError_t fail(cudaError_t error) { return last_error = error; }

cudaError_t too_much_shared(const void* kernel, size_t asked, size_t most) {
  names_kernel(kernel);
  report("too much shared memory",
         "asks for " + std::to_string(asked) + " of " + std::to_string(most) + " bytes");
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t allows_launch(const void* kernel, dim3 grid, dim3 block, size_t shared) {
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || block.z > 64 || grid.x == 0 || grid.x > 0x7fffffffu ||
      grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const auto found = allowed.find({current, kernel});
  const size_t most = found == allowed.end() ? kUnasked : found->second;
  return shared > most ? too_much_shared(kernel, shared, most) : cudaSuccess;
}

}  // namespace shim

using namespace shim;

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kCount;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kCount) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kCount) return fail(cudaErrorInvalidDevice);
  const Device& d = kDevices[device];
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = kMostThreads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = kUnasked;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = d.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = d.threads_of_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = d.major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = d.minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = d.shared_of_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = d.shared_of_block;
      return cudaSuccess;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = d.blocks_of_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReserved;
      return cudaSuccess;
  }
  return fail(cudaErrorInvalidValue);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // a hint
  const int most = kDevices[current].shared_of_block;
  if (value < 0) return fail(cudaErrorInvalidValue);
  if (value > most) return fail(too_much_shared(kernel, value, most));
  allowed[{current, kernel}] = static_cast<size_t>(value);
  return cudaSuccess;
}

cudaError_t shim_occupancy(int* blocks, int threads, size_t shared) {
  const Device& d = kDevices[current];
  if (threads <= 0 || threads > static_cast<int>(kMostThreads)) return fail(cudaErrorInvalidValue);
  const int rounded = (threads + warpSize - 1) / warpSize * warpSize;
  const int by_threads = d.threads_of_multiprocessor / rounded;
  const int by_shared = d.shared_of_multiprocessor / static_cast<int>(shared + kReserved);
  *blocks = std::min({by_threads, by_shared, d.blocks_of_multiprocessor});
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  host_writes(data, bytes);
  if (!dry) std::memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "an error of the stand-in";
}
