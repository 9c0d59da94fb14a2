// The two kernels whose registers the tests count: 5x5 in bfloat16.
#include "cuda/depthwise_conv2d_backward.cuh"

namespace nvae {
namespace cuda {
template __global__ void depthwise_forward_kernel<Dtype::bf16, 5, 1, 5, 1, 0>(const ForwardLaunch);
template __global__ void depthwise_backward_kernel<Dtype::bf16, 5, 1, 1, 5, 0>(const BackwardLaunch);
}  // namespace cuda
}  // namespace nvae
