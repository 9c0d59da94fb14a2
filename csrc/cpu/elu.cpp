// nvae_fast::elu and its gradient on the CPU: the kernels of affine_activation.vec.cpp with scale 1 and shift 0,
// on the elements in memory order as one row.
#include "affine_activation.h"
#include "planes.h"

namespace nvae {

static AffineActivationArgs as_row(const char* op, const Tensor& x, std::vector<Tensor>& keep_alive) {
  check_feature_map(op, "x", x);
  AffineActivationArgs a;
  a.dtype = dtype_of(op, "x", x);
  a.activation = Activation::elu;
  a.batches = a.channels = 1;
  a.pixels = x.numel();
  a.x = dense(x, is_channels_last(x), keep_alive).const_data_ptr();
  return a;
}

static Tensor elu(const Tensor& x) {
  std::vector<Tensor> keep_alive;
  AffineActivationArgs a = as_row("elu", x, keep_alive);
  const Coefficients one(a.dtype, std::vector<double>{1.0}), zero(a.dtype, std::vector<double>{0.0});
  a.scale = one.data();
  a.shift = zero.data();
  const Tensor y = empty_map_like(x);
  a.y = y.mutable_data_ptr();
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(affine_activation_forward, a, begin, end); });
  return y;
}

static Tensor elu_backward(const Tensor& grad, const Tensor& x) {
  const char* op = "elu_backward";
  std::vector<Tensor> keep_alive;
  AffineActivationArgs a = as_row(op, x, keep_alive);
  check_floating_like(op, "grad", grad, "x", x);
  a.grad = dense_like(x, grad, keep_alive).const_data_ptr();
  const Coefficients one(a.dtype, std::vector<double>{1.0}), zero(a.dtype, std::vector<double>{0.0});
  a.scale = a.alpha = one.data();
  a.shift = zero.data();
  const Tensor grad_x = empty_map_like(x);
  a.grad_x = grad_x.mutable_data_ptr();
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(affine_activation_gradient, a, begin, end); });
  return grad_x;
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "elu", &nvae::elu);
  NVAE_IMPL(m, "elu_backward", &nvae::elu_backward);
}
