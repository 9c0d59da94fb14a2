// weight_norm, compiled once per capability: w = exp(g) v m / (||v m|| + eps), a row being an output channel.
// A row is read twice, the second time from the cache.
#include "weight_norm.h"

#include "../vec.h"

namespace nvae {
namespace NVAE_ISA {

// Calls body(vector number of four, first element, lanes) over a row: four independent sums at a time.
template <class V, class F>
NVAE_INLINE void over(int64_t columns, F body) {
  int64_t i = 0;
  for (; i + 4 * V::size <= columns; i += 4 * V::size) {
    body(0, i, V::size);
    body(1, i + V::size, V::size);
    body(2, i + 2 * V::size, V::size);
    body(3, i + 3 * V::size, V::size);
  }
  for (; i + V::size <= columns; i += V::size) body(0, i, V::size);
  if (i < columns) body(1, i, static_cast<int>(columns - i));
}

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
template <class V>
NVAE_INLINE V total(const V* sums) {
  return V(sum((sums[0] + sums[1]) + (sums[2] + sums[3])));
}

// One layer: T the type of the weight, O that of the normalised weight.
template <class V, class T, class O>
struct Rows {
  using S = typename V::Scalar;
  const WeightNormLayer& layer;
  V eps;
  Rows(const WeightNormLayer& l, double e) : layer(l), eps(static_cast<S>(e)) {}

  NVAE_INLINE const T* weight(int64_t row) const {
    return static_cast<const T*>(layer.weight) + row * layer.columns;
  }
  NVAE_INLINE const T* mask(int64_t row) const {
    return layer.mask ? static_cast<const T*>(layer.mask) + row * layer.columns : nullptr;
  }
  NVAE_INLINE V length(int64_t row) const {  // exp(g) in every lane
    alignas(8) T one[V::size] = {};
    one[0] = static_cast<const T*>(layer.log_norm)[row * layer.log_norm_step];
    S lanes[V::size];
    V::load(one).store(lanes);
    return exp(V(lanes[0]));
  }

  template <bool masked>
  NVAE_INLINE void forward(int64_t row) const {
    const T *w = weight(row), *m = mask(row);
    O* out = static_cast<O*>(layer.out) + row * layer.columns;
    const auto value = [&](int64_t i, int n) {
      const V v = load<V>(w + i, n);
      return masked ? v * load<V>(m + i, n) : v;
    };
    V squares[4] = {V(S(0)), V(S(0)), V(S(0)), V(S(0))};
    over<V>(layer.columns, [&](int k, int64_t i, int n) {
      const V v = value(i, n);
      squares[k] = fma(v, v, squares[k]);
    });
    const V scale = length(row) / (sqrt(total(squares)) + eps);
    over<V>(layer.columns, [&](int, int64_t i, int n) { store(value(i, n) * scale, out + i, n); });
  }

  template <bool masked>
  NVAE_INLINE void backward(int64_t row) const {
    const T *w = weight(row), *m = mask(row);
    const O* grad = static_cast<const O*>(layer.grad) + row * layer.columns;
    const auto value = [&](int64_t i, int n) {
      const V v = load<V>(w + i, n);
      return masked ? v * load<V>(m + i, n) : v;
    };
    V squares[4] = {V(S(0)), V(S(0)), V(S(0)), V(S(0))}, dots[4] = {V(S(0)), V(S(0)), V(S(0)), V(S(0))};
    over<V>(layer.columns, [&](int k, int64_t i, int n) {
      const V v = value(i, n);
      squares[k] = fma(v, v, squares[k]);
      dots[k] = fma(v, load<V>(grad + i, n), dots[k]);
    });
    const V norm = sqrt(total(squares)), inverse = V(S(1)) / (norm + eps);
    const V scale = length(row) * inverse, along = total(dots) * scale;
    if (layer.grad_log_norm) store(along, static_cast<T*>(layer.grad_log_norm) + row, 1);
    if (!layer.grad_weight) return;
    // The norm's derivative at zero is taken as zero, as PyTorch does.
    const V back = select(norm > V(S(0)), along * inverse / norm, V(S(0)));
    T* out = static_cast<T*>(layer.grad_weight) + row * layer.columns;
    over<V>(layer.columns, [&](int, int64_t i, int n) {
      const V v = fnma(back, value(i, n), scale * load<V>(grad + i, n));
      store(masked ? v * load<V>(m + i, n) : v, out + i, n);
    });
  }
};

template <class V, class T, class O>
static void forward_task(const WeightNormLayer& layer, const WeightNormTask& task, double eps) {
  const Rows<V, T, O> rows(layer, eps);
  for (int64_t row = task.begin; row < task.end; ++row)
    layer.mask ? rows.template forward<true>(row) : rows.template forward<false>(row);
}
template <class V, class T, class O>
static void backward_task(const WeightNormLayer& layer, const WeightNormTask& task, double eps) {
  const Rows<V, T, O> rows(layer, eps);
  for (int64_t row = task.begin; row < task.end; ++row)
    layer.mask ? rows.template backward<true>(row) : rows.template backward<false>(row);
}

template <class T>
static void float_task(const WeightNormLayer& layer, const WeightNormTask& task, double eps) {
  const bool forward = layer.out != nullptr;
  switch (layer.out_dtype) {
    case Dtype::bf16:
      return forward ? forward_task<VecF, T, bf16>(layer, task, eps)
                     : backward_task<VecF, T, bf16>(layer, task, eps);
    case Dtype::f16:
      return forward ? forward_task<VecF, T, f16>(layer, task, eps)
                     : backward_task<VecF, T, f16>(layer, task, eps);
    default:
      return forward ? forward_task<VecF, T, float>(layer, task, eps)
                     : backward_task<VecF, T, float>(layer, task, eps);
  }
}

void weight_norm_tasks(const WeightNormArgs& a, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const WeightNormTask& task = a.tasks[t];
    const WeightNormLayer& layer = a.layers[task.layer];
    switch (layer.dtype) {
      case Dtype::f32:
        float_task<float>(layer, task, a.eps);
        break;
      case Dtype::bf16:
        float_task<bf16>(layer, task, a.eps);
        break;
      case Dtype::f16:
        float_task<f16>(layer, task, a.eps);
        break;
      case Dtype::f64:
        layer.out ? forward_task<VecD, double, double>(layer, task, a.eps)
                  : backward_task<VecD, double, double>(layer, task, a.eps);
        break;
    }
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
