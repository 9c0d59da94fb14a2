// The GPU kernels of depthwise_conv2d on the CPU, for ctypes.
#include <cstdio>

#include "cuda/depthwise_conv2d_f32.cu"
#ifndef SHIM_FLOAT_ONLY  // which is faster to compile
#include "cuda/depthwise_conv2d_bf16.cu"
#include "cuda/depthwise_conv2d_f16.cu"
#else
namespace nvae {
namespace cuda {
template <>
cudaError_t launch_forward<Dtype::bf16>(const DepthwiseForward&, void*) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_forward<Dtype::f16>(const DepthwiseForward&, void*) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_backward<Dtype::bf16>(const DepthwiseBackward&, void*) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_backward<Dtype::f16>(const DepthwiseBackward&, void*) {
  return cudaErrorInvalidValue;
}
}  // namespace cuda
}  // namespace nvae
#endif
// After the specialisations that it calls.
#include "cuda/depthwise_conv2d.cu"

using namespace nvae::cuda;

extern "C" {
int shim_is_fast(const DepthwiseConv2d* p) { return depthwise_is_fast(*p); }
int64_t shim_forward_workspace(const DepthwiseForward* p) { return depthwise_workspace(*p); }
int64_t shim_backward_workspace(const DepthwiseBackward* p) { return depthwise_workspace(*p); }
int64_t shim_forward_shared_memory(const DepthwiseForward* p) { return depthwise_shared_memory(*p); }
int64_t shim_backward_shared_memory(const DepthwiseBackward* p) { return depthwise_shared_memory(*p); }
void shim_forward_error(int error, const DepthwiseForward* p, char* text, size_t size) {
  std::snprintf(text, size, "%s", depthwise_error(error, *p).c_str());
}
int shim_forward(const DepthwiseForward* p) { return depthwise_forward(*p, nullptr); }
int shim_backward(const DepthwiseBackward* p) { return depthwise_backward(*p, nullptr); }
}
