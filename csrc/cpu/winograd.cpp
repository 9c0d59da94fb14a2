// nvae_fast::winograd_tiles and winograd_map on the CPU: checks, layouts and threads. The arithmetic is in winograd.vec.cpp.
#include "winograd.h"

#include "planes.h"

namespace nvae {

static WinogradArgs describe(const char* op, const char* name, const Tensor& map, bool gradient) {
  check_feature_map(op, name, map);
  WinogradArgs a;
  a.dtype = dtype_of(op, name, map);
  NVAE_CHECK(a.dtype == Dtype::f32 || a.dtype == Dtype::bf16, op, ": ", name,
             " must be float32 or bfloat16, got ", torch::headeronly::toString(map.scalar_type()));
  a.batches = map.size(0);
  a.channels = map.size(1);
  a.height = map.size(2);
  a.width = map.size(3);
  NVAE_CHECK(a.height % kWinogradTile == 0 && a.width % kWinogradTile == 0, op, ": ", name,
             " must have a height and a width that are multiples of 4, got ", shape_text(map));
  a.gradient = gradient;
  return a;
}

static Tensor winograd_tiles(const Tensor& x, bool gradient) {
  WinogradArgs a = describe("winograd_tiles", "x", x, gradient);
  const Tensor dense = as_contiguous(x, true);
  a.map = const_cast<void*>(dense.const_data_ptr());
  const Tensor tiles = allocate({a.count(), kWinogradPoints, a.channels}, ScalarType::Float, x);
  a.tiles = static_cast<float*>(tiles.mutable_data_ptr());
  if (tiles.numel() > 0)
    parallel_for(0, a.batches * a.tile_rows(), 1,
                 [&](int64_t begin, int64_t end) { NVAE_CALL(winograd_tiles, a, begin, end); });
  return tiles;
}

static void winograd_map(const Tensor& tiles, const std::optional<Tensor>& bias, const Tensor& y,
                         bool gradient) {
  const char* op = "winograd_map";
  WinogradArgs a = describe(op, "y", y, gradient);
  NVAE_CHECK(tiles.dim() == 3 && tiles.scalar_type() == ScalarType::Float, op,
             ": tiles must be float32 of shape (36, tiles, C), got ",
             torch::headeronly::toString(tiles.scalar_type()), " of shape ", shape_text(tiles));
  check_shape(op, "tiles", tiles, {kWinogradPoints, a.count(), a.channels});
  NVAE_CHECK(as_contiguous(y, true).const_data_ptr() == y.const_data_ptr(), op,
             ": y must be contiguous in channels_last");
  std::optional<Tensor> wide;
  if (bias) {
    NVAE_CHECK(!gradient, op, ": bias must be None with gradient");
    check_floating(op, "bias", *bias, {a.channels});
    wide = as_contiguous(to_dtype(*bias, ScalarType::Float));
    a.bias = static_cast<const float*>(wide->const_data_ptr());
  }
  const Tensor dense = as_contiguous(tiles);
  a.tiles = const_cast<float*>(static_cast<const float*>(dense.const_data_ptr()));
  a.map = y.mutable_data_ptr();
  const int64_t scratch = gradient ? kWinogradPatch * (a.width + 2) * kWinogradGroup : 0;
  if (y.numel() > 0)
    parallel_for(0, a.batches * a.groups(), 1, [&](int64_t begin, int64_t end) {
      const auto memory = doubles(scratch / 2 + 1);
      NVAE_CALL(winograd_map, a, reinterpret_cast<float*>(memory.get()), begin, end);
    });
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "winograd_tiles", &nvae::winograd_tiles);
  NVAE_IMPL(m, "winograd_map", &nvae::winograd_map);
}
