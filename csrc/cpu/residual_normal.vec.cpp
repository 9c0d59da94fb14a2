// residual_normal, compiled once per capability. The formulas are the docstring of
// nvae_fast/ops/residual_normal.py; the forward pass reads the packed parameters once, draws the noise in
// cache and writes z; the backward pass reads the same inputs, draws the same noise and writes both
// gradients.
#include "residual_normal.h"

#include "map_loops.h"

namespace nvae {
namespace NVAE_ISA {

// Written as one loop, every element would wait for some forty dependent operations, more than one core can
// overlap. So a block of vectors goes through short loops, whose iterations overlap, with buffers in the
// first-level cache between them.
template <class V>
struct Block {
  using S = typename V::Scalar;
  static constexpr int kVectors = 16;
  struct Normal {
    alignas(64) S mu[kVectors * V::size], exp_ls[kVectors * V::size];  // sigma without its floor
    alignas(64) S d_mu[kVectors * V::size], d_ls[kVectors * V::size];  // of the soft clamps
  };
  Normal q, p;
};

// A segment as vectors: `full` of them have all lanes, the others up to `total` have n.
template <class V>
struct Vectors {
  int64_t full, total;
  int n;
  NVAE_INLINE static Vectors of_row(int64_t count) {
    return {count / V::size, (count + V::size - 1) / V::size, static_cast<int>(count % V::size)};
  }
  NVAE_INLINE static Vectors of_channels(int64_t count, int n) {
    return {n == V::size ? count : 0, count, n};
  }
  // body(vector, lanes), where lanes is known to the compiler for full vectors.
  template <class F>
  NVAE_INLINE void each(int64_t first, F body) const {
    const int64_t end = total < first + Block<V>::kVectors ? total : first + Block<V>::kVectors;
    const int64_t end_full = full < end ? full : end;
    int64_t v = first;
    for (; v < end_full; ++v) body(v, V::size);
    for (; v < end; ++v) body(v, n);
  }
};
// How many short rows of a sample share a block: more than one where they are adjacent and end with a vector.
template <class V>
static int64_t rows_together(const ResidualNormalArgs& a) {
  const bool adjacent =
      a.posterior.channel == a.pixels && (!a.prior.data || a.prior.channel == a.pixels) && a.pixels > 0;
  if (!adjacent || a.pixels % V::size != 0) return 1;
  const int64_t rows = Block<V>::kVectors * V::size / a.pixels;
  return rows > 1 ? rows : 1;
}
#define NVAE_BODY [&](int64_t v, int n) __attribute__((always_inline))

template <class V, class T>
struct Model {
  using S = typename V::Scalar;
  Squasher<V> squash;
  bool has_prior, residual;
  // Elements whose sigmas may be multiplied before a logarithm is taken, see Sums. With the clamp at 5 a
  // ratio of sigmas is within exp(+-10), and eight of them stay clear of overflow.
  int per_log;
  S fixed_sigma_p;

  explicit Model(const ResidualNormalArgs& a)
      : squash(a.squash),
        has_prior(a.prior.data != nullptr),
        residual(a.residual),
        per_log(a.squash.clamped && a.squash.clamp <= 5.0 && a.squash.floor <= 1.0 ? 8 : 1),
        fixed_sigma_p(S(1) + static_cast<S>(a.squash.floor)) {}

