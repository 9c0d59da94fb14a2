// nvae_fast::depthwise_conv2d and its backward on the GPU; the kernels are in depthwise_conv2d*.cu.
#include "depthwise_conv2d.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../checks.h"

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
  STD_TORCH_CHECK(accessor != nullptr, "depthwise_conv2d: this PyTorch has no CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(accessor(device, &stream) == 0, "depthwise_conv2d: PyTorch gives no CUDA stream");
  return stream;
}

Tensor dense(const Tensor& t, bool channels_last, std::vector<Tensor>& hold) {
  hold.push_back(
      torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
  return hold.back();
}
Tensor as(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}
Tensor empty(std::initializer_list<int64_t> size, ScalarType type, const Tensor& like,
             bool channels_last = false) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::empty({sizes.data(), sizes.size()}, type, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// How a call is computed: its problem, and the tensors that must live until the launch.
template <class Problem>
struct Call {
  const char* op = "depthwise_conv2d";
  Problem p = {};
  std::vector<Tensor> hold;
  ScalarType type, wide;  // of maps; of per-channel vectors
  bool channels_last;     // the layout that is wanted
  Tensor input;

  // A per-channel vector in the type of sums.
  const void* vector(const char* name, const std::optional<Tensor>& t) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == p.channels && t->is_cuda(), op, ": ", name,
                    " must have shape (C,) on x's device");
    hold.push_back(torch::stable::contiguous(as(*t, wide)));
    return hold.back().const_data_ptr();
  }
  // A map of the shape of y.
  const void* result(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == p.batch && t.size(1) == p.channels &&
                        t.size(2) == p.out_height() && t.size(3) == p.out_width() && t.is_cuda(),
                    op, ": ", name, " must have the shape of y, on x's device");
    return dense(as(t, type), p.channels_last, hold).const_data_ptr();
  }

  Call(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
       const std::optional<Tensor>& shift, int64_t stride, int64_t dilation, int64_t upsample,
       const std::optional<Text>& activation, const std::optional<std::vector<int64_t>>& taps)
      : type(x.scalar_type()), input(x) {
    STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(1) == 1 &&
                        weight.size(2) == weight.size(3) && weight.size(3) % 2 == 1 && weight.is_cuda(),
                    op, ": x must have shape (B, C, H, W) and weight (C, 1, K, K) with K odd, on one device");
    STD_TORCH_CHECK((stride == 1 || stride == 2) && (dilation == 1 || dilation == 2) &&
                        (upsample == 1 || upsample == 2) && stride * upsample < 4,
                    op, ": stride, dilation and upsample must be 1 or 2, upsample 2 only with stride 1");
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), op, ": scale and shift must be given together");
    p.dtype = dtype_of(op, type);
    p.weight_dtype = dtype_of(op, weight.scalar_type());
    wide = p.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
    p.batch = x.size(0), p.channels = x.size(1), p.height = x.size(2), p.width = x.size(3);
    p.kernel = weight.size(3);
    p.stride = stride, p.dilation = dilation, p.upsample = upsample;
    p.device = x.get_device_index();
    if (activation) {
      STD_TORCH_CHECK(*activation == "swish" || *activation == "elu", op,
                      ": activation must be swish or elu, got ", *activation);
      p.activation = *activation == "swish" ? 1 : 2;
    }
    if (taps) {
      STD_TORCH_CHECK(p.kernel <= 31, op, ": taps need a kernel width of at most 31, got ", p.kernel);
      p.masked = 1;
      for (const int64_t tap : *taps) {
        STD_TORCH_CHECK(tap >= 0 && tap < p.kernel * p.kernel, op, ": taps must lie in [0, K*K), got ", tap);
        p.live[tap / 32] |= 1u << (tap % 32);
      }
    }
    const int64_t most = (int64_t{1} << 31) - 1;
    STD_TORCH_CHECK(p.batch * p.out_height() <= most && p.batch * p.height <= most &&
                        p.out_width() <= most / 2 && p.width <= most / 2,
                    op, ": B*H and W must be below 2^31");
    // As everywhere in this package: channels_last when the channels are adjacent and there is more than one
    // pixel.
    channels_last = x.stride(1) == 1 && p.height * p.width > 1;
    // The fast kernels are those of channels_last, so NCHW goes there and back where it can.
    p.channels_last = 1;
    if (!cuda::depthwise_is_fast(p)) p.channels_last = channels_last;
    p.x = dense(x, p.channels_last, hold).const_data_ptr();
    p.weight = dense(weight, false, hold).const_data_ptr();
    p.scale = vector("scale", scale);
    p.shift = vector("shift", shift);
  }

  Tensor in_wanted_layout(const Tensor& map) {
    if (static_cast<bool>(p.channels_last) == channels_last) return map;
    return torch::stable::contiguous(map,
                                     channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  }

  void run(int (*launch)(const Problem&, void*)) {
    const Tensor workspace = empty({cuda::depthwise_workspace(p)}, ScalarType::Byte, input);
    p.workspace = workspace.mutable_data_ptr();
    const int error = launch(p, current_stream(static_cast<int32_t>(p.device)));
    STD_TORCH_CHECK(error == 0, op, ": CUDA: ", cuda::depthwise_error(error, p));
  }
};

}  // namespace

static std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_cuda(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, int64_t stride, int64_t dilation, int64_t upsample,
    const std::optional<Text>& activation, bool stats, const std::optional<std::vector<int64_t>>& taps) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call<cuda::DepthwiseForward> call(x, weight, scale, shift, stride, dilation, upsample, activation, taps);
  cuda::DepthwiseForward& p = call.p;
  const Tensor y = empty({p.batch, p.channels, p.out_height(), p.out_width()}, call.type, x, p.channels_last);
  const int64_t sums = stats ? p.channels : 0;
  const Tensor mean = empty({sums}, call.wide, x), m2 = empty({sums}, call.wide, x);
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
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Call<cuda::DepthwiseBackward> call(x, weight, scale, shift, stride, dilation, upsample, activation, taps);
  cuda::DepthwiseBackward& p = call.p;
  p.grad = call.result("grad", grad);
  p.alpha = call.vector("alpha", alpha);
  p.beta = call.vector("beta", beta);
  p.gamma = call.vector("gamma", gamma);
  p.pivot = call.vector("pivot", pivot);
  if (out && beta) p.out = call.result("out", *out);
  const Tensor grad_x = need_x
                            ? empty({p.batch, p.channels, p.height, p.width}, call.type, x, p.channels_last)
                            : empty({0}, call.type, x);
  const int64_t k = p.kernel, sums = need_affine ? p.channels : 0;
  const Tensor grad_weight = need_weight ? empty({p.channels, 1, k, k}, weight.scalar_type(), weight)
                                         : empty({0}, weight.scalar_type(), weight);
  const Tensor grad_scale = empty({sums}, call.wide, x), grad_shift = empty({sums}, call.wide, x);
  if (need_x) p.grad_x = grad_x.mutable_data_ptr();
  if (need_weight) p.grad_weight = grad_weight.mutable_data_ptr();
  if (need_affine) p.grad_scale = grad_scale.mutable_data_ptr(), p.grad_shift = grad_shift.mutable_data_ptr();
  call.run(cuda::depthwise_backward);
  return {need_x ? call.in_wanted_layout(grad_x) : grad_x, grad_weight, grad_scale, grad_shift};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CUDA, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&nvae::depthwise_conv2d_cuda));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&nvae::depthwise_conv2d_backward_cuda));
}
