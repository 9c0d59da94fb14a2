// Matrix products, compiled once per capability: blocks of the result stay in registers, columns of the right matrix are copied
// to where the innermost loop reads them in order.
#include "products.h"

#include "plane_loops.h"

namespace nvae {
namespace NVAE_ISA {
namespace {

using V = VecF;
// Of a block: with the vectors of one row of the right matrix and a factor they are 29 of 32 registers, or 15 of 16.
constexpr int kRows = 6, kVectors = NVAE_CAPABILITY == 2 ? 4 : 2;
constexpr int64_t kRowsInPlace = 4 * kRows;  // up to so many rows, a copy costs more than it saves
constexpr int64_t kDepth = 128;  // of a part, a multiple of V::size: the copy stays in the innermost cache

// Up to kVectors vectors of neighbouring columns from `column` on, and kDepth rows from `k` on.
struct Part {
  int64_t column, width, k, depth;
};

// panel[k][vector][lane]; lanes that are not there are 0.
template <int N>
NVAE_INLINE void copy_columns(const ProductArgs& a, const float* right, Part part, float* panel) {
  const float* const from = right + part.k * a.right_depth + part.column * a.right_column;
  for (int j = 0; j < N; ++j) {
    const int64_t left = part.width - j * V::size;
    const int lanes = left < V::size ? static_cast<int>(left) : V::size;
    float* const to = panel + j * V::size;
    if (a.right_column == 1) {
      for (int64_t k = 0; k < part.depth; ++k)
        load_n<V>(from + k * a.right_depth + j * V::size, lanes).store(to + k * N * V::size);
      continue;
    }
    each_vector<V>(part.depth, [&](int64_t k, int n) {
      V rows[V::size];
      for (int i = 0; i < V::size; ++i)
        rows[i] = i < lanes ? load_n<V>(from + (j * V::size + i) * a.right_column + k, n) : V(0.0f);
      transpose(rows);
      for (int i = 0; i < n; ++i) rows[i].store(to + (k + i) * N * V::size);
    });
  }
}

// `step` is the distance of the rows of `panel`.
template <int R, int N>
NVAE_INLINE void block(const ProductArgs& a, const float* left, const float* panel, int64_t step, Part part,
                       float* out) {
  const int last = static_cast<int>(part.width - (N - 1) * V::size);  // lanes of the last vector
  V sums[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
      sums[r][j] =
          part.k == 0 ? V(0.0f) : load_n<V>(out + r * a.columns + j * V::size, j + 1 < N ? V::size : last);
  for (int64_t k = 0; k < part.depth; ++k) {
    V row[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) row[j] = V::load(panel + k * step + j * V::size);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V factor(left[r * a.left_row + k * a.left_depth]);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) sums[r][j] = fma(factor, row[j], sums[r][j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j)
      store_n(sums[r][j], out + r * a.columns + j * V::size, j + 1 < N ? V::size : last);
}

template <int N>
void columns_of(const ProductArgs& a, int64_t matrix, Part part) {
  alignas(64) float panel[kDepth * N * V::size];
  const float *const left = a.left + matrix * a.left_matrix, *const right = a.right + matrix * a.right_matrix;
  const bool in_place = a.right_column == 1 && a.rows <= kRowsInPlace && part.width == N * V::size;
  float* const out = a.out + matrix * a.rows * a.columns + part.column;
  for (part.k = 0; part.k < a.depth; part.k += kDepth) {
    part.depth = a.depth - part.k < kDepth ? a.depth - part.k : kDepth;
    const float* from = panel;
    int64_t step = N * V::size;
    if (in_place) {
      from = right + part.k * a.right_depth + part.column;
      step = a.right_depth;
    } else {
      copy_columns<N>(a, right, part, panel);
    }
    for (int64_t m = 0; m < a.rows; m += kRows) {
      const float* const rows = left + m * a.left_row + part.k * a.left_depth;
      float* const to = out + m * a.columns;
      switch (a.rows - m) {
        case 1:
          block<1, N>(a, rows, from, step, part, to);
          break;
        case 2:
          block<2, N>(a, rows, from, step, part, to);
          break;
        case 3:
          block<3, N>(a, rows, from, step, part, to);
          break;
        case 4:
          block<4, N>(a, rows, from, step, part, to);
          break;
        case 5:
          block<5, N>(a, rows, from, step, part, to);
          break;
        default:
          block<kRows, N>(a, rows, from, step, part, to);
      }
    }
  }
}

}  // namespace

void products(const ProductArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t matrix = task / a.panels(), first = task % a.panels() * kProductColumns;
    const int64_t end_column = a.columns - first < kProductColumns ? a.columns : first + kProductColumns;
    for (int64_t c = first; c < end_column;) {
      const int64_t left = end_column - c, most = kVectors * V::size, width = left < most ? left : most;
      const Part part{c, width, 0, 0};
      switch ((width + V::size - 1) / V::size) {
        case 1:
          columns_of<1>(a, matrix, part);
          break;
        case 2:
          columns_of<2>(a, matrix, part);
          break;
#if NVAE_CAPABILITY == 2
        case 3:
          columns_of<3>(a, matrix, part);
          break;
        default:
          columns_of<kVectors>(a, matrix, part);
#endif
      }
      c += width;
    }
  }
}

}  // namespace NVAE_ISA
}  // namespace nvae
