// nvae_fast::affine_activation, its reduction and its gradient on the CPU: layouts and threads. The arithmetic
// is in affine_activation.vec.cpp.
#include <tuple>

#include "affine_activation_pass.h"

namespace nvae {

AffineActivationArgs describe(const char* op, const Tensor& x, const Name& activation,
                              std::vector<Tensor>& keep_alive) {
  check_feature_map(op, "x", x);
  AffineActivationArgs a;
  static_cast<MapShape&>(a) = folded(planes_of(x));
  a.dtype = dtype_of(op, "x", x);
  a.activation = activation_of(op, "activation", activation);
  a.x = dense(x, is_channels_last(x), keep_alive).const_data_ptr();
  return a;
}

void set_grad(const char* op, AffineActivationArgs& a, const Tensor& grad, const Tensor& x,
              std::vector<Tensor>& keep_alive) {
  check_floating_like(op, "grad", grad, "x", x);
  a.grad = dense_like(x, grad, keep_alive).const_data_ptr();
}

void run_forward(const AffineActivationArgs& a) {
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(affine_activation_forward, a, begin, end); });
}
void run_gradient(const AffineActivationArgs& a) {
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(affine_activation_gradient, a, begin, end); });
}
std::pair<std::vector<double>, std::vector<double>> run_sums(AffineActivationArgs& a) {
  Partials partial(a, 2);
  a.sum_g = partial.data(0);
  a.sum_gx = partial.data(1);
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(affine_activation_sums, a, begin, end); });
  const int64_t parts = parts_of(a);
  const auto total = [&](int kind) {
    if (parts == 0) return std::vector<double>(static_cast<size_t>(a.channels), 0.0);
    const double* sums = partial.total(kind, 0, parts);
    return std::vector<double>(sums, sums + a.channels);
  };
  return {total(0), total(1)};
}

Tensor vector_of(const Tensor& like, Dtype dtype, const std::vector<double>& values) {
  const Tensor out = empty_vector(like, dtype, {static_cast<int64_t>(values.size())});
  write(out, dtype, 0, values.data(), static_cast<int64_t>(values.size()));
  return out;
}

// A tensor (C) as the kernels read it.
static Coefficients coefficients(const char* op, const char* name, Dtype dtype, const Tensor& t, int64_t n) {
  return Coefficients(dtype, doubles_of(op, name, t, n));
}

static Tensor affine_activation(const Tensor& x, const Tensor& scale, const Tensor& shift,
                                const Name& activation) {
  const char* op = "affine_activation";
  std::vector<Tensor> keep_alive;
  AffineActivationArgs a = describe(op, x, activation, keep_alive);
  const Coefficients scales = coefficients(op, "scale", a.dtype, scale, a.channels),
                     shifts = coefficients(op, "shift", a.dtype, shift, a.channels);
  a.scale = scales.data();
  a.shift = shifts.data();
  const Tensor y = empty_map_like(x);
  a.y = y.mutable_data_ptr();
  run_forward(a);
  return y;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> affine_activation_reduce(
    const Tensor& grad, const Tensor& x, const Tensor& scale, const Tensor& shift,
    const std::optional<Tensor>& pivot, const Name& activation, bool need_g, bool need_y) {
  const char* op = "affine_activation_reduce";
  std::vector<Tensor> keep_alive;
  AffineActivationArgs a = describe(op, x, activation, keep_alive);
  set_grad(op, a, grad, x, keep_alive);
  const Coefficients scales = coefficients(op, "scale", a.dtype, scale, a.channels),
                     shifts = coefficients(op, "shift", a.dtype, shift, a.channels);
  std::optional<Coefficients> pivots;
  if (pivot) pivots = coefficients(op, "pivot", a.dtype, *pivot, a.channels);
  a.scale = scales.data();
  a.shift = shifts.data();
  a.pivot = pivots ? pivots->data() : nullptr;
  const bool last = is_channels_last(x);
  const Tensor g = empty_unless(need_g, x, a.channels, x.scalar_type(), last),
               y = empty_unless(need_y, x, a.channels, x.scalar_type(), last);
  if (need_g) a.g = g.mutable_data_ptr();
  if (need_y) a.y = y.mutable_data_ptr();
  const auto sums = run_sums(a);
  return {vector_of(x, a.dtype, sums.first), vector_of(x, a.dtype, sums.second), g, y};
}

static Tensor affine_activation_grad(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                     const Tensor& shift, const Tensor& alpha, const Tensor& beta,
                                     const Tensor& gamma, const Name& activation) {
  const char* op = "affine_activation_grad";
  std::vector<Tensor> keep_alive;
  AffineActivationArgs a = describe(op, x, activation, keep_alive);
  set_grad(op, a, grad, x, keep_alive);
  const Coefficients scales = coefficients(op, "scale", a.dtype, scale, a.channels),
                     shifts = coefficients(op, "shift", a.dtype, shift, a.channels),
                     alphas = coefficients(op, "alpha", a.dtype, alpha, a.channels),
                     betas = coefficients(op, "beta", a.dtype, beta, a.channels),
                     gammas = coefficients(op, "gamma", a.dtype, gamma, a.channels);
  a.scale = scales.data();
  a.shift = shifts.data();
  a.alpha = alphas.data();
  a.beta = betas.data();
  a.gamma = gammas.data();
  const Tensor out = empty_map_like(x);
  a.grad_x = out.mutable_data_ptr();
  run_gradient(a);
  return out;
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "affine_activation", &nvae::affine_activation);
  NVAE_IMPL(m, "affine_activation_reduce", &nvae::affine_activation_reduce);
  NVAE_IMPL(m, "affine_activation_grad", &nvae::affine_activation_grad);
}
