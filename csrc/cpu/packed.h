// Layouts of feature maps for the kernels that take packed parameters (B, 2Z, H, W) and maps (B, Z, H, W).
#pragma once
#include <vector>

#include "../checks.h"
#include "residual_normal.h"

namespace nvae {

inline void check_packed(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(1) % 2 == 0, op, ": ", name, " must have shape (B, 2Z, H, W)");
}

// A map (B, Z, H, W) that belongs to packed parameters.
inline void check_map(const char* op, const char* name, const Tensor& t, const Tensor& packed) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == packed.size(0) && 2 * t.size(1) == packed.size(1) &&
                      t.size(2) == packed.size(2) && t.size(3) == packed.size(3),
                  op, ": ", name, " must have shape (B, Z, H, W) of the packed parameters");
}

// The rule by which outputs take their memory format (nvae_fast/ops/_squash.py has the same): channels_last when the
// channels are adjacent and there is more than one pixel.
inline bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(2) * t.size(3) > 1; }

inline Tensor empty_map(const Tensor& like, int64_t channels, ScalarType type, bool channels_last) {
  const int64_t size[4] = {like.size(0), channels, like.size(2), like.size(3)};
  return torch::stable::empty({size, 4}, type, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// t as a dense tensor of the layout asked for; a copy only when it is laid out otherwise.
inline const Tensor& dense(const Tensor& t, bool channels_last, std::vector<Tensor>& hold) {
  hold.push_back(torch::stable::contiguous(
      t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
  return hold.back();
}

// Packed parameters as they are where the kernel can walk them (pixels in one stride, and unit stride over pixels or, with
// channels_last, over channels), else a dense copy.
inline Packed packed_view(const Tensor& t, bool channels_last, std::vector<Tensor>& hold) {
  const int64_t h = t.size(2), w = t.size(3);
  int64_t pixel = w > 1 ? t.stride(3) : t.stride(2);
  if (h * w == 1) pixel = 1;
  const bool one_stride = h <= 1 || w <= 1 || t.stride(2) == w * t.stride(3);
  const bool fits = one_stride && (channels_last ? t.stride(1) == 1 || t.size(1) == 1 : pixel == 1);
  if (fits) return {t.const_data_ptr(), t.stride(0), t.stride(1), pixel};
  return packed_view(dense(t, channels_last, hold), channels_last, hold);
}

}  // namespace nvae
