// The kernels of depthwise_conv2d for float16.
#include "depthwise_conv2d_launch.cuh"

namespace nvae {
namespace cuda {

template <>
cudaError_t launch_forward<Dtype::f16>(const DepthwiseForward& p, void* stream) {
  return start_forward<Dtype::f16>(p, stream);
}
template <>
cudaError_t launch_backward<Dtype::f16>(const DepthwiseBackward& p, void* stream) {
  return start_backward<Dtype::f16>(p, stream);
}

}  // namespace cuda
}  // namespace nvae
