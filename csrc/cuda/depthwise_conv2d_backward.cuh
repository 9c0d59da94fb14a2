// The backward kernel of depthwise_conv2d: one pass over x and dy gives the gradients of x, of the weights,
// of scale and of shift.
//
// Both convolutions pair an element of x with the same window of dy:
//   dh[a] = sum_t weight[t] dy[a + pad - t]      grad_weight[t] = sum_a h[a] dy[a + pad - t]
// so a thread reads a row of dy once from shared memory and uses every value twice. It keeps the rows of x
// that this row touches in rings of U rows: h (activated x) and dh (being summed). Strides are ratios of the
// two walks: a step takes XS rows of x and DS rows of dy (1:1; 2:1 with stride 2; 1:2 with upsampling, where
// the kernel acts on x as one of K + 1 taps, sums of two neighbours). Large kernels split their rows over G
// groups of warps.
#pragma once
#include "depthwise_conv2d_forward.cuh"

namespace nvae {
namespace cuda {

struct BackwardLaunch {
  DepthwiseBackward p;
  Walk w;
};

// alpha * grad + beta * out + gamma. With `pool` the four interleaved images of dy are added up on load.
struct OnLoadGradient {
  const float* alpha;  // in shared memory
  const float* beta;
  const float* gamma;
  int64_t pool_row, pool_column;  // elements to the neighbours; row 0: no pooling
  __device__ __forceinline__ float one(int lane, float grad, float out) const {
    return fmaf(alpha[lane], grad, fmaf(beta[lane], out, gamma[lane]));
  }
  __device__ __forceinline__ float4 four(int lane, float4 grad, float4 out) const {
    const float4 a = *reinterpret_cast<const float4*>(alpha + lane);
    const float4 b = *reinterpret_cast<const float4*>(beta + lane);
    const float4 c = *reinterpret_cast<const float4*>(gamma + lane);
    return make_float4(fmaf(a.x, grad.x, fmaf(b.x, out.x, c.x)), fmaf(a.y, grad.y, fmaf(b.y, out.y, c.y)),
                       fmaf(a.z, grad.z, fmaf(b.z, out.z, c.z)), fmaf(a.w, grad.w, fmaf(b.w, out.w, c.w)));
  }
  template <Dtype D>
  __device__ float load(const typename Word<D>::Type* from) const {
    float v = widen<D>(*from);
    if (pool_row != 0)
      v = (v + widen<D>(from[pool_column])) +
          (widen<D>(from[pool_row]) + widen<D>(from[pool_row + pool_column]));
    return v;
  }
};

__host__ __device__ constexpr int floor_half(int n) { return (n + 4096) / 2 - 2048; }

template <int K, int XS, int DS, int U>
struct BackwardShape {
  static constexpr int kTaps = DS == 2 ? K + 1 : K;      // each way, as seen from x
  static constexpr int kRing = DS == 2 ? kTaps / 2 : K;  // rows of x that one step's rows of dy touch
  static constexpr int kGroups = (kRing + U - 1) / U;
  static constexpr int kSteps = U / XS;      // of a chunk
  static constexpr int kRows = kSteps * DS;  // of dy
  static constexpr int kOdd = XS == 2 ? K / 2 % 2 : 0;
  static constexpr int kInputs = DS == 2   ? 2 * (kColumns - 1) + kTaps
                                 : XS == 2 ? (kColumns - 1 + K - 1 - kOdd) / 2 + 1
                                           : kColumns - 1 + K;
  static constexpr int kColumnStep = DS == 2 ? 2 * kColumns : kColumns / XS;  // of dy, between column groups
  static constexpr int kWarps = kGroups > 4 ? 2 : 4;
  static constexpr int kThreads = kWarps * kGroups * kLanes;
  // Blocks of a multiprocessor: three leave a thread 168 registers, of which other things than these take 60.
  static constexpr int kHeld = 2 * U * DS * kTaps + (2 * U + XS) * kColumns + kInputs;
  static constexpr int kBlocks = kGroups > 1 ? 1 : kHeld <= 108 ? 2 + kSpare : 2;
  static_assert(U % XS == 0 && (DS == 1 || kRing % U == 0), "rings must turn in whole steps");
  // The column tap that joins column p of a thread to dy's q, or none.
  __host__ __device__ static constexpr int tap_column(int p, int q) {
    const int v = DS == 2 ? q - 2 * p : XS == 2 ? p + (K - 1) - kOdd - 2 * q : p - q + K - 1;
    return v >= 0 && v < kTaps ? v : -1;
  }
  static int columns(const Walk& w) { return kColumnStep * (w.column_groups - 1) + kInputs; }
  static int threads(const Walk& w) { return w.column_groups * w.images * kGroups * kLanes; }
  static size_t shared(const Walk& w, int bytes, int sources) {
    const size_t pixels = static_cast<size_t>(w.images) * kRows * w.columns;
    const size_t walkers = w.column_groups * w.images;
    const size_t rings = walkers * kColumns * (2 * U + (kGroups - 1) * 2 * U);
    const size_t walking = (pixels + rings) * kLanes * 4 + pixels * kLanes * bytes * sources;
    const size_t weights = kLanes * w.kernel * w.kernel * 4;
    const size_t sums = (kTaps * kTaps + 2) * kLanes * 4;
    const size_t most = walking > weights ? walking : weights;
    return 6 * kLanes * 4 + (most > sums ? most : sums);
  }
};

template <Dtype D, int K, int XS, int DS, int U, int PATTERN>
__global__ void __launch_bounds__((BackwardShape<K, XS, DS, U>::kThreads),
                                  (BackwardShape<K, XS, DS, U>::kBlocks))
    depthwise_backward_kernel(const BackwardLaunch a) {
  using Shape = BackwardShape<K, XS, DS, U>;
  using Bits = typename Word<D>::Type;
  constexpr int P = kColumns, G = Shape::kGroups, T = Shape::kTaps, R = U * DS;
  extern __shared__ uint4 nvae_shared[];
  const Walk& w = a.w;
  const Position at(w);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int column_group = warp % w.column_groups;
  const int group = G == 1 ? 0 : warp / w.column_groups % G;
  const int image = warp / (w.column_groups * G);
  const int64_t channels = a.p.channels, first = static_cast<int64_t>(at.channel_group) * kLanes;
  const int64_t channel = first + lane;
  const bool exists = channel < channels;
  const Plane px(w.x, at.view);
  const Plane py(w.y, at.view);

  float* alpha = reinterpret_cast<float*>(nvae_shared);
  float* beta = alpha + kLanes;
  float* gamma = beta + kLanes;
  float* scale = gamma + kLanes;
  float* shift = scale + kLanes;
  float* pivot = shift + kLanes;
  float* tile = pivot + kLanes;
  const bool pooled = w.y.step == 2 && !w.y.phased;
  if (warp == 0) {
    alpha[lane] = a.p.alpha != nullptr && exists ? static_cast<const float*>(a.p.alpha)[channel] : 1.f;
    beta[lane] = a.p.beta != nullptr && exists ? static_cast<const float*>(a.p.beta)[channel] : 0.f;
    const float constant =
        a.p.gamma != nullptr && exists ? static_cast<const float*>(a.p.gamma)[channel] : 0.f;
    gamma[lane] = pooled ? 4.f * constant : constant;  // of four pixels
    const bool affine = a.p.scale != nullptr && exists;
    scale[lane] = affine ? static_cast<const float*>(a.p.scale)[channel] : 1.f;
    shift[lane] = affine ? static_cast<const float*>(a.p.shift)[channel] : 0.f;
    pivot[lane] = a.p.pivot != nullptr && exists ? static_cast<const float*>(a.p.pivot)[channel] : 0.f;
  }
  const int activation = static_cast<int>(a.p.activation);

  constexpr int taps = K * K;
  const int here = channels - first < kLanes ? static_cast<int>(channels - first) : kLanes;
  for (int i = threadIdx.x; i < here * taps; i += blockDim.x)
    tile[i] =
        a.p.tap_is_live(i % taps) ? load_any<float>(a.p.weight, a.p.weight_dtype, first * taps + i) : 0.f;
  __syncthreads();
  // Row s of tap rows, in the order in which a step meets them: s = ring row * DS + row of dy.
  float weight[R][T], weight_sum[R][T];
#pragma unroll
  for (int s = 0; s < R; ++s)
#pragma unroll
    for (int v = 0; v < T; ++v) {
      const int k = group * U + s / DS;
      float value = 0.f;
      if constexpr (DS == 2) {
        const int m = s % 2 + 2 * (Shape::kRing - 1 - k);
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
          for (int f = 0; f < 2; ++f) {
            const int row = K - 1 + e - m, column = K - 1 + f - v;
            if (exists && row >= 0 && row < K && column >= 0 && column < K)
              value += tile[lane * taps + row * K + column];
          }
      } else if (exists && k < K) {
        value = tile[lane * taps + k * K + v];
      }
      weight[s][v] = value;
      weight_sum[s][v] = 0.f;
    }
  __syncthreads();

  const int walkers = w.column_groups * w.images, walker = image * w.column_groups + column_group;
  // Of group 0, each thread its own: (x, slope) by [ring row][column][walker][lane].
  float2* kept = reinterpret_cast<float2*>(tile + w.images * Shape::kRows * w.columns * kLanes);
  kept += walker * kLanes + lane;
  // [boundary][parity of chunk][ring row][column][walker][lane]
  float* handed = reinterpret_cast<float*>(kept - (walker * kLanes + lane) + U * P * walkers * kLanes);
  uint4* raw = reinterpret_cast<uint4*>(handed + (G - 1) * 2 * U * P * walkers * kLanes);
  Stage<D, Shape::kRows, 2> stage = {w,
                                     w.y,
                                     {static_cast<const Bits*>(a.p.grad), static_cast<const Bits*>(a.p.out)},
                                     pooled ? px.height : py.height,
                                     pooled ? px.width : py.width,
                                     here,
                                     w.vector && !pooled,
                                     raw,
                                     tile,
                                     0,
                                     0,
                                     0};
  const OnLoadGradient on_load{alpha, beta, gamma, pooled ? w.y.row / 2 : 0, w.y.column / 2};

  const bool need_weight = a.p.grad_weight != nullptr, need_x = a.p.grad_x != nullptr;
  const bool need_affine = a.p.grad_scale != nullptr, need_data = need_x || need_affine;
  float shift_sum = 0.f, scale_sum = 0.f;

  const unsigned last_job = (at.job_block + 1) * w.jobs_per_block;
  for (unsigned index = at.job_block * w.jobs_per_block; index < last_job && index < w.jobs; ++index) {
    const Job job(w, index);
    const int a0 = job.segment * w.segment_rows;
    const int rows = px.height - a0 < w.segment_rows ? px.height - a0 : w.segment_rows;
    const int b0 = job.tile * w.column_groups * P, b_mine = b0 + column_group * P;
    if (rows <= 0 || b0 >= px.width) continue;
    constexpr int pad = K / 2;
    // At step n ring row k is row XS n + k + low of x, and dy's rows are DS n + top and, with DS = 2, the
    // next.
    const int top = DS == 2   ? 2 * a0 - pad
                    : XS == 2 ? floor_half(a0 + pad - G * U + 2)
                              : a0 + pad - G * U + 1;
    const int low = DS == 2 ? a0 - (G * U - 1) : XS * top - pad;
    const int steps = (a0 + rows - 1 - low) / XS + 1;
    const int chunks = (steps + Shape::kSteps - 1) / Shape::kSteps;
    stage.offset = py.base + job.image * w.y.image + first;
    stage.images_here = static_cast<int>(a.p.batch - job.image < w.images ? a.p.batch - job.image : w.images);
    stage.left = DS == 2 ? 2 * b0 - pad : XS == 2 ? (b0 - pad + Shape::kOdd) / 2 : b0 - pad;
    const bool mine = exists && image < stage.images_here;
    // Of the thread's columns, those that exist.
    const int columns_left = px.width - b_mine, columns_here = mine && columns_left < P ? columns_left
                                                               : mine                   ? P
                                                                                        : 0;
    const int64_t corner = px.base + (job.image + image) * w.x.image + b_mine * w.x.column + channel;

    float h[U][P], dh[U][P];
#pragma unroll
    for (int k = 0; k < U; ++k)
#pragma unroll
      for (int p = 0; p < P; ++p) h[k][p] = dh[k][p] = 0.f;

    // The rows of x that enter this group's ring at the next step, already on their way.
    Bits coming[XS][P];
    const auto fetch = [&](int step) {
#pragma unroll
      for (int j = 0; j < XS; ++j) {
        const int row = XS * step + group * U + U - XS + j + low;
        const int inside = row >= a0 && row < a0 + rows ? columns_here : 0;
        const Bits* from = static_cast<const Bits*>(a.p.x) + (corner + row * w.x.row);
#pragma unroll
        for (int p = 0; p < P; ++p) {
          coming[j][p] = Bits(0);
          if (p < inside) coming[j][p] = *from;
          from += w.x.column;
        }
      }
    };
    fetch(0);
    stage.copy(top);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      __syncthreads();
      stage.convert(top + chunk * Shape::kRows, on_load);
      if (chunk + 1 < chunks) stage.copy(top + (chunk + 1) * Shape::kRows);
      __syncthreads();
      const float* from =
          tile + (image * Shape::kRows * w.columns + column_group * Shape::kColumnStep) * kLanes + lane;
#pragma unroll
      for (int t = 0; t < Shape::kSteps; ++t) {
        const int step = chunk * Shape::kSteps + t;
#pragma unroll
        for (int j = 0; j < XS; ++j) {
          const int slot = (U - XS + j + XS * t) % U;
          const int row = XS * step + group * U + U - XS + j + low;
          const int inside = row >= a0 && row < a0 + rows ? columns_here : 0;
          float raw[P], value[P], slope[P];
#pragma unroll
          for (int p = 0; p < P; ++p) {
            raw[p] = widen<D>(coming[j][p]);
            value[p] = fmaf(scale[lane], raw[p], shift[lane]);
          }
          activate_all<P>(value, slope, activation);
#pragma unroll
          for (int p = 0; p < P; ++p) {
            h[slot][p] = p < inside ? value[p] : 0.f;
            dh[slot][p] = 0.f;
            if (group == 0)
              kept[(slot * P + p) * walkers * kLanes] = make_float2(raw[p], p < inside ? slope[p] : 0.f);
          }
        }
        fetch(step + 1);
#pragma unroll
        for (int d = 0; d < DS; ++d) {
          const int r = top + DS * step + d;
          if (r >= 0 && r < stage.height) {
            float dy[Shape::kInputs];
#pragma unroll
            for (int q = 0; q < Shape::kInputs; ++q) dy[q] = from[q * kLanes];
#pragma unroll
            for (int k = 0; k < U; ++k) {
              if (group * U + k >= Shape::kRing) continue;
              const int slot = (k + XS * t) % U, s = k * DS + d;
              if (need_data) {
#pragma unroll
                for (int q = 0; q < Shape::kInputs; ++q)
#pragma unroll
                  for (int p = 0; p < P; ++p) {
                    const int v = Shape::tap_column(p, q);
                    if (v >= 0 && tap_exists(PATTERN, k, v))
                      dh[slot][p] = fmaf(weight[s][v], dy[q], dh[slot][p]);
                  }
              }
              if (need_weight) {
#pragma unroll
                for (int q = 0; q < Shape::kInputs; ++q)
#pragma unroll
                  for (int p = 0; p < P; ++p) {
                    const int v = Shape::tap_column(p, q);
                    if (v >= 0 && tap_exists(PATTERN, k, v))
                      weight_sum[s][v] = fmaf(h[slot][p], dy[q], weight_sum[s][v]);
                  }
              }
            }
          }
          from += w.columns * kLanes;
        }
        if (!need_data) continue;
        // The oldest rows leave: on to the next group, which meets them one chunk later, or done.
#pragma unroll
        for (int j = 0; j < XS; ++j) {
          const int slot = (j + XS * t) % U;
          const int row = XS * step + group * U + j + low;
          if constexpr (G > 1) {
            const int boundary = 2 * U * P * walkers * kLanes;
            const int mine_at = (XS * t + j) * P * walkers * kLanes + walker * kLanes + lane;
            if (group < G - 1 && row >= a0)
#pragma unroll
              for (int p = 0; p < P; ++p)
                dh[slot][p] +=
                    handed[group * boundary + (~chunk & 1) * (boundary / 2) + mine_at + p * walkers * kLanes];
            if (group > 0)
#pragma unroll
              for (int p = 0; p < P; ++p)
                handed[(group - 1) * boundary + (chunk & 1) * (boundary / 2) + mine_at +
                       p * walkers * kLanes] = dh[slot][p];
          }
          if (group == 0 && row >= a0 && row < a0 + rows) {
            float gradient[P];
#pragma unroll
            for (int p = 0; p < P; ++p) {
              const float2 was = kept[(slot * P + p) * walkers * kLanes];
              const float du = dh[slot][p] * was.y;
              shift_sum += du;
              scale_sum = fmaf(du, was.x - pivot[lane], scale_sum);
              gradient[p] = scale[lane] * du;
            }
            if (need_x) {
              Bits* to = static_cast<Bits*>(a.p.grad_x) + (corner + row * w.x.row);
              Bits bits[P];
#pragma unroll
              for (int p = 0; p < P; p += 2) narrow_two<D>(gradient[p], gradient[p + 1], bits + p);
#pragma unroll
              for (int p = 0; p < P; ++p) {
                if (p < columns_here) *to = bits[p];
                to += w.x.column;
              }
            }
          }
        }
      }
    }
  }

