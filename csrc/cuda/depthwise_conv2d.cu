// Entry points of depthwise_conv2d on the GPU: the fast kernels where they apply, the general ones elsewhere,
// and the second stage of the sums.
#include "depthwise_conv2d_finish.cuh"
#include "depthwise_conv2d_general.cuh"
#include "depthwise_conv2d_launch.cuh"

namespace nvae {
namespace cuda {

namespace {

// Ranges of pixels that share a channel in the general kernels.
int general_chunks(const DepthwiseConv2d& p) {
  const int64_t pixels = p.batch * p.out_height() * p.out_width();
  const int64_t most = ceil_divide(pixels, 4 * kGeneralThreads), wanted = ceil_divide(kBlocks, p.channels);
  const int64_t chunks = most < wanted ? most : wanted;
  return static_cast<int>(chunks < 1 ? 1 : chunks);
}

// What visit(Shape, Walk) says of the fast kernel that runs.
template <class Visit>
int64_t of_launch(const DepthwiseForward& p, Visit visit) {
  return forward_kind(p, [&](auto kind) {
    using Shape = typename decltype(kind)::Shape;
    return static_cast<int64_t>(visit(Shape{}, walk_of<Shape>(p)));
  });
}
template <class Visit>
int64_t of_launch(const DepthwiseBackward& p, Visit visit) {
  return backward_kind(p, [&](auto kind) {
    using Shape = typename decltype(kind)::Shape;
    return static_cast<int64_t>(visit(Shape{}, walk_of<Shape>(p)));
  });
}

template <class Problem>
int64_t partials(const Problem& p) {
  if (!depthwise_is_fast(p)) return general_chunks(p);
  return of_launch(p, [](auto, const Walk& w) { return int64_t{w.views} * w.job_blocks; });
}
template <class Problem>
int64_t shared_memory(const Problem& p) {
  if (!depthwise_is_fast(p)) return 0;
  return of_launch(p, [&](auto shape, const Walk& w) { return shape.shared(w, p); });
}
int64_t backward_taps(const DepthwiseConv2d& p) {
  return p.kernel + (depthwise_is_fast(p) && is_folded(p) ? 1 : 0);
}
int64_t bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }  // of what sums are kept in

cudaError_t forward_of(const DepthwiseForward& p, void* stream) {
  return p.dtype == Dtype::f32    ? launch_forward<Dtype::f32>(p, stream)
         : p.dtype == Dtype::bf16 ? launch_forward<Dtype::bf16>(p, stream)
                                  : launch_forward<Dtype::f16>(p, stream);
}
cudaError_t backward_of(const DepthwiseBackward& p, void* stream) {
  return p.dtype == Dtype::f32    ? launch_backward<Dtype::f32>(p, stream)
         : p.dtype == Dtype::bf16 ? launch_backward<Dtype::bf16>(p, stream)
                                  : launch_backward<Dtype::f16>(p, stream);
}

template <class S>
cudaError_t finish(const DepthwiseForward& p, void* stream) {
  const unsigned groups = static_cast<unsigned>(ceil_divide(p.channels, kLanes));
  NVAE_LAUNCH(depthwise_finish_stats<S>, groups, 32 * kStrands, 0, stream, static_cast<const S*>(p.workspace),
              static_cast<int>(partials(p)), p.channels, static_cast<S*>(p.mean), static_cast<S*>(p.m2));
  return cudaGetLastError();
}
template <class S>
cudaError_t finish(const DepthwiseBackward& p, void* stream) {
  FinishGradients a = {};
  a.partial = p.workspace;
  a.count = static_cast<int>(partials(p));
  a.kernel = static_cast<int>(p.kernel);
  a.masked = p.masked != 0;
  for (int i = 0; i < 32; ++i) a.live[i] = p.live[i];
  a.taps = static_cast<int>(backward_taps(p));
  a.channels = p.channels;
  a.weight = p.grad_weight;
  a.weight_dtype = p.weight_dtype;
  a.shift = p.grad_shift;
  a.scale = p.grad_scale;
  const unsigned groups = static_cast<unsigned>(ceil_divide(p.channels, kLanes));
  const dim3 grid(groups, static_cast<unsigned>(p.kernel * p.kernel + (p.grad_scale ? 2 : 0)));
  NVAE_LAUNCH(depthwise_finish_gradients<S>, grid, 32 * kStrands, 0, stream, a);
  return cudaGetLastError();
}

template <class S>
cudaError_t general(const DepthwiseForward& p, void* stream) {
  const int chunks = general_chunks(p);
  NVAE_LAUNCH(depthwise_general_forward<S>, static_cast<unsigned>(p.channels * chunks), kGeneralThreads, 0,
              stream, p, chunks);
  return cudaGetLastError();
}
template <class S>
cudaError_t general(const DepthwiseBackward& p, void* stream) {
  const int chunks = general_chunks(p);
  NVAE_LAUNCH(depthwise_general_backward<S>, static_cast<unsigned>(p.channels * chunks), kGeneralThreads, 0,
              stream, p, chunks);
  return cudaGetLastError();
}

template <class Problem>
std::string describe(int error, const Problem& p) {
  if (error == cudaErrorNoKernelImageForDevice) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, static_cast<int>(p.device));
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, static_cast<int>(p.device));
    return "this binary holds no code for GPU " + std::to_string(p.device) + ", of compute capability " +
           std::to_string(major) + "." + std::to_string(minor) +
           "; nvae_fast.depthwise_conv2d runs in PyTorch there";
  }
  const int64_t needed = shared_memory(p);
  int64_t limit = 0;
  if (shared_memory_limit(p.device, limit) == cudaSuccess && needed > limit)
    return "a block needs " + std::to_string(needed) + " bytes of shared memory, this GPU has " +
           std::to_string(limit);
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace

