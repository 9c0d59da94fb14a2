// nvae_fast::adamax on the CPU: one step of all parameters in one call; the arithmetic is in adamax.vec.cpp.
#include "adamax.h"

#include <vector>

#include "../memory.h"

namespace nvae {

using Tensors = std::vector<Tensor>;

// Whether the tensor is numel elements without gaps, in any order of dimensions.
static bool is_dense(const Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  return t.numel() == 0 || last == t.numel() - 1;
}

// The elements of t, in the order of those of the parameter `like`.
static float* elements_like(const char* name, const Tensor& t, const Tensor& like) {
  bool same = same_shape(t, like) && t.scalar_type() == ScalarType::Float;
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == 1 || t.stride(d) == like.stride(d);
  NVAE_CHECK(same, "adamax: ", name, " must be float32, of the parameter's shape and strides");
  return static_cast<float*>(const_cast<void*>(t.const_data_ptr()));
}

static void adamax(const Tensors& parameters, const Tensors& grads, const Tensors& averages,
                   const Tensors& norms, double rate, double beta1, double beta2, double eps, double decay) {
  constexpr int64_t kChunk = 1 << 14;
  const size_t count = parameters.size();
  NVAE_CHECK(grads.size() == count && averages.size() == count && norms.size() == count,
             "adamax: lists must have equal length");
  std::vector<AdamaxTask> tasks;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = parameters[i];
    NVAE_CHECK(is_dense(p), "adamax: parameters must be dense");
    AdamaxTask task{elements_like("parameters", p, p),
                    elements_like("grads", grads[i], p),
                    elements_like("averages", averages[i], p),
                    elements_like("norms", norms[i], p),
                    0,
                    0};
    for (const int64_t n = p.numel(); task.begin < n; task.begin = task.end) {
      task.end = n - task.begin < kChunk ? n : task.begin + kChunk;
      tasks.push_back(task);
    }
  }
  AdamaxArgs args{tasks.data(),
                  static_cast<float>(rate),
                  static_cast<float>(1.0 - beta1),
                  static_cast<float>(beta2),
                  static_cast<float>(eps),
                  static_cast<float>(decay)};
  parallel_for(0, static_cast<int64_t>(tasks.size()), 4,
               [&](int64_t begin, int64_t end) { NVAE_CALL(adamax_tasks, args, begin, end); });
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) { NVAE_IMPL(m, "adamax", &nvae::adamax); }
