// mixture_logistic_log_prob, its backward pass and the mean, compiled once per capability. The formulas are
// the docstring of nvae_fast/ops/mixture_logistic.py. Lanes are pixels. A tile holds every parameter of as
// many pixels as a vector has lanes; the backward kernel computes the gradient in place.
#include "mixture_logistic.h"

#include "pixel_tiles.h"

namespace nvae {
namespace NVAE_ISA {

// One colour of one component has the probability P = num / (num + rest) * exp(shift): num and rest are sums
// and products of positive numbers, so that log P = shift - log1p(rest / num) keeps its digits near 0 too,
// and the colours of a component share one logarithm. With m = (x - mean) / s, d = h / s, E = exp(-|m|), G =
// exp(-d):
//
//   inside    sigmoid(m + d) sigmoid(d - m) (1 - exp(-2d)) = E (1 - G^2) / ((1 + EG) (E + G))
//   edges     sigmoid(m + d) or sigmoid(d - m), which is 1 / (1 + EG) where the pixel is on the edge's own
//   side of
//             the mean, else exp(min(d - |m|, 0)) max(E, G) / (E + G)
//   density   exp(-|m|) 2 / (levels s) / (1 + E)^2
//
// -dP/dm / P and so on are sums and products of positive numbers too: see Derivatives.
template <class V>
struct Terms {
  V num, rest, shift;
};
// Of log P: by the mean (to be multiplied with what reaches log P), and by the log-scale.
template <class V>
struct Derivatives {
  V mean, log_scale;
};

// A third fewer instructions than tanh and up to 3 units in the last place off.
template <class V>
NVAE_INLINE V short_tanh(V x) {
  V t;  // exp(-2|x|) - 1
  exp_negative(-(abs(x) + abs(x)), t);
  return copysign(t / (V(2) + t), x);
}

template <class V>
struct Colour {
  V value;
  decltype(V() < V()) low, high;
  bool edge;  // any lane is at an edge
};

template <class V>
class Likelihood {
 public:
  using S = typename V::Scalar;
  using M = decltype(V() < V());

  explicit Likelihood(double levels)
      : half_(static_cast<S>(1.0 / levels)),
        log_density_(static_cast<S>(__builtin_log(2.0 / levels))),
        // A scale of exp(-7) makes d = h / s this large.
        far_(1097.0 / levels > double(kNear)) {}

  NVAE_INLINE Colour<V> colour(V x) const {
    Colour<V> c;
    c.value = fma(V(S(2)), x, V(S(-1)));
    c.low = c.value < V(S(-0.999));
    c.high = c.value > V(S(0.99));
    c.edge = any(c.low | c.high);
    return c;
  }

  // mean: with the shift by the colours before.
  template <bool kGradient>
  NVAE_INLINE Terms<V> operator()(const Colour<V>& x, V mean, V raw_log_scale,
                                  Derivatives<V>& derivative) const {
    const V zero(S(0)), one(S(1)), two(S(2));
    const V log_scale = max(V(S(-7)), raw_log_scale);  // NaN passes
    const V inverse = exp(-log_scale), centred = x.value - mean;
    const V m = inverse * centred, d = inverse * V(half_), size = abs(m);
    V size_e = size, d_g = d, difference = d - size;
    if (far_) {
      // Only their difference (which has digits before it is scaled) and the smaller one's exponential
      // matter, and that vanishes next to 1.
      difference = inverse * (V(half_) - abs(centred));
      const V smaller = min(min(size, d), V(kNear));
      size_e = smaller + max(zero, -difference);
      d_g = smaller + max(zero, difference);
    }
    V minus_one;
    const V g = exp_negative(-d_g, minus_one), e = exp_negative(-size_e);
    const V gap = -minus_one * (one + g);  // 1 - G^2
    const V eg = e * g, sum = e + g, far = one + eg;

    const V inside_num = e * gap, inside_den = far * sum;
    const M inside = inside_num > V(S(1e-5)) * inside_den;
    Terms<V> t;
    t.num = select(inside, inside_num, one);
    t.rest = select(inside, g * fma(e, fma(two, g, e), one), e * (two + e));
    t.shift = select(inside, zero, V(log_density_) - log_scale - size);
    M own = inside;
    if (x.edge) {
      own = (x.low & (m >= zero)) | (x.high & (m <= zero));
      const M edge = x.low | x.high;
      t.num = select(edge, select(own, one, max(g, e)), t.num);
      t.rest = select(edge, select(own, eg, min(g, e)), t.rest);
      t.shift = select(edge, select(own, zero, min(zero, difference)), t.shift);
    }
    if (kGradient) {
      // With u = sigmoid(-(|m| + d)) = EG / (1 + EG) and w = sigmoid(|m| - d) = G / (E + G):
      //   inside    by |m|: u - w                       by log s: -((|m| + d) u + (d - |m|) w + 2 d G^2 / (1
      //   - G^2)) edges     by |m|: u on the own side, else -w  by log s: -(|m| + d) u, or -(d - |m|) w
      //   density   by |m|: -(1 - E) / (1 + E)          by log s: |m| (1 - E) / (1 + E) - 1
      // One division serves all.
      const V safe_gap = max(gap, V(S(1e-10)));  // inside it is above 1e-5
      V den = select(inside, inside_den * safe_gap, one + e);
      if (x.edge) den = select(x.low | x.high, select(own, far, sum), den);
      const V quotient = one / den;
      const V d_e = (one - e) * quotient, through_gap = safe_gap * quotient;
      const V u = eg * sum * through_gap, w = g * far * through_gap;
      V by_size = select(inside, (e - one) * (e + one) * g * through_gap, -d_e);
      V by_log =
          select(inside, -fma(size + d, u, fma(difference, w, two * d * (g * g) * inside_den * quotient)),
                 fma(size, d_e, V(S(-1))));
      V by_m = copysign(V(S(1)), m) * by_size;
      if (x.edge) {
        const M edge = x.low | x.high;
        const V pull = select(own, eg, g) * quotient;
        by_m = select(x.low, pull, select(x.high, -pull, by_m));
        by_log = select(edge, -(select(own, size + d, difference) * pull), by_log);
      }
      derivative.mean = -inverse * by_m;
      derivative.log_scale = select(raw_log_scale >= V(S(-7)), by_log, zero);
    }
    return t;
  }

