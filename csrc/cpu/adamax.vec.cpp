// Adamax over all parameters, compiled once per capability. Roundings and their order are PyTorch's, whose
// vector code has multiply-adds at the same places: the results are the same bits.
#include "adamax.h"

#include "../vec.h"

namespace nvae {
namespace NVAE_ISA {

NVAE_INLINE static void step(const AdamaxArgs& a, const AdamaxTask& t, int64_t i, int n) {
  const auto load = [n](const float* p) { return n == VecF::size ? VecF::load(p) : VecF::load(p, n); };
  const auto store = [n](VecF v, float* p) { n == VecF::size ? v.store(p) : v.store(p, n); };
  const VecF p = load(t.parameter + i), m = load(t.average + i);
  VecF g = load(t.grad + i);
  if (a.decay != 0.f) g = fma(p, VecF(a.decay), g);
  const VecF average = fma(VecF(a.weight), g - m, m);
  const VecF size = abs(g) + VecF(a.eps), old = load(t.norm + i) * VecF(a.beta2);
  const VecF norm = select(old == old, max(old, size), old);  // the larger, or NaN of either
  store(average, t.average + i);
  store(norm, t.norm + i);
  store(p + (VecF(-a.rate) * average) / norm, t.parameter + i);
}

void adamax_tasks(const AdamaxArgs& a, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    const AdamaxTask t = a.tasks[k];
    int64_t i = t.begin;
    for (; i + VecF::size <= t.end; i += VecF::size) step(a, t, i, VecF::size);
    if (i < t.end) step(a, t, i, static_cast<int>(t.end - i));
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
