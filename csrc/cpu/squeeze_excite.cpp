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
static Tensor in_type(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

static std::tuple<Tensor, Tensor> squeeze_excite(const Tensor& x, const Tensor& w1, const Tensor& b1,
                                                 const Tensor& w2, const Tensor& b2,
                                                 const std::optional<Tensor>& skip, double residual_scale) {
  const char* op = "squeeze_excite";
  check_feature_map(op, "x", x);
  const Tensor pooled = std::get<0>(channel_statistics(x, true));
  const ScalarType acc_dtype = pooled.scalar_type();
  const Tensor factor = std::get<3>(
      gate_coefficients(pooled, std::nullopt, std::nullopt, in_type(w1, acc_dtype), in_type(b1, acc_dtype),
                        in_type(w2, acc_dtype), in_type(b2, acc_dtype), residual_scale));
  std::optional<Tensor> added;
  if (skip) added = in_type(*skip, promoted(x.scalar_type(), skip->scalar_type()));
  return {plane_affine(x, factor, added, std::nullopt, std::nullopt), pooled};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) { m.impl("squeeze_excite", TORCH_BOX(&nvae::squeeze_excite)); }
