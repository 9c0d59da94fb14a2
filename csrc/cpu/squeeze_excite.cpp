// nvae_fast::squeeze_excite on the CPU: pooled, gate and the affine map of a plane. Small cells are mostly
// calls, and three operators called from Python cost as much as what they compute.
#include "squeeze_excite.h"

#include "planes.h"

namespace nvae {

// The dtype of a sum of the two.
static ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

static std::tuple<Tensor, Tensor> squeeze_excite(const Tensor& x, const Tensor& w1, const Tensor& b1,
                                                 const Tensor& w2, const Tensor& b2,
                                                 const std::optional<Tensor>& skip, double residual_scale) {
  const char* op = "squeeze_excite";
  check_feature_map(op, "x", x);
  const ScalarType type = accumulation_type(dtype_of(op, "x", x));
  const int64_t channels = x.size(1), units = w1.dim() == 2 ? w1.size(0) : 0;
  check_floating(op, "reduce_weight", w1, {units, channels});
  check_floating(op, "reduce_bias", b1, {units});
  check_floating(op, "expand_weight", w2, {channels, units});
  check_floating(op, "expand_bias", b2, {channels});
  std::optional<Tensor> added;
  if (skip) {
    check_floating_like(op, "skip", *skip, "x", x);
    added = to_dtype(*skip, promoted(x.scalar_type(), skip->scalar_type()));
  }
  const Tensor pooled = std::get<0>(channel_statistics(x, true));
  const Tensor factor = std::get<3>(gate_coefficients(pooled, std::nullopt, std::nullopt, to_dtype(w1, type),
                                                      to_dtype(b1, type), to_dtype(w2, type),
                                                      to_dtype(b2, type), residual_scale));
  return {plane_affine(x, factor, added, std::nullopt, std::nullopt), pooled};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) { NVAE_IMPL(m, "squeeze_excite", &nvae::squeeze_excite); }
