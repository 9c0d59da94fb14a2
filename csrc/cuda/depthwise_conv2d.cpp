// nvae_fast::depthwise_conv2d and its backward on the GPU; the kernels are in depthwise_conv2d*.cu.
#include "depthwise_conv2d.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../depthwise_conv2d_checks.h"
#include "../memory.h"

namespace nvae {

namespace {

// PyTorch's current stream. Looked up when first used, so that the binary also loads where PyTorch has no
// CUDA.
void* current_stream(int32_t device) {
  using Accessor = AOTITorchError (*)(int32_t, void**);
  static const Accessor accessor = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Accessor>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  NVAE_CHECK(accessor != nullptr, "depthwise_conv2d: this PyTorch was built without CUDA");
  void* stream = nullptr;
  NVAE_CHECK(accessor(device, &stream) == 0, "depthwise_conv2d: PyTorch has no current CUDA stream");
  return stream;
}

// The kernel of this dispatch key is called as soon as one argument is on a GPU.
int32_t gpu_of(const char* op, const Tensor& x) {
  NVAE_CHECK(x.is_cuda(), op, ": x must be on the GPU like the other arguments, got ", device_text(x));
  return x.get_device_index();
}
void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  NVAE_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name, " must be on ",
             device_text(like), " like x, got ", device_text(t));
}

Tensor dense(const Tensor& t, bool channels_last, std::vector<Tensor>& keep_alive) {
  keep_alive.push_back(as_contiguous(t, channels_last));
  return keep_alive.back();
}

// How a call is computed: its problem, and the tensors that must live until the launch.
template <class Problem>
struct Call {
  const char* op;
  Problem p = {};
  std::vector<Tensor> keep_alive;
  ScalarType type, acc_type;  // of maps; of sums and per-channel vectors
  bool channels_last;         // the layout that is wanted
  Tensor input;

  // A per-channel vector in the type of sums.
  const void* vector(const char* name, const std::optional<Tensor>& t) {
    if (!t) return nullptr;
    check_floating(op, name, *t, {p.channels});
    check_device(op, name, *t, input);
    keep_alive.push_back(as_contiguous(to_dtype(*t, acc_type)));
    return keep_alive.back().const_data_ptr();
  }
  // A map of the shape of y, which was checked.
  const void* result(const char* name, const Tensor& t) {
    check_device(op, name, t, input);
    return dense(to_dtype(t, type), p.channels_last, keep_alive).const_data_ptr();
  }

  Call(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
       const std::optional<Tensor>& shift, int64_t stride, int64_t dilation, int64_t upsample,
       const std::optional<Text>& activation, const std::optional<std::vector<int64_t>>& taps)
      : op(op), type(x.scalar_type()), input(x) {
    check_depthwise(op, x, weight, stride, dilation, upsample, taps);
    check_device(op, "weight", weight, x);
    NVAE_CHECK(scale.has_value() == shift.has_value(), op, ": scale and shift must be given together");
    p.dtype = dtype_of(op, "x", x);
    p.weight_dtype = dtype_of(op, "weight", weight);
    acc_type = accumulation_type(p.dtype);
    p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
    p.kernel = weight.size(3);
    p.stride = stride, p.dilation = dilation, p.upsample = upsample;
    p.device = x.get_device_index();
    p.activation = static_cast<int64_t>(activation_of(op, "activation", activation));
    if (taps) {
      NVAE_CHECK(p.kernel <= 31, op, ": taps need a kernel width of at most 31, got ", p.kernel);
      p.masked = 1;
      for (const int64_t tap : *taps) p.live[tap / 32] |= 1u << (tap % 32);
    }
    const int64_t most = (int64_t{1} << 31) - 1;
    NVAE_CHECK(p.batch * p.out_height() <= most && p.batch * p.height <= most && p.out_width() <= most / 2 &&
                   p.width <= most / 2,
               op, ": B*H and W must be below 2^31");
    // As everywhere in this package: channels_last when the channels are adjacent and there is more than one
    // pixel.
    channels_last = x.stride(1) == 1 && p.height * p.width > 1;
    // The fast kernels are those of channels_last, so NCHW goes there and back where it can.
    p.channels_last = 1;
    if (!cuda::depthwise_is_fast(p)) p.channels_last = channels_last;
    p.x = dense(x, p.channels_last, keep_alive).const_data_ptr();
    p.weight = dense(weight, false, keep_alive).const_data_ptr();
    p.scale = vector("scale", scale);
    p.shift = vector("shift", shift);
  }

