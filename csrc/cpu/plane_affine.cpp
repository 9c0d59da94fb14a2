// nvae_fast::plane_affine and plane_dots on the CPU: layouts, threads and the second stage of the sums; the
// arithmetic is in plane_affine.vec.cpp.
#include "plane_affine.h"
#include "squeeze_excite.h"

#include <tuple>

#include "planes.h"

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

Tensor plane_affine(const Tensor& x, const Tensor& a, const std::optional<Tensor>& y,
                    const std::optional<Tensor>& b, const std::optional<Tensor>& c) {
  const char* op = "plane_affine";
  check_feature_map(op, "x", x);
  NVAE_CHECK(y || !b, op, ": b needs y");
  dtype_of(op, "x", x);
  if (y) check_floating_like(op, "y", *y, "x", x);
  const Tensor& like = y ? *y : x;
  const bool last = is_channels_last(like);
  std::vector<Tensor> keep_alive;
  keep_alive.reserve(16);
  PlaneAffineArgs args;
  static_cast<MapShape&>(args) = planes_of(like);
  args.dtype = dtype_of(op, "y", like);
  args.mixed = set_data(x, like.scalar_type(), last, &args.x, keep_alive);
  if (y) args.y = dense(*y, last, keep_alive).const_data_ptr();
  args.a = planes("a", a, args, args.dtype, keep_alive);
  if (b) args.b = planes("b", *b, args, args.dtype, keep_alive);
  if (c) args.c = planes("c", *c, args, args.dtype, keep_alive);
  const Tensor out = empty_map_like(like);
  args.out = out.mutable_data_ptr();
  MapShape walk = args;
  walk.channels_last |= args.mixed;
  for_planes(walk, [&](int64_t begin, int64_t end) { NVAE_CALL(plane_affine_forward, args, begin, end); });
  return out;
}

static std::tuple<Tensor, Tensor> plane_dots(const Tensor& x, const Tensor& y,
                                             const std::optional<Tensor>& pivot) {
  const char* op = "plane_dots";
  check_feature_map(op, "x", x);
  check_floating_like(op, "y", y, "x", x);
  const bool last = is_channels_last(x);
  std::vector<Tensor> keep_alive;
  keep_alive.reserve(8);
  PlaneDotsArgs args;
  static_cast<MapShape&>(args) = planes_of(x);
  args.dtype = dtype_of(op, "x", x);
  args.x = dense(x, last, keep_alive).const_data_ptr();
  args.mixed = set_data(y, x.scalar_type(), last, &args.y, keep_alive);
  args.x_channels_last = last;
  args.channels_last |= args.mixed;
  std::optional<Coefficients> pivots;
  if (pivot) pivots = Coefficients(args.dtype, doubles_of(op, "pivot", *pivot, args.channels));
  args.pivot = pivots ? pivots->data() : nullptr;
  Partials partial(args, 2);
  args.sum_x = partial.data(0);
  args.sum_xy = partial.data(1);
  for_planes(args, [&](int64_t begin, int64_t end) { NVAE_CALL(plane_dots_parts, args, begin, end); });
  const Tensor out[2] = {empty_vector(x, args.dtype, {args.batches, args.channels}),
                         empty_vector(x, args.dtype, {args.batches, args.channels})};
  const int64_t spans = args.spans();
  const std::vector<double> zeros(spans ? 0 : static_cast<size_t>(args.rows()), 0.0);
  for (int kind = 0; kind < 2; ++kind) {
    if (spans <= 1) {
      write(out[kind], args.dtype, 0, spans ? partial.data(kind) : zeros.data(), args.rows());
      continue;
    }
    for (int64_t sample = 0; sample < args.batches; ++sample)
      write(out[kind], args.dtype, sample * args.channels, partial.total(kind, sample * spans, spans),
            args.channels);
  }
  return {out[0], out[1]};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "plane_affine", &nvae::plane_affine);
  NVAE_IMPL(m, "plane_dots", &nvae::plane_dots);
}
