// nvae_fast::squeeze_excite on the CPU: pooled, gate and the affine map of a plane, for a few samples at a time. Their
// maps are still in the cache when they are read again.
#include "squeeze_excite.h"

#include <tuple>

#include "gate.h"
#include "statistics.h"

namespace nvae {

// Bytes of x of the samples that are computed together, for each thread: a share of its second-level cache.
constexpr int64_t kBlockBytes = 256 * 1024;

// The dtype of a sum of the two.
static ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

static int64_t block_of(const Tensor& x) {
  const int64_t bytes = x.size(1) * x.size(2) * x.size(3) * static_cast<int64_t>(x.element_size()),
                budget = kBlockBytes * torch::stable::get_num_threads();
  return bytes < budget ? budget / (bytes ? bytes : 1) : 1;
}

// The two layers in the dtype S of the arithmetic.
template <class S>
class Layers {
 public:
  Layers(const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2)
      : units_(w1.size(0)),
        channels_(w1.size(1)),
        w1_(read(w1)),
        b1_(read(b1)),
        w2_(read(w2)),
        b2_(read(b2)) {}
  const S* read(const Tensor& t) {
    keep_alive_.push_back(
        as_contiguous(to_dtype(t, sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float)));
    return static_cast<const S*>(keep_alive_.back().const_data_ptr());
  }
  GateArgs gate(const GateWeights& weights, double residual_scale) const {
    GateArgs a;
    a.is_double = sizeof(S) == 8;
    a.channels = channels_, a.units = units_;
    a.residual_scale = residual_scale;
    a.w1 = weights.reduce.data(), a.w2 = weights.expand.data();
    a.b1 = b1_, a.b2 = b2_;
    return a;
  }
  GateWeights weights() const { return GateWeights(w1_, w2_, units_, channels_); }

