// depthwise_conv2d for every odd kernel, both layouts and float64, by the formula: a block takes one channel
// and a range of its pixels. Neighbouring threads take neighbouring columns, which suits NCHW.
#pragma once
#include "depthwise_conv2d.h"
#include "elements.cuh"

namespace nvae {
namespace cuda {

constexpr int kGeneralThreads = 256;

// Sum over the block, to every thread, always in the same order.
template <class S>
__device__ S block_sum(S value) {
  static __shared__ S shared[kGeneralThreads];
  __syncthreads();
  shared[threadIdx.x] = value;
  for (int n = kGeneralThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < n) shared[threadIdx.x] += shared[threadIdx.x + n];
  }
  __syncthreads();
  return shared[0];
}

struct GeneralMap {
  int64_t channels;
  int height, width;
  bool channels_last;
  __device__ GeneralMap(const DepthwiseConv2d& p, int64_t h, int64_t w)
      : channels(p.channels),
        height(static_cast<int>(h)),
        width(static_cast<int>(w)),
        channels_last(p.channels_last != 0) {}
  __device__ int64_t at(int64_t b, int64_t c, int i, int j) const {
    return channels_last ? ((b * height + i) * width + j) * channels + c
                         : ((b * channels + c) * height + i) * width + j;
  }
  // The rows of a chunk, each to a warp, and of a row the columns to its lanes.
  template <class Visit>
  __device__ __forceinline__ void each(int64_t batch, int64_t chunk, int chunks, Visit visit) const {
    const unsigned rows = static_cast<unsigned>(batch) * height, warp = threadIdx.x / 32;
    const unsigned share = rows / chunks, more = rows % chunks, c = static_cast<unsigned>(chunk);
    const unsigned begin = c * share + (c < more ? c : more), end = begin + share + (c < more ? 1 : 0);
    for (unsigned n = begin + warp; n < end; n += kGeneralThreads / 32) {
      const unsigned b = n / height, i = n - b * height;
      for (int j = threadIdx.x % 32; j < width; j += 32) visit(b, static_cast<int>(i), j);
    }
  }
};

template <class S>
struct GeneralLoad {
  const DepthwiseConv2d& p;
  GeneralMap map;
  int64_t channel;
  S scale, shift;
  __device__ GeneralLoad(const DepthwiseConv2d& q, int64_t c) : p(q), map(q, q.height, q.width), channel(c) {
    scale = q.scale ? static_cast<const S*>(q.scale)[c] : S(1);
    shift = q.scale ? static_cast<const S*>(q.shift)[c] : S(0);
  }
  __device__ S raw(unsigned b, int i, int j) const {
    return load_any<S>(p.x, p.dtype, map.at(b, channel, i, j));
  }
  __device__ S h(unsigned b, int i, int j) const {
    return activate(scale * raw(b, i, j) + shift, static_cast<int>(p.activation));
  }
  __device__ S weight(int tap) const {
    return p.tap_is_live(tap) ? load_any<S>(p.weight, p.weight_dtype, channel * p.kernel * p.kernel + tap)
                              : S(0);
  }
};

template <class S>
__global__ void __launch_bounds__(kGeneralThreads, 1)
    depthwise_general_forward(const DepthwiseForward p, int chunks) {
  const unsigned channel = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const GeneralLoad<S> load(p, channel);
  const GeneralMap out(p, p.out_height(), p.out_width());
  const int k = static_cast<int>(p.kernel), stride = static_cast<int>(p.stride);
  const int dilation = static_cast<int>(p.dilation), halve = p.upsample == 2 ? 1 : 0, pad = k / 2 * dilation;
  const int height = load.map.height << halve, width = load.map.width << halve;
  S pivot = 0, sum = 0, squares = 0, count = 0;
  out.each(p.batch, chunk, chunks, [&](unsigned b, int i, int j) {
    S y = 0;
    for (int u = 0; u < k; ++u) {
      const int row = i * stride + u * dilation - pad;
      if (row < 0 || row >= height) continue;
      for (int v = 0; v < k; ++v) {
        const int column = j * stride + v * dilation - pad;
        if (column >= 0 && column < width)
          y += load.weight(u * k + v) * load.h(b, row >> halve, column >> halve);
      }
    }
    const int64_t at = out.at(b, channel, i, j);
    store_any(p.y, p.dtype, at, y);
    if (!p.mean) return;
    const S value = load_any<S>(p.y, p.dtype, at);
    if (count == S(0)) pivot = value;
    count += S(1);
    sum += value - pivot;
    squares += (value - pivot) * (value - pivot);
  });
  if (!p.mean) return;
  const S n = block_sum(count);
  const S share = count > S(0) ? reciprocal(count) : S(0);  // 0 where there is nothing
  const S mine = count > S(0) ? pivot + sum * share : S(0);
  // The block's mean as a distance from its first thread's pivot, so that nothing large is summed.
  const S centre = block_sum(threadIdx.x == 0 ? pivot : S(0));
  const S mean = n > S(0) ? centre + block_sum(count * (mine - centre)) * reciprocal(n) : S(0);
  const S own = count > S(0) ? squares - sum * sum * share + count * (mine - mean) * (mine - mean) : S(0);
  const S m2 = block_sum(own);
  if (threadIdx.x == 0) {
    S* partial = static_cast<S*>(p.workspace) + chunk * 3 * p.channels + channel;
    partial[0] = n;
    partial[p.channels] = mean;
    partial[2 * p.channels] = m2;
  }
}

template <class S>
__global__ void __launch_bounds__(kGeneralThreads, 1)
    depthwise_general_backward(const DepthwiseBackward p, int chunks) {
  const unsigned channel = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const GeneralLoad<S> load(p, channel);
  const GeneralMap out(p, p.out_height(), p.out_width());
  const int k = static_cast<int>(p.kernel), halved = p.stride == 2 ? 1 : 0;
  const int dilation = static_cast<int>(p.dilation), doubled = p.upsample == 2 ? 1 : 0,
            pad = k / 2 * dilation;
  const auto vector = [&](const void* of, S otherwise) {
    return of ? static_cast<const S*>(of)[channel] : otherwise;
  };
  const S alpha = vector(p.alpha, S(1)), beta = vector(p.beta, S(0)), gamma = vector(p.gamma, S(0));
  const auto dy = [&](unsigned b, int i, int j) {
    const int64_t at = out.at(b, channel, i, j);
    S value = alpha * load_any<S>(p.grad, p.dtype, at) + gamma;
    if (p.out) value += beta * load_any<S>(p.out, p.dtype, at);
    return value;
  };
  S* partial = static_cast<S*>(p.workspace) + chunk * (k * k + 2) * p.channels + channel;

  if (p.grad_x || p.grad_scale) {
    const S pivot = vector(p.pivot, S(0));
    S shift_sum = 0, scale_sum = 0;
    load.map.each(p.batch, chunk, chunks, [&](unsigned b, int r, int c) {
      S dh = 0;
      for (int e = 0; e < 1 << (2 * doubled); ++e) {
        for (int u = 0; u < k; ++u) {
          const int i = (r << doubled) + (e >> 1) + pad - u * dilation;
          if (i < 0 || (i & halved) || i >> halved >= out.height) continue;
          for (int v = 0; v < k; ++v) {
            const int j = (c << doubled) + (e & 1) + pad - v * dilation;
            if (j < 0 || (j & halved) || j >> halved >= out.width) continue;
            dh += load.weight(u * k + v) * dy(b, i >> halved, j >> halved);
          }
        }
      }
      S derivative;
      const S x = load.raw(b, r, c);
      activate(load.scale * x + load.shift, static_cast<int>(p.activation), derivative);
      const S du = dh * derivative;
      if (p.grad_x) store_any(p.grad_x, p.dtype, load.map.at(b, channel, r, c), load.scale * du);
      shift_sum += du;
      scale_sum += du * (x - pivot);
    });
    if (p.grad_scale) {
      shift_sum = block_sum(shift_sum);
      scale_sum = block_sum(scale_sum);
      if (threadIdx.x == 0) {
        partial[k * k * p.channels] = shift_sum;
        partial[(k * k + 1) * p.channels] = scale_sum;
      }
    }
  }

  if (!p.grad_weight) return;
  const int height = load.map.height << doubled, width = load.map.width << doubled;
  for (int u = 0; u < k; ++u) {
    for (int v = 0; v < k; ++v) {
      S sum = 0;
      out.each(p.batch, chunk, chunks, [&](unsigned b, int i, int j) {
        const int row = (i << halved) + u * dilation - pad, column = (j << halved) + v * dilation - pad;
        if (row >= 0 && row < height && column >= 0 && column < width)
          sum += dy(b, i, j) * load.h(b, row >> doubled, column >> doubled);
      });
      sum = block_sum(sum);
      if (threadIdx.x == 0) partial[(u * k + v) * p.channels] = sum;
    }
  }
}

}  // namespace cuda
}  // namespace nvae
