// The per-capability kernel of channel_statistics.vec.cpp and its arguments.
#pragma once
#include "../capability.h"
#include "../maps.h"

namespace nvae {

struct ChannelStatisticsArgs : MapShape {
  Dtype dtype;
  const void* x = nullptr;  // dense
  // Mean and sum of squared deviations of every part: [part * channels + channel], see csrc/cpu/planes.h. Without m2
  // only means are computed.
  double *mean = nullptr, *m2 = nullptr;
};

NVAE_PER_ISA(void channel_statistics_parts(const ChannelStatisticsArgs& args, int64_t begin, int64_t end))

}  // namespace nvae