 private:
  std::vector<Tensor> keep_alive_;
  int64_t units_, channels_;
  const S *w1_, *b1_, *w2_, *b2_;
};

template <class S>
static void forward(const Tensor& x, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                    double residual_scale, const Tensor& pooled, const Tensor& factor,
                    const PlaneAffine& map) {
  std::vector<Tensor> keep_alive;
  ChannelStatisticsArgs means;
  static_cast<MapShape&>(means) = planes_of(x);
  means.dtype = dtype_of("squeeze_excite", "x", x);
  means.x = dense(x, is_channels_last(x), keep_alive).const_data_ptr();
  Partials partial(means, 1);
  means.mean = partial.data();

  const int64_t channels = x.size(1), units = w1.size(0), spans = means.spans();
  const Layers<S> layers(w1, b1, w2, b2);
  const GateWeights weights = layers.weights();
  GateArgs gate = layers.gate(weights, residual_scale);
  S* const mean = pooled.mutable_data_ptr<S>();
  gate.mean = mean;
  gate.factor = factor.mutable_data_ptr();
  std::vector<S> hidden(static_cast<size_t>(x.size(0) * units));
  gate.hidden = hidden.data();
  std::vector<double> scratch(static_cast<size_t>(3 * channels)), shares(static_cast<size_t>(spans));
  for (int64_t i = 0; i < spans; ++i)
    shares[i] = static_cast<double>(count_of(means, i)) / static_cast<double>(means.pixels);

  for (int64_t begin = 0, step = block_of(x); begin < x.size(0); begin += step) {
    const int64_t end = begin + step < x.size(0) ? begin + step : x.size(0);
    for_samples(means, begin, end, [&](int64_t first, int64_t last) {
      NVAE_CALL(channel_statistics_parts, means, first, last);
    });
    for (int64_t b = begin; b < end; ++b) {
      double* const total = scratch.data();
      for (int64_t c = 0; c < channels; ++c) total[c] = 0;
      for (int64_t i = 0; i < spans; ++i)
        for (int64_t c = 0; c < channels; ++c)
          total[c] += shares[i] * means.mean[(b * spans + i) * channels + c];
      for (int64_t c = 0; c < channels; ++c) mean[b * channels + c] = static_cast<S>(total[c]);
    }
    NVAE_CALL(gate_forward, gate, begin, end, scratch.data());
    map.run(begin, end);
  }
}

static void check_layers(const char* op, const Tensor& x, const Tensor& w1, const Tensor& b1,
                         const Tensor& w2, const Tensor& b2) {
  check_feature_map(op, "x", x);
  const int64_t channels = x.size(1), units = w1.dim() == 2 ? w1.size(0) : 0;
  check_floating(op, "reduce_weight", w1, {units, channels});
  check_floating(op, "reduce_bias", b1, {units});
  check_floating(op, "expand_weight", w2, {channels, units});
  check_floating(op, "expand_bias", b2, {channels});
}

static std::tuple<Tensor, Tensor> squeeze_excite(const Tensor& x, const Tensor& w1, const Tensor& b1,
                                                 const Tensor& w2, const Tensor& b2,
                                                 const std::optional<Tensor>& skip, double residual_scale) {
  const char* op = "squeeze_excite";
  check_layers(op, x, w1, b1, w2, b2);
  const Dtype dtype = dtype_of(op, "x", x);
  std::optional<Tensor> added;
  if (skip) {
    check_floating_like(op, "skip", *skip, "x", x);
    const ScalarType sum = promoted(x.scalar_type(), skip->scalar_type());
    if (sum == ScalarType::Double && dtype != Dtype::f64) {
      const auto [y, mean] = squeeze_excite(to_dtype(x, sum), w1, b1, w2, b2, skip, residual_scale);
      return {y, to_dtype(mean, ScalarType::Float)};
    }
    added = to_dtype(*skip, sum);
  }
  const Tensor pooled = empty_vector(x, dtype, {x.size(0), x.size(1)}),
               factor = empty_vector(x, dtype, {x.size(0), x.size(1)});
  const PlaneAffine map(x, factor, added, std::nullopt, std::nullopt);
  const auto run = dtype == Dtype::f64 ? forward<double> : forward<float>;
  run(x, w1, b1, w2, b2, residual_scale, pooled, factor, map);
  return {map.out(), pooled};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class S>
static Gradients backward(const Tensor& grad, const Tensor& x, const Tensor& pooled, const Tensor& w1,
                          const Tensor& b1, const Tensor& w2, const Tensor& b2, double residual_scale) {
  const int64_t batches = x.size(0), channels = x.size(1), units = w1.size(0), pixels = x.size(2) * x.size(3);
  constexpr ScalarType type = sizeof(S) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto of_planes = [&] { return allocate({batches, channels}, type, x); };
  const Tensor sum_g = of_planes(), sum_gx = of_planes(), factor = of_planes(), shift = of_planes();
  PlaneDots dots(grad, x, std::nullopt);
  const PlaneAffine map(grad, factor, std::nullopt, std::nullopt, shift);

  Layers<S> layers(w1, b1, w2, b2);
  const GateWeights weights = layers.weights();
  std::vector<S> hidden(static_cast<size_t>(batches * units)), open(static_cast<size_t>(batches * channels));
  std::vector<double> scratch(static_cast<size_t>(3 * channels));
  GateArgs gate = layers.gate(weights, residual_scale);
  gate.mean = layers.read(pooled);
  gate.hidden = hidden.data(), gate.gate = open.data(), gate.factor = factor.mutable_data_ptr();

  std::vector<double> to_w1(weights.reduce.size()), to_w2(to_w1.size()), to_b1(static_cast<size_t>(units)),
      to_b2(static_cast<size_t>(channels));
  GateGradientsArgs back;
  back.is_double = gate.is_double;
  back.channels = channels, back.units = units;
  back.residual_scale = residual_scale;
  back.sum_x = sum_g.const_data_ptr(), back.sum_xp = sum_gx.const_data_ptr();
  back.pooled = gate.mean, back.hidden = gate.hidden, back.gate = gate.gate;
  back.w1 = gate.w1, back.w2 = gate.w2;
  back.through = shift.mutable_data_ptr(), back.factor = gate.factor;
  back.to_w1 = to_w1.data(), back.to_b1 = to_b1.data(), back.to_w2 = to_w2.data(), back.to_b2 = to_b2.data();

  S* const through = shift.mutable_data_ptr<S>();
  const S share = pixels ? S(1) / static_cast<S>(pixels) : S(1);
  for (int64_t begin = 0, step = block_of(x); begin < batches; begin += step) {
    const int64_t end = begin + step < batches ? begin + step : batches;
    dots.run(begin, end);
    dots.write_sums(begin, end, sum_g, sum_gx);
    NVAE_CALL(gate_forward, gate, begin, end, scratch.data());
    NVAE_CALL(gate_backward, back, begin, end, scratch.data());
    for (int64_t i = begin * channels; i < end * channels; ++i) through[i] *= share;
    map.run(begin, end);
  }
  std::vector<double> expand(to_w2.size());
  GateWeights::from_transposed(to_w2.data(), channels, units, expand.data());
  const auto result = [&](const std::vector<double>& from, std::initializer_list<int64_t> size) {
    const Tensor out = allocate(size, type, x);
    S* data = out.mutable_data_ptr<S>();
    for (size_t i = 0; i < from.size(); ++i) data[i] = static_cast<S>(from[i]);
    return out;
  };
  return {map.out(), result(to_w1, {units, channels}), result(to_b1, {units}),
          result(expand, {channels, units}), result(to_b2, {channels})};
}

// Gradients of x, in the dtype of grad, and of the layers, in that of the arithmetic.
static Gradients squeeze_excite_gradients(const Tensor& grad, const Tensor& x, const Tensor& pooled,
                                          const Tensor& w1, const Tensor& b1, const Tensor& w2,
                                          const Tensor& b2, double residual_scale) {
  const char* op = "squeeze_excite_gradients";
  check_layers(op, x, w1, b1, w2, b2);
  check_floating_like(op, "grad", grad, "x", x);
  check_floating(op, "pooled", pooled, {x.size(0), x.size(1)});
  dtype_of(op, "x", x);
  const ScalarType sums = accumulation_type(dtype_of(op, "grad", grad));
  const auto run = sums == ScalarType::Double ? backward<double> : backward<float>;
  return run(grad, x, to_dtype(pooled, sums), w1, b1, w2, b2, residual_scale);
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "squeeze_excite", &nvae::squeeze_excite);
  NVAE_IMPL(m, "squeeze_excite_gradients", &nvae::squeeze_excite_gradients);
}
