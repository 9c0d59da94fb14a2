// Loops over the tasks of a map (csrc/maps.h) for the kernels over planes, in csrc/cpu/<op>.vec.cpp files.
#pragma once
#include "../maps.h"
#include "../vec.h"

namespace nvae {
namespace NVAE_ISA {

// Elements ahead of the one at work that are fetched into the cache; the processor's own prefetching stops at
// the end of a page and is late where rows are short.
template <class T>
NVAE_INLINE void prefetch(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 2048);
}

template <class T>
NVAE_INLINE void prefetch_for_write(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + 2048, 1);
}

template <class V, class T>
NVAE_INLINE V load_n(const T* p, int n) {
  return n == V::size ? V::load(p) : V::load(p, n);
}
template <class V, class T>
NVAE_INLINE void store_n(V v, T* p, int n) {
  if (n == V::size)
    v.store(p);
  else
    v.store(p, n);
}
// The first n lanes, 0 in the others.
template <class V>
NVAE_INLINE V first_lanes(V v, int n) {
  typename V::Scalar lanes[V::size];
  v.store(lanes);
  for (int j = n; j < V::size; ++j) lanes[j] = 0;
  return V::load(lanes);
}

// Rows (NCHW): run(b, c, s, at, count) for each task, `count` pixels of channel c of sample b, the first of
// which is element `at` of the map; s is the number of the task within its row.
template <class F>
NVAE_INLINE void each_row(const MapShape& m, int64_t begin, int64_t end, F run) {
  const int64_t spans = m.spans(), span = m.span();
  int64_t row = begin / spans, s = begin % spans, b = row / m.channels, c = row % m.channels;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t p = s * span, left = m.pixels - p;
    run(b, c, s, row * m.pixels + p, left < span ? left : span);
    if (++s < spans) continue;
    s = 0;
    ++row;
    if (++c < m.channels) continue;
    c = 0;
    ++b;
  }
}

// channels_last: run(b, task, pixel, count) for each task, `count` pixels of which the first has the channels
// from element pixel * channels of the map on.
template <class F>
NVAE_INLINE void each_run(const MapShape& m, int64_t begin, int64_t end, F run) {
  const int64_t spans = m.spans(), span = m.span();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / spans, p = task % spans * span, left = m.pixels - p;
    run(b, task, b * m.pixels + p, left < span ? left : span);
  }
}

// Calls run(i, n) for vectors of n lanes from element i on; n is V::size but for the last. The loop over full
// vectors is its own, so that the compiler sees the constant.
template <class V, class F>
NVAE_INLINE void each_vector(int64_t count, F run) {
  int64_t i = 0;
  for (; i + V::size <= count; i += V::size) run(i, V::size);
  if (i < count) run(i, static_cast<int>(count - i));
}

// Sums over the pixels of a channels_last task: channels are taken kBlock at a time and pixels kGroup at a
// time, so that memory is read nearly in order and the sums stay in the innermost cache. A group is added up
// before it is added to the others: the fewer additions a value goes through, the fewer roundings.
constexpr int64_t kBlock = 1024;
constexpr int kGroup = 8;
template <class V, int kinds>
struct BlockSums {
  using S = typename V::Scalar;
  alignas(64) S sums[kinds][kBlock];

  // add(c, n, pixel, count, totals): channels c .. c + n - 1 of the block, pixels pixel .. pixel + count - 1.
  template <class F>
  NVAE_INLINE void run(int64_t channels, int64_t pixels, F add) {
    for (int k = 0; k < kinds; ++k)
      for (int64_t c = 0; c < channels; c += V::size) V(S(0)).store(sums[k] + c);
    for (int64_t i = 0; i < pixels; i += kGroup) {
      const int count = pixels - i < kGroup ? static_cast<int>(pixels - i) : kGroup;
      each_vector<V>(channels, [&](int64_t c, int n) {
        V totals[kinds];
        for (int k = 0; k < kinds; ++k) totals[k] = V(S(0));
        if (count == kGroup)
          add(c, n, i, kGroup, totals);
        else
          add(c, n, i, count, totals);
        for (int k = 0; k < kinds; ++k) (V::load(sums[k] + c) + totals[k]).store(sums[k] + c);
      });
    }
  }
};

// Calls run(tag, tag) with the vector and element type of a dtype.
template <class V, class T>
struct Types {
  using Vector = V;
  using Element = T;
};
template <class F>
NVAE_INLINE void with_types(Dtype dtype, F run) {
  switch (dtype) {
    case Dtype::f32:
      return run(Types<VecF, float>{});
    case Dtype::f64:
      return run(Types<VecD, double>{});
    case Dtype::bf16:
      return run(Types<VecF, bf16>{});
    case Dtype::f16:
      return run(Types<VecF, f16>{});
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