  // Squashes the block that begins at vector `first`; vector v is v * step on from q.mu and so on.
  template <bool kSlopes>
  NVAE_INLINE void fill(Block<V>& block, const Vectors<V>& vectors, int64_t first, const Raw<T>& q,
                        const Raw<T>& p, int64_t q_step, int64_t p_step) const {
    const auto put = [&](V v, S* to, int64_t at)
                         __attribute__((always_inline)) { v.store(to + (at - first) * V::size); };
    if (has_prior) {
      vectors.each(
          first, NVAE_BODY {
            const T *mu_q = q.mu + v * q_step, *ls_q = q.log_sigma + v * q_step;
            const T *mu_p = p.mu + v * p_step, *ls_p = p.log_sigma + v * p_step;
            prefetch(mu_q), prefetch(ls_q), prefetch(mu_p), prefetch(ls_p);
            V raw[4] = {load<V>(mu_q, n), load<V>(ls_q, n), load<V>(mu_p, n), load<V>(ls_p, n)}, u[4],
              derivative[4];
            if (residual) {
              raw[0] = raw[0] + raw[2];
              raw[1] = raw[1] + raw[3];
            }
            squash.tanh_clamp(raw, u, derivative);
            put(u[0], block.q.mu, v);
            put(u[1], block.q.exp_ls, v);
            put(u[2], block.p.mu, v);
            put(u[3], block.p.exp_ls, v);
            if (kSlopes) {
              put(derivative[0], block.q.d_mu, v);
              put(derivative[1], block.q.d_ls, v);
              put(derivative[2], block.p.d_mu, v);
              put(derivative[3], block.p.d_ls, v);
            }
          });
    } else {
      vectors.each(
          first, NVAE_BODY {
            const T *mu_q = q.mu + v * q_step, *ls_q = q.log_sigma + v * q_step;
            prefetch(mu_q), prefetch(ls_q);
            const V raw[2] = {load<V>(mu_q, n), load<V>(ls_q, n)};
            V u[2], derivative[2];
            squash.tanh_clamp(raw, u, derivative);
            put(u[0], block.q.mu, v);
            put(u[1], block.q.exp_ls, v);
            if (kSlopes) {
              put(derivative[0], block.q.d_mu, v);
              put(derivative[1], block.q.d_ls, v);
            }
          });
    }
    const int64_t left = vectors.total - first;
    const int count = left < Block<V>::kVectors ? static_cast<int>(left) : Block<V>::kVectors;
    raise(block.q.exp_ls, count);
    if (has_prior) raise(block.p.exp_ls, count);
  }
  NVAE_INLINE void raise(S* u, int count) const {
    for (int v = 0; v < count; ++v) squash.exponential(V::load(u + v * V::size)).store(u + v * V::size);
  }
  struct Normals {
    V mu_q, sigma_q, mu_p, sigma_p;
  };
  NVAE_INLINE Normals normals(const Block<V>& block, int64_t at) const {
    const V floor(squash.floor());
    Normals n{V::load(block.q.mu + at), V::load(block.q.exp_ls + at) + floor, V(S(0)), V(fixed_sigma_p)};
    if (has_prior) {
      n.mu_p = V::load(block.p.mu + at);
      n.sigma_p = V::load(block.p.exp_ls + at) + floor;
    }
    return n;
  }
};

// Lane-wise sums of kl, log_q and log_p, the latter two without their constant. The sum of logarithms is the
// logarithm of the product: a few elements share one.
template <class V>
class Sums {
 public:
  using S = typename V::Scalar;
  explicit Sums(int per_log) : per_log_(per_log) {}
  V kl{S(0)}, log_q{S(0)}, log_p{S(0)};

