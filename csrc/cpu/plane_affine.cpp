// nvae_fast::plane_affine and plane_dots on the CPU: layouts, threads and the second stage of the sums; the
// arithmetic is in plane_affine.vec.cpp.
#include <tuple>

#include "squeeze_excite.h"

namespace nvae {

// Whether t is dense in the memory format; extents of 1 may have any stride.
static bool is_dense(const Tensor& t, bool channels_last) {
  const int order[2][4] = {{3, 2, 1, 0}, {1, 3, 2, 0}};
  int64_t expected = 1;
  for (const int d : order[channels_last]) {
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// Sets `data` to x for a kernel whose other map is in the format `channels_last`: x itself where it is dense in
// either format, else a copy in that one. Returns whether the formats differ.
static bool set_data(const Tensor& x, ScalarType type, bool channels_last, const void** data,
                     std::vector<Tensor>& keep_alive) {
  keep_alive.push_back(x);
  if (x.scalar_type() != type) keep_alive.push_back(to_dtype(x, type));
  const Tensor& same = keep_alive.back();
  const bool mixed = !is_dense(same, channels_last) && is_dense(same, !channels_last);
  *data = mixed ? same.const_data_ptr() : dense(Tensor(same), channels_last, keep_alive).const_data_ptr();
  return mixed;
}

// Coefficients (B, C) or (1, C), in the dtype the kernels compute in.
static PlaneCoefficients planes(const char* name, const Tensor& t, const MapShape& m, Dtype dtype,
                                std::vector<Tensor>& keep_alive) {
  NVAE_CHECK(t.dim() == 2 && (t.size(0) == m.batches || t.size(0) == 1) && t.size(1) == m.channels,
             "plane_affine: ", name, " must have shape (B, C) or (1, C)");
  keep_alive.push_back(as_contiguous(to_dtype(t, accumulation_type(dtype))));
  return {keep_alive.back().const_data_ptr(), t.size(0) == 1 ? 0 : m.channels};
}

PlaneAffine::PlaneAffine(const Tensor& x, const Tensor& a, const std::optional<Tensor>& y,
                         const std::optional<Tensor>& b, const std::optional<Tensor>& c) {
  const char* op = "plane_affine";
  check_feature_map(op, "x", x);
  NVAE_CHECK(y || !b, op, ": b needs y");
  dtype_of(op, "x", x);
  if (y) check_floating_like(op, "y", *y, "x", x);
  const Tensor& like = y ? *y : x;
  const bool last = is_channels_last(like);
  keep_alive_.reserve(16);
  static_cast<MapShape&>(args_) = planes_of(like);
  args_.dtype = dtype_of(op, "y", like);
  args_.mixed = set_data(x, like.scalar_type(), last, &args_.x, keep_alive_);
  if (y) args_.y = dense(*y, last, keep_alive_).const_data_ptr();
  args_.a = planes("a", a, args_, args_.dtype, keep_alive_);
  if (b) args_.b = planes("b", *b, args_, args_.dtype, keep_alive_);
  if (c) args_.c = planes("c", *c, args_, args_.dtype, keep_alive_);
  keep_alive_.push_back(empty_map_like(like));
  args_.out = keep_alive_.back().mutable_data_ptr();
  walk_ = args_;
  walk_.channels_last |= args_.mixed;
}

void PlaneAffine::run_tasks(int64_t begin, int64_t end) const {
  NVAE_CALL(plane_affine_forward, args_, begin, end);
}

static Tensor plane_affine(const Tensor& x, const Tensor& a, const std::optional<Tensor>& y,
                           const std::optional<Tensor>& b, const std::optional<Tensor>& c) {
  const PlaneAffine map(x, a, y, b, c);
  map.run(0, x.size(0));
  return map.out();
}

PlaneDots::PlaneDots(const Tensor& x, const Tensor& y, const std::optional<Tensor>& pivot) {
  const char* op = "plane_dots";
  check_feature_map(op, "x", x);
  check_floating_like(op, "y", y, "x", x);
  const bool last = is_channels_last(x);
  keep_alive_.reserve(8);
  static_cast<MapShape&>(args_) = planes_of(x);
  args_.dtype = dtype_of(op, "x", x);
  args_.x = dense(x, last, keep_alive_).const_data_ptr();
  args_.mixed = set_data(y, x.scalar_type(), last, &args_.y, keep_alive_);
  args_.x_channels_last = last;
  args_.channels_last |= args_.mixed;
  if (pivot) pivots_ = Coefficients(args_.dtype, doubles_of(op, "pivot", *pivot, args_.channels));
  args_.pivot = pivots_ ? pivots_->data() : nullptr;
  partial_.emplace(args_, 2);
  args_.sum_x = partial_->data(0);
  args_.sum_xy = partial_->data(1);
}

void PlaneDots::run_tasks(int64_t begin, int64_t end) const {
  NVAE_CALL(plane_dots_parts, args_, begin, end);
}

void PlaneDots::write_sums(int64_t begin, int64_t end, const Tensor& sum_x, const Tensor& sum_xy) {
  const Tensor* const out[2] = {&sum_x, &sum_xy};
  const int64_t spans = args_.spans(), channels = args_.channels;
  const std::vector<double> zeros(spans ? 0 : static_cast<size_t>(channels), 0.0);
  for (int kind = 0; kind < 2; ++kind)
    for (int64_t b = begin; b < end; ++b)
      write(*out[kind], args_.dtype, b * channels,
            spans ? partial_->total(kind, b * spans, spans) : zeros.data(), channels);
}

static std::tuple<Tensor, Tensor> plane_dots(const Tensor& x, const Tensor& y,
                                             const std::optional<Tensor>& pivot) {
  PlaneDots dots(x, y, pivot);
  const Dtype dtype = dtype_of("plane_dots", "x", x);
  const Tensor sum_x = empty_vector(x, dtype, {x.size(0), x.size(1)}),
               sum_xy = empty_vector(x, dtype, {x.size(0), x.size(1)});
  dots.run(0, x.size(0));
  dots.write_sums(0, x.size(0), sum_x, sum_xy);
  return {sum_x, sum_xy};
}

// Elements of g that are still in the first-level cache when they are read again.
constexpr int64_t kCached = 8192;

// dx = a g, and the sums of g and of g x, of maps in one format span by span: g is read once.
static std::tuple<Tensor, Tensor, Tensor> plane_affine_gradients(const Tensor& grad, const Tensor& x,
                                                                 const Tensor& a) {
  const char* op = "plane_affine_gradients";
  check_feature_map(op, "grad", grad);
  check_floating_like(op, "x", x, "grad", grad);
  NVAE_CHECK(a.dim() == 2 && (a.size(0) == 1 || a.size(0) == grad.size(0)) && a.size(1) == grad.size(1), op,
             ": a must have shape (B, C) or (1, C), got ", shape_text(a));
  PlaneDots dots(grad, x, std::nullopt);
  const PlaneAffine map(grad, a, std::nullopt, std::nullopt, std::nullopt);
  const Dtype dtype = dtype_of(op, "grad", grad);
  const int64_t batches = x.size(0);
  const Tensor sum_g = empty_vector(grad, dtype, {batches, x.size(1)}),
               sum_gx = empty_vector(grad, dtype, {batches, x.size(1)});
  const MapShape& shape = dots.shape();
  const int64_t elements = shape.span() * shape.lanes(),
                step = elements && elements < kCached ? kCached / elements : 1;
  for_samples(shape, 0, batches, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task += step) {
      const int64_t last = task + step < end ? task + step : end;
      dots.run_tasks(task, last);
      if (!dots.mixed()) map.run_tasks(task, last);
    }
  });
  if (dots.mixed()) map.run(0, batches);
  dots.write_sums(0, batches, sum_g, sum_gx);
  return {map.out(), sum_g, sum_gx};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "plane_affine", &nvae::plane_affine);
  NVAE_IMPL(m, "plane_affine_gradients", &nvae::plane_affine_gradients);
  NVAE_IMPL(m, "plane_dots", &nvae::plane_dots);
}
