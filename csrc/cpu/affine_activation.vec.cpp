// The kernels of affine_activation and batch_norm_swish, compiled once per capability: act(scale x + shift), and
// two for its gradient, the first of which computes the sums over pixels.
#include "affine_activation.h"

#include "../activation.h"
#include "plane_loops.h"

namespace nvae {
namespace NVAE_ISA {

using Args = AffineActivationArgs;

template <class V>
NVAE_INLINE V of_channel(const void* coefficients, int64_t c) {
  return V(static_cast<const typename V::Scalar*>(coefficients)[c]);
}
template <class V>
NVAE_INLINE V of_channels(const void* coefficients, int64_t c, int n) {
  return load_n<V>(static_cast<const typename V::Scalar*>(coefficients) + c, n);
}

// Calls run(tags, activation) with everything a loop is compiled for.
template <class F>
NVAE_INLINE void specialised(const Args& a, F run) {
  with_types(a.dtype, [&](auto types) {
    with_activation(a.activation, [&](auto activation) { run(types, activation); });
  });
}

template <class V, class T, Activation A>
static void forward(const Args& a, int64_t begin, int64_t end) {
  const T* const x = static_cast<const T*>(a.x);
  T* const y = static_cast<T*>(a.y);
  if (!a.channels_last)
    return each_row(a, begin, end, [&](int64_t, int64_t c, int64_t, int64_t at, int64_t count) {
      const V scale = of_channel<V>(a.scale, c), shift = of_channel<V>(a.shift, c);
      each_vector<V>(count, [&](int64_t i, int n) {
        prefetch(x + at + i);
        store_n(activate<A>(fma(scale, load_n<V>(x + at + i, n), shift)), y + at + i, n);
      });
    });
  each_run(a, begin, end, [&](int64_t, int64_t, int64_t pixel, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (pixel + i) * a.channels;
      each_vector<V>(a.channels, [&](int64_t c, int n) {
        prefetch(x + at + c);
        const V u =
            fma(of_channels<V>(a.scale, c, n), load_n<V>(x + at + c, n), of_channels<V>(a.shift, c, n));
        store_n(activate<A>(u), y + at + c, n);
      });
    }
  });
}

template <class V, class T, Activation A>
static void sums(const Args& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
  // n lanes at element `at`; g in the return value, x in `value`.
  const auto element = [&](int64_t at, int n, V scale, V shift, V& value) {
    value = load_n<V>(x + at, n);
    V y;
    const V g = activate_grad<A>(fma(scale, value, shift), load_n<V>(grad + at, n), y);
    if (a.g) store_n(g, static_cast<T*>(a.g) + at, n);
    if (a.y) store_n(y, static_cast<T*>(a.y) + at, n);
    return g;
  };
  if (!a.channels_last) {
    const int64_t spans = a.spans();
    return each_row(a, begin, end, [&](int64_t b, int64_t c, int64_t s, int64_t at, int64_t count) {
      const V scale = of_channel<V>(a.scale, c), shift = of_channel<V>(a.shift, c);
      const V pivot = a.pivot ? of_channel<V>(a.pivot, c) : V(S(0));
      V sum_g(S(0)), sum_gx(S(0));
      each_vector<V>(count, [&](int64_t i, int n) {
        prefetch(x + at + i);
        prefetch(grad + at + i);
        V value;
        V g = element(at + i, n, scale, shift, value);
        V d = value - pivot;
        if (n < V::size) {
          g = first_lanes(g, n);
          d = first_lanes(d, n);
        }
        sum_g = sum_g + g;
        sum_gx = fma(g, d, sum_gx);
      });
      const int64_t out = (b * spans + s) * a.channels + c;
      a.sum_g[out] = sum(sum_g);
      a.sum_gx[out] = sum(sum_gx);
    });
  }
  each_run(a, begin, end, [&](int64_t, int64_t task, int64_t pixel, int64_t count) {
    BlockSums<V, 2> block;
    for (int64_t first = 0; first < a.channels; first += kBlock) {
      const int64_t width = a.channels - first < kBlock ? a.channels - first : kBlock;
      block.run(width, count, [&](int64_t lane, int n, int64_t i, int pixels, V* totals) {
        const int64_t c = first + lane;
        const V scale = of_channels<V>(a.scale, c, n), shift = of_channels<V>(a.shift, c, n);
        const V pivot = a.pivot ? of_channels<V>(a.pivot, c, n) : V(S(0));
        for (int k = 0; k < pixels; ++k) {
          const int64_t at = (pixel + i + k) * a.channels + c;
          __builtin_prefetch(x + at + kGroup * a.channels);
          __builtin_prefetch(grad + at + kGroup * a.channels);
          V value;
          const V g = element(at, n, scale, shift, value);
          totals[0] = totals[0] + g;
          totals[1] = fma(g, value - pivot, totals[1]);
        }
      });
      double *sum_g = a.sum_g + task * a.channels + first, *sum_gx = a.sum_gx + task * a.channels + first;
      for (int64_t c = 0; c < width; ++c) {
        sum_g[c] = block.sums[0][c];
        sum_gx[c] = block.sums[1][c];
      }
    }
  });
}

template <class V, class T, Activation A>
static void gradient(const Args& a, int64_t begin, int64_t end) {
  using S = typename V::Scalar;
  const T *const x = static_cast<const T*>(a.x), *const grad = static_cast<const T*>(a.grad);
  T* const out = static_cast<T*>(a.grad_x);
  const bool linear = a.beta != nullptr;
  const auto element = [&](int64_t at, int n, V scale, V shift, V alpha, V beta, V gamma) {
    prefetch(x + at);
    prefetch(grad + at);
    const V value = load_n<V>(x + at, n);
    V y;
    const V g = activate_grad<A>(fma(scale, value, shift), load_n<V>(grad + at, n), y);
    store_n(linear ? fma(alpha, g, fma(beta, value, gamma)) : alpha * g, out + at, n);
  };
  if (!a.channels_last)
    return each_row(a, begin, end, [&](int64_t, int64_t c, int64_t, int64_t at, int64_t count) {
      const V scale = of_channel<V>(a.scale, c), shift = of_channel<V>(a.shift, c);
      const V alpha = of_channel<V>(a.alpha, c);
      const V beta = linear ? of_channel<V>(a.beta, c) : V(S(0));
      const V gamma = linear ? of_channel<V>(a.gamma, c) : V(S(0));
      each_vector<V>(count, [&](int64_t i, int n) { element(at + i, n, scale, shift, alpha, beta, gamma); });
    });
  each_run(a, begin, end, [&](int64_t, int64_t, int64_t pixel, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = (pixel + i) * a.channels;
      each_vector<V>(a.channels, [&](int64_t c, int n) {
        const V beta = linear ? of_channels<V>(a.beta, c, n) : V(S(0));
        const V gamma = linear ? of_channels<V>(a.gamma, c, n) : V(S(0));
        element(at + c, n, of_channels<V>(a.scale, c, n), of_channels<V>(a.shift, c, n),
                of_channels<V>(a.alpha, c, n), beta, gamma);
      });
    }
  });
}

void affine_activation_forward(const Args& a, int64_t begin, int64_t end) {
  specialised(a, [&](auto types, auto activation) {
    forward<typename decltype(types)::Vector, typename decltype(types)::Element, decltype(activation)::value>(
        a, begin, end);
  });
}
void affine_activation_sums(const Args& a, int64_t begin, int64_t end) {
  specialised(a, [&](auto types, auto activation) {
    sums<typename decltype(types)::Vector, typename decltype(types)::Element, decltype(activation)::value>(
        a, begin, end);
  });
}
void affine_activation_gradient(const Args& a, int64_t begin, int64_t end) {
  specialised(a, [&](auto types, auto activation) {
    gradient<typename decltype(types)::Vector, typename decltype(types)::Element,
             decltype(activation)::value>(a, begin, end);
  });
}

}  // namespace NVAE_ISA
}  // namespace nvae
