// residual_normal, compiled once per capability. The formulas are the docstring of
// nvae_fast/ops/residual_normal.py; the forward pass reads the packed parameters once, draws the noise in cache and
// writes z; the backward pass reads the same inputs, draws the same noise and writes both gradients.
#include "residual_normal.h"

#include "../noise.h"

namespace nvae {
namespace NVAE_ISA {

template <class V>
struct Model {
  using S = typename V::Scalar;
  Squasher<V> squash;
  bool has_prior, residual;
  // Elements whose sigmas may be multiplied before a logarithm is taken, see Sums. With the clamp at 5 a ratio of sigmas
  // lies within exp(+-10), and eight of them stay clear of overflow.
  int per_log;
  S fixed_inverse_p, fixed_sigma_p;

  explicit Model(const ResidualNormalArgs& a)
      : squash(a.squash),
        has_prior(a.prior.data != nullptr),
        residual(a.residual),
        per_log(a.squash.clamped && a.squash.clamp <= 5.0 && a.squash.floor <= 1.0 ? 8 : 1),
        fixed_inverse_p(S(1) / (S(1) + static_cast<S>(a.squash.floor))),
        fixed_sigma_p(S(1) + static_cast<S>(a.squash.floor)) {}

  // What one element adds to the sums; the logarithms are still to come.
  struct Terms {
    V z, kl, log_q, log_p, ratio, sigma_q, sigma_p;
  };
  NVAE_INLINE Terms forward(V raw_mu_q, V raw_ls_q, V raw_mu_p, V raw_ls_p, V eps) const {
    Terms t;
    V mu_p(S(0)), inverse_p(fixed_inverse_p);
    t.sigma_p = V(fixed_sigma_p);
    if (has_prior) {
      if (residual) {
        raw_mu_q = raw_mu_q + raw_mu_p;
        raw_ls_q = raw_ls_q + raw_ls_p;
      }
      mu_p = squash.mu(raw_mu_p);
      t.sigma_p = squash.sigma(raw_ls_p);
      inverse_p = V(S(1)) / t.sigma_p;
    }
    const V mu_q = squash.mu(raw_mu_q);
    t.sigma_q = squash.sigma(raw_ls_q);
    t.z = fma(t.sigma_q, eps, mu_q);
    t.ratio = t.sigma_q * inverse_p;
    const V d = (mu_q - mu_p) * inverse_p, w = (t.z - mu_p) * inverse_p, half(S(0.5));
    t.kl = half * fma(d, d, fma(t.ratio, t.ratio, V(S(-1))));
    t.log_q = eps * eps * half;
    t.log_p = w * w * half;
    return t;
  }

