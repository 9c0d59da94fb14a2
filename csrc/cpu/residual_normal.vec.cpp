// residual_normal, compiled once per capability. The formulas are the docstring of
// nvae_fast/ops/residual_normal.py; the forward pass reads the packed parameters once, draws the noise in
// cache and writes z; the backward pass reads the same inputs, draws the same noise and writes both
// gradients.
#include "residual_normal.h"

#include "map_loops.h"

namespace nvae {
namespace NVAE_ISA {

template <class V>
struct Model {
  using S = typename V::Scalar;
  Squasher<V> squash;
  bool has_prior, residual;
  // Elements whose sigmas may be multiplied before a logarithm is taken, see Sums. With the clamp at 5 a
  // ratio of sigmas lies within exp(+-10), and eight of them stay clear of overflow.
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
  NVAE_INLINE Gradients backward(V raw_mu_q, V raw_ls_q, V raw_mu_p, V raw_ls_p, V eps, V g_z, V g_kl,
                                 V g_log_q, V g_log_p) const {
    V mu_p(S(0)), sigma_p(fixed_sigma_p), slope_mu_p(S(0)), slope_ls_p(S(0));
    if (has_prior) {
      if (residual) {
        raw_mu_q = raw_mu_q + raw_mu_p;
        raw_ls_q = raw_ls_q + raw_ls_p;
      }
      mu_p = squash.mu(raw_mu_p, slope_mu_p);
      sigma_p = squash.sigma(raw_ls_p, slope_ls_p);
    }
    V slope_mu_q, slope_ls_q;
    const V mu_q = squash.mu(raw_mu_q, slope_mu_q), sigma_q = squash.sigma(raw_ls_q, slope_ls_q);
    V inverse_p, inverse_q;
    if (per_log > 1) {  // one division serves both
      const V both = V(S(1)) / (sigma_p * sigma_q);
      inverse_p = both * sigma_q;
      inverse_q = both * sigma_p;
    } else {
      inverse_p = V(S(1)) / sigma_p;
      inverse_q = V(S(1)) / sigma_q;
    }
    const V d = (mu_q - mu_p) * inverse_p, r = sigma_q * inverse_p;
    const V w = fma(sigma_q, eps, mu_q - mu_p) * inverse_p;
    const V through_p = g_log_p * w * inverse_p;  // -d log_p / dz
    const V into_z = g_z - through_p, from_kl = g_kl * d * inverse_p;
    const V to_mu_q = into_z + from_kl;
    // d kl / d sigma_q = r / sigma_p - 1 / sigma_q
    const V to_sigma_q = fma(into_z, eps, fnma(g_log_q, inverse_q, g_kl * fma(r, inverse_p, -inverse_q)));
    const V to_mu_p = through_p - from_kl;
    // d kl / d sigma_p = (1 - d^2 - r^2) / sigma_p
    const V to_sigma_p = inverse_p * fma(g_log_p, fma(w, w, V(S(-1))), g_kl * fnma(d, d, fnma(r, r, V(1))));
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

// Lane-wise sums of kl, log_q and log_p. The sum of logarithms is the logarithm of the product: a few
// elements share one.
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

// The terms of n lanes at element i of a stretch; writes z.
template <class V, class T>
struct Forward {
  const ResidualNormalArgs& a;
  Model<V> model;
  explicit Forward(const ResidualNormalArgs& args) : a(args), model(args) {}

  NVAE_INLINE typename Model<V>::Terms at(const Raw<T>& q, const Raw<T>& p, int64_t i, V eps, T* z,
                                          int n) const {
    V mu_p{}, log_sigma_p{};
    if (p.mu) {
      ahead(p.mu + i * p.step);
      ahead(p.log_sigma + i * p.step);
      mu_p = load<V>(p.mu + i * p.step, n);
      log_sigma_p = load<V>(p.log_sigma + i * p.step, n);
    }
    ahead(q.mu + i * q.step);
    ahead(q.log_sigma + i * q.step);
    ahead_to_write(z);
    const auto terms = model.forward(load<V>(q.mu + i * q.step, n), load<V>(q.log_sigma + i * q.step, n),
                                     mu_p, log_sigma_p, eps);
    store(terms.z, z, n);
    return terms;
  }
};

template <class V, class T>
static void forward_rows(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Forward<V, T> forward(a);
  for_rows<V>(a, &a.noise, begin, end, [&](const Stretch<typename V::Scalar>& s) {
    Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
    q.step = p.step = 1;  // known to the compiler
    T* z = static_cast<T*>(a.z) + s.map;
    Sums<V> sums(forward.model.per_log);
    int64_t i = 0;
    for (; i + V::size <= s.count; i += V::size)
      sums.add(forward.at(q, p, i, V::load(s.eps + i), z + i, V::size));
    if (const int n = static_cast<int>(s.count - i))
      sums.add(forward.at(q, p, i, V::load(s.eps + i, n), z + i, n), n);
    sums.finish();
    const double constant = kLogSqrt2Pi * static_cast<double>(s.count);
    leave_row(sums.kl, 0.0, a.partial, s.task, a.kSums, 0);
    leave_row(sums.log_q, constant, a.partial, s.task, a.kSums, 1);
    leave_row(sums.log_p, constant, a.partial, s.task, a.kSums, 2);
  });
}

template <class V, class T>
static void forward_channels(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Forward<V, T> forward(a);
  for_channels<V>(a, &a.noise, begin, end, [&](const Stretch<typename V::Scalar>& s, int n) {
    const Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
    T* z = static_cast<T*>(a.z) + s.map;
    Sums<V> sums(forward.model.per_log);
    for (int64_t i = 0; i < s.count; ++i)
      sums.add(forward.at(q, p, i, V::load(s.eps + i * V::size), z + i * a.channels, n));
    sums.finish();
    const double constant = kLogSqrt2Pi * static_cast<double>(s.count);
    leave_channels(sums.kl, 0.0, a.partial, a, s.task, s.c, n, a.kSums, 0);
    leave_channels(sums.log_q, constant, a.partial, a, s.task, s.c, n, a.kSums, 1);
    leave_channels(sums.log_p, constant, a.partial, a, s.task, s.c, n, a.kSums, 2);
  });
}

// The gradients of n lanes at element i of a stretch, written where they belong.
template <class V, class T>
struct Backward {
  const ResidualNormalArgs& a;
  Model<V> model;
  explicit Backward(const ResidualNormalArgs& args) : a(args), model(args) {}

  struct Upstream {
    V kl, log_q, log_p;
  };
  // map and packed: of the first lane, in dense maps and dense packed parameters; log_sigma: from mu to log
  // sigma there.
  NVAE_INLINE void at(const Raw<T>& q, const Raw<T>& p, int64_t i, V eps, const Upstream& up, int64_t map,
                      int64_t packed, int64_t log_sigma, int n) const {
    V mu_p{}, log_sigma_p{}, grad_z(typename V::Scalar(0));
    ahead(q.mu + i * q.step);
    ahead(q.log_sigma + i * q.step);
    if (p.mu) {
      ahead(p.mu + i * p.step);
      ahead(p.log_sigma + i * p.step);
      mu_p = load<V>(p.mu + i * p.step, n);
      log_sigma_p = load<V>(p.log_sigma + i * p.step, n);
    }
    if (a.grad_z) ahead(static_cast<const T*>(a.grad_z) + map);
    if (a.grad_z) grad_z = load<V>(static_cast<const T*>(a.grad_z) + map, n);
    const auto g = model.backward(load<V>(q.mu + i * q.step, n), load<V>(q.log_sigma + i * q.step, n), mu_p,
                                  log_sigma_p, eps, grad_z, up.kl, up.log_q, up.log_p);
    if (T* out = static_cast<T*>(a.grad_posterior)) {
      ahead_to_write(out + packed);
      ahead_to_write(out + packed + log_sigma);
      store(g.mu_q, out + packed, n);
      store(g.ls_q, out + packed + log_sigma, n);
    }
    if (T* out = static_cast<T*>(a.grad_prior)) {
      ahead_to_write(out + packed);
      ahead_to_write(out + packed + log_sigma);
      store(g.mu_p, out + packed, n);
      store(g.ls_p, out + packed + log_sigma, n);
    }
    if (a.grad_noise) store_as(g.eps, a.grad_noise, a.noise.dtype, map, n);
  }
};

template <class V, class T>
static void backward_rows(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Backward<V, T> backward(a);
  for_rows<V>(a, &a.noise, begin, end, [&](const Stretch<typename V::Scalar>& s) {
    Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
    q.step = p.step = 1;
    const typename Backward<V, T>::Upstream up{row_gradient<V>(a.grad_kl, s.row),
                                               row_gradient<V>(a.grad_log_q, s.row),
                                               row_gradient<V>(a.grad_log_p, s.row)};
    const int64_t log_sigma = a.channels * a.pixels;
    int64_t i = 0;
    for (; i + V::size <= s.count; i += V::size)
      backward.at(q, p, i, V::load(s.eps + i), up, s.map + i, s.packed + i, log_sigma, V::size);
    if (const int n = static_cast<int>(s.count - i))
      backward.at(q, p, i, V::load(s.eps + i, n), up, s.map + i, s.packed + i, log_sigma, n);
  });
}

template <class V, class T>
static void backward_channels(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Backward<V, T> backward(a);
  for_channels<V>(a, &a.noise, begin, end, [&](const Stretch<typename V::Scalar>& s, int n) {
    const Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
    const typename Backward<V, T>::Upstream up{channel_gradients<V>(a.grad_kl, s.row, n),
                                               channel_gradients<V>(a.grad_log_q, s.row, n),
                                               channel_gradients<V>(a.grad_log_p, s.row, n)};
    for (int64_t i = 0; i < s.count; ++i)
      backward.at(q, p, i, V::load(s.eps + i * V::size), up, s.map + i * a.channels,
                  s.packed + i * 2 * a.channels, a.channels, n);
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
