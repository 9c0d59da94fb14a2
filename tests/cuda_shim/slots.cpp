// The two kernels whose issue slots the tests count, for ctypes: 5x5 in bfloat16.
#include "cuda/depthwise_conv2d_launch.cuh"

using namespace nvae;
using namespace nvae::cuda;

namespace {
using ForwardFive = ForwardKind<5, 1, 5, 1>;
using BackwardFive = BackwardKind<5, 1, 1, 5>;

template <class Shape, class Problem>
int64_t workspace(const Problem& p, int64_t sums) {
  const Walk w = walk_of<Shape>(p);
  return w.views * w.job_blocks * sums * p.channels * static_cast<int64_t>(sizeof(float));
}
}  // namespace

extern "C" {
int64_t shim_forward_workspace(const DepthwiseForward* p) { return workspace<ForwardFive::Shape>(*p, 3); }
int64_t shim_backward_workspace(const DepthwiseBackward* p) { return workspace<BackwardFive::Shape>(*p, 27); }
int shim_forward(const DepthwiseForward* p) {
  return start<ForwardFive::Shape>(depthwise_forward_kernel<Dtype::bf16, 5, 1, 5, 1, 0>, *p, nullptr);
}
int shim_backward(const DepthwiseBackward* p) {
  return start<BackwardFive::Shape>(depthwise_backward_kernel<Dtype::bf16, 5, 1, 1, 5, 0>, *p, nullptr);
}
}
