// nvae_fast::winograd_weights, winograd_conv2d and its backward on the CPU: checks, layouts and the products over channels. The
// transforms are in winograd.vec.cpp.
#include "winograd.h"

#include <algorithm>
#include <array>

#include "planes.h"
#include "products.h"

namespace nvae {
namespace {

constexpr int64_t kPartBytes = 4 << 20;  // of the tiles that a thread has at a time: they stay in the cache
constexpr int64_t kPartTiles = 128;      // at least, for products that are not slow

WinogradArgs describe(const char* op, const char* name, const Tensor& map) {
  check_feature_map(op, name, map);
  WinogradArgs a;
  a.dtype = dtype_of(op, name, map);
  NVAE_CHECK(a.dtype == Dtype::f32 || a.dtype == Dtype::bf16, op, ": ", name,
             " must be float32 or bfloat16, got ", torch::headeronly::toString(map.scalar_type()));
  a.batches = map.size(0);
  a.channels = map.size(1);
  a.height = map.size(2);
  a.width = map.size(3);
  NVAE_CHECK(a.channels > 0, op, ": ", name, " must have channels, got ", shape_text(map));
  NVAE_CHECK(a.height % kWinogradTile == 0 && a.width % kWinogradTile == 0, op, ": ", name,
             " must have a height and a width that are multiples of 4, got ", shape_text(map));
  return a;
}

// Of a float32 weight.
WinogradWeights describe(const Tensor& weight, const Tensor& points) {
  WinogradWeights a;
  a.weight = static_cast<float*>(const_cast<void*>(weight.const_data_ptr()));
  a.points = static_cast<float*>(points.mutable_data_ptr());
  a.rows = weight.size(0);
  a.columns = weight.size(1);
  a.row = weight.stride(0);
  a.column = weight.stride(1);
  a.tap = weight.stride(3);
  return a;
}

void run(const WinogradWeights& a, bool gradient) {
  if (a.rows * a.columns > 0)
    parallel_for(0, a.rows, 2048 / a.columns + 1,
                 [&](int64_t begin, int64_t end) { NVAE_CALL(winograd_weights, a, gradient, begin, end); });
}

Tensor transformed(const char* op, const Tensor& weight) {
  dtype_of(op, "weight", weight);
  NVAE_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, op,
             ": weight must have shape (C_out, C_in, 3, 3), got ", shape_text(weight));
  Tensor wide = to_dtype(weight, ScalarType::Float);
  if (wide.stride(2) != 3 * wide.stride(3)) wide = as_contiguous(wide);
  const Tensor points =
      allocate({kWinogradPoints, weight.size(0), weight.size(1)}, ScalarType::Float, weight);
  run(describe(wide, points), false);
  return points;
}

Tensor library_product(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  try {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::bmm", "", stack.data(), TORCH_ABI_VERSION));
  } catch (const std::exception&) {
    fail_to_allocate(static_cast<double>(a.size(0) * a.size(1) * b.size(2)), ScalarType::Float, "cpu");
  }
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// a b for every point; one of the last two strides of b is 1.
Tensor product(const Tensor& a, const Tensor& b) {
  if (fast_library_products()) return library_product(a, b);
  const Tensor made = allocate({a.size(0), a.size(1), b.size(2)}, ScalarType::Float, a);
  ProductArgs p;
  p.left = static_cast<const float*>(a.const_data_ptr());
  p.right = static_cast<const float*>(b.const_data_ptr());
  p.out = static_cast<float*>(made.mutable_data_ptr());
  p.matrices = a.size(0);
  p.rows = a.size(1);
  p.columns = b.size(2);
  p.depth = a.size(2);
  p.left_matrix = a.stride(0);
  p.left_row = a.stride(1);
  p.left_depth = a.stride(2);
  p.right_matrix = b.stride(0);
  p.right_depth = b.stride(1);
  p.right_column = b.stride(2);
  parallel_for(0, p.matrices * p.panels(), 1,
               [&](int64_t begin, int64_t end) { NVAE_CALL(products, p, begin, end); });
  return made;
}
Tensor transposed(const Tensor& t, int64_t first = 0) {
  return torch::stable::transpose(t, first, first + 1);
}

// `count` images from `first` on.
WinogradArgs part(WinogradArgs a, void* map, int64_t first, int64_t count) {
  const int64_t image = a.channels * a.height * a.width, size = a.dtype == Dtype::bf16 ? 2 : 4;
  a.map = static_cast<char*>(map) + first * image * size;
  a.batches = count;
  return a;
}

// The tiles of a part as [tile][point][channel].
Tensor tiles_of(WinogradArgs a, const Tensor& like, bool gradient, float* sums) {
  const Tensor tiles = allocate({a.count(), kWinogradPoints, a.channels}, ScalarType::Float, like);
  a.gradient = gradient;
  a.tiles = static_cast<float*>(tiles.mutable_data_ptr());
  a.sums = sums;
  parallel_for(0, a.batches * a.tile_rows(), 1,
               [&](int64_t begin, int64_t end) { NVAE_CALL(winograd_tiles, a, begin, end); });
  return tiles;
}

// Writes the map of a part from products [point][tile][channel].
void put_map(WinogradArgs a, const Tensor& products, const float* bias, bool gradient) {
  const Tensor dense = as_contiguous(products);
  a.gradient = gradient;
  a.tiles = static_cast<float*>(const_cast<void*>(dense.const_data_ptr()));
  a.bias = bias;
  const int64_t scratch = gradient ? kWinogradPatch * (a.width + 2) * kWinogradGroup : 0;
  parallel_for(0, a.batches * a.groups(), 1, [&](int64_t begin, int64_t end) {
    const auto memory = doubles(scratch / 2 + 1);
    NVAE_CALL(winograd_map, a, reinterpret_cast<float*>(memory.get()), begin, end);
  });
}

// run(first, count) for as many images at a time as keep their tiles in the cache, and parts of about equal size.
template <class F>
void each_part(const WinogradArgs& x, const WinogradArgs& y, F run) {
  const int64_t tiles = std::max<int64_t>(x.tile_rows() * x.tile_columns(), 1);
  const int64_t bytes = 4 * kWinogradPoints * tiles * std::max(x.channels, y.channels);
  int64_t most = kPartBytes * static_cast<int64_t>(torch::stable::get_num_threads()) / bytes;
  most = std::max<int64_t>({most, (kPartTiles + tiles - 1) / tiles, 1});
  const int64_t parts = std::max<int64_t>((x.batches + most - 1) / most, 1);
  const int64_t size = (x.batches + parts - 1) / parts;
  for (int64_t first = 0; first < x.batches; first += size) run(first, std::min(size, x.batches - first));
}

// Whether the result of a map is to be in channels_last. `dense` is the map in it.
bool keeps(const Tensor& map, const Tensor& dense) { return map.const_data_ptr() == dense.const_data_ptr(); }

Tensor winograd_weights(const Tensor& weight) { return transformed("winograd_weights", weight); }

Tensor winograd_conv2d(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "winograd_conv2d";
  const WinogradArgs a = describe(op, "x", x);
  Tensor points = weight.dim() == 3 ? weight : transformed(op, weight);
  if (points.stride(1) != 1 && points.stride(2) != 1) points = as_contiguous(points);
  NVAE_CHECK(points.scalar_type() == ScalarType::Float, op, ": a transformed weight must be float32, got ",
             torch::headeronly::toString(points.scalar_type()));
  WinogradArgs b = a;
  b.channels = points.size(1);
  check_shape(op, "weight", points, {kWinogradPoints, b.channels, a.channels});
  std::optional<Tensor> wide;
  const float* added = nullptr;
  if (bias) {
    check_floating(op, "bias", *bias, {b.channels});
    wide = as_contiguous(to_dtype(*bias, ScalarType::Float));
    added = static_cast<const float*>(wide->const_data_ptr());
  }
  const Tensor dense = as_contiguous(x, true);
  const Tensor y = allocate({a.batches, b.channels, a.height, a.width}, x.scalar_type(), x, true);
  const Tensor right = transposed(points, 1);
  if (dense.numel() > 0 && y.numel() > 0)
    each_part(a, b, [&](int64_t first, int64_t count) {
      const Tensor tiles =
          tiles_of(part(a, const_cast<void*>(dense.const_data_ptr()), first, count), x, false, nullptr);
      put_map(part(b, y.mutable_data_ptr(), first, count), product(transposed(tiles), right), added, false);
    });
  return keeps(x, dense) ? y : as_contiguous(y);
}

std::tuple<Tensor, Tensor, Tensor> winograd_conv2d_backward(const Tensor& grad, const Tensor& x,
                                                            const Tensor& weight, bool need_x,
                                                            bool need_weight, bool need_bias) {
  const char* op = "winograd_conv2d_backward";
  const WinogradArgs a = describe(op, "x", x), b = describe(op, "grad", grad);
  check_shape(op, "weight", weight, {b.channels, a.channels, 3, 3});
  check_shape(op, "grad", grad, {a.batches, b.channels, a.height, a.width});
  const Tensor dense_x = as_contiguous(x, true), dense_grad = as_contiguous(grad, true);
  const Tensor nothing = allocate({0}, ScalarType::Float, x);
  const bool any = dense_x.numel() > 0 && dense_grad.numel() > 0;
  Tensor grad_x =
      need_x ? allocate({a.batches, a.channels, a.height, a.width}, x.scalar_type(), x, true) : nothing;
  Tensor grad_bias = need_bias ? allocate({b.channels}, ScalarType::Float, x) : nothing;
  std::optional<Tensor> points, total;
  if (need_x) points = transformed(op, weight);
  const int64_t rows = a.tile_rows();
  const auto sums = doubles(need_bias ? a.batches * rows * b.channels / 2 + 1 : 1);
  float* const partial = reinterpret_cast<float*>(sums.get());
  if (any)
    each_part(a, b, [&](int64_t first, int64_t count) {
      const Tensor tiles = tiles_of(part(b, const_cast<void*>(dense_grad.const_data_ptr()), first, count), x,
                                    true, need_bias ? partial + first * rows * b.channels : nullptr);
      if (need_x)
        put_map(part(a, grad_x.mutable_data_ptr(), first, count), product(transposed(tiles), *points),
                nullptr, true);
      if (!need_weight) return;
      const Tensor of_x =
          tiles_of(part(a, const_cast<void*>(dense_x.const_data_ptr()), first, count), x, false, nullptr);
      const Tensor made = product(transposed(transposed(tiles), 1), transposed(of_x));
      if (!total) {
        total = as_contiguous(made);
        return;
      }
      const Tensor more = as_contiguous(made);
      float* const sum = static_cast<float*>(total->mutable_data_ptr());
      const float* const from = static_cast<const float*>(more.const_data_ptr());
      parallel_for(0, more.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sum[i] += from[i];
      });
    });
  Tensor grad_weight = nothing;
  if (need_weight) {
    grad_weight = allocate_like(to_dtype(weight, ScalarType::Float));
    if (grad_weight.dim() == 4 && grad_weight.stride(2) != 3 * grad_weight.stride(3))
      grad_weight = allocate({b.channels, a.channels, 3, 3}, ScalarType::Float, x);
    if (total)
      run(describe(grad_weight, *total), true);
    else
      torch::stable::zero_(grad_weight);
  }
  if (!any && need_x) torch::stable::zero_(grad_x);
  if (need_bias) {
    float* const to = static_cast<float*>(grad_bias.mutable_data_ptr());
    for (int64_t c = 0; c < b.channels; ++c) {
      double sum = 0;
      if (any)
        for (int64_t task = 0; task < a.batches * rows; ++task) sum += partial[task * b.channels + c];
      to[c] = static_cast<float>(sum);
    }
  }
  if (need_x && !keeps(x, dense_x)) grad_x = as_contiguous(grad_x);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "winograd_weights", &nvae::winograd_weights);
  NVAE_IMPL(m, "winograd_conv2d", &nvae::winograd_conv2d);
  NVAE_IMPL(m, "winograd_conv2d_backward", &nvae::winograd_conv2d_backward);
}
