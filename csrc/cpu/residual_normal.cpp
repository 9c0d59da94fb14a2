// nvae_fast::residual_normal and its backward on the CPU: layouts, threads and the second stage of the sums; the
// arithmetic is in residual_normal.vec.cpp.
#include "residual_normal.h"

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "packed.h"

namespace nvae {

namespace {

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kGrain = 4096;  // elements a thread should have at least

ScalarType sums_type(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

// What forward and backward are told alike. The tensors are kept alive in `hold`.
ResidualNormalArgs describe(const Tensor& posterior, const std::optional<Tensor>& prior,
                            const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, bool residual,
                            std::optional<double> clamp, double sigma_floor, std::vector<Tensor>& hold) {
  const char* op = "residual_normal";
  check_packed(op, "posterior", posterior);
  ResidualNormalArgs a{};
  a.batches = posterior.size(0);
  a.channels = posterior.size(1) / 2;
  a.pixels = posterior.size(2) * posterior.size(3);
  a.channels_last = is_channels_last(posterior);
  a.residual = residual && prior.has_value();
  a.squash = {clamp.has_value(), clamp.value_or(0.0), sigma_floor};
  a.dtype = dtype_of(op, posterior.scalar_type());
  a.posterior = packed_view(posterior, a.channels_last, hold);
  if (prior) {
    STD_TORCH_CHECK(prior->sizes() == posterior.sizes() && prior->scalar_type() == posterior.scalar_type(), op,
                    ": prior must have the shape and dtype of posterior");
    a.prior = packed_view(*prior, a.channels_last, hold);
  }
  STD_TORCH_CHECK(noise.has_value() != seed.has_value(), op, ": give either noise or seed");
  if (noise) {
    check_map(op, "noise", *noise, posterior);
    a.noise_dtype = dtype_of(op, noise->scalar_type());
    a.noise = dense(*noise, a.channels_last, hold).const_data_ptr();
  } else {
    a.seed = seed_of(op, *seed);
  }
  return a;
}

Tensor as_doubles(const std::optional<Tensor>& grad, std::vector<Tensor>& hold) {
  hold.push_back(torch::stable::contiguous(torch::stable::to(*grad, ScalarType::Double)));
  return hold.back();
}

int64_t grain_of(const ResidualNormalArgs& a) {
  const int64_t span = a.channels_last ? (a.pixels < a.kPixels ? a.pixels : a.kPixels) * a.channels
                                       : (a.pixels < a.kSpan ? a.pixels : a.kSpan);
  return kGrain / (span ? span : 1) + 1;
}

}  // namespace

static Outputs residual_normal(const Tensor& posterior, const std::optional<Tensor>& prior,
                               const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, bool residual,
                               std::optional<double> clamp, double sigma_floor) {
  std::vector<Tensor> hold;
  ResidualNormalArgs a = describe(posterior, prior, noise, seed, residual, clamp, sigma_floor, hold);
  const Tensor z = empty_map(posterior, a.channels, posterior.scalar_type(), a.channels_last);
  const Tensor sums = torch::stable::empty({3, a.batches, a.channels}, sums_type(a.dtype), std::nullopt,
                                           posterior.device());
  a.z = z.mutable_data_ptr();
  const int64_t tasks = a.pixels && a.channels ? a.tasks() : 0, spans = a.spans(), lanes = a.lanes();
  const std::unique_ptr<double[]> partial(new double[static_cast<size_t>(tasks * a.kSums * lanes) + 1]);
  a.partial = partial.get();
  torch::stable::parallel_for(0, tasks, grain_of(a), [&](int64_t begin, int64_t end) {
    NVAE_CALL(residual_normal_forward, a, begin, end);
  });
  // Spans in order, whatever thread made them: two runs agree bit for bit.
  const int64_t rows = a.batches * a.channels;
  void* out = sums.mutable_data_ptr();
  for (int64_t k = 0; k < a.kSums; ++k)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = row / lanes * spans, lane = row % lanes;
      double total = 0;
      for (int64_t s = 0; s < spans; ++s) total += a.partial[((first + s) * a.kSums + k) * lanes + lane];
      if (a.dtype == Dtype::f64)
        static_cast<double*>(out)[k * rows + row] = total;
      else
        static_cast<float*>(out)[k * rows + row] = static_cast<float>(total);
    }
  return {z, torch::stable::clone(torch::stable::select(sums, 0, 0)),
          torch::stable::clone(torch::stable::select(sums, 0, 1)),
          torch::stable::clone(torch::stable::select(sums, 0, 2))};
}

static std::tuple<Tensor, Tensor, Tensor> residual_normal_backward(
    const std::optional<Tensor>& grad_z, const std::optional<Tensor>& grad_kl, const std::optional<Tensor>& grad_log_q,
    const std::optional<Tensor>& grad_log_p, const Tensor& posterior, const std::optional<Tensor>& prior,
    const std::optional<Tensor>& noise, const std::optional<Tensor>& seed, bool residual, std::optional<double> clamp,
    double sigma_floor, bool need_posterior, bool need_prior, bool need_noise) {
  std::vector<Tensor> hold;
  ResidualNormalArgs a = describe(posterior, prior, noise, seed, residual, clamp, sigma_floor, hold);
  if (grad_z) {
    check_map("residual_normal_backward", "grad_z", *grad_z, posterior);
    Tensor same = grad_z->scalar_type() == posterior.scalar_type()
                      ? *grad_z
                      : torch::stable::to(*grad_z, posterior.scalar_type());
    a.grad_z = dense(same, a.channels_last, hold).const_data_ptr();
  }
  if (grad_kl) a.grad_kl = as_doubles(grad_kl, hold).const_data_ptr<double>();
  if (grad_log_q) a.grad_log_q = as_doubles(grad_log_q, hold).const_data_ptr<double>();
  if (grad_log_p) a.grad_log_p = as_doubles(grad_log_p, hold).const_data_ptr<double>();
  const auto wanted = [&](bool need, int64_t channels, ScalarType type) {
    return need ? empty_map(posterior, channels, type, a.channels_last)
                : torch::stable::empty({0}, type, std::nullopt, posterior.device());
  };
  const Tensor grad_posterior = wanted(need_posterior, 2 * a.channels, posterior.scalar_type());
  const Tensor grad_prior = wanted(need_prior && prior, 2 * a.channels, posterior.scalar_type());
  const Tensor grad_noise =
      wanted(need_noise && noise, a.channels, noise ? noise->scalar_type() : posterior.scalar_type());
  if (need_posterior) a.grad_posterior = grad_posterior.mutable_data_ptr();
  if (need_prior && prior) a.grad_prior = grad_prior.mutable_data_ptr();
  if (need_noise && noise) a.grad_noise = grad_noise.mutable_data_ptr();
  torch::stable::parallel_for(0, a.pixels && a.channels ? a.tasks() : 0, grain_of(a),
                              [&](int64_t begin, int64_t end) {
                                NVAE_CALL(residual_normal_backward, a, begin, end);
                              });
  return {grad_posterior, grad_prior, grad_noise};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  m.impl("residual_normal", TORCH_BOX(&nvae::residual_normal));
  m.impl("residual_normal_backward", TORCH_BOX(&nvae::residual_normal_backward));
}
