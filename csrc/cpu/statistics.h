// Mean and sum of squared deviations of the channels of a map, for the host side of the ops that need them.
#pragma once
#include "channel_statistics.h"
#include "planes.h"

namespace nvae {

struct Statistics {
  std::vector<double> mean, m2;  // (C) or, of every sample, (B * C)
};

// Chan's formula for parts first .. first + n - 1 of a map, in order, into mean and m2 (C).
inline void merge(const MapShape& m, const double* part_mean, const double* part_m2, int64_t first, int64_t n,
                  double* mean, double* m2) {
  const int64_t channels = m.channels;
  double total = 0;
  for (int64_t part = first; part < first + n; ++part) {
    const double count = static_cast<double>(count_of(m, part));
    const double share = count / (total + count), weight = total * share;
    const double *from = part_mean + part * channels, *from_m2 = part_m2 + part * channels;
    total += count;
    for (int64_t c = 0; c < channels; ++c) {
      const double d = from[c] - mean[c];
      mean[c] += d * share;
      m2[c] += from_m2[c] + d * d * weight;
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (mean[c] == mean[c]) continue;
    mean[c] = 0;  // differences of infinities: their sum is what the mean of such values is
    for (int64_t part = first; part < first + n; ++part)
      mean[c] += part_mean[part * channels + c] * (static_cast<double>(count_of(m, part)) / total);
  }
}

// x is dense, with the layout that `walked` describes. An empty map has mean 0 and m2 0.
inline Statistics statistics_of(const MapShape& walked, Dtype dtype, const void* x, bool per_sample) {
  ChannelStatisticsArgs a;
  static_cast<MapShape&>(a) = per_sample ? walked : folded(walked);
  a.dtype = dtype;
  a.x = x;
  const int64_t spans = a.spans();
  const size_t size = static_cast<size_t>((per_sample ? a.batches : 1) * a.channels);
  Statistics out{std::vector<double>(size, 0.0), std::vector<double>(size, 0.0)};
  const bool merged = !per_sample || spans > 1;
  Partials partial(a, merged ? 2 : 0);
  a.mean = merged ? partial.data(0) : out.mean.data();
  a.m2 = merged ? partial.data(1) : out.m2.data();
  for_planes(a, [&](int64_t begin, int64_t end) { NVAE_CALL(channel_statistics_parts, a, begin, end); });
  if (!per_sample) {
    merge(a, a.mean, a.m2, 0, parts_of(a), out.mean.data(), out.m2.data());
  } else if (spans > 1) {
    for (int64_t b = 0; b < a.batches; ++b)
      merge(a, a.mean, a.m2, b * spans, spans, out.mean.data() + b * a.channels,
            out.m2.data() + b * a.channels);
  }
  return out;
}

}  // namespace nvae
