// Argument checks for the files that talk to PyTorch (csrc/cpu/<op>.cpp, csrc/cuda/<op>.cpp). They use the
// stable ABI only. The public Python functions check too; these checks guard direct calls of
// torch.ops.nvae_fast, so that no kernel reads outside of its arguments.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "capability.h"
#include "text.h"
#include "types.h"

namespace nvae {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws a RuntimeError. Not STD_TORCH_CHECK, whose messages begin with the path of a source file.
template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}
#define NVAE_CHECK(condition, ...)                                    \
  do {                                                                \
    if (__builtin_expect(!(condition), 0)) ::nvae::fail(__VA_ARGS__); \
  } while (false)

template <class Sizes>
std::string shape_text(const Sizes& sizes) {
  std::string text = "(";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + (sizes.size() == 1 ? ",)" : ")");
}
inline std::string shape_text(const Tensor& t) { return shape_text(t.sizes()); }

// Dimension by dimension: sizes() cannot be compared before PyTorch 2.13.
template <class A, class B>
bool equal_sizes(const A& a, const B& b) {
  bool same = a.size() == b.size();
  for (size_t d = 0; same && d < a.size(); ++d) same = a.begin()[d] == b.begin()[d];
  return same;
}
inline bool same_shape(const Tensor& a, const Tensor& b) { return equal_sizes(a.sizes(), b.sizes()); }

inline void check_shape(const char* op, const char* name, const Tensor& t,
                        std::initializer_list<int64_t> expected) {
  NVAE_CHECK(equal_sizes(t.sizes(), expected), op, ": ", name, " must have shape ", shape_text(expected),
             ", got ", shape_text(t));
}
inline void check_same_shape(const char* op, const char* name, const Tensor& t, const char* like_name,
                             const Tensor& like) {
  NVAE_CHECK(same_shape(t, like), op, ": ", name, " must have the shape of ", like_name, " ",
             shape_text(like), ", got ", shape_text(t));
}

inline Dtype dtype_of(const char* op, const char* name, ScalarType type) {
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
      fail(op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
           torch::headeronly::toString(type));
  }
}
inline Dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  return dtype_of(op, name, t.scalar_type());
}

// The shape and a dtype that kernels can read.
inline void check_floating(const char* op, const char* name, const Tensor& t,
                           std::initializer_list<int64_t> expected) {
  check_shape(op, name, t, expected);
  dtype_of(op, name, t);
}
inline void check_floating_like(const char* op, const char* name, const Tensor& t, const char* like_name,
                                const Tensor& like) {
  check_same_shape(op, name, t, like_name, like);
  dtype_of(op, name, t);
}

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

// The dtype of sums and of per-channel values.
inline ScalarType accumulation_type(Dtype dtype) {
  return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

inline Activation activation_of(const char* op, const char* name, const std::optional<Text>& value) {
  if (!value) return Activation::none;
  if (*value == "swish") return Activation::swish;
  NVAE_CHECK(*value == "elu", op, ": ", name, " must be None, 'swish' or 'elu', got '", *value, "'");
  return Activation::elu;
}

// The value of a seed tensor on the CPU.
inline uint64_t seed_of(const char* op, const Tensor& seed) {
  NVAE_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op,
             ": seed must be a 0-d int64 tensor, got ", torch::headeronly::toString(seed.scalar_type()),
             " of shape ", shape_text(seed));
  return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
}

}  // namespace nvae