 private:
  static constexpr S kNear = sizeof(S) == 8 ? S(40) : S(12);
  S half_, log_density_;
  bool far_;
};

// Reads a tile of parameters; the scratch of a thread (MixtureLogistic::scratch).
template <class V>
struct Tile {
  using S = typename V::Scalar;
  S *logits, *colours, *image;  // (M), (3, 3, M), (3), each times V::size
  S *weights, *totals;          // (M): log-softmax of the logits, log P of all colours and the component
  int64_t mixtures;
  Tile(void* scratch, int64_t count) : mixtures(count) {
    S* at = static_cast<S*>(scratch);
    const auto take = [&](int64_t n) { return at += n * V::size, at - n * V::size; };
    logits = take(mixtures);
    colours = take(9 * mixtures);
    weights = take(mixtures);
    totals = take(mixtures);
    image = take(3);
  }
  // What holds colour c's parameter `kind` (0 mean, 1 log-scale, 2 coefficient) of component m.
  NVAE_INLINE S* at(int c, int kind, int64_t m) const {
    return colours + ((c * 3 + kind) * mixtures + m) * V::size;
  }
};

// logsumexp of the rows, as the largest and what is added to it: what is small beside the largest keeps its
// digits.
template <class V>
struct LogSum {
  V largest, rest;
  NVAE_INLINE V share(V row) const { return (row - largest) - rest; }
};
template <class V>
static LogSum<V> log_sum(const typename V::Scalar* rows, int64_t count) {
  using S = typename V::Scalar;
  V largest = V::load(rows);
  for (int64_t m = 1; m < count; ++m) largest = max(V::load(rows + m * V::size), largest);
  largest = select(largest == V(S(-__builtin_inf())), V(S(0)), largest);
  V sum(S(0));
  for (int64_t m = 0; m < count; ++m) sum = sum + exp(V::load(rows + m * V::size) - largest);
  return {largest, log(sum)};
}

// log P of every component into tile.totals, and log of all of them together as the result; with kGradient
// the colours' parameters are replaced by the derivatives of the component's log P.
template <bool kGradient, class V>
static LogSum<V> log_prob_of(const Likelihood<V>& likelihood, const Tile<V>& t) {
  using S = typename V::Scalar;
  const V one(S(1));
  const LogSum<V> logits = log_sum<V>(t.logits, t.mixtures);
  const Colour<V> r = likelihood.colour(V::load(t.image)), g = likelihood.colour(V::load(t.image + V::size)),
                  b = likelihood.colour(V::load(t.image + 2 * V::size));
  for (int64_t m = 0; m < t.mixtures; ++m) {
    const V c0 = short_tanh(V::load(t.at(0, 2, m))), c1 = short_tanh(V::load(t.at(1, 2, m))),
            c2 = short_tanh(V::load(t.at(2, 2, m)));
    Derivatives<V> dr, dg, db;
    const Terms<V> pr =
        likelihood.template operator()<kGradient>(r, V::load(t.at(0, 0, m)), V::load(t.at(0, 1, m)), dr);
    const Terms<V> pg = likelihood.template operator()<kGradient>(g, fma(c0, r.value, V::load(t.at(1, 0, m))),
                                                                  V::load(t.at(1, 1, m)), dg);
    const Terms<V> pb = likelihood.template operator()<kGradient>(
        b, fma(c2, g.value, fma(c1, r.value, V::load(t.at(2, 0, m)))), V::load(t.at(2, 1, m)), db);
    // The product of the colours, again as num / (num + rest).
    const V num = pr.num * pg.num, den = (pr.num + pr.rest) * (pg.num + pg.rest);
    const V rest = fma(pr.rest, pg.num, (pr.num + pr.rest) * pg.rest);
    const V all_rest = fma(rest, pb.num, den * pb.rest);
    const V log_weight = logits.share(V::load(t.logits + m * V::size));
    log_weight.store(t.weights + m * V::size);
    const V total =
        log_weight + ((pr.shift + pg.shift) + (pb.shift - log1p_positive(all_rest / (num * pb.num))));
    total.store(t.totals + m * V::size);
    if (kGradient) {
      dr.mean.store(t.at(0, 0, m));
      dg.mean.store(t.at(1, 0, m));
      db.mean.store(t.at(2, 0, m));
      dr.log_scale.store(t.at(0, 1, m));
      dg.log_scale.store(t.at(1, 1, m));
      db.log_scale.store(t.at(2, 1, m));
      (dg.mean * r.value * fnma(c0, c0, one)).store(t.at(0, 2, m));
      (db.mean * r.value * fnma(c1, c1, one)).store(t.at(1, 2, m));
      (db.mean * g.value * fnma(c2, c2, one)).store(t.at(2, 2, m));
    }
  }
  return log_sum<V>(t.totals, t.mixtures);
}

// tile(b, p, n) for every n <= V::size pixels of tasks begin .. end - 1.
template <class V, class F>
static void for_tiles(const MixtureLogistic& a, int64_t begin, int64_t end, F tile) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.spans(), first = task % a.spans() * a.kSpan;
    const int64_t last = a.pixels < first + a.kSpan ? a.pixels : first + a.kSpan;
    for (int64_t p = first; p < last; p += V::size)
      tile(b, p, last - p < V::size ? static_cast<int>(last - p) : V::size);
  }
}

