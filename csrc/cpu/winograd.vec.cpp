// The transforms of Winograd's F(4x4, 3x3) and their adjoints, compiled once per capability: Lavin and Gray, arXiv 1509.09308,
// section 4. Their matrices are written out in nvae_fast/ops/winograd.py.
#include "winograd.h"

#include "plane_loops.h"

namespace nvae {
namespace NVAE_ISA {
namespace {

using V = VecF;
constexpr int kTile = kWinogradTile, kPatch = kWinogradPatch;

// The points P and Q, of which nvae_fast/ops/winograd.py says why, and products of their squares.
constexpr float kP = 0.625f, kQ = 1.5f, kPP = kP * kP, kQQ = kQ * kQ, kSum = kPP + kQQ, kProduct = kPP * kQQ;

// One dimension of the transforms. T::in and T::out are numbers of values; V in[], out[].
struct InputTransform {  // B'
  static constexpr int in = 6, out = 6;
  NVAE_INLINE static void run(const V* d, V* t) {
    const V p_even = fnma(V(kQQ), d[2], d[4]), p_odd = V(kP) * fnma(V(kQQ), d[1], d[3]);
    const V q_even = fnma(V(kPP), d[2], d[4]), q_odd = V(kQ) * fnma(V(kPP), d[1], d[3]);
    t[0] = fma(V(kProduct), d[0], fnma(V(kSum), d[2], d[4]));
    t[1] = p_even + p_odd;
    t[2] = p_even - p_odd;
    t[3] = q_even + q_odd;
    t[4] = q_even - q_odd;
    t[5] = fma(V(kProduct), d[1], fnma(V(kSum), d[3], d[5]));
  }
};
struct InputAdjoint {  // B
  static constexpr int in = 6, out = 6;
  NVAE_INLINE static void run(const V* t, V* d) {
    const V p_sum = t[1] + t[2], p_difference = V(kP) * (t[1] - t[2]);
    const V q_sum = t[3] + t[4], q_difference = V(kQ) * (t[3] - t[4]);
    d[0] = V(kProduct) * t[0];
    d[1] = fma(V(kProduct), t[5], -fma(V(kQQ), p_difference, V(kPP) * q_difference));
    d[2] = -fma(V(kSum), t[0], fma(V(kQQ), p_sum, V(kPP) * q_sum));
    d[3] = fnma(V(kSum), t[5], p_difference + q_difference);
    d[4] = t[0] + p_sum + q_sum;
    d[5] = t[5];
  }
};
struct OutputTransform {  // A'
  static constexpr int in = 6, out = 4;
  NVAE_INLINE static void run(const V* m, V* y) {
    const V p_sum = m[1] + m[2], p_difference = V(kP) * (m[1] - m[2]);
    const V q_sum = m[3] + m[4], q_difference = V(kQ) * (m[3] - m[4]);
    y[0] = m[0] + p_sum + q_sum;
    y[1] = p_difference + q_difference;
    y[2] = fma(V(kPP), p_sum, V(kQQ) * q_sum);
    y[3] = fma(V(kPP), p_difference, fma(V(kQQ), q_difference, m[5]));
  }
};
struct OutputAdjoint {  // A
  static constexpr int in = 4, out = 6;
  NVAE_INLINE static void run(const V* y, V* m) {
    const V p_even = fma(V(kPP), y[2], y[0]), p_odd = V(kP) * fma(V(kPP), y[3], y[1]);
    const V q_even = fma(V(kQQ), y[2], y[0]), q_odd = V(kQ) * fma(V(kQQ), y[3], y[1]);
    m[0] = y[0];
    m[1] = p_even + p_odd;
    m[2] = p_even - p_odd;
    m[3] = q_even + q_odd;
    m[4] = q_even - q_odd;
    m[5] = y[3];
  }
};

constexpr float kAtZero = 1 / kProduct, kAtP = 1 / (2 * kPP * (kPP - kQQ)),
                kAtQ = 1 / (2 * kQQ * (kQQ - kPP));
struct WeightTransform {  // G
  static constexpr int in = 3, out = 6;
  NVAE_INLINE static void run(const V* g, V* t) {
    const V p_even = V(kAtP) * fma(V(kPP), g[2], g[0]), p_odd = V(kAtP * kP) * g[1];
    const V q_even = V(kAtQ) * fma(V(kQQ), g[2], g[0]), q_odd = V(kAtQ * kQ) * g[1];
    t[0] = V(kAtZero) * g[0];
    t[1] = p_even + p_odd;
    t[2] = p_even - p_odd;
    t[3] = q_even + q_odd;
    t[4] = q_even - q_odd;
    t[5] = g[2];
  }
};
struct WeightAdjoint {  // G'
  static constexpr int in = 6, out = 3;
  NVAE_INLINE static void run(const V* t, V* g) {
    const V p_sum = V(kAtP) * (t[1] + t[2]), p_difference = t[1] - t[2];
    const V q_sum = V(kAtQ) * (t[3] + t[4]), q_difference = t[3] - t[4];
    g[0] = fma(V(kAtZero), t[0], p_sum + q_sum);
    g[1] = fma(V(kAtP * kP), p_difference, V(kAtQ * kQ) * q_difference);
    g[2] = fma(V(kPP), p_sum, fma(V(kQQ), q_sum, t[5]));
  }
};

// Both dimensions: load(row, column) and store(row, column, value).
template <class T, class Load, class Store>
NVAE_INLINE void transform(Load load, Store store) {
  V half[T::out * T::in];
  for (int j = 0; j < T::in; ++j) {
    V column[T::in], made[T::out];
    for (int i = 0; i < T::in; ++i) column[i] = load(i, j);
    T::run(column, made);
    for (int i = 0; i < T::out; ++i) half[i * T::in + j] = made[i];
  }
  for (int i = 0; i < T::out; ++i) {
    V made[T::out];
    T::run(half + i * T::in, made);
    for (int j = 0; j < T::out; ++j) store(i, j, made[j]);
  }
}

template <class T, class E>
void tiles_of(const WinogradArgs& a, int64_t begin, int64_t end) {
  constexpr int first = T::in == kPatch ? -1 : 0;  // of a tile's patch
  const E* const map = static_cast<const E*>(a.map);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.tile_rows(), top = task % a.tile_rows() * kTile + first;
    for (int64_t t = 0; t < a.tile_columns(); ++t) {
      const int64_t left = t * kTile + first;
      const E* pixel[T::in][T::in];  // null outside the map
      for (int i = 0; i < T::in; ++i)
        for (int j = 0; j < T::in; ++j) {
          const int64_t y = top + i, x = left + j;
          const bool inside = y >= 0 && y < a.height && x >= 0 && x < a.width;
          pixel[i][j] = inside ? map + ((b * a.height + y) * a.width + x) * a.channels : nullptr;
        }
      float* const tile = a.tiles + (task * a.tile_columns() + t) * kWinogradPoints * a.channels;
      float* const sums = a.sums ? a.sums + task * a.channels : nullptr;
      each_vector<V>(a.channels, [&](int64_t c, int n) {
        V sum(0.0f);
        transform<T>(
            [&](int i, int j) {
              const V v = pixel[i][j] ? load_n<V>(pixel[i][j] + c, n) : V(0.0f);
              if (T::in == kTile) sum = sum + v;
              return v;
            },
            [&](int i, int j, V v) { store_n(v, tile + (i * kPatch + j) * a.channels + c, n); });
        if (sums) store_n(t == 0 ? sum : sum + load_n<V>(sums + c, n), sums + c, n);
      });
    }
  }
}

// y = A' m A + bias.
template <class E>
void outputs(const WinogradArgs& a, int64_t begin, int64_t end) {
  E* const map = static_cast<E*>(a.map);
  const int64_t step = a.count() * a.channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.groups(), low = task % a.groups() * kWinogradGroup;
    const int64_t width = a.channels - low < kWinogradGroup ? a.channels - low : kWinogradGroup;
    for (int64_t row = 0; row < a.tile_rows(); ++row)
      for (int64_t t = 0; t < a.tile_columns(); ++t) {
        const float* const tile =
            a.tiles + ((b * a.tile_rows() + row) * a.tile_columns() + t) * a.channels + low;
        E* const to = map + ((b * a.height + row * kTile) * a.width + t * kTile) * a.channels + low;
        each_vector<V>(width, [&](int64_t c, int n) {
          const V bias = a.bias ? load_n<V>(a.bias + low + c, n) : V(0.0f);
          transform<OutputTransform>(
              [&](int i, int j) { return load_n<V>(tile + (i * kPatch + j) * step + c, n); },
              [&](int i, int j, V v) { store_n(v + bias, to + (i * a.width + j) * a.channels + c, n); });
        });
      }
  }
}

// dx, the sum of B m B' over the patches that a pixel is in. Rows of the patches of a row of tiles are in scratch memory, with a
// border of one pixel; the last two are the first two of the next row of tiles.
template <class E>
void input_gradients(const WinogradArgs& a, float* scratch, int64_t begin, int64_t end) {
  E* const map = static_cast<E*>(a.map);
  const int64_t step = a.count() * a.channels, row_size = (a.width + 2) * kWinogradGroup;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.groups(), low = task % a.groups() * kWinogradGroup;
    const int64_t width = a.channels - low < kWinogradGroup ? a.channels - low : kWinogradGroup;
    for (int64_t i = 0; i < kPatch * row_size; ++i) scratch[i] = 0;
    for (int64_t row = 0; row < a.tile_rows(); ++row) {
      for (int64_t t = 0; t < a.tile_columns(); ++t) {
        const float* const tile =
            a.tiles + ((b * a.tile_rows() + row) * a.tile_columns() + t) * a.channels + low;
        float* const patch = scratch + t * kTile * kWinogradGroup;
        each_vector<V>(width, [&](int64_t c, int n) {
          transform<InputAdjoint>(
              [&](int i, int j) { return load_n<V>(tile + (i * kPatch + j) * step + c, n); },
              [&](int i, int j, V v) {
                float* const at = patch + i * row_size + j * kWinogradGroup + c;
                (V::load(at) + v).store(at);
              });
        });
      }
      // Padded rows 0 to 3 of these patches are complete, and with the last row of tiles row 4 too.
      const int64_t complete = row + 1 == a.tile_rows() ? kTile + 1 : kTile;
      for (int64_t i = 0; i < complete; ++i) {
        const int64_t y = row * kTile + i - 1;
        if (y < 0) continue;
        for (int64_t x = 0; x < a.width; ++x) {
          const float* const from = scratch + i * row_size + (x + 1) * kWinogradGroup;
          E* const to = map + ((b * a.height + y) * a.width + x) * a.channels + low;
          each_vector<V>(width, [&](int64_t c, int n) { store_n(V::load(from + c), to + c, n); });
        }
      }
      for (int64_t i = 0; i < 2 * row_size; ++i) scratch[i] = scratch[kTile * row_size + i];
      for (int64_t i = 2 * row_size; i < kPatch * row_size; ++i) scratch[i] = 0;
    }
  }
}