  struct Gradients {
    V mu_q, ls_q, mu_p, ls_p, eps;
  };
  NVAE_INLINE Gradients backward(V raw_mu_q, V raw_ls_q, V raw_mu_p, V raw_ls_p, V eps, V g_z, V g_kl, V g_log_q,
                                 V g_log_p) const {
    V mu_p(S(0)), inverse_p(fixed_inverse_p), slope_mu_p(S(0)), slope_ls_p(S(0));
    if (has_prior) {
      if (residual) {
        raw_mu_q = raw_mu_q + raw_mu_p;
        raw_ls_q = raw_ls_q + raw_ls_p;
      }
      mu_p = squash.mu(raw_mu_p, slope_mu_p);
      inverse_p = V(1) / squash.sigma(raw_ls_p, slope_ls_p);
    }
    V slope_mu_q, slope_ls_q;
    const V mu_q = squash.mu(raw_mu_q, slope_mu_q), sigma_q = squash.sigma(raw_ls_q, slope_ls_q);
    const V inverse_q = V(1) / sigma_q;
    const V d = (mu_q - mu_p) * inverse_p, r = sigma_q * inverse_p;
    const V w = fma(sigma_q, eps, mu_q - mu_p) * inverse_p;
    const V through_p = g_log_p * w * inverse_p;  // -d log_p / dz
    const V into_z = g_z - through_p, from_kl = g_kl * d * inverse_p;
    const V to_mu_q = into_z + from_kl;
    // d kl / d sigma_q = r / sigma_p - 1 / sigma_q
    const V to_sigma_q =
        fma(into_z, eps, fnma(g_log_q, inverse_q, g_kl * fma(r, inverse_p, -inverse_q)));
    const V to_mu_p = through_p - from_kl;
    // d kl / d sigma_p = (1 - d^2 - r^2) / sigma_p
    const V to_sigma_p =
        inverse_p * fma(g_log_p, fma(w, w, V(S(-1))), g_kl * fnma(d, d, fnma(r, r, V(1))));
    Gradients g;
    g.mu_q = to_mu_q * slope_mu_q;
    g.ls_q = to_sigma_q * slope_ls_q;
    g.mu_p = to_mu_p * slope_mu_p;
    g.ls_p = to_sigma_p * slope_ls_p;
    if (residual) {
      g.mu_p = g.mu_p + g.mu_q;
      g.ls_p = g.ls_p + g.ls_q;
    }
    g.eps = fnma(g_log_q, eps, into_z * sigma_q);
    return g;
  }
};

template <class V, class T>
NVAE_INLINE V load(const T* p, int n) {
  return n == V::size ? V::load(p) : V::load(p, n);
}
template <class V, class T>
NVAE_INLINE void store(V v, T* p, int n) {
  if (n == V::size)
    v.store(p);
  else
    v.store(p, n);
}
// The first n lanes; the others become `rest`.
template <class V>
NVAE_INLINE V keep(V v, int n, typename V::Scalar rest) {
  if (n == V::size) return v;
  typename V::Scalar lanes[V::size];
  v.store(lanes);
  for (int j = n; j < V::size; ++j) lanes[j] = rest;
  return V::load(lanes);
}

// Lane-wise sums of kl, log_q and log_p. The sum of logarithms is the logarithm of the product: a few elements share one.
template <class V>
class Sums {
 public:
  using S = typename V::Scalar;
  explicit Sums(int per_log) : per_log_(per_log) { restart(); }
  V kl{S(0)}, log_q{S(0)}, log_p{S(0)};  // log_q, log_p without their constant

  NVAE_INLINE void add(const typename Model<V>::Terms& t) {
    kl_ = kl_ + t.kl;
    log_q_ = log_q_ + t.log_q;
    log_p_ = log_p_ + t.log_p;
    ratio_ = ratio_ * t.ratio;
    sigma_q_ = sigma_q_ * t.sigma_q;
    if (++count_ == per_log_) flush(t.sigma_p);
  }
  // For a vector of which only the first n lanes count.
  NVAE_INLINE void add(typename Model<V>::Terms t, int n) {
    t.kl = keep(t.kl, n, S(0));
    t.log_q = keep(t.log_q, n, S(0));
    t.log_p = keep(t.log_p, n, S(0));
    t.ratio = keep(t.ratio, n, S(1));
    t.sigma_q = keep(t.sigma_q, n, S(1));
    t.sigma_p = keep(t.sigma_p, n, S(1));
    add(t);
  }
  NVAE_INLINE void finish() {
    if (count_) flush(V(S(1)));
  }

