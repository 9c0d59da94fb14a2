// nvae_fast::residual_normal and its backward on the CPU: layouts, threads and the second stage of the sums;
// the arithmetic is in residual_normal.vec.cpp.
#include "residual_normal.h"

#include <tuple>

#include "packed.h"

namespace nvae {

// Arguments of both forward and backward; `type` becomes the dtype in which the maps are read and written.
static ResidualNormalArgs describe(const char* op, const Tensor& posterior,
                                   const std::optional<Tensor>& prior, const std::optional<Tensor>& noise,
                                   const std::optional<Tensor>& seed, bool residual,
                                   std::optional<double> clamp, double sigma_floor, ScalarType& type,
                                   std::vector<Tensor>& keep_alive) {
  check_packed(op, "posterior", posterior);
  ResidualNormalArgs a;
  static_cast<MapShape&>(a) = shape_of(posterior, posterior.size(1) / 2);
  a.residual = residual && prior.has_value();
  a.squash = {clamp.has_value(), clamp.value_or(0.0), sigma_floor};
  type = common_type(op, "posterior", posterior, "prior", prior);
  a.dtype = dtype_of(op, "posterior", type);
  a.posterior = packed_view(converted(posterior, type, keep_alive), a.channels_last, keep_alive);
  if (prior) {
    check_same_shape(op, "prior", *prior, "posterior", posterior);
    a.prior = packed_view(converted(*prior, type, keep_alive), a.channels_last, keep_alive);
  }
  a.noise = noise_of(op, posterior, noise, seed, a.channels_last, keep_alive);
  return a;
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> residual_normal(
    const Tensor& posterior, const std::optional<Tensor>& prior, const std::optional<Tensor>& noise,
    const std::optional<Tensor>& seed, bool residual, std::optional<double> clamp, double sigma_floor) {
  std::vector<Tensor> keep_alive;
  ScalarType type;
  ResidualNormalArgs a = describe("residual_normal", posterior, prior, noise, seed, residual, clamp,
                                  sigma_floor, type, keep_alive);
  const Tensor z = empty_map(posterior, a.channels, type, a.channels_last);
  PartialSums sums(a, a.kSums);
  a.z = z.mutable_data_ptr();
  a.partial = sums.data();
  for_tasks(a, [&](int64_t begin, int64_t end) { NVAE_CALL(residual_normal_forward, a, begin, end); });
  return {to_dtype(z, posterior.scalar_type()), sums.total(0, a.dtype, z), sums.total(1, a.dtype, z),
          sums.total(2, a.dtype, z)};
}

static std::tuple<Tensor, Tensor, Tensor> residual_normal_backward(
    const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_kl,
    const std::optional<Tensor>& grad_log_q, const std::optional<Tensor>& grad_log_p, const Tensor& posterior,
    const std::optional<Tensor>& prior, const std::optional<Tensor>& noise, const std::optional<Tensor>& seed,
    bool residual, std::optional<double> clamp, double sigma_floor, bool need_posterior, bool need_prior,
    bool need_noise) {
  const char* op = "residual_normal_backward";
  std::vector<Tensor> keep_alive;
  std::vector<std::vector<double>> sums;
  ScalarType type;
  ResidualNormalArgs a =
      describe(op, posterior, prior, noise, seed, residual, clamp, sigma_floor, type, keep_alive);
  if (grad_z) {
    check_map(op, "grad_z", *grad_z, posterior);
    a.grad_z = map_gradient(*grad_z, type, a.channels_last, keep_alive);
  }
  a.grad_kl = sums_gradient(op, "grad_kl", grad_kl, a, sums);
  a.grad_log_q = sums_gradient(op, "grad_log_q", grad_log_q, a, sums);
  a.grad_log_p = sums_gradient(op, "grad_log_p", grad_log_p, a, sums);
  need_prior = need_prior && prior;
  need_noise = need_noise && noise;
  const Tensor grad_posterior =
      empty_unless(need_posterior, posterior, 2 * a.channels, type, a.channels_last);
  const Tensor grad_prior = empty_unless(need_prior, posterior, 2 * a.channels, type, a.channels_last);
  const Tensor grad_noise =
      empty_unless(need_noise, posterior, a.channels, noise ? noise->scalar_type() : posterior.scalar_type(),
                   a.channels_last);
  if (need_posterior) a.grad_posterior = grad_posterior.mutable_data_ptr();
  if (need_prior) a.grad_prior = grad_prior.mutable_data_ptr();
  if (need_noise) a.grad_noise = grad_noise.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end) { NVAE_CALL(residual_normal_backward, a, begin, end); });
  return {to_dtype(grad_posterior, posterior.scalar_type()),
          to_dtype(grad_prior, prior ? prior->scalar_type() : posterior.scalar_type()), grad_noise};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "residual_normal", &nvae::residual_normal);
  NVAE_IMPL(m, "residual_normal_backward", &nvae::residual_normal_backward);
}