// The taps of neighbouring columns: adjacent in memory where the weight is in channels_last, else gathered.
template <bool gradient>
void weights_of(const WinogradWeights& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row)
    each_vector<V>(a.columns, [&](int64_t c, int n) {
      float* const taps = a.weight + row * a.row + c * a.column;
      float* const points = a.points + row * a.columns + c;
      const int64_t step = a.rows * a.columns;
      const auto point = [&](int i, int j) { return points + (i * kPatch + j) * step; };
      const auto tap = [&](int i, int j) { return taps + (i * 3 + j) * a.tap; };
      float lanes[V::size] = {};
      if constexpr (gradient)
        transform<WeightAdjoint>([&](int i, int j) { return load_n<V>(point(i, j), n); },
                                 [&](int i, int j, V v) {
                                   if (a.column == 1) return store_n(v, tap(i, j), n);
                                   v.store(lanes);
                                   for (int k = 0; k < n; ++k) tap(i, j)[k * a.column] = lanes[k];
                                 });
      else
        transform<WeightTransform>(
            [&](int i, int j) {
              if (a.column == 1) return load_n<V>(tap(i, j), n);
              for (int k = 0; k < n; ++k) lanes[k] = tap(i, j)[k * a.column];
              return V::load(lanes);
            },
            [&](int i, int j, V v) { store_n(v, point(i, j), n); });
    });
}

}  // namespace

void winograd_tiles(const WinogradArgs& a, int64_t begin, int64_t end) {
  const bool half = a.dtype == Dtype::bf16;
  if (a.gradient)
    return half ? tiles_of<OutputAdjoint, bf16>(a, begin, end)
                : tiles_of<OutputAdjoint, float>(a, begin, end);
  return half ? tiles_of<InputTransform, bf16>(a, begin, end)
              : tiles_of<InputTransform, float>(a, begin, end);
}

void winograd_map(const WinogradArgs& a, float* scratch, int64_t begin, int64_t end) {
  const bool half = a.dtype == Dtype::bf16;
  if (a.gradient)
    return half ? input_gradients<bf16>(a, scratch, begin, end)
                : input_gradients<float>(a, scratch, begin, end);
  return half ? outputs<bf16>(a, begin, end) : outputs<float>(a, begin, end);
}

void winograd_weights(const WinogradWeights& a, bool gradient, int64_t begin, int64_t end) {
  gradient ? weights_of<true>(a, begin, end) : weights_of<false>(a, begin, end);
}

}  // namespace NVAE_ISA
}  // namespace nvae
