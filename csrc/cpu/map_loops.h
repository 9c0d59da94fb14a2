// Loops over the tasks of a map (csrc/maps.h), for csrc/cpu/<op>.vec.cpp files.
#pragma once
#include "../maps.h"
#include "../noise.h"

namespace nvae {
namespace NVAE_ISA {

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
constexpr int64_t kPrefetchBytes = 2048;
template <class T>
NVAE_INLINE void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, 0);
}
template <class T>
NVAE_INLINE void prefetch_for_write(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, 1);
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

// The two raw parameters at one place of packed parameters, and what one pixel more adds.
template <class T>
struct Raw {
  const T *mu = nullptr, *log_sigma = nullptr;
  int64_t step = 0;
  Raw(const Packed& packed, int64_t channels, int64_t b, int64_t c, int64_t p) {
    if (!packed.data) return;
    mu = static_cast<const T*>(packed.data) + b * packed.batch + c * packed.channel + p * packed.pixel;
    log_sigma = mu + channels * packed.channel;
    step = packed.pixel;
  }
};

// A segment of a task: n lanes (pixels of a row, or channels) times `steps` steps. Lane j of step i is
// element `at + i * map_step` + j of a dense map, and is at `eps + i * V::size` (rows: eps + i) in the
// noise.
template <class S>
struct Segment {
  int64_t task, b, c, p;  // first element
  int64_t row;            // b * channels + c
  int64_t count;          // pixels
  int64_t rows;           // 1, or whole rows of one sample, one after the other
  int64_t map, packed;  // its place in a dense map (B, Z, pixels), in dense packed parameters (B, 2Z, pixels)
  const S* eps;
};

// Calls run(segment) for each task of a contiguous map: a span of one row. Short rows share one call for noise
// and, up to `group` of them, a segment.
template <class V, class F>
static void for_rows(const MapShape& m, const Noise* noise, int64_t begin, int64_t end, F run,
                     int64_t group = 1) {
  using S = typename V::Scalar;
  alignas(64) S eps[MapShape::kSpan + V::size];  // whole vectors are read from the last elements on
  const NoiseSource source(noise ? *noise : Noise{});
  const auto segment = [&](int64_t task, int64_t row, int64_t p, int64_t count, const S* at, int64_t most) {
    const int64_t b = row / m.channels, c = row % m.channels;
    const int64_t rows = most < m.channels - c ? most : m.channels - c;
    run(Segment<S>{task, b, c, p, row, rows * count, rows, row * m.pixels + p,
                   (b * 2 * m.channels + c) * m.pixels + p, at});
    return rows;
  };
  const int64_t spans = m.spans();
  if (spans > 1) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / spans, p = task % spans * m.span();
      const int64_t count = m.pixels - p < m.span() ? m.pixels - p : m.span();
      if (noise) source.fill(row * m.pixels + p, count, eps);
      segment(task, row, p, count, eps, 1);
    }
    return;
  }
  const int64_t rows = m.kSpan / m.pixels;
  for (int64_t task = begin; task < end; task += rows) {
    const int64_t n = end - task < rows ? end - task : rows;
    if (noise) source.fill(task * m.pixels, n * m.pixels, eps);
    for (int64_t i = 0; i < n;)
      i += segment(task + i, task + i, 0, m.pixels, eps + i * m.pixels, n - i < group ? n - i : group);
  }
}

// channels_last: calls run(segment, n) for every block of n <= V::size channels of every task.
template <class V, class F>
static void for_channels(const MapShape& m, const Noise* noise, int64_t begin, int64_t end, F run) {
  using S = typename V::Scalar;
  alignas(64) S eps[MapShape::kPixels * V::size];
  const NoiseSource source(noise ? *noise : Noise{});
  const int64_t spans = m.spans();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / spans, p = task % spans * m.span();
    const int64_t count = m.pixels - p < m.span() ? m.pixels - p : m.span(), pixel = b * m.pixels + p;
    for (int64_t c = 0; c < m.channels; c += V::size) {
      const int n = m.channels - c < V::size ? static_cast<int>(m.channels - c) : V::size;
      if (noise) source.fill_channels(b, c, n, m.channels, m.pixels, p, count, eps);
      run(Segment<S>{task, b, c, p, b * m.channels + c, count, 1, pixel * m.channels + c,
                     pixel * 2 * m.channels + c, eps},
          n);
    }
  }
}

// Upstream gradients of sums (B, Z), which may be absent: of one row in every lane, or of n channels.
template <class V>
NVAE_INLINE V row_gradient(const double* grads, int64_t row) {
  return V(grads ? static_cast<typename V::Scalar>(grads[row]) : typename V::Scalar(0));
}
template <class V>
NVAE_INLINE V channel_gradients(const double* grads, int64_t row, int n) {
  typename V::Scalar lanes[V::size] = {};
  if (grads)
    for (int j = 0; j < n; ++j) lanes[j] = static_cast<typename V::Scalar>(grads[row + j]);
  return V::load(lanes);
}

// Stores lane-wise sums for the second stage: partial[(task * kinds + kind) * lanes + channel].
template <class V>
NVAE_INLINE void store_row_sum(V sums, double constant, double* partial, int64_t task, int kinds, int kind) {
  partial[task * kinds + kind] = sum(sums) - constant;
}
template <class V>
NVAE_INLINE void store_channel_sums(V sums, double constant, double* partial, const MapShape& m, int64_t task,
                                    int64_t c, int n, int kinds, int kind) {
  typename V::Scalar lanes[V::size];
  sums.store(lanes);
  double* out = partial + (task * kinds + kind) * m.channels + c;
  for (int j = 0; j < n; ++j) out[j] = lanes[j] - constant;
}

}  // namespace NVAE_ISA
}  // namespace nvae
