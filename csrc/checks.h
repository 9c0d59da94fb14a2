// Small helpers for the files that talk to PyTorch (csrc/cpu/<op>.cpp). They use the stable ABI only.
// Arguments were checked in Python; what is checked here guards direct calls of torch.ops.nvae_fast.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "capability.h"
#include "text.h"
#include "types.h"

namespace nvae {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const char* op, ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::Double:
      return Dtype::f64;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float64, bfloat16 or float16, got ",
                      torch::headeronly::toString(type));
  }
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline Activation activation_of(const char* op, const std::optional<Text>& name) {
  if (!name) return Activation::none;
  if (*name == "swish") return Activation::swish;
  STD_TORCH_CHECK(*name == "elu", op, ": activation must be None, 'swish' or 'elu', got '", *name, "'");
  return Activation::elu;
}

// Dimension by dimension: sizes() cannot be compared before PyTorch 2.13.
inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t d = 0; same && d < a.dim(); ++d) same = a.size(d) == b.size(d);
  return same;
}

// The value of a seed tensor on the CPU.
inline uint64_t seed_of(const char* op, const Tensor& seed) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
                  ": seed must be a 0-d int64 tensor");
  return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
}

}  // namespace nvae
