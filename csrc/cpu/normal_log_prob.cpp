// nvae_fast::normal_log_prob and its backward on the CPU; the arithmetic is in normal_log_prob.vec.cpp.
#include "normal_log_prob.h"

#include <tuple>

#include "packed.h"

namespace nvae {

// Arguments of both forward and backward; `type` becomes the dtype in which the maps are read and written.
static NormalLogProbArgs describe(const char* op, const Tensor& z, const std::optional<Tensor>& params,
                                  std::optional<double> clamp, double sigma_floor, ScalarType& type,
                                  std::vector<Tensor>& keep_alive) {
  NVAE_CHECK(z.dim() == 4, op, ": z must have shape (B, Z, H, W), got ", shape_text(z));
  NormalLogProbArgs a;
  static_cast<MapShape&>(a) = shape_of(z, z.size(1));
  a.squash = {clamp.has_value(), clamp.value_or(0.0), sigma_floor};
  type = common_type(op, "z", z, "params", params);
  a.dtype = dtype_of(op, "z", type);
  a.z = packed_view(converted(z, type, keep_alive), a.channels_last, keep_alive);
  if (params) {
    check_packed(op, "params", *params);
    check_map(op, "z", z, *params);
    a.params = packed_view(converted(*params, type, keep_alive), a.channels_last, keep_alive);
  }
  return a;
}

static Tensor normal_log_prob(const Tensor& z, const std::optional<Tensor>& params,
                              std::optional<double> clamp, double sigma_floor) {
  std::vector<Tensor> keep_alive;
  ScalarType type;
  NormalLogProbArgs a = describe("normal_log_prob", z, params, clamp, sigma_floor, type, keep_alive);
  PartialSums sums(a, 1);
  a.partial = sums.data();
  for_tasks(a, [&](int64_t begin, int64_t end) { NVAE_CALL(normal_log_prob_forward, a, begin, end); });
  return sums.total(0, a.dtype, z);
}

static std::tuple<Tensor, Tensor> normal_log_prob_backward(const Tensor& grad, const Tensor& z,
                                                           const std::optional<Tensor>& params,
                                                           std::optional<double> clamp, double sigma_floor,
                                                           bool need_z, bool need_params) {
  const char* op = "normal_log_prob_backward";
  std::vector<Tensor> keep_alive;
  std::vector<std::vector<double>> sums;
  ScalarType type;
  NormalLogProbArgs a = describe(op, z, params, clamp, sigma_floor, type, keep_alive);
  a.grad = sums_gradient(op, "grad", grad, a, sums);
  need_params = need_params && params;
  const Tensor grad_z = empty_unless(need_z, z, a.channels, type, a.channels_last);
  const Tensor grad_params = empty_unless(need_params, z, 2 * a.channels, type, a.channels_last);
  if (need_z) a.grad_z = grad_z.mutable_data_ptr();
  if (need_params) a.grad_params = grad_params.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end) { NVAE_CALL(normal_log_prob_backward, a, begin, end); });
  return {to_dtype(grad_z, z.scalar_type()),
          to_dtype(grad_params, params ? params->scalar_type() : z.scalar_type())};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "normal_log_prob", &nvae::normal_log_prob);
  NVAE_IMPL(m, "normal_log_prob_backward", &nvae::normal_log_prob_backward);
}