 private:
  NVAE_INLINE void restart() {
    kl_ = log_q_ = log_p_ = V(S(0));
    ratio_ = sigma_q_ = V(S(1));
    count_ = 0;
  }
  NVAE_INLINE void flush(V sigma_p) {
    const V log_ratio = log(ratio_), log_sigma_q = log(sigma_q_);
    // One element at a time may have sigmas so extreme that their ratio says nothing about sigma_p.
    const V log_sigma_p = per_log_ == 1 ? log(sigma_p) : log_sigma_q - log_ratio;
    kl = kl + (kl_ - log_ratio);
    log_q = log_q - (log_q_ + log_sigma_q);
    log_p = log_p - (log_p_ + log_sigma_p);
    restart();
  }
  V kl_, log_q_, log_p_, ratio_, sigma_q_;
  int per_log_, count_;
};

// Pointers to the four raw parameters and z-like maps at one place, and what one pixel more adds to each.
template <class T>
struct Cursor {
  const T *mu_q, *ls_q, *mu_p, *ls_p;
  int64_t step_q, step_p;
  Cursor(const ResidualNormalArgs& a, int64_t b, int64_t c, int64_t p) {
    const T* q = static_cast<const T*>(a.posterior.data);
    mu_q = q + b * a.posterior.batch + c * a.posterior.channel + p * a.posterior.pixel;
    ls_q = mu_q + a.channels * a.posterior.channel;
    step_q = a.posterior.pixel;
    mu_p = ls_p = nullptr;
    step_p = 0;
    if (a.prior.data) {
      mu_p = static_cast<const T*>(a.prior.data) + b * a.prior.batch + c * a.prior.channel + p * a.prior.pixel;
      ls_p = mu_p + a.channels * a.prior.channel;
      step_p = a.prior.pixel;
    }
  }
};

// Calls run(task, first, count, eps) for each task: a span of one row whose noise stands in eps. Short rows share a draw.
template <class V, class F>
static void for_rows(const ResidualNormalArgs& a, int64_t begin, int64_t end, F run) {
  typename V::Scalar eps[ResidualNormalArgs::kSpan];
  const NoiseSource noise(a.seed, a.noise, a.noise_dtype);
  const int64_t spans = a.spans();
  if (spans > 1) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % spans * a.kSpan;
      const int64_t count = a.pixels - first < a.kSpan ? a.pixels - first : a.kSpan;
      noise.fill(task / spans * a.pixels + first, count, eps);
      run(task, task / spans, first, count, eps);
    }
    return;
  }
  const int64_t rows = a.kSpan / a.pixels;
  for (int64_t task = begin; task < end; task += rows) {
    const int64_t n = end - task < rows ? end - task : rows;
    noise.fill(task * a.pixels, n * a.pixels, eps);
    for (int64_t i = 0; i < n; ++i) run(task + i, task + i, 0, a.pixels, eps + i * a.pixels);
  }
}

template <class V, class T>
static void forward_rows(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Model<V> model(a);
  for_rows<V>(a, begin, end, [&](int64_t task, int64_t row, int64_t first, int64_t count, const typename V::Scalar* eps) {
    const Cursor<T> at(a, row / a.channels, row % a.channels, first);
    T* z = static_cast<T*>(a.z) + row * a.pixels + first;
    Sums<V> sums(model.per_log);
    const auto terms = [&](int64_t i, int n) {
      V mu_p(typename V::Scalar(0)), ls_p(typename V::Scalar(0));
      if (at.mu_p) {
        mu_p = load<V>(at.mu_p + i, n);
        ls_p = load<V>(at.ls_p + i, n);
      }
      const auto t =
          model.forward(load<V>(at.mu_q + i, n), load<V>(at.ls_q + i, n), mu_p, ls_p, load<V>(eps + i, n));
      store(t.z, z + i, n);
      return t;
    };
    int64_t i = 0;
    for (; i + V::size <= count; i += V::size) sums.add(terms(i, V::size));
    if (i < count) sums.add(terms(i, static_cast<int>(count - i)), static_cast<int>(count - i));
    sums.finish();
    double* out = a.partial + task * a.kSums;
    const double constant = kLogSqrt2Pi * static_cast<double>(count);
    out[0] = sum(sums.kl);
    out[1] = sum(sums.log_q) - constant;
    out[2] = sum(sums.log_p) - constant;
  });
}

// Writes the gradients of n lanes; grads point at the first lane of mu_q, and the others follow at fixed distances.
template <class V, class T>
struct GradientWriter {
  T *posterior, *prior;
  int64_t log_sigma;  // elements from mu to log sigma
  void* eps;
  Dtype eps_dtype;
  int64_t eps_at;
  NVAE_INLINE void write(const typename Model<V>::Gradients& g, int64_t at, int64_t eps_offset, int n) const {
    if (posterior) {
      store(g.mu_q, posterior + at, n);
      store(g.ls_q, posterior + at + log_sigma, n);
    }
    if (prior) {
      store(g.mu_p, prior + at, n);
      store(g.ls_p, prior + at + log_sigma, n);
    }
    if (eps) store_as(g.eps, eps, eps_dtype, eps_at + eps_offset, n);
  }
};

