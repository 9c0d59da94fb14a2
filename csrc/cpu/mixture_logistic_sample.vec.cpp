// mixture_logistic_sample, compiled once per capability: Gumbel-max over the components, then logistic noise,
// as in nvae_fast/ops/mixture_logistic.py, from the same words of the Philox streams.
#include "../philox.h"
#include "mixture_logistic.h"
#include "pixel_tiles.h"

namespace nvae {
namespace NVAE_ISA {

// Words first .. first + count - 1 of a stream, in order, VecF::size blocks at a time; all below 2^34, where
// the upper half of the block number is 0.
class WordStream {
 public:
  explicit WordStream(uint64_t seed) : key_(seed) {}

  void fill(uint64_t first, int64_t count, uint32_t* out) const {
    constexpr int kBatch = 4 * VecF::size;
    uint64_t block = first / 4;
    int64_t skip = static_cast<int64_t>(first % 4);
    while (count > 0) {
      uint32_t some[kBatch];
      const int64_t n = count < kBatch - skip ? count : kBatch - skip;
      if (skip == 0 && n == kBatch) {
        make(block, out);
      } else {
        make(block, some);
        for (int64_t i = 0; i < n; ++i) out[i] = some[skip + i];
      }
      out += n;
      count -= n;
      block += VecF::size;
      skip = 0;
    }
  }

 private:
  NVAE_INLINE void make(uint64_t block, uint32_t* out) const {
    Bits w[4];
    VecF z[4];
    philox_words(Words64(block) + Words64::load(order_.even), Words64(block) + Words64::load(order_.odd),
                 key_, w);
    transpose_chunks(from_bits(w[0]), from_bits(w[1]), from_bits(w[2]), from_bits(w[3]), z);
    for (int j = 0; j < 4; ++j) bits(z[j]).store(out + j * VecF::size);
  }

  PhiloxKey key_;
  BlockLanes order_;
};

// The middle of one of 2^23 cells of (0, 1); exact, and so is 1 minus it.
NVAE_INLINE VecF uniform(const uint32_t* words, VecF) {
  return (int_to_float(shift_right<9>(Bits::load(words))) + VecF(0.5f)) * VecF(0x1p-23f);
}
NVAE_INLINE VecD uniform(const uint32_t* words, VecD) {
  return (static_cast<double>(*words >> 9) + 0.5) * 0x1p-23;
}

template <class V>
NVAE_INLINE V clamped(V x) {
  return min(V(1), max(V(-1), x));  // NaN passes
}

template <class V, class T>
struct Sampler {
  using S = typename V::Scalar;
  const MixtureLogistic& a;
  S* logits;        // a tile of them
  uint32_t* words;  // (M, pixels of the span), then (3, them), and a vector more that may be read
  V temperature;

  Sampler(const MixtureLogistic& args, void* scratch)
      : a(args), logits(static_cast<S*>(scratch)), temperature(static_cast<S>(args.temperature)) {
    words = reinterpret_cast<uint32_t*>(logits + (a.mixtures + 16) * V::size);
  }

  // The components with the largest logit / temperature + Gumbel noise; NaN counts as largest, as in argmax.
  NVAE_INLINE V choose(const uint32_t* noise, int64_t step) const {
    const auto score = [&](int64_t m) {
      const V u = uniform(noise + m * step, V());
      return V::load(logits + m * V::size) / temperature - log_positive(-log_positive(u));
    };
    V best = score(0), chosen(S(0));
    for (int64_t m = 1; m < a.mixtures; ++m) {
      const V other = score(m);
      const auto better = ~(other <= best) & (best == best);
      best = select(better, other, best);
      chosen = select(better, V(static_cast<S>(m)), chosen);
    }
    return chosen;
  }

  // Pixels p .. p + n - 1 of image b.
  NVAE_INLINE void tile(int64_t b, int64_t p, int n, const uint32_t* noise, int64_t step) const {
    load_tile<T>(a.params, b, p, n, a.mixtures, logits);
    S lanes[V::size], found[9][V::size] = {};
    choose(noise, step).store(lanes);
    const T* pixel = static_cast<const T*>(a.params.data) + b * a.params.batch + p * a.params.pixel;
    for (int j = 0; j < n; ++j, pixel += a.params.pixel)
      for (int i = 0; i < 9; ++i)
        found[i][j] =
            scalar(pixel + ((i + 1) * a.mixtures + static_cast<int64_t>(lanes[j])) * a.params.channel);
    V x[3], c[3];
    for (int i = 0; i < 3; ++i) {
      const V u = uniform(noise + (a.mixtures + i) * step, V());
      const V noise_i = log_positive(u) - log_positive(V(S(1)) - u);
      const V scale = exp(max(V(S(-7)), V::load(found[3 * i + 1])));
      x[i] = V::load(found[3 * i]) + scale * temperature * noise_i;
      c[i] = tanh(V::load(found[3 * i + 2]));
    }
    const V half(S(0.5)), red = clamped(x[0]), green = clamped(x[1] + c[0] * red);
    const V blue = clamped(x[2] + c[1] * red + c[2] * green);
    T* out = static_cast<T*>(a.out) + b * 3 * a.pixels + p;
    store_lanes(red * half + half, out, n);
    store_lanes(green * half + half, out + a.pixels, n);
    store_lanes(blue * half + half, out + 2 * a.pixels, n);
  }
  NVAE_INLINE static S scalar(const float* p) { return *p; }
  NVAE_INLINE static S scalar(const double* p) { return static_cast<S>(*p); }
  NVAE_INLINE static S scalar(const bf16* p) { return load_float(p); }
  NVAE_INLINE static S scalar(const f16* p) { return load_float(p); }
};

template <class V, class T>
static void sample(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  const Sampler<V, T> sampler(a, scratch);
  const WordStream components(a.component_seed), noise(a.noise_seed);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.spans(), first = task % a.spans() * a.kSpan;
    const int64_t count = a.pixels - first < a.kSpan ? a.pixels - first : a.kSpan;
    const auto draw = [&](const WordStream& stream, int64_t rows, uint32_t* out) {
      const int64_t start = b * rows * a.pixels + first;
      if (count == a.pixels) return stream.fill(static_cast<uint64_t>(start), rows * count, out);
      for (int64_t row = 0; row < rows; ++row)
        stream.fill(static_cast<uint64_t>(start + row * a.pixels), count, out + row * count);
    };
    draw(components, a.mixtures, sampler.words);
    draw(noise, 3, sampler.words + a.mixtures * count);
    for (int64_t i = 0; i < count; i += V::size)
      sampler.tile(b, first + i, count - i < V::size ? static_cast<int>(count - i) : V::size,
                   sampler.words + i, count);
  }
}

void mixture_logistic_sample(const MixtureLogistic& a, int64_t begin, int64_t end, void* scratch) {
  switch (a.dtype) {
    case Dtype::f32:
      return sample<VecF, float>(a, begin, end, scratch);
    case Dtype::f64:
      return sample<VecD, double>(a, begin, end, scratch);
    case Dtype::bf16:
      return sample<VecF, bf16>(a, begin, end, scratch);
    case Dtype::f16:
      return sample<VecF, f16>(a, begin, end, scratch);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
