// The small arithmetic of the inverted residual cell on the CPU; formulas in nvae_fast/ops/_coefficients.py.
// Vectors of a few hundred numbers: plain loops, one thread. Sums over samples in double, in order.
#include <cmath>
#include <tuple>
#include <vector>

#include "../checks.h"

namespace nvae {

static Tensor vector_like(const Tensor& t, int64_t n) {
  return torch::stable::empty({n}, t.scalar_type(), std::nullopt, t.device());
}
static Tensor matrix_like(const Tensor& t, int64_t rows, int64_t columns) {
  return torch::stable::empty({rows, columns}, t.scalar_type(), std::nullopt, t.device());
}

template <class S>
static const S* in(const char* op, const Tensor& t) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": expected contiguous arguments");
  return t.const_data_ptr<S>();
}
template <class S>
static S* out(const Tensor& t) {
  return t.mutable_data_ptr<S>();
}

// Calls run(S()) with the scalar type of t.
template <class F>
static void by_type(const char* op, const Tensor& t, F run) {
  if (t.scalar_type() == ScalarType::Double)
    run(double());
  else if (t.scalar_type() == ScalarType::Float)
    run(float());
  else
    STD_TORCH_CHECK(false, op, ": expected float32 or float64");
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_coefficients(const std::optional<Tensor>& mean,
                                                                          const Tensor& m2,
                                                                          const std::optional<Tensor>& weight,
                                                                          const std::optional<Tensor>& bias,
                                                                          double count, double eps) {
  const char* op = "batch_norm_coefficients";
  const int64_t n = m2.numel();
  const Tensor var = vector_like(m2, n), rstd = vector_like(m2, n), scale = vector_like(m2, n),
               shift = vector_like(m2, n);
  by_type(op, m2, [&](auto kind) {
    using S = decltype(kind);
    const S *a = mean ? in<S>(op, *mean) : nullptr, *m = in<S>(op, m2),
            *w = weight ? in<S>(op, *weight) : nullptr, *b = bias ? in<S>(op, *bias) : nullptr;
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
  const int64_t n = sum_g.numel();
  const Tensor grad_weight = vector_like(sum_g, n), beta = vector_like(sum_g, n),
               gamma = vector_like(sum_g, n);
  by_type(op, sum_g, [&](auto kind) {
    using S = decltype(kind);
    const S *g = in<S>(op, sum_g), *gx = in<S>(op, sum_gx), *m = mean ? in<S>(op, *mean) : nullptr,
            *r = in<S>(op, rstd), *s = in<S>(op, scale);
    S *w = out<S>(grad_weight), *b = out<S>(beta), *c = out<S>(gamma);
    for (int64_t i = 0; i < n; ++i) {
      w[i] = r[i] * gx[i];
      const double slope = -double(s[i]) * r[i] * w[i] / count;
      b[i] = static_cast<S>(slope);
      c[i] = static_cast<S>(-double(s[i]) * g[i] / count - (m ? slope * m[i] : 0.0));
    }
  });
  return {grad_weight, beta, gamma};
}

static std::tuple<Tensor, Tensor> merge_planes(const Tensor& mean, const Tensor& m2, int64_t pixels) {
  const char* op = "merge_planes";
  const int64_t planes = mean.size(0), n = mean.size(1);
  const Tensor merged = vector_like(mean, n), total = vector_like(mean, n);
  by_type(op, mean, [&](auto kind) {
    using S = decltype(kind);
    const S *a = in<S>(op, mean), *m = in<S>(op, m2);
    std::vector<double> center(static_cast<size_t>(n)), spread(static_cast<size_t>(n));
    for (int64_t b = 0; b < planes; ++b)
      for (int64_t i = 0; i < n; ++i) center[i] += a[b * n + i];
    for (double& c : center) c /= planes ? static_cast<double>(planes) : 1.0;
    for (int64_t b = 0; b < planes; ++b)
      for (int64_t i = 0; i < n; ++i) {
        const double d = a[b * n + i] - center[i];
        spread[i] += m[b * n + i] + static_cast<double>(pixels) * d * d;
      }
    for (int64_t i = 0; i < n; ++i) {
      out<S>(merged)[i] = static_cast<S>(center[i]);
      out<S>(total)[i] = static_cast<S>(spread[i]);
    }
  });
  return {merged, total};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate_coefficients(
    const Tensor& mean, const Tensor& scale, const Tensor& shift, const Tensor& w1, const Tensor& b1,
    const Tensor& w2, const Tensor& b2, double residual_scale) {
  const char* op = "gate_coefficients";
  const int64_t batch = mean.size(0), n = mean.size(1), units = w1.size(0);
  const Tensor pooled = matrix_like(mean, batch, n), hidden = matrix_like(mean, batch, units),
               gate = matrix_like(mean, batch, n), factor = matrix_like(mean, batch, n),
               offset = matrix_like(mean, batch, n);
  by_type(op, mean, [&](auto kind) {
    using S = decltype(kind);
    const S *m = in<S>(op, mean), *s = in<S>(op, scale), *t = in<S>(op, shift), *u1 = in<S>(op, w1),
            *c1 = in<S>(op, b1), *u2 = in<S>(op, w2), *c2 = in<S>(op, b2);
    const S rs = static_cast<S>(residual_scale);
    for (int64_t b = 0; b < batch; ++b) {
      S *p = out<S>(pooled) + b * n, *h = out<S>(hidden) + b * units, *g = out<S>(gate) + b * n;
      S *f = out<S>(factor) + b * n, *o = out<S>(offset) + b * n;
      for (int64_t i = 0; i < n; ++i) p[i] = m[b * n + i] * s[i] + t[i];
      for (int64_t r = 0; r < units; ++r) {
        S sum = c1[r];
        for (int64_t i = 0; i < n; ++i) sum += u1[r * n + i] * p[i];
        h[r] = sum > S(0) || sum != sum ? sum : S(0);
      }
      for (int64_t i = 0; i < n; ++i) {
        S sum = c2[i];
        for (int64_t r = 0; r < units; ++r) sum += u2[i * units + r] * h[r];
        g[i] = S(1) / (S(1) + std::exp(-sum));
        f[i] = rs * g[i] * s[i];
        o[i] = rs * g[i] * t[i];
      }
    }
  });
  return {pooled, hidden, gate, factor, offset};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_gradients(
    const Tensor& sum_x, const Tensor& sum_xp, const Tensor& plane_mean, const Tensor& mean,
    const Tensor& rstd, const Tensor& weight, const Tensor& bias, const Tensor& pooled, const Tensor& hidden,
    const Tensor& gate, const Tensor& w1, const Tensor& w2, double residual_scale) {
  const char* op = "gate_gradients";
  const int64_t batch = sum_x.size(0), n = sum_x.size(1), units = w1.size(0);
  const Tensor to_w1 = matrix_like(w1, units, n), to_b1 = vector_like(w1, units),
               to_w2 = matrix_like(w2, n, units), to_b2 = vector_like(w2, n),
               through = matrix_like(sum_x, batch, n), sum_y = vector_like(sum_x, n),
               dot_y = vector_like(sum_x, n), factor = matrix_like(sum_x, batch, n);
  by_type(op, sum_x, [&](auto kind) {
    using S = decltype(kind);
    const S *x = in<S>(op, sum_x), *xp = in<S>(op, sum_xp), *pm = in<S>(op, plane_mean), *m = in<S>(op, mean),
            *r = in<S>(op, rstd), *w = in<S>(op, weight), *c = in<S>(op, bias), *p = in<S>(op, pooled),
            *h = in<S>(op, hidden), *g = in<S>(op, gate), *u1 = in<S>(op, w1), *u2 = in<S>(op, w2);
    S *t = out<S>(through), *f = out<S>(factor);
    const S rs = static_cast<S>(residual_scale);
    std::vector<double> d1(static_cast<size_t>(units * n)), d2(static_cast<size_t>(units * n)),
        e1(static_cast<size_t>(units)), e2(static_cast<size_t>(n)), sums(static_cast<size_t>(n)),
        dots(static_cast<size_t>(n));
    std::vector<S> logit(static_cast<size_t>(n)), unit(static_cast<size_t>(units));
    for (int64_t b = 0; b < batch;
         ++b, x += n, xp += n, pm += n, p += n, g += n, h += units, t += n, f += n) {
      for (S& u : unit) u = S(0);
      for (int64_t i = 0; i < n; ++i) {
        logit[i] = (w[i] * (rs * r[i] * xp[i]) + c[i] * (rs * x[i])) * g[i] * (S(1) - g[i]);
        e2[i] += logit[i];
        for (int64_t k = 0; k < units; ++k) {
          unit[k] += logit[i] * u2[i * units + k];
          d2[i * units + k] += static_cast<double>(logit[i]) * h[k];
        }
        t[i] = S(0);
      }
      for (int64_t k = 0; k < units; ++k) {
        if (!(h[k] > S(0))) unit[k] *= S(0);  // a NaN stays one
        e1[k] += unit[k];
        for (int64_t i = 0; i < n; ++i) {
          t[i] += unit[k] * u1[k * n + i];
          d1[k * n + i] += static_cast<double>(unit[k]) * p[i];
        }
      }
      for (int64_t i = 0; i < n; ++i) {
        sums[i] += static_cast<double>(g[i] * (rs * x[i])) + t[i];
        dots[i] += static_cast<double>(g[i] * (rs * r[i] * xp[i])) + t[i] * (pm[i] - m[i]) * r[i];
        f[i] = rs * g[i];
      }
    }
    const auto write = [](const std::vector<double>& from, const Tensor& to) {
      for (size_t i = 0; i < from.size(); ++i) out<S>(to)[i] = static_cast<S>(from[i]);
    };
    write(d1, to_w1), write(e1, to_b1), write(d2, to_w2), write(e2, to_b2), write(sums, sum_y),
        write(dots, dot_y);
  });
  return {to_w1, to_b1, to_w2, to_b2, through, sum_y, dot_y, factor};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  m.impl("batch_norm_coefficients", TORCH_BOX(&nvae::batch_norm_coefficients));
  m.impl("batch_norm_corrections", TORCH_BOX(&nvae::batch_norm_corrections));
  m.impl("merge_planes", TORCH_BOX(&nvae::merge_planes));
  m.impl("gate_coefficients", TORCH_BOX(&nvae::gate_coefficients));
  m.impl("gate_gradients", TORCH_BOX(&nvae::gate_gradients));
}