template <class V, class T>
static void backward_rows(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Model<V> model(a);
  for_rows<V>(a, begin, end, [&](int64_t, int64_t row, int64_t first, int64_t count, const S* eps) {
    const int64_t b = row / a.channels, c = row % a.channels;
    const Cursor<T> at(a, b, c, first);
    const int64_t dense = (b * 2 * a.channels + c) * a.pixels + first, z_at = row * a.pixels + first;
    const GradientWriter<V, T> writer{a.grad_posterior ? static_cast<T*>(a.grad_posterior) + dense : nullptr,
                                      a.grad_prior ? static_cast<T*>(a.grad_prior) + dense : nullptr,
                                      a.channels * a.pixels,
                                      a.grad_noise,
                                      a.noise_dtype,
                                      z_at};
    const T* grad_z = a.grad_z ? static_cast<const T*>(a.grad_z) + z_at : nullptr;
    const V g_kl(a.grad_kl ? static_cast<S>(a.grad_kl[row]) : S(0));
    const V g_log_q(a.grad_log_q ? static_cast<S>(a.grad_log_q[row]) : S(0));
    const V g_log_p(a.grad_log_p ? static_cast<S>(a.grad_log_p[row]) : S(0));
    for (int64_t i = 0; i < count; i += V::size) {
      const int n = count - i < V::size ? static_cast<int>(count - i) : V::size;
      V mu_p(0), ls_p(0);
      if (at.mu_p) {
        mu_p = load<V>(at.mu_p + i, n);
        ls_p = load<V>(at.ls_p + i, n);
      }
      const auto g = model.backward(load<V>(at.mu_q + i, n), load<V>(at.ls_q + i, n), mu_p, ls_p,
                                    load<V>(eps + i, n), grad_z ? load<V>(grad_z + i, n) : V(0), g_kl, g_log_q,
                                    g_log_p);
      writer.write(g, i, i, n);
    }
  });
}

// channels_last: calls run(task, b, c, n, first, count, eps) for every block of V::size channels of every task; the
// noise of pixel first + i stands in eps + i * V::size.
template <class V, class F>
static void for_channels(const ResidualNormalArgs& a, int64_t begin, int64_t end, F run) {
  alignas(64) typename V::Scalar eps[ResidualNormalArgs::kPixels * V::size];
  const NoiseSource noise(a.seed, a.noise, a.noise_dtype);
  const int64_t spans = a.spans();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / spans, first = task % spans * a.kPixels;
    const int64_t count = a.pixels - first < a.kPixels ? a.pixels - first : a.kPixels;
    for (int64_t c = 0; c < a.channels; c += V::size) {
      const int n = a.channels - c < V::size ? static_cast<int>(a.channels - c) : V::size;
      noise.fill_channels(b, c, n, a.channels, a.pixels, first, count, eps);
      run(task, b, c, n, first, count, eps);
    }
  }
}

