// Second stage of the sums of depthwise_conv2d: partial results of blocks, added in a fixed order and in
// double.
#pragma once
#include "elements.cuh"

namespace nvae {
namespace cuda {

constexpr int kStrands = 8;  // threads that share the partial results of a channel; lanes are channels

// The sum over strands of what each thread brings, to every thread, always in the same order.
__device__ __forceinline__ double across_strands(double value, double (*shared)[32]) {
  const int lane = threadIdx.x % 32, strand = threadIdx.x / 32;
  __syncthreads();
  shared[strand][lane] = value;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kStrands; ++i) sum += shared[i][lane];
  return sum;
}

// partial [count][n, mean, m2][channel] -> mean, m2. Each channel's `repeat` equal images count as one here.
template <class S>
__global__ void __launch_bounds__(32 * kStrands)
    depthwise_finish_stats(const S* partial, int count, int64_t channels, S* mean, S* m2) {
  static __shared__ double shared[kStrands][32];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int strand = threadIdx.x / 32;
  const bool exists = channel < channels;
  const int64_t stride = 3 * channels;
  double n = 0, sum = 0, squares = 0;
  if (exists) {
    for (int i = strand; i < count; i += kStrands) {
      const S* at = partial + i * stride + channel;
      n += at[0];
      sum += static_cast<double>(at[0]) * at[channels];
    }
  }
  n = across_strands(n, shared);
  sum = across_strands(sum, shared);
  const double centre = n > 0 ? sum / n : 0;
  if (exists) {
    for (int i = strand; i < count; i += kStrands) {
      const S* at = partial + i * stride + channel;
      const double d = at[channels] - centre;
      if (at[0] > 0) squares += at[2 * channels] + at[0] * d * d;
    }
  }
  squares = across_strands(squares, shared);
  if (exists && strand == 0) {
    mean[channel] = static_cast<S>(centre);
    m2[channel] = static_cast<S>(squares);
  }
}

struct FinishGradients {
  const void* partial;  // [count][tap, shift, scale][channel]
  int count;
  int kernel;
  bool masked;
  uint32_t live[32];
  int taps;  // each way: kernel, or kernel + 1: then tap m holds dh's neighbours, and a weight has four of
             // them
  int64_t channels;
  void* weight;  // null where not wanted
  Dtype weight_dtype;
  void* shift;
  void* scale;
};

// blockIdx.y: a weight, then shift and scale.
template <class S>
__global__ void __launch_bounds__(32 * kStrands) depthwise_finish_gradients(const FinishGradients a) {
  static __shared__ double shared[kStrands][32];
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int strand = threadIdx.x / 32, result = blockIdx.y, weights = a.kernel * a.kernel;
  const bool exists = channel < a.channels;
  if (result < weights && !a.weight) return;  // its partial sums were not written
  int rows[4], used = 1;
  if (result >= weights) {
    rows[0] = a.taps * a.taps + result - weights;
  } else {
    const int u = result / a.kernel, v = result % a.kernel;
    rows[0] = u * a.taps + v;
    if (a.taps != a.kernel) {
      used = 4;
      for (int i = 0; i < 4; ++i) rows[i] = (a.kernel - 1 - u + i / 2) * a.taps + a.kernel - 1 - v + i % 2;
    }
  }
  double sum = 0;
  if (exists) {
    for (int i = strand; i < a.count; i += kStrands) {
      const S* at = static_cast<const S*>(a.partial) + i * (a.taps * a.taps + 2) * a.channels + channel;
      for (int j = 0; j < used; ++j) sum += at[rows[j] * a.channels];
    }
  }
  sum = across_strands(sum, shared);
  if (!exists || strand != 0) return;
  if (result < weights) {
    store_any(a.weight, a.weight_dtype, channel * weights + result,
              a.masked && !(a.live[result / 32] >> (result % 32) & 1) ? S(0) : static_cast<S>(sum));
  } else if (a.shift) {
    static_cast<S*>(result == weights ? a.shift : a.scale)[channel] = static_cast<S>(sum);
  }
}

}  // namespace cuda
}  // namespace nvae
