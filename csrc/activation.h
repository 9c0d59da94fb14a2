// The activations that are fused into other kernels, and their derivatives. Include it in
// csrc/cpu/<op>.vec.cpp files.
#pragma once
#include "vec.h"

namespace nvae {
namespace NVAE_ISA {

// 1 / (1 + exp(-u)): one exponential, one division. Not sigmoid() of vec_math.h, which keeps the digits of
// results below 1e-38 at the price of a selection.
template <class V>
NVAE_INLINE V logistic(V u) {
  return V(1) / (V(1) + exp(-u));
}

template <Activation A, class V>
NVAE_INLINE V activate(V u) {
  if constexpr (A == Activation::swish) return u / (V(1) + exp(-u));
  if constexpr (A == Activation::elu) {
    V e, less_one;
    exp_and_less_one(min(V(0), u), e, less_one);
    return select(u > V(0), u, less_one);
  }
  return u;
}

// grad * act'(u), and y = act(u).
template <Activation A, class V>
NVAE_INLINE V activate_grad(V u, V grad, V& y) {
  y = u;
  if constexpr (A == Activation::swish) {
    const V s = logistic(u);
    y = u * s;
    return grad * fma(y, V(1) - s, s);
  }
  if constexpr (A == Activation::elu) {
    V e, less_one;
    exp_and_less_one(min(V(0), u), e, less_one);
    y = select(u > V(0), u, less_one);
    return grad * e;
  }
  return grad;
}

// Calls run(std::integral_constant-like tag) for the activation: a switch outside of loops.
template <Activation A>
struct Fixed {
  static constexpr Activation value = A;
};
template <class F>
NVAE_INLINE void with_activation(Activation a, F run) {
  switch (a) {
    case Activation::none:
      return run(Fixed<Activation::none>{});
    case Activation::swish:
      return run(Fixed<Activation::swish>{});
    case Activation::elu:
      return run(Fixed<Activation::elu>{});
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
