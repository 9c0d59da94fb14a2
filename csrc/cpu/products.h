// Matrix products in float32 of matrices that a view of a tensor describes, for kernels that need many of the same size.
#pragma once
#include <cstdint>

#include "../capability.h"

namespace nvae {

constexpr int64_t kProductColumns = 64;  // of a task

// out[p][m][n] = sum over k of left[p][m][k] right[p][k][n]. out is dense, the others have strides, and one of right_depth and
// right_column is 1.
struct ProductArgs {
  const float *left = nullptr, *right = nullptr;
  float* out = nullptr;
  int64_t matrices = 0, rows = 0, columns = 0, depth = 0;  // numbers of p, m, n and k
  int64_t left_matrix = 0, left_row = 0, left_depth = 0;
  int64_t right_matrix = 0, right_depth = 0, right_column = 0;
  int64_t panels() const { return (columns + kProductColumns - 1) / kProductColumns; }
};

// Tasks are groups of columns of a matrix: matrices * panels().
NVAE_PER_ISA(void products(const ProductArgs& a, int64_t begin, int64_t end))

}  // namespace nvae
