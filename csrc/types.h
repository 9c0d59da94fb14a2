// The element types of tensors as plain data. Kernel sources are compiled once per instruction set, and an
// inline function of a library header could then end up as AVX-512 code in the baseline path (the linker
// keeps one copy of each). So kernels include no PyTorch headers and these types have no member functions.
#pragma once
#include <cstdint>

namespace nvae {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum class Dtype { f32, f64, bf16, f16 };

enum class Activation { none, swish, elu };

}  // namespace nvae
