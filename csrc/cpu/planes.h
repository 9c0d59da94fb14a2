// Host side of the kernels over planes (channel statistics, batch norm, affine maps): how a map is walked,
// coefficients, and the second stage of sums. The kernels' side is csrc/cpu/plane_loops.h.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>
#include <optional>
#include <vector>

#include "packed.h"

namespace nvae {

inline void check_feature_map(const char* op, const char* name, const Tensor& t) {
  NVAE_CHECK(t.dim() == 4, op, ": ", name, " must have shape (B, C, H, W), got ", shape_text(t));
}

// How dense maps laid out like t are walked. One pixel a plane is the same memory in both layouts, and so is
// one channel: the kernels take the longer run of the two.
inline MapShape planes_of(const Tensor& t) {
  MapShape m = shape_of(t, t.size(1));
  m.channels_last = m.channels > 1 && (m.channels_last || m.pixels == 1);
  return m;
}
// The same for kernels whose coefficients and sums belong to channels alone: samples in channels_last are
// then but more pixels.
inline MapShape folded(MapShape m) {
  if (m.channels_last) {
    m.pixels *= m.batches;
    m.batches = m.batches ? 1 : 0;
  }
  return m;
}
// Partial results a channel that the tasks of a map leave: [part * channels + channel].
inline int64_t parts_of(const MapShape& m) { return m.batches * m.spans(); }
inline int64_t count_of(const MapShape& m, int64_t part) {
  const int64_t first = part % m.spans() * m.span();
  return m.pixels - first < m.span() ? m.pixels - first : m.span();
}

// A map in the layout and dtype of another, a copy only when it is not.
inline const Tensor& dense_like(const Tensor& like, const Tensor& t, std::vector<Tensor>& keep_alive) {
  const bool last = is_channels_last(like);
  return dense(to_dtype(t, like.scalar_type()), last, keep_alive);
}
inline Tensor empty_map_like(const Tensor& like) {
  return empty_map(like, like.size(1), like.scalar_type(), is_channels_last(like));
}

inline Tensor empty_vector(const Tensor& like, Dtype dtype, std::initializer_list<int64_t> size) {
  return allocate(size, accumulation_type(dtype), like);
}
// n values from element `at` of a tensor that empty_vector made.
inline void write(const Tensor& out, Dtype dtype, int64_t at, const double* values, int64_t n) {
  if (dtype == Dtype::f64) {
    double* to = static_cast<double*>(out.mutable_data_ptr()) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = values[i];
  } else {
    float* to = static_cast<float*>(out.mutable_data_ptr()) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(values[i]);
  }
}

// A tensor (C,) as float64, whatever its dtype.
inline std::vector<double> doubles_of(const char* op, const char* name, const Tensor& t, int64_t n) {
  check_floating(op, name, t, {n});
  std::vector<double> out(static_cast<size_t>(n));
  const int64_t step = t.stride(0);
  const void* data = t.const_data_ptr();
  const auto fill = [&](auto* from) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<double>(static_cast<float>(from[i * step]));
  };
  switch (dtype_of(op, name, t)) {
    case Dtype::f32:
      fill(static_cast<const float*>(data));
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) out[i] = static_cast<const double*>(data)[i * step];
      break;
    case Dtype::bf16:
      fill(static_cast<const c10::BFloat16*>(data));
      break;
    case Dtype::f16:
      fill(static_cast<const c10::Half*>(data));
      break;
  }
  return out;
}

// Coefficients as a kernel reads them: dense, float32 or (for float64 maps) float64.
class Coefficients {
 public:
  Coefficients(Dtype dtype, int64_t n)
      : double_(dtype == Dtype::f64), data_(static_cast<size_t>(n * (double_ ? 2 : 1) + 1)) {}
  Coefficients(Dtype dtype, const std::vector<double>& values) : Coefficients(dtype, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void set(int64_t i, double value) {
    if (double_)
      reinterpret_cast<double*>(data_.data())[i] = value;
    else
      data_[i] = static_cast<float>(value);
  }
  const void* data() const { return data_.data(); }

 private:
  bool double_;
  std::vector<float> data_;
};

// Runs kernel(begin, end) over the tasks of a map that is not empty.
template <class F>
void for_planes(const MapShape& m, F kernel) {
  if (m.batches && m.channels && m.pixels) for_tasks(m, kernel);
}

// The same over the tasks of samples begin .. end - 1.
template <class F>
void for_samples(const MapShape& m, int64_t begin, int64_t end, F kernel) {
  if (begin == end || !m.channels || !m.pixels) return;
  const int64_t tasks = m.tasks() / m.batches, elements = m.span() * m.lanes();
  parallel_for(begin * tasks, end * tasks, 4096 / elements + 1, kernel);
}

// Partial results of `kinds` kinds: kind k begins at data() + k * size().
class Partials {
 public:
  Partials(const MapShape& m, int kinds)
      : parts_(parts_of(m)), channels_(m.channels), data_(doubles(parts_ * channels_ * kinds + 1)) {}
  int64_t size() const { return parts_ * channels_; }
  double* data(int kind = 0) { return data_.get() + kind * size(); }

  // The sums of n > 0 parts from `first` on, added in order into those of the first: one value a channel.
  const double* total(int kind, int64_t first, int64_t n) {
    double* sums = data(kind) + first * channels_;
    const double* from = sums + channels_;
    for (int64_t part = 1; part < n; ++part, from += channels_)
      for (int64_t c = 0; c < channels_; ++c) sums[c] += from[c];
    return sums;
  }

 private:
  int64_t parts_, channels_;
  std::unique_ptr<double[]> data_;
};

}  // namespace nvae