  // The block's sums, warp after warp in a fixed order, then to the workspace: [block][tap, shift,
  // scale][channel].
  float* sums = tile;
  __syncthreads();
  for (int i = threadIdx.x; i < (T * T + 2) * kLanes; i += blockDim.x) sums[i] = 0.f;
  for (int turn = 0; turn < walkers; ++turn) {
    __syncthreads();
    if (turn != walker) continue;
    if (need_weight) {
#pragma unroll
      for (int s = 0; s < R; ++s) {
        const int k = group * U + s / DS;
        const int row = DS == 2 ? s % 2 + 2 * (Shape::kRing - 1 - k) : k;
        if (row < 0 || row >= T) continue;
#pragma unroll
        for (int v = 0; v < T; ++v) sums[(row * T + v) * kLanes + lane] += weight_sum[s][v];
      }
    }
    if (group == 0) {
      sums[T * T * kLanes + lane] += shift_sum;
      sums[(T * T + 1) * kLanes + lane] += scale_sum;
    }
  }
  __syncthreads();
  if (!need_weight && !need_affine) return;
  float* partial = static_cast<float*>(a.p.workspace) +
                   static_cast<int64_t>(at.job_block * w.views + at.view) * (T * T + 2) * channels + first;
  for (int i = threadIdx.x + (need_weight ? 0 : T * T * kLanes); i < (T * T + 2) * kLanes; i += blockDim.x)
    if (i % kLanes < here) partial[(i / kLanes) * channels + i % kLanes] = sums[i];
}

}  // namespace cuda
}  // namespace nvae
