// nvae_fast::channel_statistics on the CPU; the arithmetic is in channel_statistics.vec.cpp.
#include <tuple>

#include "statistics.h"

namespace nvae {

static std::tuple<Tensor, Tensor> channel_statistics(const Tensor& x, bool per_sample) {
  const char* op = "channel_statistics";
  check_feature_map(op, "x", x);
  std::vector<Tensor> keep_alive;
  const Dtype dtype = dtype_of(op, "x", x);
  const void* data = dense(x, is_channels_last(x), keep_alive).const_data_ptr();
  const Statistics found = statistics_of(planes_of(x), dtype, data, per_sample);
  const int64_t b = x.size(0), c = x.size(1);
  const Tensor mean = per_sample ? empty_vector(x, dtype, {b, c}) : empty_vector(x, dtype, {c});
  const Tensor m2 = per_sample ? empty_vector(x, dtype, {b, c}) : empty_vector(x, dtype, {c});
  const int64_t n = static_cast<int64_t>(found.mean.size());
  write(mean, dtype, 0, found.mean.data(), n);
  write(m2, dtype, 0, found.m2.data(), n);
  return {mean, m2};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "channel_statistics", &nvae::channel_statistics);
}