  // What one element adds; the logarithms are still to come.
  struct Terms {
    V kl, log_q, log_p, ratio, sigma_q, sigma_p;
  };
  NVAE_INLINE void add(const Terms& t) {
    kl = kl + t.kl;
    log_q = log_q - t.log_q;
    log_p = log_p - t.log_p;
    ratio_ = ratio_ * t.ratio;
    sigma_q_ = sigma_q_ * t.sigma_q;
    if (++count_ == per_log_) flush(t.sigma_p);
  }
  // For a vector of which only the first n lanes count.
  NVAE_INLINE void add(Terms t, int n) {
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
  NVAE_INLINE void flush(V sigma_p) {
    const V log_ratio = log(ratio_), log_sigma_q = log(sigma_q_);
    // One element at a time may have sigmas so extreme that their ratio says nothing about sigma_p.
    const V log_sigma_p = per_log_ == 1 ? log(sigma_p) : log_sigma_q - log_ratio;
    kl = kl - log_ratio;
    log_q = log_q - log_sigma_q;
    log_p = log_p - log_sigma_p;
    ratio_ = sigma_q_ = V(S(1));
    count_ = 0;
  }
  V ratio_{S(1)}, sigma_q_{S(1)};
  int per_log_, count_ = 0;
};

// Writes z of one segment and calls leave(row, sums) at the end of each of its rows. kRow: only the first n
// lanes of a vector count, else the sums of the others are never read.
template <bool kRow, class V, class T, class F>
static void forward_stretch(const Model<V, T>& model, const Vectors<V>& vectors, int64_t rows,
                            const Raw<T>& q, const Raw<T>& p, int64_t q_step, int64_t p_step,
                            const typename V::Scalar* eps_at, T* z_at, int64_t z_step, F leave) {
  using S = typename V::Scalar;
  Block<V> block;
  Sums<V> sums(model.per_log);
  const int64_t length = vectors.total / rows;
  int64_t row = 0, left = length;
  for (int64_t first = 0; first < vectors.total; first += Block<V>::kVectors) {
    model.template fill<false>(block, vectors, first, q, p, q_step, p_step);
    vectors.each(
        first, NVAE_BODY {
          const V eps = V::load(eps_at + v * V::size), half(S(0.5));
          const auto at = model.normals(block, (v - first) * V::size);
          const V inverse_p = V(S(1)) / at.sigma_p;
          const V z = fma(at.sigma_q, eps, at.mu_q);
          T* out = z_at + v * z_step;
          prefetch_for_write(out);
          store(z, out, n);
          typename Sums<V>::Terms t;
          t.sigma_q = at.sigma_q;
          t.sigma_p = at.sigma_p;
          t.ratio = at.sigma_q * inverse_p;
          const V d = (at.mu_q - at.mu_p) * inverse_p, w = (z - at.mu_p) * inverse_p;
          t.kl = half * fma(d, d, fma(t.ratio, t.ratio, V(S(-1))));
          t.log_q = eps * eps * half;
          t.log_p = w * w * half;
          if (kRow && n != V::size)
            sums.add(t, n);
          else
            sums.add(t);
          if (--left == 0) {
            sums.finish();
            leave(row++, sums);
            sums = Sums<V>(model.per_log);
            left = length;
          }
        });
  }
}

template <class V, class T>
static void forward_rows(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Model<V, T> model(a);
  for_rows<V>(
      a, &a.noise, begin, end,
      [&](const Segment<typename V::Scalar>& s) {
        const Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
        const double constant = kLogSqrt2Pi * static_cast<double>(s.count / s.rows);
        forward_stretch<true>(model, Vectors<V>::of_row(s.count), s.rows, q, p, V::size, V::size, s.eps,
                              static_cast<T*>(a.z) + s.map, V::size, [&](int64_t row, const Sums<V>& sums) {
                                store_row_sum(sums.kl, 0.0, a.partial, s.task + row, a.kSums, 0);
                                store_row_sum(sums.log_q, constant, a.partial, s.task + row, a.kSums, 1);
                                store_row_sum(sums.log_p, constant, a.partial, s.task + row, a.kSums, 2);
                              });
      },
      rows_together<V>(a));
}

template <class V, class T>
static void forward_channels(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Model<V, T> model(a);
  for_channels<V>(a, &a.noise, begin, end, [&](const Segment<typename V::Scalar>& s, int n) {
    const Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
    const double constant = kLogSqrt2Pi * static_cast<double>(s.count);
    forward_stretch<false>(
        model, Vectors<V>::of_channels(s.count, n), 1, q, p, q.step, p.step, s.eps,
        static_cast<T*>(a.z) + s.map, a.channels, [&](int64_t, const Sums<V>& sums) {
          store_channel_sums(sums.kl, 0.0, a.partial, a, s.task, s.c, n, a.kSums, 0);
          store_channel_sums(sums.log_q, constant, a.partial, a, s.task, s.c, n, a.kSums, 1);
          store_channel_sums(sums.log_p, constant, a.partial, a, s.task, s.c, n, a.kSums, 2);
        });
  });
}

// Where the gradients of one segment go and come from. Steps are from vector to vector; log_sigma is from mu
// to log sigma in the dense packed gradients.
template <class T>
struct Gradients {
  const T* z;
  T *posterior, *prior;
  void* noise;
  Dtype noise_dtype;
  bool kl, log_q, log_p;  // which sums have a gradient: without one, no NaN may come from 0 * NaN
  int64_t map, map_step, packed, packed_step, log_sigma;

