// The small arithmetic of the inverted residual cell on the CPU; formulas in nvae_fast/ops/inverted_residual/coefficients.py.
// Vectors of a few hundred numbers: plain loops, one thread. Sums over samples in double, in order. The gate's are in
// gate.vec.cpp.
#include <cmath>
#include <tuple>
#include <vector>

#include "../memory.h"
#include "gate.h"
#include "squeeze_excite.h"

namespace nvae {

static Tensor vector_like(const Tensor& t, int64_t n) { return allocate({n}, t.scalar_type(), t); }
static Tensor matrix_like(const Tensor& t, int64_t rows, int64_t columns) {
  return allocate({rows, columns}, t.scalar_type(), t);
}

// Arguments as contiguous arrays of S, null where absent; copies live as long as this. Checks shapes and dtypes.
template <class S>
class Arguments {
 public:
  explicit Arguments(const char* op) : op_(op) {}
  const S* read(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
    constexpr ScalarType type = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
    check_shape(op_, name, t, expected);
    NVAE_CHECK(t.scalar_type() == type, op_, ": ", name, " must be ", torch::headeronly::toString(type),
               " like the other arguments, got ", torch::headeronly::toString(t.scalar_type()));
    if (t.is_contiguous()) return static_cast<const S*>(t.const_data_ptr());
    keep_alive_.push_back(as_contiguous(t));
    return static_cast<const S*>(keep_alive_.back().const_data_ptr());
  }
  const S* read(const char* name, const std::optional<Tensor>& t, std::initializer_list<int64_t> expected) {
    return t ? read(name, *t, expected) : nullptr;
  }