bool depthwise_is_fast(const DepthwiseConv2d& p) {
  const int64_t k = p.kernel;
  // Rows and columns, and the bytes between them in a view, are counted in 32 bits; so are those of an image.
  const int64_t most = int64_t{1} << 24, row = p.width * p.upsample * p.channels;
  return p.channels_last && p.dtype != Dtype::f64 && (k == 3 || k == 5 || k == 7 || k == 11) &&
         p.height < most && p.width < most && row < int64_t{1} << 28 &&
         row * p.upsample * p.height < int64_t{1} << 30;
}

int64_t depthwise_workspace(const DepthwiseForward& p) {
  return p.mean ? partials(p) * 3 * p.channels * bytes(p.dtype) : 0;
}
int64_t depthwise_workspace(const DepthwiseBackward& p) {
  const int64_t taps = backward_taps(p);
  return p.grad_weight || p.grad_scale ? partials(p) * (taps * taps + 2) * p.channels * bytes(p.dtype) : 0;
}

int depthwise_forward(const DepthwiseForward& p, void* stream) {
  if (p.channels == 0) return cudaSuccess;
  cudaError_t error = cudaSetDevice(static_cast<int>(p.device));
  if (error != cudaSuccess) return error;
  if (depthwise_is_fast(p))
    error = forward_of(p, stream);
  else
    error = p.dtype == Dtype::f64 ? general<double>(p, stream) : general<float>(p, stream);
  if (error != cudaSuccess || !p.mean) return error;
  return p.dtype == Dtype::f64 ? finish<double>(p, stream) : finish<float>(p, stream);
}

int depthwise_backward(const DepthwiseBackward& p, void* stream) {
  if (p.channels == 0) return cudaSuccess;
  cudaError_t error = cudaSetDevice(static_cast<int>(p.device));
  if (error != cudaSuccess) return error;
  if (depthwise_is_fast(p)) {
    if (p.grad_x && p.dilation == 2 && p.stride == 2) {  // three pixels of four are never seen
      const size_t size = p.batch * p.channels * p.height * p.width * (p.dtype == Dtype::f32 ? 4 : 2);
      error = cudaMemsetAsync(p.grad_x, 0, size, static_cast<cudaStream_t>(stream));
      if (error != cudaSuccess) return error;
    }
    error = backward_of(p, stream);
  } else {
    error = p.dtype == Dtype::f64 ? general<double>(p, stream) : general<float>(p, stream);
  }
  if (error != cudaSuccess || !(p.grad_weight || p.grad_scale)) return error;
  return p.dtype == Dtype::f64 ? finish<double>(p, stream) : finish<float>(p, stream);
}

int64_t depthwise_shared_memory(const DepthwiseForward& p) { return shared_memory(p); }
int64_t depthwise_shared_memory(const DepthwiseBackward& p) { return shared_memory(p); }

std::string depthwise_error(int error, const DepthwiseForward& p) { return describe(error, p); }
std::string depthwise_error(int error, const DepthwiseBackward& p) { return describe(error, p); }

}  // namespace cuda
}  // namespace nvae
