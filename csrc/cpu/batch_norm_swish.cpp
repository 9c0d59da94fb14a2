// nvae_fast::batch_norm_swish on the CPU: what is computed once per channel, in float64. The maps go through
// affine_activation.
#include <cmath>
#include <tuple>

#include "affine_activation_pass.h"
#include "statistics.h"

namespace nvae {

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
  NVAE_CHECK(mean.has_value() == var.has_value(), op, ": mean and var must be given together");
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
  if (mean) return {y, copy_of(*mean), copy_of(*var)};
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
      const double coefficient = -f.scale[c] * square * sum_gx * share;
      beta.set(c, coefficient);
      gamma.set(c, -f.scale[c] * sum_g * share - coefficient * means[c]);
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
  NVAE_IMPL(m, "batch_norm_swish", &nvae::batch_norm_swish);
  NVAE_IMPL(m, "batch_norm_swish_backward", &nvae::batch_norm_swish_backward);
}