template <class V, class T>
static void log_prob_forward(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename V::Scalar;
  const Tile<V> t(scratch, a.mixtures);
  const Likelihood<V> likelihood(a.levels);
  for_tiles<V>(a, begin, end, [&](int64_t b, int64_t p, int n) {
    load_tile<T>(a.params, b, p, n, a.channels(), t.logits);
    load_tile<S>(a.image, b, p, n, 3, t.image);
    const LogSum<V> sum = log_prob_of<false>(likelihood, t);
    store_lanes(sum.largest + sum.rest, static_cast<S*>(a.out) + b * a.pixels + p, n);
  });
}

template <class V, class T>
static void log_prob_backward(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename V::Scalar;
  const Tile<V> t(scratch, a.mixtures);
  const Likelihood<V> likelihood(a.levels);
  MapShape map;
  map.batches = a.batches;
  map.channels = a.channels();
  map.pixels = a.pixels;
  map.channels_last = a.channels_last;
  for_tiles<V>(a, begin, end, [&](int64_t b, int64_t p, int n) {
    load_tile<T>(a.params, b, p, n, a.channels(), t.logits);
    load_tile<S>(a.image, b, p, n, 3, t.image);
    const LogSum<V> sum = log_prob_of<true>(likelihood, t);
    const V grad = load_lanes<V>(static_cast<const S*>(a.grad) + b * a.pixels + p, n);
    for (int64_t m = 0; m < t.mixtures; ++m) {
      const V share = grad * exp(sum.share(V::load(t.totals + m * V::size)));
      fnma(grad, exp(V::load(t.weights + m * V::size)), share).store(t.logits + m * V::size);
      for (int i = 0; i < 9; ++i) {
        S* derivative = t.colours + (i * t.mixtures + m) * V::size;
        (V::load(derivative) * share).store(derivative);
      }
    }
    store_tile<T>(t.logits, a.out, map, b, p, n);
  });
}

template <class V>
NVAE_INLINE V clamped(V x) {
  return min(V(1), max(V(-1), x));  // NaN passes
}

