// Kernels that do one thing wrong each, and some that do all right, to test the stand-in itself.
#include "cuda_runtime.h"

namespace nvae {
namespace cuda {

enum Toy {
  kBarriers,
  kShuffles,
  kCopyGroups,
  kNoBarrier,
  kWriteAfterRead,
  kWriteTwice,
  kBlocksWriteTwice,
  kNoWarpBarrier,
  kMisalignedShared,
  kMisalignedGlobal,
  kMisalignedCopy,
  kPastShared,
  kBeforeShared,
  kPastInput,
  kBeforeInput,
  kPastResult,
  kWriteInput,
  kUninitialised,
  kUninitialisedResult,
  kCopyNotWaitedFor,
  kCopyOfTooYoungGroup,
  kCopyOfOthers,
  kCopyOverRead,
  kThreadEnds,
  kOtherBarrier,
  kLaneMissing,
};

// 64 threads; in [64]; out [64] for each block; 512 bytes of shared memory; everything aligned to 16 bytes.
__global__ void toy(int kind, const float* in, float* out) {
  extern __shared__ uint4 nvae_shared[];
  float* shared = reinterpret_cast<float*>(nvae_shared);
  const int i = static_cast<int>(threadIdx.x), other = (i + 32) % 64, lane = i % warpSize;
  float& result = out[blockIdx.x * 64 + i];
  switch (kind) {
    case kBarriers: {  // in[(i + 32) % 64 ^ 1], by way of a copy, a barrier and one of the warp
      if (i < 16) shim_copy_async(shared + 4 * i, in + 4 * i);
      shim_wait_copies();
      __syncthreads();
      const float v = shared[other];
      __syncthreads();
      shared[i] = v;
      __syncwarp();
      result = shared[i ^ 1];
      break;
    }
    case kShuffles: {
      float sum = __ldg(in + i);
      for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
      const int third = __shfl_sync(0xffffffffu, lane, 3, 8), next = __shfl_down_sync(0xffffffffu, lane, 1u);
      result = sum + 1e3f * static_cast<float>(third) + 1e5f * static_cast<float>(next);
      break;
    }
    case kCopyGroups:
    case kCopyOfTooYoungGroup:
      shim_copy_async(shared + i, in + i, 4);
      shim_commit_copies();
      shim_copy_async(shared + 64 + i, in + i, 4, 0);
      shim_commit_copies();
      shim_wait_copies(1);
      result = shared[kind == kCopyGroups ? i : 64 + i];
      shim_wait_copies(0);
      result += shared[64 + i];  // zeros
      break;
    case kNoBarrier:
      shared[i] = in[i];
      result = shared[other];
      break;
    case kWriteAfterRead:
      shared[i] = in[i];
      __syncthreads();
      result = shared[other];
      shared[i] = 0;
      break;
    case kWriteTwice:
      shared[i / 2] = in[i];
      break;
    case kBlocksWriteTwice:
      out[i] = in[i];
      break;
    case kNoWarpBarrier:
      shared[i] = in[i];
      result = shared[i ^ 1];
      break;
    case kMisalignedShared:
      *reinterpret_cast<float2*>(shared + 1) = make_float2(1, 2);
      break;
    case kMisalignedGlobal:
      result = reinterpret_cast<const float4*>(in + 2)->x;
      break;
    case kMisalignedCopy:
      shim_copy_async(shared, in + 2);
      break;
    case kPastShared:
      shared[i + 65] = in[i];
      break;
    case kBeforeShared:
      shared[i - 1] = in[i];
      break;
    case kPastInput:
      result = in[i + 1];
      break;
    case kBeforeInput:
      result = in[i - 1];
      break;
    case kPastResult:
      (&result)[1] = in[i];
      break;
    case kWriteInput:
      const_cast<float*>(in)[i] = 0;
      break;
    case kUninitialised:
      result = shared[i];
      break;
    case kUninitialisedResult:
      result += 1;
      break;
    case kCopyNotWaitedFor:
      shim_copy_async(shared + i, in + i, 4);
      result = shared[i];
      break;
    case kCopyOfOthers:
      shim_copy_async(shared + i, in + i, 4);
      shim_wait_copies();
      result = shared[other];
      break;
    case kCopyOverRead:
      shared[i] = in[i];
      __syncthreads();
      result = shared[other];
      shim_copy_async(shared + i, in + i, 4);
      shim_wait_copies();
      break;
    case kThreadEnds:
      if (i == 5) return;
      __syncthreads();
      break;
    case kOtherBarrier:
      if (i == 5)
        __syncthreads();
      else
        __syncthreads();
      break;
    case kLaneMissing:
      if (lane != 5) result = __shfl_xor_sync(0xffffffffu, in[i], 1);
      break;
  }
}

}  // namespace cuda
}  // namespace nvae

extern "C" {
int toy_launch(int kind, int blocks, int shared, int device, const float* in, float* out) {
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(nvae::cuda::toy, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  NVAE_LAUNCH(nvae::cuda::toy, blocks, 64, shared, nullptr, kind, in, out);
  return cudaGetLastError();
}
// Without having asked for more than 48 KB.
int toy_launch_unasked(int shared) {
  const auto other = [](float* out) { *out = 0; };
  float* out = nullptr;
  NVAE_LAUNCH(static_cast<void (*)(float*)>(other), 1, 64, shared, nullptr, out);
  return cudaGetLastError();
}
int toy_attribute(int attribute, int device) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), device) ? -1 : value;
}
int toy_occupancy(int device, int threads, int shared) {
  int blocks = 0;
  cudaSetDevice(device);
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, nvae::cuda::toy, threads, shared) ? -1
                                                                                                  : blocks;
}
}
