// The GPU kernels of depthwise_conv2d as plain functions of pointers: free of PyTorch's and of CUDA's
// headers. Maps are dense (NHWC or NCHW); per-channel vectors are float, or double for f64 maps.
#pragma once
#include <cstdint>
#include <string>

#include "../types.h"

namespace nvae {
namespace cuda {

struct DepthwiseConv2d {
  int64_t batch, channels, height, width;  // of x
  int64_t kernel;
  int64_t stride, dilation, upsample;
  int64_t activation;  // 0 none, 1 swish, 2 elu
  int64_t channels_last;
  int64_t device;
  int64_t masked;  // 1: only the taps whose bit is set in `live` exist (kernel <= 31)
  uint32_t live[32];
  Dtype dtype, weight_dtype;
  const void* x;
  const void* weight;
  const void* scale;  // null, or with shift
  const void* shift;

  constexpr bool tap_is_live(int64_t tap) const { return !masked || (live[tap / 32] >> (tap % 32) & 1); }
  constexpr int64_t out_height() const { return (height * upsample + stride - 1) >> (stride == 2); }
  constexpr int64_t out_width() const { return (width * upsample + stride - 1) >> (stride == 2); }
};

struct DepthwiseForward : DepthwiseConv2d {
  void* y;
  void* mean;  // null without statistics
  void* m2;
  void* workspace;
};

struct DepthwiseBackward : DepthwiseConv2d {
  const void* grad;
  const void* out;    // null, or with beta
  const void* alpha;  // null: dy = grad
  const void* beta;
  const void* gamma;
  const void* pivot;  // null: 0
  void* grad_x;       // the results that are wanted; null otherwise
  void* grad_weight;
  void* grad_scale;
  void* grad_shift;
  void* workspace;
};

// Whether the kernels in registers know this problem; others take the general ones, which are slow.
bool depthwise_is_fast(const DepthwiseConv2d& p);
// Bytes of workspace.
int64_t depthwise_workspace(const DepthwiseForward& p);
int64_t depthwise_workspace(const DepthwiseBackward& p);
// Bytes of shared memory of a block; 0 for the general kernels, which need next to none.
int64_t depthwise_shared_memory(const DepthwiseForward& p);
int64_t depthwise_shared_memory(const DepthwiseBackward& p);
// 0, or CUDA's error.
int depthwise_forward(const DepthwiseForward& p, void* stream);
int depthwise_backward(const DepthwiseBackward& p, void* stream);
// What an error of these says; where shared memory does not suffice, how much is needed and what the device
// has.
std::string depthwise_error(int error, const DepthwiseForward& p);
std::string depthwise_error(int error, const DepthwiseBackward& p);

}  // namespace cuda
}  // namespace nvae
