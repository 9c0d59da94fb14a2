// nvae_fast::normal_sample and its backward on the CPU; the arithmetic is in normal_sample.vec.cpp.
#include "normal_sample.h"

#include <tuple>

#include "packed.h"

namespace nvae {

static NormalSampleArgs describe(const char* op, const Tensor& params, const std::optional<Tensor>& noise,
                                 const std::optional<Tensor>& seed, double temperature,
                                 std::optional<double> clamp, double sigma_floor,
                                 std::vector<Tensor>& keep_alive) {
  check_packed(op, "params", params);
  NormalSampleArgs a;
  static_cast<MapShape&>(a) = shape_of(params, params.size(1) / 2);
  a.squash = {clamp.has_value(), clamp.value_or(0.0), sigma_floor};
  a.temperature = temperature;
  a.dtype = dtype_of(op, "params", params);
  a.params = packed_view(params, a.channels_last, keep_alive);
  a.noise = noise_of(op, params, noise, seed, a.channels_last, keep_alive);
  return a;
}

static Tensor normal_sample(const Tensor& params, const std::optional<Tensor>& noise,
                            const std::optional<Tensor>& seed, double temperature,
                            std::optional<double> clamp, double sigma_floor) {
  std::vector<Tensor> keep_alive;
  NormalSampleArgs a =
      describe("normal_sample", params, noise, seed, temperature, clamp, sigma_floor, keep_alive);
  const Tensor z = empty_map(params, a.channels, params.scalar_type(), a.channels_last);
  a.z = z.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end) { NVAE_CALL(normal_sample_forward, a, begin, end); });
  return z;
}

static std::tuple<Tensor, Tensor> normal_sample_backward(const Tensor& grad_z, const Tensor& params,
                                                         const std::optional<Tensor>& noise,
                                                         const std::optional<Tensor>& seed,
                                                         double temperature, std::optional<double> clamp,
                                                         double sigma_floor, bool need_params,
                                                         bool need_noise) {
  const char* op = "normal_sample_backward";
  std::vector<Tensor> keep_alive;
  NormalSampleArgs a = describe(op, params, noise, seed, temperature, clamp, sigma_floor, keep_alive);
  const ScalarType type = params.scalar_type();
  check_map(op, "grad_z", grad_z, params);
  a.grad_z = map_gradient(grad_z, type, a.channels_last, keep_alive);
  need_noise = need_noise && noise;
  const Tensor grad_params = empty_unless(need_params, params, 2 * a.channels, type, a.channels_last);
  const Tensor grad_noise =
      empty_unless(need_noise, params, a.channels, noise ? noise->scalar_type() : type, a.channels_last);
  if (need_params) a.grad_params = grad_params.mutable_data_ptr();
  if (need_noise) a.grad_noise = grad_noise.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end) { NVAE_CALL(normal_sample_backward, a, begin, end); });
  return {grad_params, grad_noise};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "normal_sample", &nvae::normal_sample);
  NVAE_IMPL(m, "normal_sample_backward", &nvae::normal_sample_backward);
}