// The rows of a tile that the mean needs, all but the log-scales, which is a third less to read where rows are far apart.
template <class V, class T>
static void load_means(const MixtureLogistic& a, int64_t b, int64_t p, int n, const Tile<V>& t) {
  if (a.params.pixel != 1) return load_tile<T>(a.params, b, p, n, a.channels(), t.logits);
  const T* row = static_cast<const T*>(a.params.data) + b * a.params.batch + p;
  for (int64_t c = 0; c < a.channels(); ++c, row += a.params.channel) {
    if (c >= t.mixtures && (c / t.mixtures - 1) % 3 == 1) continue;
    __builtin_prefetch(row + V::size, 0, 2);  // one cache line of each row is used at a time
    load_lanes<V>(row, n).store(t.logits + c * V::size);
  }
}

// tanh(x) = n / d with |n| <= 1 <= d <= 2: two of them are added with one division.
template <class V>
NVAE_INLINE void tanh_quotient(V x, V& n, V& d) {
  V t;  // exp(-2|x|) - 1
  exp_negative(-(abs(x) + abs(x)), t);
  n = copysign(t, x);
  d = V(2) + t;
}

template <class V, class T>
static void mean_forward(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  using S = typename V::Scalar;
  const Tile<V> t(scratch, a.mixtures);
  for_tiles<V>(a, begin, end, [&](int64_t b, int64_t p, int n) {
    load_means<V, T>(a, b, p, n, t);
    V largest = V::load(t.logits);
    for (int64_t m = 1; m < t.mixtures; ++m) largest = max(V::load(t.logits + m * V::size), largest);
    const V half(S(0.5)), zero(S(0));
    V total = zero, mean[3] = {zero, zero, zero}, c[3] = {zero, zero, zero};
    for (int64_t m = 0; m < t.mixtures; m += 2) {
      const bool two = m + 1 < t.mixtures;
      const V w0 = exp(V::load(t.logits + m * V::size) - largest);
      const V w1 = two ? exp(V::load(t.logits + (m + 1) * V::size) - largest) : zero;
      total = total + w0 + w1;
      for (int i = 0; i < 3; ++i) {
        V n0, d0, n1 = zero, d1(S(1));
        tanh_quotient(V::load(t.at(i, 2, m)), n0, d0);
        mean[i] = fma(w0, V::load(t.at(i, 0, m)), mean[i]);
        if (two) {
          tanh_quotient(V::load(t.at(i, 2, m + 1)), n1, d1);
          mean[i] = fma(w1, V::load(t.at(i, 0, m + 1)), mean[i]);
        }
        c[i] = c[i] + fma(w0 * n0, d1, w1 * n1 * d0) / (d0 * d1);
      }
    }
    const V share = V(S(1)) / total;
    for (int i = 0; i < 3; ++i) mean[i] = mean[i] * share, c[i] = c[i] * share;
    const V red = clamped(mean[0]), green = clamped(fma(c[0], red, mean[1]));
    const V blue = clamped(fma(c[2], green, fma(c[1], red, mean[2])));
    T* out = static_cast<T*>(a.out) + b * 3 * a.pixels + p;
    store_lanes(fma(half, red, half), out, n);
    store_lanes(fma(half, green, half), out + a.pixels, n);
    store_lanes(fma(half, blue, half), out + 2 * a.pixels, n);
  });
}

void mixture_logistic_log_prob(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::f32:
      return log_prob_forward<VecF, float>(a, begin, end, scratch);
    case Dtype::f64:
      return log_prob_forward<VecD, double>(a, begin, end, scratch);
    case Dtype::bf16:
      return log_prob_forward<VecF, bf16>(a, begin, end, scratch);
    case Dtype::f16:
      return log_prob_forward<VecF, f16>(a, begin, end, scratch);
  }
}

void mixture_logistic_log_prob_backward(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::f32:
      return log_prob_backward<VecF, float>(a, begin, end, scratch);
    case Dtype::f64:
      return log_prob_backward<VecD, double>(a, begin, end, scratch);
    case Dtype::bf16:
      return log_prob_backward<VecF, bf16>(a, begin, end, scratch);
    case Dtype::f16:
      return log_prob_backward<VecF, f16>(a, begin, end, scratch);
  }
}

void mixture_logistic_mean(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::f32:
      return mean_forward<VecF, float>(a, begin, end, scratch);
    case Dtype::f64:
      return mean_forward<VecD, double>(a, begin, end, scratch);
    case Dtype::bf16:
      return mean_forward<VecF, bf16>(a, begin, end, scratch);
    case Dtype::f16:
      return mean_forward<VecF, f16>(a, begin, end, scratch);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