  Gradients(const ResidualNormalArgs& a, int64_t map_at, int64_t packed_at)
      : z(static_cast<const T*>(a.grad_z)),
        posterior(static_cast<T*>(a.grad_posterior)),
        prior(static_cast<T*>(a.grad_prior)),
        noise(a.grad_noise),
        noise_dtype(a.noise.dtype),
        kl(a.grad_kl != nullptr),
        log_q(a.grad_log_q != nullptr),
        log_p(a.grad_log_p != nullptr),
        map(map_at),
        packed(packed_at) {}
  // The gradients of a packed tensor, at element `at` of it.
  template <class V>
  NVAE_INLINE void leave(T* to, V mu, V ls, int64_t at, int n) const {
    prefetch_for_write(to + at);
    prefetch_for_write(to + at + log_sigma);
    store(mu, to + at, n);
    store(ls, to + at + log_sigma, n);
  }
};

// The gradients of the sums of one row, in every lane; or of as many channels as there are lanes.
template <class V>
struct SumGradients {
  V kl, log_q, log_p;
};

// sums(row) gives the gradients of a row's sums.
template <class V, class T, class F>
static void backward_stretch(const Model<V, T>& model, const Vectors<V>& vectors, int64_t rows,
                             const Raw<T>& q, const Raw<T>& p, int64_t q_step, int64_t p_step,
                             const typename V::Scalar* eps_at, const Gradients<T>& g, F sums) {
  using S = typename V::Scalar;
  Block<V> block;
  const int64_t length = vectors.total / rows;
  int64_t row = 0, left = length;
  SumGradients<V> up = sums(0);
  for (int64_t first = 0; first < vectors.total; first += Block<V>::kVectors) {
    model.template fill<true>(block, vectors, first, q, p, q_step, p_step);
    vectors.each(
        first, NVAE_BODY {
          const int64_t place = (v - first) * V::size, map = g.map + v * g.map_step;
          const V eps = V::load(eps_at + v * V::size), one(S(1));
          const auto at = model.normals(block, place);
          V g_z(S(0)), inverse_p, inverse_q;
          if (g.z) {
            prefetch(g.z + map);
            g_z = load<V>(g.z + map, n);
          }
          bool shared = model.per_log > 1;
          if (shared) {  // one division serves both
            const V both = one / (at.sigma_p * at.sigma_q);
            inverse_p = both * at.sigma_q;
            inverse_q = both * at.sigma_p;
            shared = all(both > V(S(0)));  // else a NaN of the one is not to reach the other
          }
          if (!shared) {
            inverse_p = one / at.sigma_p;
            inverse_q = one / at.sigma_q;
          }
          V d(S(0)), r(S(0)), w(S(0)), through_p(S(0)), from_kl(S(0)), sigma_q_alone(S(0));
          if (g.log_p) {
            w = fma(at.sigma_q, eps, at.mu_q - at.mu_p) * inverse_p;
            through_p = up.log_p * w * inverse_p;  // -d log_p / dz
          }
          if (g.kl) {
            d = (at.mu_q - at.mu_p) * inverse_p;
            r = at.sigma_q * inverse_p;
            from_kl = up.kl * d * inverse_p;
            sigma_q_alone =
                up.kl * fma(r, inverse_p, -inverse_q);  // d kl / d sigma_q = r / sigma_p - 1 / sigma_q
          }
          if (g.log_q) sigma_q_alone = fnma(up.log_q, inverse_q, sigma_q_alone);
          const V into_z = g_z - through_p;
          const V to_sigma_q = g.z || g.log_p ? fma(into_z, eps, sigma_q_alone) : sigma_q_alone;
          V mu_q(S(0));
          if (g.z || g.kl || g.log_p) mu_q = (into_z + from_kl) * V::load(block.q.d_mu + place);
          const V ls_q = to_sigma_q * (V::load(block.q.d_ls + place) * V::load(block.q.exp_ls + place));
          const int64_t packed = g.packed + v * g.packed_step;
          if (g.posterior) g.leave(g.posterior, mu_q, ls_q, packed, n);
          if (g.prior) {
            V mu_p(S(0)), ls_p(S(0));
            if (g.kl || g.log_p) {
              V to_sigma_p(S(0));
              // d kl / d sigma_p = (1 - d^2 - r^2) / sigma_p
              if (g.kl) to_sigma_p = up.kl * fnma(d, d, fnma(r, r, one));
              if (g.log_p) to_sigma_p = fma(up.log_p, fma(w, w, -one), to_sigma_p);
              mu_p = (through_p - from_kl) * V::load(block.p.d_mu + place);
              ls_p =
                  inverse_p * to_sigma_p * (V::load(block.p.d_ls + place) * V::load(block.p.exp_ls + place));
            }
            if (model.residual) {
              mu_p = mu_p + mu_q;
              ls_p = ls_p + ls_q;
            }
            g.leave(g.prior, mu_p, ls_p, packed, n);
          }
          if (g.noise) {
            V to_noise(S(0));
            if (g.z || g.log_p) to_noise = into_z * at.sigma_q;
            if (g.log_q) to_noise = fnma(up.log_q, eps, to_noise);
            store_as(to_noise, g.noise, g.noise_dtype, map, n);
          }
          if (--left == 0 && ++row < rows) {
            up = sums(row);
            left = length;
          }
        });
  }
}

template <class V, class T>
static void backward_rows(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Model<V, T> model(a);
  for_rows<V>(
      a, &a.noise, begin, end,
      [&](const Segment<typename V::Scalar>& s) {
        const Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
        Gradients<T> g(a, s.map, s.packed);
        g.map_step = g.packed_step = V::size;
        g.log_sigma = a.channels * a.pixels;
        backward_stretch(model, Vectors<V>::of_row(s.count), s.rows, q, p, V::size, V::size, s.eps, g,
                         [&](int64_t row) {
                           return SumGradients<V>{row_gradient<V>(a.grad_kl, s.row + row),
                                                  row_gradient<V>(a.grad_log_q, s.row + row),
                                                  row_gradient<V>(a.grad_log_p, s.row + row)};
                         });
      },
      rows_together<V>(a));
}

template <class V, class T>
static void backward_channels(const ResidualNormalArgs& a, int64_t begin, int64_t end) {
  const Model<V, T> model(a);
  for_channels<V>(a, &a.noise, begin, end, [&](const Segment<typename V::Scalar>& s, int n) {
    const Raw<T> q(a.posterior, a.channels, s.b, s.c, s.p), p(a.prior, a.channels, s.b, s.c, s.p);
    Gradients<T> g(a, s.map, s.packed);
    const SumGradients<V> up{channel_gradients<V>(a.grad_kl, s.row, n),
                             channel_gradients<V>(a.grad_log_q, s.row, n),
                             channel_gradients<V>(a.grad_log_p, s.row, n)};
    g.map_step = a.channels;
    g.packed_step = 2 * a.channels;
    g.log_sigma = a.channels;
    backward_stretch(model, Vectors<V>::of_channels(s.count, n), 1, q, p, q.step, p.step, s.eps, g,
                     [&](int64_t) { return up; });
  });
}
#undef NVAE_BODY

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
