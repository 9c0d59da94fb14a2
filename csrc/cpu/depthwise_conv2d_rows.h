// Rows of maps on their way into and out of the depthwise kernels: activations, conversion, transposition.
// Include it in csrc/cpu/depthwise_conv2d*.vec.cpp only.
#pragma once
#include "../vec.h"
#include "depthwise_conv2d.h"

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

// act(u), and its derivative where it is asked for.
template <int activation, bool with_derivative, class V>
NVAE_INLINE V activate(V u, V& derivative) {
  using S = typename V::Scalar;
  const V one(S(1));
  if constexpr (activation == 1) {
    // A division by infinity gives the limit 0 for large negative u.
    const V sigma = one / (one + exp(-u));
    const V h = u * sigma;
    if constexpr (with_derivative) derivative = fma(h, one - sigma, sigma);
    return h;
  } else if constexpr (activation == 2) {
    V e, less_one;
    exp_and_less_one(u, e, less_one);
    const auto positive = u > V(S(0));
    if constexpr (with_derivative) derivative = select(positive, one, e);
    return select(positive, u, less_one);
  } else {
    return u;
  }
}

// One row of a map as vectors: pixel s of vector g is at p + s * pixel + g * V::size.
template <class T>
struct Row {
  T* p;
  int64_t pixel;
};

// A group of vectors of channels: lanes of the last one may be absent.
struct Group {
  int64_t first;   // channel
  int count;       // vectors
  int full, tail;  // vectors with all lanes; lanes of the one after them
};
template <class V>
NVAE_INLINE Group group_of(const DepthwiseArgs& a, int64_t group) {
  const int64_t first = group * a.group * V::size, rest = a.channels - first;
  const int64_t count = a.vectors - group * a.group;
  Group c;
  c.first = first;
  c.count = static_cast<int>(count < a.group ? count : a.group);
  c.full = rest >= c.count * V::size ? c.count : c.count - 1;
  c.tail = static_cast<int>(rest - c.full * V::size);
  return c;
}
template <class V>
NVAE_INLINE int lanes(const Group& c, int g) {
  return g < c.full ? V::size : c.tail;
}

// Calls run(g, n) for every vector g of a group, which has n lanes. Vectors are in the outer loop and pixels in the inner one, so
// that what belongs to channels stays in registers.
template <class V, class F>
NVAE_INLINE void each_group_vector(const Group& c, F run) {
  for (int g = 0; g < c.full; ++g) run(g, V::size);
  if (c.full < c.count) run(c.full, c.tail);
}

// Per-channel constants, null: `missing`.
template <class V>
NVAE_INLINE V constant(const void* p, const Group& c, int g, double missing) {
  using S = typename V::Scalar;
  if (!p) return V(static_cast<S>(missing));
  return load<V>(static_cast<const S*>(p) + c.first + g * V::size, lanes<V>(c, g));
}

template <class T>
NVAE_INLINE T* place(const DepthwiseMap& m, int64_t b, int64_t channel, int64_t row) {
  return static_cast<T*>(m.data) + b * m.batch + channel * m.channel + row * m.row;
}

// Asks for a row of a channels_last map ahead of its use: chunks of a few vectors, a pixel apart, are more
// than the processor foresees.
template <bool write, class V, class T>
NVAE_INLINE void prefetch_row(const DepthwiseMap& m, int64_t b, const Group& c, int64_t row) {
  if (!m.channels_last || row >= m.height) return;
  const char* p = reinterpret_cast<const char*>(place<T>(m, b, c.first, row));
  const int64_t pixel = m.pixel * static_cast<int64_t>(sizeof(T));
  const int64_t bytes =
      (c.full * V::size + (c.full < c.count ? c.tail : 0)) * static_cast<int64_t>(sizeof(T));
  for (int64_t s = 0; s < m.width; ++s, p += pixel)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, write ? 1 : 0, 2);
}

// Planar maps: a row of one vector's channels into lanes, converted; and back.
template <class V, class T>
static void gather_row(const DepthwiseMap& m, int64_t b, const Group& c, int64_t row,
                       typename V::Scalar* to) {
  const int n = lanes<V>(c, 0);
  const T* from = place<T>(m, b, c.first, row);
  for (int64_t s = 0; s < m.width; s += V::size) {
    const int pixels = m.width - s < V::size ? static_cast<int>(m.width - s) : V::size;
    V z[V::size];
    for (int j = 0; j < V::size; ++j)
      z[j] = j < n ? load<V>(from + j * m.channel + s, pixels) : V(typename V::Scalar(0));
    transpose(z);
    for (int j = 0; j < pixels; ++j) z[j].store(to + (s + j) * V::size);
  }
}
template <class V, class T>
static void scatter_row(const DepthwiseMap& m, int64_t b, const Group& c, int64_t row,
                        const typename V::Scalar* from) {
  const int n = lanes<V>(c, 0);
  T* to = place<T>(m, b, c.first, row);
  for (int64_t s = 0; s < m.width; s += V::size) {
    const int pixels = m.width - s < V::size ? static_cast<int>(m.width - s) : V::size;
    V z[V::size];
    for (int j = 0; j < V::size; ++j)
      z[j] = j < pixels ? V::load(from + (s + j) * V::size) : V(typename V::Scalar(0));
    transpose(z);
    for (int j = 0; j < n; ++j) store(z[j], to + j * m.channel + s, pixels);
  }
}

// A row to read, with the elements of memory or, of planar maps, as scalars in `buffer`: run(row, lanes).
template <class V, class T, class F>
NVAE_INLINE void read_row(const DepthwiseMap& m, int64_t b, const Group& c, int64_t row,
                          typename V::Scalar* buffer, F run) {
  if (m.channels_last) {
    run(Row<const T>{place<T>(m, b, c.first, row), m.pixel});
  } else {
    gather_row<V, T>(m, b, c, row, buffer);
    run(Row<const typename V::Scalar>{buffer, V::size});
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
