// The kernels of depthwise_conv2d for bfloat16 and float16.
#include "depthwise_conv2d_launch.cuh"

namespace nvae {
namespace cuda {

template <>
cudaError_t launch_forward<2>(const DepthwiseForward& p, void* stream) {
  return start_forward<2>(p, stream);
}
template <>
cudaError_t launch_backward<2>(const DepthwiseBackward& p, void* stream) {
  return start_backward<2>(p, stream);
}

}  // namespace cuda
}  // namespace nvae
