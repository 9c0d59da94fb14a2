// Layouts of feature maps for the kernels that take packed parameters (B, 2Z, H, W) and maps (B, Z, H, W).
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "../maps.h"
#include "../memory.h"

namespace nvae {

inline void check_packed(const char* op, const char* name, const Tensor& t) {
  NVAE_CHECK(t.dim() == 4 && t.size(1) % 2 == 0, op, ": ", name, " must have shape (B, 2Z, H, W), got ",
             shape_text(t));
}

// A map (B, Z, H, W) that belongs to packed parameters.
inline void check_map(const char* op, const char* name, const Tensor& t, const Tensor& packed) {
  check_floating(op, name, t, {packed.size(0), packed.size(1) / 2, packed.size(2), packed.size(3)});
}

// The rule by which outputs take their memory format (nvae_fast/ops/_squash.py has the same): channels_last
// when the channels are adjacent and there is more than one pixel.
inline bool is_channels_last(const Tensor& t) { return t.stride(1) == 1 && t.size(2) * t.size(3) > 1; }

inline Tensor empty_map(const Tensor& like, int64_t channels, ScalarType type, bool channels_last) {
  return allocate({like.size(0), channels, like.size(2), like.size(3)}, type, like, channels_last);
}

// The dtype in which a kernel reads two maps. Of two dtypes it is the accumulation type of the first: converting
// to that loses nothing of what the kernel computes with.
inline ScalarType common_type(const char* op, const char* name, const Tensor& t, const char* other_name,
                              const std::optional<Tensor>& other) {
  const ScalarType type = t.scalar_type();
  if (!other || other->scalar_type() == type) return type;
  dtype_of(op, other_name, *other);
  return accumulation_type(dtype_of(op, name, type));
}
inline const Tensor& converted(const Tensor& t, ScalarType type, std::vector<Tensor>& keep_alive) {
  if (t.scalar_type() == type) return t;
  keep_alive.push_back(to_dtype(t, type));
  return keep_alive.back();
}

// t as a dense tensor of the layout asked for; a copy only when it is laid out otherwise.
inline const Tensor& dense(const Tensor& t, bool channels_last, std::vector<Tensor>& keep_alive) {
  keep_alive.push_back(as_contiguous(t, channels_last));
  return keep_alive.back();
}

// Packed parameters as they are where the kernel can walk them (pixels in one stride, and unit stride over
// pixels or, with channels_last, over channels), else a dense copy.
inline Packed packed_view(const Tensor& t, bool channels_last, std::vector<Tensor>& keep_alive) {
  const int64_t h = t.size(2), w = t.size(3);
  int64_t pixel = w > 1 ? t.stride(3) : t.stride(2);
  if (h * w == 1) pixel = 1;
  const bool one_stride = h <= 1 || w <= 1 || t.stride(2) == w * t.stride(3);
  // Without elements every layout will do. A "copy" would be the same tensor, and this function would not end.
  const bool empty = t.numel() == 0;
  const bool fits =
      empty || (one_stride && (channels_last ? t.stride(1) == 1 || t.size(1) == 1 : pixel == 1));
  if (fits) {
    const Packed found{t.const_data_ptr(), t.stride(0), t.stride(1), pixel};
    keep_alive.push_back(Tensor(t));  // a copy of the handle: t may be an element of keep_alive
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
  NVAE_CHECK(noise.has_value() != seed.has_value(), op, ": give either noise or seed, got ",
             noise ? "both" : "neither");
  Noise n;
  if (noise) {
    check_map(op, "noise", *noise, packed);
    n.dtype = dtype_of(op, "noise", *noise);
    n.data = dense(*noise, channels_last, keep_alive).const_data_ptr();
  } else {
    n.seed = seed_of(op, *seed);
  }
  return n;
}

// An upstream gradient in the layout and dtype of its map.
inline const void* map_gradient(const Tensor& grad, ScalarType type, bool channels_last,
                                std::vector<Tensor>& keep_alive) {
  return dense(converted(grad, type, keep_alive), channels_last, keep_alive).const_data_ptr();
}
// An upstream gradient of sums (B, Z) as float64, null when there is none. Converted here: it is small and
// often expanded from one number, and two calls of the dispatcher would take longer.
inline const double* sums_gradient(const char* op, const char* name, const std::optional<Tensor>& grad,
                                   const MapShape& map, std::vector<std::vector<double>>& keep_alive) {
  if (!grad) return nullptr;
  const int64_t rows = map.batches, columns = map.channels;
  check_shape(op, name, *grad, {rows, columns});
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
    fail(op, ": ", name, " must be float32 or float64, got ",
         torch::headeronly::toString(grad->scalar_type()));
  keep_alive.push_back(std::move(values));
  return keep_alive.back().data();
}

inline Tensor empty_unless(bool need, const Tensor& like, int64_t channels, ScalarType type,
                           bool channels_last) {
  return need ? empty_map(like, channels, type, channels_last) : allocate({0}, type, like);
}

// Runs kernel(begin, end) over the tasks of a map, in threads that have at least 4096 elements each.
template <class F>
void for_tasks(const MapShape& m, F kernel) {
  const int64_t elements = m.span() * m.lanes();
  parallel_for(0, m.tasks(), 4096 / (elements ? elements : 1) + 1, kernel);
}

// The second stage of sums: partial[(task * kinds + kind) * lanes + channel] -> one (B, Z) tensor a kind.
// Spans are added in order, whichever thread computed them: two runs agree bit for bit.
class PartialSums {
 public:
  PartialSums(const MapShape& m, int kinds)
      : m_(m), kinds_(kinds), partial_(doubles(m.tasks() * kinds * m.lanes() + 1)) {}
  double* data() { return partial_.get(); }
  Tensor total(int kind, Dtype dtype, const Tensor& like) const {
    const Tensor out = allocate({m_.batches, m_.channels}, accumulation_type(dtype), like);
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
