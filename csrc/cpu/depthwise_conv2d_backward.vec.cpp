// The backward kernel of depthwise_conv2d. It reads maps once: rows of dy are kept in a ring, and each pixel of
// x is combined with the dy that depends on it, for its own gradient and its share of all others.
#include "depthwise_conv2d_phase.h"

namespace nvae {
namespace NVAE_ISA {
namespace {

// Rows of scratch memory besides the ring, a vector of `width` pixels each for every vector of the group, and
// per-channel constants and sums.
enum { kScale, kShift, kPivot, kAlpha, kBeta, kGamma, kScaleSum, kShiftSum, kConstants };

template <class S>
struct Scratch {
  Ring<S> ring;
  S *h, *derivative, *dh, *planar, *planar_out, *constants;
  int64_t vector;  // of h, derivative and dh
};

template <class V>
int64_t backward_scratch(const DepthwiseArgs& a) {
  const int64_t widest = a.x.width > a.grad.width ? a.x.width : a.grad.width;
  return static_cast<int64_t>(sizeof(typename V::Scalar)) *
         (ring_size<V>(a, a.grad.width) +
          (3 * a.group * a.x.width + 2 * widest + kConstants * a.group) * V::size);
}

template <class V>
Scratch<typename V::Scalar> cut_scratch(const DepthwiseArgs& a, void* memory) {
  using S = typename V::Scalar;
  const int64_t widest = a.x.width > a.grad.width ? a.x.width : a.grad.width;
  Scratch<S> s;
  s.vector = a.x.width * V::size;
  s.ring = make_ring<V>(a, a.grad.width, static_cast<S*>(memory));
  s.h = s.ring.data + ring_size<V>(a, a.grad.width);
  s.derivative = s.h + a.group * s.vector;
  s.dh = s.derivative + a.group * s.vector;
  s.planar = s.dh + a.group * s.vector;
  s.planar_out = s.planar + widest * V::size;
  s.constants = s.planar_out + widest * V::size;
  return s;
}

// dy = alpha grad + beta out + gamma of one row into the ring.
template <class V, class T>
void upstream_row(const DepthwiseArgs& a, const Group& c, Row<const T> grad, const Row<const T>* out,
                  int64_t row, const Scratch<typename V::Scalar>& s) {
  using S = typename V::Scalar;
  each_group_vector<V>(c, [&](int g, int n) {
    const S* const constants = s.constants + g * kConstants * V::size;
    const V alpha = V::load(constants + kAlpha * V::size), beta = V::load(constants + kBeta * V::size),
            gamma = V::load(constants + kGamma * V::size);
    const T *from = grad.p + g * V::size, *y = out ? out->p + g * V::size : nullptr;
    S* to = s.ring.at(g, row);
    if (!out)
      for (int64_t i = 0; i < a.grad.width; ++i, from += grad.pixel, to += V::size)
        load<V>(from, n).store(to);
    else
      for (int64_t i = 0; i < a.grad.width; ++i, from += grad.pixel, y += out->pixel, to += V::size)
        fma(alpha, load<V>(from, n), fma(beta, load<V>(y, n), gamma)).store(to);
  });
}

// h and act' of one row of x.
template <class V, int activation, class T>
void activate_row(const DepthwiseArgs& a, const Group& c, Row<const T> x,
                  const Scratch<typename V::Scalar>& s) {
  using S = typename V::Scalar;
  each_group_vector<V>(c, [&](int g, int n) {
    const S* const constants = s.constants + g * kConstants * V::size;
    const V scale = V::load(constants + kScale * V::size), shift = V::load(constants + kShift * V::size);
    const T* from = x.p + g * V::size;
    int64_t at = g * s.vector;
    for (int64_t i = 0; i < a.x.width; ++i, from += x.pixel, at += V::size) {
      V derivative;
      activate<activation, true>(fma(scale, load<V>(from, n), shift), derivative).store(s.h + at);
      if constexpr (activation != 0) derivative.store(s.derivative + at);
    }
  });
}

// du = dh act', its sums, and grad_x = scale du into `to`.
template <class V, class T, class U>
void store_row_sum(const DepthwiseArgs& a, const Group& c, Row<const T> x, const Row<U>* to,
                   const Scratch<typename V::Scalar>& s, bool affine) {
  using S = typename V::Scalar;
  each_group_vector<V>(c, [&](int g, int n) {
    S* const constants = s.constants + g * kConstants * V::size;
    const V scale = V::load(constants + kScale * V::size), pivot = V::load(constants + kPivot * V::size);
    V scale_sum = V::load(constants + kScaleSum * V::size),
      shift_sum = V::load(constants + kShiftSum * V::size);
    for (int64_t i = 0; i < a.x.width; ++i) {
      const int64_t at = g * s.vector + i * V::size;
      V du = V::load(s.dh + at);
      if (a.activation != 0) du = du * V::load(s.derivative + at);
      if (to) store(du * scale, to->p + i * to->pixel + g * V::size, n);
      if (affine) {
        scale_sum = fma(du, load<V>(x.p + i * x.pixel + g * V::size, n) - pivot, scale_sum);
        shift_sum = du + shift_sum;
      }
    }
    scale_sum.store(constants + kScaleSum * V::size);
    shift_sum.store(constants + kShiftSum * V::size);
  });
}

template <class V>
void add_sums(const Group& c, const Scratch<typename V::Scalar>& s, double* sums) {
  for (int g = 0; g < c.count; ++g) {
    typename V::Scalar* row = s.constants + (g * kConstants + kScaleSum) * V::size;
    for (int j = 0; j < 2 * V::size; ++j) {
      sums[2 * g * V::size + j] += row[j];
      row[j] = 0;
    }
  }
}

template <class V, class T>
void backward(const DepthwiseArgs& a, void* scratch, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const bool data = a.grad_x.data || a.sums, weight = a.tap_gradients;
  const DepthwisePlan& plan = a.plan;
  const Scratch<S> s = cut_scratch<V>(a, scratch);
  const int64_t rows = (a.x.height + plan.row_phases - 1) / plan.row_phases;
  for (int64_t task = begin; task < end; ++task) {
    const Group c = group_of<V>(a, task % a.groups);
    const int64_t band = task / a.groups % a.bands, b = task / a.groups / a.bands;
    for (int g = 0; g < c.count; ++g) {
      S* to = s.constants + g * kConstants * V::size;
      const void* given[] = {a.scale, a.shift, a.pivot, a.alpha, a.beta, a.gamma, nullptr, nullptr};
      for (int i = 0; i < kConstants; ++i)
        constant<V>(given[i], c, g, i == kScale ? 1.0 : 0.0).store(to + i * V::size);
    }
    const S* taps = static_cast<const S*>(a.taps) + c.first * plan.taps;
    S* gradients = nullptr;
    if (weight) {
      gradients = static_cast<S*>(a.tap_gradients) + task * a.group * plan.taps * V::size;
      for (int64_t i = 0; i < a.group * plan.taps * V::size; ++i) gradients[i] = 0;
    }
    double* sums = a.sums ? a.sums + task * a.group * 2 * V::size : nullptr;
    if (sums)
      for (int64_t i = 0; i < a.group * 2 * V::size; ++i) sums[i] = 0;
    const int64_t first = band * a.band, last = first + a.band < rows ? first + a.band : rows;
    int64_t next = first * plan.row_scale + plan.first_row;
    next = next < 0 ? 0 : next;
    for (int64_t R = first; R < last; ++R) {
      for (; next <= R * plan.row_scale + plan.last_row && next < a.grad.height; ++next)
        read_row<V, T>(a.grad, b, c, next, s.planar, [&](auto grad) {
          if (!a.out.data) return upstream_row<V>(a, c, grad, static_cast<decltype(&grad)>(nullptr), next, s);
          if (a.out.channels_last) {
            decltype(grad) out = grad;
            out.p = reinterpret_cast<decltype(grad.p)>(place<T>(a.out, b, c.first, next));
            out.pixel = a.out.pixel;
            upstream_row<V>(a, c, grad, &out, next, s);
          } else {
            gather_row<V, T>(a.out, b, c, next, s.planar_out);
            decltype(grad) out = grad;
            out.p = reinterpret_cast<decltype(grad.p)>(s.planar_out);
            upstream_row<V>(a, c, grad, &out, next, s);
          }
        });
      prefetch_row<false, V, T>(a.grad, b, c, next);
      if (a.out.data) prefetch_row<false, V, T>(a.out, b, c, next);
      for (int e = 0; e < plan.row_phases && R * plan.row_phases + e < a.x.height; ++e) {
        const int64_t r = R * plan.row_phases + e;
        prefetch_row<false, V, T>(a.x, b, c, r + 1);
        if (a.grad_x.data) prefetch_row<true, V, T>(a.grad_x, b, c, r);
        read_row<V, T>(a.x, b, c, r, s.planar, [&](auto x) {
          if (a.activation == 1)
            activate_row<V, 1>(a, c, x, s);
          else if (a.activation == 2)
            activate_row<V, 2>(a, c, x, s);
          else
            activate_row<V, 0>(a, c, x, s);
          for (int g = 0; g < c.count; ++g)
            for (int f = 0; f < plan.col_phases; ++f)
              run_phase<V>(a, plan.phases[e * plan.col_phases + f], R, a.grad.height, a.x.width, s.ring, g,
                           taps + g * plan.taps * V::size,
                           weight ? gradients + g * plan.taps * V::size : nullptr, s.h + g * s.vector,
                           s.dh + g * s.vector);
          if (!data) return;
          if (!a.grad_x.data) {
            store_row_sum<V>(a, c, x, static_cast<const Row<T>*>(nullptr), s, sums != nullptr);
          } else if (a.grad_x.channels_last) {
            const Row<T> to{place<T>(a.grad_x, b, c.first, r), a.grad_x.pixel};
            store_row_sum<V>(a, c, x, &to, s, sums != nullptr);
          } else {
            const Row<S> to{s.planar_out, V::size};
            store_row_sum<V>(a, c, x, &to, s, sums != nullptr);
            scatter_row<V, T>(a.grad_x, b, c, r, s.planar_out);
          }
        });
        if (sums) add_sums<V>(c, s, sums);
      }
    }
  }
}

}  // namespace

int64_t depthwise_backward_scratch(const DepthwiseArgs& a) {
  return a.dtype == Dtype::f64 ? backward_scratch<VecD>(a) : backward_scratch<VecF>(a);
}

void depthwise_backward(const DepthwiseArgs& a, void* scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case Dtype::f32:
      return backward<VecF, float>(a, scratch, begin, end);
    case Dtype::f64:
      return backward<VecD, double>(a, scratch, begin, end);
    case Dtype::bf16:
      return backward<VecF, bf16>(a, scratch, begin, end);
    case Dtype::f16:
      return backward<VecF, f16>(a, scratch, begin, end);
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