  Tensor in_wanted_layout(const Tensor& map) {
    if (static_cast<bool>(p.channels_last) == channels_last) return map;
    return as_contiguous(map, channels_last);
  }

  void run(int (*launch)(const Problem&, void*)) {
    const Tensor workspace = allocate({cuda::depthwise_workspace(p)}, ScalarType::Byte, input);
    p.workspace = workspace.mutable_data_ptr();
    const int error = launch(p, current_stream(static_cast<int32_t>(p.device)));
    NVAE_CHECK(error == 0, op, ": CUDA: ", cuda::depthwise_error(error, p));
  }
};

}  // namespace

static std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t stride, int64_t dilation, int64_t upsample,
    const std::optional<Text>& activation, bool stats, const std::optional<std::vector<int64_t>>& taps) {
  const torch::stable::accelerator::DeviceGuard guard(gpu_of("depthwise_conv2d", x));
  Call<cuda::DepthwiseForward> call("depthwise_conv2d", x, weight, scale, shift, stride, dilation, upsample,
                                    activation, taps);
  cuda::DepthwiseForward& p = call.p;
  const Tensor y =
      allocate({p.batch, p.channels, p.out_height(), p.out_width()}, call.type, x, p.channels_last);
  const int64_t sums = stats ? p.channels : 0;
  const Tensor mean = allocate({sums}, call.acc_type, x), m2 = allocate({sums}, call.acc_type, x);
  p.y = y.mutable_data_ptr();
  if (stats) p.mean = mean.mutable_data_ptr(), p.m2 = m2.mutable_data_ptr();
  call.run(cuda::depthwise_forward);
  return {call.in_wanted_layout(y), mean, m2};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_conv2d_backward_cuda(
    const Tensor& grad, const std::optional<Tensor>& out, const std::optional<Tensor>& alpha,
    const std::optional<Tensor>& beta, const std::optional<Tensor>& gamma, const std::optional<Tensor>& pivot,
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t stride, int64_t dilation, int64_t upsample,
    const std::optional<Text>& activation, const std::optional<std::vector<int64_t>>& taps, bool need_x,
    bool need_weight, bool need_affine) {
  const char* op = "depthwise_conv2d_backward";
  const torch::stable::accelerator::DeviceGuard guard(gpu_of(op, x));
  Call<cuda::DepthwiseBackward> call(op, x, weight, scale, shift, stride, dilation, upsample, activation,
                                     taps);
  check_depthwise_backward(op, grad, out, alpha.has_value(), beta.has_value(), gamma.has_value(), x, stride,
                           upsample);
  cuda::DepthwiseBackward& p = call.p;
  p.grad = call.result("grad", grad);
  p.alpha = call.vector("alpha", alpha);
  p.beta = call.vector("beta", beta);
  p.gamma = call.vector("gamma", gamma);
  p.pivot = call.vector("pivot", pivot);
  if (out && beta) p.out = call.result("out", *out);
  const Tensor grad_x =
      need_x ? allocate({p.batch, p.channels, p.height, p.width}, call.type, x, p.channels_last)
             : allocate({0}, call.type, x);
  const int64_t k = p.kernel, sums = need_affine ? p.channels : 0;
  const Tensor grad_weight = need_weight ? allocate({p.channels, 1, k, k}, weight.scalar_type(), weight)
                                         : allocate({0}, weight.scalar_type(), weight);
  const Tensor grad_scale = allocate({sums}, call.acc_type, x),
               grad_shift = allocate({sums}, call.acc_type, x);
  if (need_x) p.grad_x = grad_x.mutable_data_ptr();
  if (need_weight) p.grad_weight = grad_weight.mutable_data_ptr();
  if (need_affine) p.grad_scale = grad_scale.mutable_data_ptr(), p.grad_shift = grad_shift.mutable_data_ptr();
  call.run(cuda::depthwise_backward);
  return {need_x ? call.in_wanted_layout(grad_x) : grad_x, grad_weight, grad_scale, grad_shift};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CUDA, m) {
  NVAE_IMPL(m, "depthwise_conv2d", &nvae::depthwise_conv2d_cuda);
  NVAE_IMPL(m, "depthwise_conv2d_backward", &nvae::depthwise_conv2d_backward_cuda);
}
