// nvae_fast::batch_norm_swish and the passes it is made of on the CPU: layouts, threads, and what is computed
// once a channel, in float64; the arithmetic over maps is in batch_norm_swish.vec.cpp.
#include "batch_norm_swish.h"

#include <cmath>
#include <tuple>

#include "statistics.h"

namespace nvae {

using Name = std::optional<Text>;

// Arguments of every pass that describe the map.
static AffineActivationArgs describe(const char* op, const Tensor& x, const Name& activation,
                                     std::vector<Tensor>& keep_alive) {
  check_feature_map(op, "x", x);
  AffineActivationArgs a;
  static_cast<MapShape&>(a) = folded(planes_of(x));
  a.dtype = dtype_of(op, x.scalar_type());
  a.activation = activation_of(op, activation);
  a.x = dense(x, is_channels_last(x), keep_alive).const_data_ptr();
  return a;
}

static void set_grad(const char* op, AffineActivationArgs& a, const Tensor& grad, const Tensor& x,
                     std::vector<Tensor>& keep_alive) {
  check_same_shape(op, "grad", grad, x);
  a.grad = dense_like(x, grad, keep_alive).const_data_ptr();
}

static void run_forward(const AffineActivationArgs& a) {
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(affine_activation_forward, a, begin, end); });
}
static void run_gradient(const AffineActivationArgs& a) {
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(affine_activation_gradient, a, begin, end); });
}
// The sums of g and of g (x - pivot), (C).
static std::pair<std::vector<double>, std::vector<double>> run_sums(AffineActivationArgs& a) {
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

static Tensor vector_of(const Tensor& like, Dtype dtype, const std::vector<double>& values) {
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

// weight / sqrt(var + eps) and bias - mean * that, per channel.
struct Folded {
  std::vector<double> inverse, scale, shift;
  Folded(const std::vector<double>& weight, const std::vector<double>& bias, const std::vector<double>& mean,
         const std::vector<double>& var, double eps)
      : inverse(weight.size()), scale(weight.size()), shift(weight.size()) {
    for (size_t c = 0; c < weight.size(); ++c) {
      inverse[c] = 1.0 / std::sqrt(var[c] + eps);
      scale[c] = weight[c] * inverse[c];
      shift[c] = bias[c] - mean[c] * scale[c];
    }
  }
};

static std::tuple<Tensor, Tensor, Tensor> batch_norm_swish(const Tensor& x, const Tensor& weight,
                                                           const Tensor& bias,
                                                           const std::optional<Tensor>& mean,
                                                           const std::optional<Tensor>& var, double eps,
                                                           const Name& activation) {
  const char* op = "batch_norm_swish";
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), op, ": mean and var must be given together");
  std::vector<Tensor> keep_alive;
  AffineActivationArgs a = describe(op, x, activation, keep_alive);
  std::vector<double> means, vars;
  if (mean) {
    means = doubles_of(op, "mean", *mean, a.channels);
    vars = doubles_of(op, "var", *var, a.channels);
  } else {
    Statistics found = statistics_of(planes_of(x), a.dtype, a.x, false);
    const int64_t count = x.size(0) * x.size(2) * x.size(3);
    means = std::move(found.mean);
    vars = std::move(found.m2);
    for (double& v : vars) v = count ? v / static_cast<double>(count) : 1.0;
  }
  const Folded f(doubles_of(op, "weight", weight, a.channels), doubles_of(op, "bias", bias, a.channels),
                 means, vars, eps);
  const Coefficients scale(a.dtype, f.scale), shift(a.dtype, f.shift);
  a.scale = scale.data();
  a.shift = shift.data();
  const Tensor y = empty_map_like(x);
  a.y = y.mutable_data_ptr();
  run_forward(a);
  if (mean) return {y, torch::stable::clone(*mean), torch::stable::clone(*var)};
  return {y, vector_of(x, a.dtype, means), vector_of(x, a.dtype, vars)};
}

// Gradients of x, weight, bias, mean and var, but for what mean and var as outputs add when they were given.
static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> batch_norm_swish_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean,
    const Tensor& var, double eps, const Name& activation, bool given, bool need_x, bool need_sums) {
  const char* op = "batch_norm_swish_backward";
  std::vector<Tensor> keep_alive;
  AffineActivationArgs a = describe(op, x, activation, keep_alive);
  set_grad(op, a, grad, x, keep_alive);
  const int64_t channels = a.channels;
  const std::vector<double> weights = doubles_of(op, "weight", weight, channels),
                            means = doubles_of(op, "mean", mean, channels);
  const Folded f(weights, doubles_of(op, "bias", bias, channels), means, doubles_of(op, "var", var, channels),
                 eps);
  const Coefficients scale(a.dtype, f.scale), shift(a.dtype, f.shift), pivot(a.dtype, means);
  a.scale = scale.data();
  a.shift = shift.data();
  a.pivot = pivot.data();
  std::vector<double> grad_weight(channels), grad_bias(channels), grad_mean(channels), grad_var(channels);
  Coefficients alpha(a.dtype, f.scale), beta(a.dtype, channels), gamma(a.dtype, channels);
  if (need_sums || (need_x && !given)) {
    const auto sums = run_sums(a);
    const double n = static_cast<double>(x.size(0) * x.size(2) * x.size(3)), share = n > 0 ? 1 / n : 0;
    for (int64_t c = 0; c < channels; ++c) {
      const double sum_g = sums.first[c], sum_gx = sums.second[c], square = f.inverse[c] * f.inverse[c];
      grad_weight[c] = sum_gx * f.inverse[c];
      grad_bias[c] = sum_g;
      grad_mean[c] = -sum_g * f.scale[c];
      grad_var[c] = -0.5 * sum_gx * f.scale[c] * square;
      const double slope = -f.scale[c] * square * sum_gx * share;
      beta.set(c, slope);
      gamma.set(c, -f.scale[c] * sum_g * share - slope * means[c]);
    }
  }
  const Tensor grad_x = empty_unless(need_x, x, channels, x.scalar_type(), is_channels_last(x));
  if (need_x) {
    a.alpha = alpha.data();
    a.beta = given ? nullptr : beta.data();
    a.gamma = given ? nullptr : gamma.data();
    a.grad_x = grad_x.mutable_data_ptr();
    run_gradient(a);
  }
  const auto out = [&](const std::vector<double>& values, bool need) {
    return vector_of(x, a.dtype, need ? values : std::vector<double>());
  };
  return {grad_x, out(grad_weight, need_sums), out(grad_bias, need_sums), out(grad_mean, given && need_sums),
          out(grad_var, given && need_sums)};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  m.impl("affine_activation", TORCH_BOX(&nvae::affine_activation));
  m.impl("affine_activation_reduce", TORCH_BOX(&nvae::affine_activation_reduce));
  m.impl("affine_activation_grad", TORCH_BOX(&nvae::affine_activation_grad));
  m.impl("batch_norm_swish", TORCH_BOX(&nvae::batch_norm_swish));
  m.impl("batch_norm_swish_backward", TORCH_BOX(&nvae::batch_norm_swish_backward));
}