 private:
  const char* op_;
  std::vector<Tensor> keep_alive_;
};
template <class S>
static S* out(const Tensor& t) {
  return t.mutable_data_ptr<S>();
}

// Calls run(Arguments<S>(op)) with the scalar type S of t.
template <class F>
static void by_type(const char* op, const char* name, const Tensor& t, F run) {
  const ScalarType type = t.scalar_type();
  NVAE_CHECK(type == ScalarType::Double || type == ScalarType::Float, op, ": ", name,
             " must be float32 or float64, got ", torch::headeronly::toString(type));
  if (type == ScalarType::Double)
    run(Arguments<double>(op), double());
  else
    run(Arguments<float>(op), float());
}
static void check_matrix(const char* op, const char* name, const Tensor& t) {
  NVAE_CHECK(t.dim() == 2, op, ": ", name, " must have two dimensions, got shape ", shape_text(t));
}
static void check_vector(const char* op, const char* name, const Tensor& t) {
  NVAE_CHECK(t.dim() == 1, op, ": ", name, " must have one dimension, got shape ", shape_text(t));
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_coefficients(const std::optional<Tensor>& mean,
                                                                          const Tensor& m2,
                                                                          const std::optional<Tensor>& weight,
                                                                          const std::optional<Tensor>& bias,
                                                                          double count, double eps) {
  const char* op = "batch_norm_coefficients";
  check_vector(op, "m2", m2);
  const int64_t n = m2.size(0);
  const Tensor var = vector_like(m2, n), rstd = vector_like(m2, n), scale = vector_like(m2, n),
               shift = vector_like(m2, n);
  by_type(op, "m2", m2, [&](auto given, auto zero) {
    using S = decltype(zero);
    const S *a = given.read("mean", mean, {n}), *m = given.read("m2", m2, {n}),
            *w = given.read("weight", weight, {n}), *b = given.read("bias", bias, {n});
    S *v = out<S>(var), *r = out<S>(rstd), *s = out<S>(scale), *t = out<S>(shift);
    for (int64_t i = 0; i < n; ++i) {
      v[i] = static_cast<S>(m[i] / count);
      r[i] = static_cast<S>(1.0 / std::sqrt(static_cast<double>(v[i]) + eps));
      s[i] = w ? w[i] * r[i] : r[i];
      t[i] = (b ? b[i] : S(0)) - (a ? a[i] * s[i] : S(0));
    }
  });
  return {var, rstd, scale, shift};
}

static std::tuple<Tensor, Tensor, Tensor> batch_norm_corrections(const Tensor& sum_g, const Tensor& sum_gx,
                                                                 const std::optional<Tensor>& mean,
                                                                 const Tensor& rstd, const Tensor& scale,
                                                                 double count) {
  const char* op = "batch_norm_corrections";
  check_vector(op, "sum_g", sum_g);
  const int64_t n = sum_g.size(0);
  const Tensor grad_weight = vector_like(sum_g, n), beta = vector_like(sum_g, n),
               gamma = vector_like(sum_g, n);
  by_type(op, "sum_g", sum_g, [&](auto given, auto zero) {
    using S = decltype(zero);
    const S *g = given.read("sum_g", sum_g, {n}), *gx = given.read("sum_gx", sum_gx, {n}),
            *m = given.read("mean", mean, {n}), *r = given.read("rstd", rstd, {n}),
            *s = given.read("scale", scale, {n});
    S *w = out<S>(grad_weight), *b = out<S>(beta), *c = out<S>(gamma);
    for (int64_t i = 0; i < n; ++i) {
      w[i] = r[i] * gx[i];
      const double of_x = -double(s[i]) * r[i] * w[i] / count;
      b[i] = static_cast<S>(of_x);
      c[i] = static_cast<S>(-double(s[i]) * g[i] / count - (m ? of_x * m[i] : 0.0));
    }
  });
  return {grad_weight, beta, gamma};
}

static std::tuple<Tensor, Tensor> merge_planes(const Tensor& mean, const Tensor& m2, int64_t pixels) {
  const char* op = "merge_planes";
  check_matrix(op, "mean", mean);
  const int64_t planes = mean.size(0), n = mean.size(1);
  const Tensor merged = vector_like(mean, n), total = vector_like(mean, n);
  by_type(op, "mean", mean, [&](auto given, auto zero) {
    using S = decltype(zero);
    const S *a = given.read("mean", mean, {planes, n}), *m = given.read("m2", m2, {planes, n});
    std::vector<double> center(static_cast<size_t>(n)), spread(static_cast<size_t>(n));
    for (int64_t b = 0; b < planes; ++b)
      for (int64_t i = 0; i < n; ++i) center[i] += a[b * n + i];
    for (double& c : center) c /= planes ? static_cast<double>(planes) : 1.0;
    for (int64_t b = 0; b < planes; ++b)
      for (int64_t i = 0; i < n; ++i) {
        const double d = a[b * n + i] - center[i];
        spread[i] += m[b * n + i] + static_cast<double>(pixels) * d * d;
      }
    S *to_mean = out<S>(merged), *to_m2 = out<S>(total);
    for (int64_t i = 0; i < n; ++i) {
      to_mean[i] = static_cast<S>(center[i]);
      to_m2[i] = static_cast<S>(spread[i]);
    }
  });
  return {merged, total};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_coefficients(
    const Tensor& mean, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, double residual_scale) {
  const char* op = "gate_coefficients";
  check_matrix(op, "mean", mean);
  check_matrix(op, "w1", w1);
  NVAE_CHECK(scale.has_value() == shift.has_value(), op, ": scale and shift must be given together");
  const int64_t batch = mean.size(0), n = mean.size(1), units = w1.size(0);
  const Tensor pooled = matrix_like(mean, batch, n), hidden = matrix_like(mean, batch, units),
               gate = matrix_like(mean, batch, n), factor = matrix_like(mean, batch, n),
               offset = matrix_like(mean, batch, n);
  by_type(op, "mean", mean, [&](auto given, auto zero) {
    using S = decltype(zero);
    const S *m = given.read("mean", mean, {batch, n}), *s = given.read("scale", scale, {n}),
            *t = given.read("shift", shift, {n}), *u1 = given.read("w1", w1, {units, n}),
            *c1 = given.read("b1", b1, {units}), *u2 = given.read("w2", w2, {n, units}),
            *c2 = given.read("b2", b2, {n});
    GateArgs a;
    a.is_double = sizeof(S) == 8;
    a.channels = n;
    a.units = units;
    a.residual_scale = residual_scale;
    a.mean = m, a.scale = s, a.shift = t, a.b1 = c1, a.b2 = c2;
    const GateWeights weights(u1, u2, units, n);
    a.w1 = weights.reduce.data(), a.w2 = weights.expand.data();
    a.pooled = out<S>(pooled), a.hidden = out<S>(hidden), a.gate = out<S>(gate), a.factor = out<S>(factor);
    a.offset = out<S>(offset);
    std::vector<double> scratch(static_cast<size_t>(2 * n));
    NVAE_CALL(gate_forward, a, 0, batch, scratch.data());
  });
  return {pooled, hidden, gate, factor, offset};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_gradients(
    const Tensor& sum_x, const Tensor& sum_xp, const std::optional<Tensor>& plane_mean,
    const std::optional<Tensor>& mean, const std::optional<Tensor>& rstd, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& pooled, const Tensor& hidden, const Tensor& gate,
    const Tensor& w1, const Tensor& w2, double residual_scale) {
  const char* op = "gate_gradients";
  check_matrix(op, "sum_x", sum_x);
  check_matrix(op, "w1", w1);
  const bool normed = rstd.has_value();
  NVAE_CHECK(plane_mean.has_value() == normed && mean.has_value() == normed && weight.has_value() == normed &&
                 bias.has_value() == normed,
             op, ": plane_mean, mean, rstd, weight and bias must be given together");
  const int64_t batch = sum_x.size(0), n = sum_x.size(1), units = w1.size(0);
  const Tensor to_w1 = matrix_like(w1, units, n), to_b1 = vector_like(w1, units),
               to_w2 = matrix_like(w2, n, units), to_b2 = vector_like(w2, n),
               through = matrix_like(sum_x, batch, n), sum_y = vector_like(sum_x, n),
               dot_y = vector_like(sum_x, n), factor = matrix_like(sum_x, batch, n);
  by_type(op, "sum_x", sum_x, [&](auto given, auto zero) {
    using S = decltype(zero);
    const S *x = given.read("sum_x", sum_x, {batch, n}), *xp = given.read("sum_xp", sum_xp, {batch, n}),
            *pm = given.read("plane_mean", plane_mean, {batch, n}), *m = given.read("mean", mean, {n}),
            *r = given.read("rstd", rstd, {n}), *w = given.read("weight", weight, {n}),
            *c = given.read("bias", bias, {n}), *p = given.read("pooled", pooled, {batch, n}),
            *h = given.read("hidden", hidden, {batch, units}), *g = given.read("gate", gate, {batch, n}),
            *u1 = given.read("w1", w1, {units, n}), *u2 = given.read("w2", w2, {n, units});
    std::vector<double> d1(static_cast<size_t>(units * n)), d2(static_cast<size_t>(units * n)),
        e1(static_cast<size_t>(units)), e2(static_cast<size_t>(n)), sums(static_cast<size_t>(n)),
        dots(static_cast<size_t>(n)), scratch(static_cast<size_t>(3 * n));
    GateGradientsArgs a;
    a.is_double = sizeof(S) == 8;
    a.channels = n;
    a.units = units;
    a.residual_scale = residual_scale;
    a.sum_x = x, a.sum_xp = xp, a.plane_mean = pm, a.mean = m, a.rstd = r, a.weight = w, a.bias = c;
    a.pooled = p, a.hidden = h, a.gate = g;
    const GateWeights weights(u1, u2, units, n);
    a.w1 = weights.reduce.data(), a.w2 = weights.expand.data();
    a.through = out<S>(through), a.factor = out<S>(factor);
    a.to_w1 = d1.data(), a.to_b1 = e1.data(), a.to_w2 = d2.data(), a.to_b2 = e2.data();
    a.sum_y = sums.data(), a.dot_y = dots.data();
    NVAE_CALL(gate_backward, a, 0, batch, scratch.data());
    GateWeights::from_transposed(d2.data(), n, units, out<S>(to_w2));
    const auto write = [](const std::vector<double>& from, const Tensor& to) {
      S* data = out<S>(to);
      for (size_t i = 0; i < from.size(); ++i) data[i] = static_cast<S>(from[i]);
    };
    write(d1, to_w1), write(e1, to_b1), write(e2, to_b2), write(sums, sum_y), write(dots, dot_y);
  });
  return {to_w1, to_b1, to_w2, to_b2, through, sum_y, dot_y, factor};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "batch_norm_coefficients", &nvae::batch_norm_coefficients);
  NVAE_IMPL(m, "batch_norm_corrections", &nvae::batch_norm_corrections);
  NVAE_IMPL(m, "merge_planes", &nvae::merge_planes);
  NVAE_IMPL(m, "gate_coefficients", &nvae::gate_coefficients);
  NVAE_IMPL(m, "gate_gradients", &nvae::gate_gradients);
}
