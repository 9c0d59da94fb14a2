// Layouts of feature maps for the kernels that take packed parameters (B, 2Z, H, W) and maps (B, Z, H, W).
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "../checks.h"
#include "../maps.h"

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

// The rule by which outputs take their memory format (nvae_fast/ops/_squash.py has the same): channels_last
// when the channels are adjacent and there is more than one pixel.
inline bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(2) * t.size(3) > 1; }

inline Tensor empty_map(const Tensor& like, int64_t channels, ScalarType type, bool channels_last) {
  const int64_t size[4] = {like.size(0), channels, like.size(2), like.size(3)};
  return torch::stable::empty({size, 4}, type, std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor as_dtype_of(const Tensor& like, const Tensor& t) {
  return t.scalar_type() == like.scalar_type() ? t : torch::stable::to(t, like.scalar_type());
}

// t as a dense tensor of the layout asked for; a copy only when it is laid out otherwise.
inline const Tensor& dense(const Tensor& t, bool channels_last, std::vector<Tensor>& keep_alive) {
  keep_alive.push_back(
      torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
  return keep_alive.back();
}

// Packed parameters as they are where the kernel can walk them (pixels in one stride, and unit stride over
// pixels or, with channels_last, over channels), else a dense copy.
inline Packed packed_view(const Tensor& t, bool channels_last, std::vector<Tensor>& keep_alive) {
  const int64_t h = t.size(2), w = t.size(3);
  int64_t pixel = w > 1 ? t.stride(3) : t.stride(2);
  if (h * w == 1) pixel = 1;
  const bool one_stride = h <= 1 || w <= 1 || t.stride(2) == w * t.stride(3);
  // Of no elements every layout is the right one, and PyTorch makes no copy of it to begin again with.
  const bool empty = t.numel() == 0;
  const bool fits =
      empty || (one_stride && (channels_last ? t.stride(1) == 1 || t.size(1) == 1 : pixel == 1));
  if (fits) {
    const Packed found{t.const_data_ptr(), t.stride(0), t.stride(1), pixel};
    keep_alive.push_back(
        Tensor(t));  // t may be a conversion that nobody else keeps, or stand in keep_alive itself
    return found;
  }
  return packed_view(dense(t, channels_last, keep_alive), channels_last, keep_alive);
}

// The shape of the map (B, Z, H, W) that belongs to packed parameters (B, 2Z, H, W), or of a map itself.
inline MapShape shape_of(const Tensor& t, int64_t channels) {
  MapShape m;
  m.batches = t.size(0);
  m.channels = channels;
  m.pixels = t.size(2) * t.size(3);
  m.channels_last = is_channels_last(t);
  return m;
}

inline Noise noise_of(const char* op, const Tensor& packed, const std::optional<Tensor>& noise,
                      const std::optional<Tensor>& seed, bool channels_last,
                      std::vector<Tensor>& keep_alive) {
  STD_TORCH_CHECK(noise.has_value() != seed.has_value(), op, ": give either noise or seed");
  Noise n;
  if (noise) {
    check_map(op, "noise", *noise, packed);
    n.dtype = dtype_of(op, noise->scalar_type());
    n.data = dense(*noise, channels_last, keep_alive).const_data_ptr();
  } else {
    n.seed = seed_of(op, *seed);
  }
  return n;
}

// An upstream gradient in the layout and dtype of its map.
inline const void* map_gradient(const Tensor& grad, ScalarType type, bool channels_last,
                                std::vector<Tensor>& keep_alive) {
  return dense(grad.scalar_type() == type ? grad : torch::stable::to(grad, type), channels_last, keep_alive)
      .const_data_ptr();
}
// An upstream gradient of sums (B, Z) as float64, null when there is none. Read here: it is small, often
// expanded from one number, and two trips through the dispatcher cost more.
inline const double* sums_gradient(const std::optional<Tensor>& grad,
                                   std::vector<std::vector<double>>& keep_alive) {
  if (!grad) return nullptr;
  STD_TORCH_CHECK(grad->dim() == 2, "gradient of sums: expected shape (B, Z), got ", grad->dim(),
                  " dimensions");
  const int64_t rows = grad->size(0), columns = grad->size(1);
  std::vector<double> values(static_cast<size_t>(rows * columns) + 1);
  const auto read = [&](auto* data) {
    double* out = values.data();
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) *out++ = data[i * grad->stride(0) + j * grad->stride(1)];
  };
  if (grad->scalar_type() == ScalarType::Double)
    read(grad->const_data_ptr<double>());
  else if (grad->scalar_type() == ScalarType::Float)
    read(grad->const_data_ptr<float>());
  else
    STD_TORCH_CHECK(false, "gradient of sums: expected float32 or float64");
  keep_alive.push_back(std::move(values));
  return keep_alive.back().data();
}

inline Tensor empty_unless(bool need, const Tensor& like, int64_t channels, ScalarType type,
                           bool channels_last) {
  return need ? empty_map(like, channels, type, channels_last)
              : torch::stable::empty({0}, type, std::nullopt, like.device());
}

// Runs kernel(begin, end) over the tasks of a map, in threads that have at least 4096 elements each.
template <class F>
void for_tasks(const MapShape& m, F kernel) {
  const int64_t elements = m.span() * m.lanes();
  torch::stable::parallel_for(0, m.tasks(), 4096 / (elements ? elements : 1) + 1, kernel);
}

// The second stage of sums: partial[(task * kinds + kind) * lanes + channel] -> one (B, Z) tensor a kind.
// Spans are added in order, whatever thread made them: two runs agree bit for bit.
class PartialSums {
 public:
  PartialSums(const MapShape& m, int kinds)
      : m_(m), kinds_(kinds), partial_(new double[static_cast<size_t>(m.tasks() * kinds * m.lanes()) + 1]) {}
  double* data() { return partial_.get(); }
  Tensor total(int kind, Dtype dtype, const Tensor& like) const {
    const ScalarType type = dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
    const Tensor out = torch::stable::empty({m_.batches, m_.channels}, type, std::nullopt, like.device());
    void* data = out.mutable_data_ptr();
    const int64_t lanes = m_.lanes(), spans = m_.spans();
    for (int64_t row = 0; row < m_.rows(); ++row) {
      const int64_t first = row / lanes * spans, lane = row % lanes;
      double sum = 0;
      for (int64_t s = 0; s < spans; ++s) sum += partial_[((first + s) * kinds_ + kind) * lanes + lane];
      if (dtype == Dtype::f64)
        static_cast<double*>(data)[row] = sum;
      else
        static_cast<float*>(data)[row] = static_cast<float>(sum);
    }
    return out;
  }

 private:
  MapShape m_;
  int kinds_;
  std::unique_ptr<double[]> partial_;
};

}  // namespace nvae