template <class V, class T>
static void forward_channels(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Model<V> model(a);
  for_channels<V>(a, begin, end,
                  [&](int64_t task, int64_t b, int64_t c, int n, int64_t first, int64_t count, const S* eps) {
                    Cursor<T> at(a, b, c, first);
                    T* z = static_cast<T*>(a.z) + (b * a.pixels + first) * a.channels + c;
                    Sums<V> sums(model.per_log);
                    for (int64_t i = 0; i < count; ++i) {
                      V mu_p(S(0)), ls_p(S(0));
                      if (at.mu_p) {
                        mu_p = load<V>(at.mu_p + i * at.step_p, n);
                        ls_p = load<V>(at.ls_p + i * at.step_p, n);
                      }
                      const auto t =
                          model.forward(load<V>(at.mu_q + i * at.step_q, n), load<V>(at.ls_q + i * at.step_q, n),
                                        mu_p, ls_p, V::load(eps + i * V::size));
                      store(t.z, z + i * a.channels, n);
                      sums.add(t);
                    }
                    sums.finish();
                    const double constant = kLogSqrt2Pi * static_cast<double>(count);
                    const V all[3] = {sums.kl, sums.log_q, sums.log_p};
                    for (int k = 0; k < 3; ++k) {
                      S lanes[V::size];
                      all[k].store(lanes);
                      double* out = a.partial + (task * a.kSums + k) * a.channels + c;
                      for (int j = 0; j < n; ++j) out[j] = lanes[j] - (k ? constant : 0.0);
                    }
                  });
}

template <class V>
NVAE_INLINE V load_sums(const double* grads, int64_t at, int n) {
  typename V::Scalar lanes[V::size] = {};
  if (grads)
    for (int j = 0; j < n; ++j) lanes[j] = static_cast<typename V::Scalar>(grads[at + j]);
  return V::load(lanes);
}

template <class V, class T>
static void backward_channels(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const Model<V> model(a);
  for_channels<V>(a, begin, end,
                  [&](int64_t, int64_t b, int64_t c, int n, int64_t first, int64_t count, const S* eps) {
                    Cursor<T> at(a, b, c, first);
                    const int64_t pixel = b * a.pixels + first, dense = pixel * 2 * a.channels + c,
                                  z_at = pixel * a.channels + c, row = b * a.channels + c;
                    const GradientWriter<V, T> writer{
                        a.grad_posterior ? static_cast<T*>(a.grad_posterior) + dense : nullptr,
                        a.grad_prior ? static_cast<T*>(a.grad_prior) + dense : nullptr,
                        a.channels,
                        a.grad_noise,
                        a.noise_dtype,
                        z_at};
                    const T* grad_z = a.grad_z ? static_cast<const T*>(a.grad_z) + z_at : nullptr;
                    const V g_kl = load_sums<V>(a.grad_kl, row, n), g_log_q = load_sums<V>(a.grad_log_q, row, n),
                            g_log_p = load_sums<V>(a.grad_log_p, row, n);
                    for (int64_t i = 0; i < count; ++i) {
                      V mu_p(0), ls_p(0);
                      if (at.mu_p) {
                        mu_p = load<V>(at.mu_p + i * at.step_p, n);
                        ls_p = load<V>(at.ls_p + i * at.step_p, n);
                      }
                      const auto g = model.backward(
                          load<V>(at.mu_q + i * at.step_q, n), load<V>(at.ls_q + i * at.step_q, n), mu_p, ls_p,
                          V::load(eps + i * V::size), grad_z ? load<V>(grad_z + i * a.channels, n) : V(0), g_kl,
                          g_log_q, g_log_p);
                      writer.write(g, i * 2 * a.channels, i * a.channels, n);
                    }
                  });
}

template <class V, class T>
static void forward_as(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  a.channels_last ? forward_channels<V, T>(a, begin, end) : forward_rows<V, T>(a, begin, end);
}
template <class V, class T>
static void backward_as(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  a.channels_last ? backward_channels<V, T>(a, begin, end) : backward_rows<V, T>(a, begin, end);
}

void residual_normal_forward(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return forward_as<VecF, float>(a, begin, end);
    case Dtype::f64:
      return forward_as<VecD, double>(a, begin, end);
    case Dtype::bf16:
      return forward_as<VecF, bf16>(a, begin, end);
    case Dtype::f16:
      return forward_as<VecF, f16>(a, begin, end);
  }
}

void residual_normal_backward(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return backward_as<VecF, float>(a, begin, end);
    case Dtype::f64:
      return backward_as<VecD, double>(a, begin, end);
    case Dtype::bf16:
      return backward_as<VecF, bf16>(a, begin, end);
    case Dtype::f16:
      return backward_as<VecF, f16>(a, begin, end);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
