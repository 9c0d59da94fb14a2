// The forward kernel of depthwise_conv2d: activated rows of x in a ring, rows of y out of it.
#include "depthwise_conv2d_phase.h"

namespace nvae {
namespace NVAE_ISA {

int depthwise_lanes(Dtype dtype) { return dtype == Dtype::f64 ? VecD::size : VecF::size; }

namespace {

// h = act(scale x + shift) of one row into the ring.
template <class V, int activation, class T>
void activate_row(const DepthwiseArgs& a, const Group& c, Row<const T> x, int64_t row,
                  const Ring<typename V::Scalar>& ring, const typename V::Scalar* constants) {
  using S = typename V::Scalar;
  each_group_vector<V>(c, [&](int g, int n) {
    const V scale = V::load(constants + 2 * g * V::size), shift = V::load(constants + (2 * g + 1) * V::size);
    const T* from = x.p + g * V::size;
    S* to = ring.at(g, row);
    for (int64_t s = 0; s < a.x.width; ++s, from += x.pixel, to += V::size) {
      V derivative;
      activate<activation, false>(fma(scale, load<V>(from, n), shift), derivative).store(to);
    }
  });
}

// act(scale y + shift) of a row of y in scratch memory.
template <class V, int activation>
void finish_row(const DepthwiseArgs& a, const Group& c, typename V::Scalar* out) {
  for (int g = 0; g < c.count; ++g) {
    const V scale = constant<V>(a.out_scale, c, g, 1.0), shift = constant<V>(a.out_shift, c, g, 0.0);
    for (int64_t s = 0; s < a.y.width; ++s, out += V::size) {
      V derivative;
      activate<activation, false>(fma(scale, V::load(out), shift), derivative).store(out);
    }
  }
}

// A row of y from scratch to memory, and its part of the statistics.
template <class V, class T>
void store_row_sum(const DepthwiseArgs& a, const Group& c, int64_t b, int64_t row, typename V::Scalar* out,
                   double* sums, bool start) {
  using S = typename V::Scalar;
  const int64_t width = a.y.width, vector = width * V::size;
  T* const to = place<T>(a.y, b, c.first, row);
  if (a.y.channels_last) {
    each_group_vector<V>(c, [&](int g, int n) {
      const S* from = out + g * vector;
      T* at = to + g * V::size;
      for (int64_t s = 0; s < width; ++s, from += V::size, at += a.y.pixel) store(V::load(from), at, n);
    });
  } else {
    scatter_row<V, T>(a.y, b, c, row, out);
  }
  if (!sums) return;
  for (int g = 0; g < c.count; ++g) {
    const S* from = out + g * vector;
    double* total = sums + 3 * g * V::size;
    S lane[V::size], square[V::size];
    T rounded[V::size];  // statistics are of y as it is stored
    const auto value = [&](int64_t s) {
      if (sizeof(T) == sizeof(S)) return V::load(from + s * V::size);
      if (a.y.channels_last) return load<V>(to + s * a.y.pixel + g * V::size, lanes<V>(c, g));
      V::load(from + s * V::size).store(rounded);
      return V::load(rounded);
    };
    if (start) {
      value(0).store(lane);
      for (int j = 0; j < V::size; ++j) {
        total[j] = total[V::size + j] = 0;
        total[2 * V::size + j] = lane[j];
      }
    }
    for (int j = 0; j < V::size; ++j) lane[j] = static_cast<S>(total[2 * V::size + j]);
    const V pivot = V::load(lane);
    V sum(S(0)), squares(S(0));
    for (int64_t s = 0; s < width; ++s) {
      const V v = value(s) - pivot;
      sum = sum + v;
      squares = fma(v, v, squares);
    }
    sum.store(lane);
    squares.store(square);
    for (int j = 0; j < V::size; ++j) {
      total[j] += lane[j];
      total[V::size + j] += square[j];
    }
  }
}

template <class V>
int64_t forward_scratch(const DepthwiseArgs& a) {
  const int64_t rows = (a.group * a.y.width + a.x.width) * V::size;  // of y, and one of x transposed
  return static_cast<int64_t>(sizeof(typename V::Scalar)) *
         (ring_size<V>(a, a.x.width) + rows + 2 * a.group * V::size);
}

template <class V, class T>
void forward(const DepthwiseArgs& a, void* scratch, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const DepthwisePlan& plan = a.plan;
  const Ring<S> ring = make_ring<V>(a, a.x.width, static_cast<S*>(scratch));
  S* const out = ring.data + ring_size<V>(a, a.x.width);
  S* const planar = out + a.group * a.y.width * V::size;
  S* const constants = planar + a.x.width * V::size;
  const int64_t rows = (a.y.height + plan.row_phases - 1) / plan.row_phases;
  for (int64_t task = begin; task < end; ++task) {
    const Group c = group_of<V>(a, task % a.groups);
    const int64_t band = task / a.groups % a.bands, b = task / a.groups / a.bands;
    for (int g = 0; g < c.count; ++g) {
      constant<V>(a.scale, c, g, 1.0).store(constants + 2 * g * V::size);
      constant<V>(a.shift, c, g, 0.0).store(constants + (2 * g + 1) * V::size);
    }
    const S* taps = static_cast<const S*>(a.taps) + c.first * plan.taps;
    double* sums = a.sums ? a.sums + task * a.group * 3 * V::size : nullptr;
    const int64_t first = band * a.band, last = first + a.band < rows ? first + a.band : rows;
    int64_t next = first * plan.row_scale + plan.first_row;  // scanned row to be loaded
    next = next < 0 ? 0 : next;
    bool start = true;
    for (int64_t R = first; R < last; ++R) {
      for (; next <= R * plan.row_scale + plan.last_row && next < a.x.height; ++next)
        read_row<V, T>(a.x, b, c, next, planar, [&](auto row) {
          if (a.activation == 1)
            activate_row<V, 1>(a, c, row, next, ring, constants);
          else if (a.activation == 2)
            activate_row<V, 2>(a, c, row, next, ring, constants);
          else
            activate_row<V, 0>(a, c, row, next, ring, constants);
        });
      prefetch_row<false, V, T>(a.x, b, c, next);
      for (int e = 0; e < plan.row_phases && R * plan.row_phases + e < a.y.height; ++e) {
        prefetch_row<true, V, T>(a.y, b, c, R * plan.row_phases + e);
        for (int g = 0; g < c.count; ++g)
          for (int f = 0; f < plan.col_phases; ++f)
            run_phase<V>(a, plan.phases[e * plan.col_phases + f], R, a.x.height, a.y.width, ring, g,
                         taps + g * plan.taps * V::size, nullptr, nullptr, out + g * a.y.width * V::size);
        if (a.out_scale) {
          if (a.out_activation == 1)
            finish_row<V, 1>(a, c, out);
          else if (a.out_activation == 2)
            finish_row<V, 2>(a, c, out);
          else
            finish_row<V, 0>(a, c, out);
        }
        store_row_sum<V, T>(a, c, b, R * plan.row_phases + e, out, sums, start);
        start = false;
      }
    }
  }
}

}  // namespace

int64_t depthwise_forward_scratch(const DepthwiseArgs& a) {
  return a.dtype == Dtype::f64 ? forward_scratch<VecD>(a) : forward_scratch<VecF>(a);
}

void depthwise_forward(const DepthwiseArgs& a, void* scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return forward<VecF, float>(a, scratch, begin, end);
    case Dtype::f64:
      return forward<VecD, double>(a, scratch, begin, end);
    case Dtype::bf16:
      return forward<VecF, bf16>(a, scratch, begin, end);
    case Dtype::f16:
      return forward<VecF, f16>(a, scratch, begin, end);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
