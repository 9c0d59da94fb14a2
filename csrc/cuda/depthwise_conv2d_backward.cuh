// The backward kernel of depthwise_conv2d: it reads x and dy once for the gradients of x, of the weights, of
// scale and of shift.
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
  int pool_row, pool_column;  // bytes to the neighbours; row 0: no pooling
  struct Four {
    float4 a, b, c;
    __device__ __forceinline__ float4 operator()(float4 grad, float4 out) const {
      return make_float4(fmaf(a.x, grad.x, fmaf(b.x, out.x, c.x)), fmaf(a.y, grad.y, fmaf(b.y, out.y, c.y)),
                         fmaf(a.z, grad.z, fmaf(b.z, out.z, c.z)), fmaf(a.w, grad.w, fmaf(b.w, out.w, c.w)));
    }
  };
  __device__ __forceinline__ Four of(int channel) const {
    return {*reinterpret_cast<const float4*>(alpha + channel),
            *reinterpret_cast<const float4*>(beta + channel),
            *reinterpret_cast<const float4*>(gamma + channel)};
  }
  __device__ __forceinline__ float one(int channel, float grad, float out) const {
    return fmaf(alpha[channel], grad, fmaf(beta[channel], out, gamma[channel]));
  }
  template <Dtype D>
  __device__ float load(const typename Word<D>::Type* from) const {
    using Bits = typename Word<D>::Type;
    const auto at = [&](int bytes) {
      return widen<D>(*reinterpret_cast<const Bits*>(reinterpret_cast<const char*>(from) + bytes));
    };
    if (pool_row == 0) return at(0);
    return (at(0) + at(pool_column)) + (at(pool_row) + at(pool_row + pool_column));
  }
};

// Scale and shift of a thread's channel, and its sums of their gradients. With swish, scale, shift, h and derivative are
// multiplied by kSwishUnit; with dh divided by its square the gradients of x are right and the sums divided by the unit.
struct Affine {
  float scale, pivot, shift_sum, scale_sum;
  // Of a row of x: h, and what add() needs of it later.
  template <Dtype D, int ACTIVATION, int P>
  __device__ __forceinline__ void enter(const typename Word<D>::Type* x, float shift, float* h, bool keeps,
                                        float2* keep) const {
    float value[P], derivative[P];
#pragma unroll
    for (int p = 0; p < P; ++p) {
      value[p] = widen<D>(x[p * kLanes]);
      h[p] = fmaf(scale, value[p], shift);
    }
    if (ACTIVATION == kSwish) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const float sigmoid = reciprocal(1.f + power_of_two(h[p]));
        h[p] *= sigmoid;
        derivative[p] = fmaf(kSwishUnit, sigmoid, fmaf(-h[p], sigmoid, h[p]));
      }
    } else {
      activate_all<P>(h, derivative, ACTIVATION);
    }
    if (!keeps) return;
#pragma unroll
    for (int p = 0; p < P; ++p) keep[p * kLanes] = make_float2(value[p], derivative[p]);
  }
  // From dh, x and the derivative of the activation: the gradients of x.
  template <bool FULL, int P>
  __device__ __forceinline__ void add(const float* dh, const float2* kept, int columns, float* gradient) {
#pragma unroll
    for (int p = 0; p < P; ++p) {
      gradient[p] = 0.f;
      if (FULL || p < columns) {
        const float2 was = kept[p * kLanes];
        const float du = dh[p] * was.y;
        shift_sum += du;
        scale_sum = fmaf(du, was.x - pivot, scale_sum);
        gradient[p] = scale * du;
      }
    }
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
  static constexpr int kStep = DS == 2 ? 2 * kColumns : kColumns / XS;  // columns of dy of a column group
  static constexpr int kHalo = kInputs - kStep;
  static constexpr int kPad = XS == 2 ? (K / 2 - kOdd) / 2 : K / 2;  // of the halo, columns on the left
  static constexpr int kWarps = kGroups > 4 ? 2 : 4;
  static constexpr int kThreads = kWarps * kGroups * kLanes;
  static constexpr int kResident = 3;  // blocks of a multiprocessor, at most
  // Blocks of a multiprocessor: three leave a thread 168 registers, of which other things than these take 60.
  static constexpr int kHeld = 2 * U * DS * kTaps + (2 * U + XS) * kColumns + kInputs;
  static constexpr int kBlocks = kGroups > 1 ? 1 : kHeld <= 108 ? 2 + kSpare : 2;
  static_assert(U % XS == 0 && (DS == 1 || kRing % U == 0), "rings must turn in whole steps");
  template <Dtype D>
  using StageOf = Stage<D, kWarps, kRows, kStep, kHalo, kGroups, 2>;
  static constexpr int kSums = kTaps * kTaps + 2;  // the weights', shift's and scale's

  // The column tap that joins column p of a thread to dy's q, or none.
  __host__ __device__ static constexpr int tap_column(int p, int q) {
    const int v = DS == 2 ? q - 2 * p : XS == 2 ? p + (K - 1) - kOdd - 2 * q : p - q + K - 1;
    return v >= 0 && v < kTaps ? v : -1;
  }
  static int columns(int column_groups) { return kStep * column_groups + kHalo; }
  static int threads(const Walk& w) { return w.column_groups * w.images * kGroups * kLanes; }
  static size_t shared(const Walk& w, const DepthwiseBackward& p) {
    using AnyStage = StageOf<Dtype::f32>;
    const size_t walkers = w.column_groups * w.images;
    const size_t rings = walkers * kColumns * (2 * U + (kGroups - 1) * 2 * U) * kLanes * sizeof(float);
    const size_t x = static_cast<size_t>(2 * U * kColumns) * threads(w) * map_bytes(p);
    const size_t walking =
        AnyStage::kTile * sizeof(float) + rings + x + AnyStage::raw_bytes(w, threads(w), map_bytes(p));
    const size_t weights = kLanes * K * K * sizeof(float);
    const size_t sums = walkers * kSums * kLanes * sizeof(float);
    const size_t most = walking > weights ? walking : weights;
    return 6 * kLanes * sizeof(float) + (most > sums ? most : sums);
  }
};

template <Dtype D, int K, int XS, int DS, int U, int PATTERN>
__global__ void __launch_bounds__((BackwardShape<K, XS, DS, U>::kThreads),
                                  (BackwardShape<K, XS, DS, U>::kBlocks))
    depthwise_backward_kernel(const BackwardLaunch a) {
  using Shape = BackwardShape<K, XS, DS, U>;
  using Bits = typename Word<D>::Type;
  using Four = typename Word<D>::Four;
  NVAE_REGION(1);
  constexpr int P = kColumns, G = Shape::kGroups, T = Shape::kTaps, R = U * DS;
  extern __shared__ uint4 nvae_shared[];
  const Walk& w = a.w;
  const Position at(w);
  const int lane = threadIdx.x % kLanes, warp = uniform(threadIdx.x / kLanes);
  const int group = G == 1 ? 0 : warp % G, walker = G == 1 ? warp : warp / G;
  // Several images share a block only where they have one or two column groups.
  static_assert(Shape::kWarps <= 4, "else a division");
  const int image = w.images == 1 ? 0 : walker >> (w.column_groups - 1);
  const int column_group = walker - image * w.column_groups;
  const int64_t channels = a.p.channels, first = static_cast<int64_t>(at.channel_group) * kLanes;
  const int64_t channel = first + lane;
  const int here = channels - first < kLanes ? static_cast<int>(channels - first) : kLanes;
  const bool exists = lane < here;
  const Plane px(w.x, at.view);
  const Plane py(w.y, at.view);

  float* alpha = reinterpret_cast<float*>(nvae_shared);
  float* beta = alpha + kLanes;
  float* gamma = beta + kLanes;
  float* tile = gamma + kLanes;
  const bool pooled = w.y.halved && !w.y.phased;
  const auto vector = [&](const void* of, float otherwise) {
    return of != nullptr && exists ? static_cast<const float*>(of)[channel] : otherwise;
  };
  if (warp == 0) {
    alpha[lane] = vector(a.p.alpha, 1.f);
    beta[lane] = vector(a.p.beta, 0.f);
    gamma[lane] = vector(a.p.gamma, 0.f) * (pooled ? 4.f : 1.f);  // of four pixels
  }
  const int activation = uniform(static_cast<int>(a.p.activation));
  const float unit = activation == kSwish ? kSwishUnit : 1.f,
              of_unit = activation == kSwish ? 1.f / kSwishUnit : 1.f;
  const float scale = vector(a.p.scale, 1.f) * unit, shift = vector(a.p.shift, 0.f) * unit;
  const float pivot = vector(a.p.pivot, 0.f);

  constexpr int taps = K * K;
  load_weights(a.p, PATTERN == 0, first, here, taps, of_unit * of_unit, tile);
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

  using StageOf = typename Shape::template StageOf<D>;
  constexpr int kRow = P * kLanes;  // elements of a row that are a warp's
  const int walkers = w.column_groups * w.images;
  // Of group 0, each thread its own: (x, derivative) by [walker][ring row][column][lane].
  float2* kept_all = reinterpret_cast<float2*>(tile + StageOf::kTile);
  float2* kept = kept_all + walker * (U * kRow) + lane;
  // [walker][boundary][parity of chunk][ring row][column][lane]
  float* handed_all = reinterpret_cast<float*>(kept_all + walkers * (U * kRow));
  float* handed = handed_all + walker * ((G - 1) * 2 * U * kRow) + lane;
  // The warp's rows of x that enter the ring in this chunk and in the next: [parity][row][column][lane].
  Bits* x_all = reinterpret_cast<Bits*>(handed_all + walkers * ((G - 1) * 2 * U * kRow));
  Bits* x_rows = x_all + warp * (2 * U * kRow);
  Four* raw = reinterpret_cast<Four*>(x_all + static_cast<int>(blockDim.x) * (2 * U * P));
  StageOf stage = {w,
                   w.y,
                   {static_cast<const char*>(a.p.grad) + py.base + first * sizeof(Bits),
                    static_cast<const char*>(a.p.out) + py.base + first * sizeof(Bits)},
                   uniform(a.p.out != nullptr),
                   pooled ? px.height : py.height,
                   pooled ? px.width : py.width,
                   here,
                   w.vector && !pooled,
                   Shape::kPad,
                   warp,
                   column_group,
                   group,
                   image,
                   tile,
                   raw};
  stage.clear_halo();
  const OnLoadGradient on_load{alpha, beta, gamma, pooled ? w.y.row / 2 : 0, w.y.column / 2};

  const int need_weight = uniform(a.p.grad_weight != nullptr), need_x = uniform(a.p.grad_x != nullptr);
  const int need_affine = uniform(a.p.grad_scale != nullptr), need_data = need_x | need_affine;
  Affine affine = {scale, pivot, 0.f, 0.f};

  const unsigned last_job = (at.job_block + 1) * w.jobs_per_block;
  for (unsigned index = at.job_block * w.jobs_per_block; index < last_job && index < w.jobs; ++index) {
    NVAE_REGION(1);
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
    stage.begin(job.image, static_cast<int>(a.p.batch), DS == 2 ? 2 * b0 : b0 / XS);
    // Of the thread's columns, those that exist.
    const int columns_left = stage.inside_batch ? px.width - b_mine : 0;
    const int columns_here = columns_left < P ? columns_left : P;
    const bool full = w.vector && here == kLanes && columns_left >= P;
    const int64_t corner = px.base + w.x.bytes(job.image + image) +
                           static_cast<int64_t>(b_mine) * w.x.column + first * sizeof(Bits);

    char* grad_x = static_cast<char*>(a.p.grad_x) + corner + lane * sizeof(Bits) +
                   (full ? full_offset<D>(w.x.column) : 0);
    float h[U][P], dh[U][P];
#pragma unroll
    for (int k = 0; k < U; ++k)
#pragma unroll
      for (int p = 0; p < P; ++p) h[k][p] = dh[k][p] = 0.f;

    // Row i of those that enter this group's ring in a chunk.
    const auto entering = [&](int chunk, int i) { return chunk * U + group * U + U - XS + i + low; };
    const unsigned rows_here = columns_here > 0 ? rows : 0;
    const auto row_here = [&](int row) { return static_cast<unsigned>(row - a0) < rows_here; };
    // What the lane brings of x's first row that enters in the next chunk; without a column or channel
    // nothing.
    const bool brings = stage.slot() < columns_here && stage.quad() < here;
    const char* x_next = static_cast<const char*>(a.p.x) + corner +
                         static_cast<int64_t>(entering(0, 0)) * w.x.row +
                         (w.vector ? stage.slot() * w.x.column + stage.quad() * static_cast<int>(sizeof(Bits))
                                   : lane * static_cast<int>(sizeof(Bits)));
    const auto fetch = [&](int chunk) {
      NVAE_REGION(1);
      Bits* to = x_rows + (chunk & 1) * (U * kRow);
      if (w.vector) {
#pragma unroll
        for (int i = 0; i < U; ++i) {
          NVAE_REGION(U);
          if (row_here(entering(chunk, i)) && brings)
            copy_async(reinterpret_cast<Four*>(to + i * kRow) + lane,
                       x_next + static_cast<int64_t>(i) * w.x.row);
        }
      } else if (exists) {
        NVAE_REGION(1);
#pragma unroll 1
        for (int i = 0; i < U; ++i) {
          if (!row_here(entering(chunk, i))) continue;
#pragma unroll 1
          for (int p = 0; p < columns_here; ++p)
            to[i * kRow + p * kLanes + lane] = *reinterpret_cast<const Bits*>(
                x_next + static_cast<int64_t>(i) * w.x.row + static_cast<int64_t>(p) * w.x.column);
        }
      }
      x_next += static_cast<int64_t>(U) * w.x.row;
    };
    fetch(0);
    stage.rewind(top);
    stage.copy(top);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      NVAE_REGION(1);
      const int chunk_top = top + chunk * Shape::kRows;
      __syncthreads();
      stage.template convert<StageOf::kShare>(chunk_top, on_load);
      if (chunk + 1 < chunks) {
        fetch(chunk + 1);
        stage.copy(chunk_top + Shape::kRows);
      }
      __syncthreads();
      const float* from = tile + (image * w.columns + column_group * Shape::kStep) * kLanes + lane;
      const Bits* x_of = x_rows + (chunk & 1) * (U * kRow) + lane;
#pragma unroll
      for (int t = 0; t < Shape::kSteps; ++t) {
        NVAE_REGION(Shape::kSteps);
#pragma unroll
        for (int j = 0; j < XS; ++j) {
          const int i = XS * t + j, slot = (U - XS + i) % U;
#pragma unroll
          for (int p = 0; p < P; ++p) h[slot][p] = dh[slot][p] = 0.f;
          if (row_here(entering(chunk, i))) {
            NVAE_REGION(U);
            const Bits* x = x_of + i * kRow;
            float2* keep = kept + slot * kRow;
            if (activation == kSwish) {
              NVAE_REGION(U);
              affine.template enter<D, kSwish, P>(x, shift, h[slot], group == 0, keep);
            } else if (activation == kElu) {
              NVAE_REGION(U);
              affine.template enter<D, kElu, P>(x, shift, h[slot], group == 0, keep);
            } else {
              NVAE_REGION(U);
              affine.template enter<D, kIdentity, P>(x, shift, h[slot], group == 0, keep);
            }
            if (!full) {
              NVAE_REGION(U);
#pragma unroll
              for (int p = 1; p < P; ++p)
                if (p >= columns_here) h[slot][p] = 0.f;
            }
          }
        }
#pragma unroll
        for (int d = 0; d < DS; ++d) {
          if (stage.row_inside(chunk_top + DS * t + d)) {
            NVAE_REGION(Shape::kSteps * DS);
            float dy[Shape::kInputs];
#pragma unroll
            for (int q = 0; q < Shape::kInputs; ++q)
              dy[q] = from[((DS * t + d) * StageOf::kPitch + q) * kLanes];
            // visit(ring row, its slot, row of taps, input, column, tap) for every product.
            const auto products = [&](auto visit) {
#pragma unroll
              for (int k = 0; k < U; ++k)
#pragma unroll
                for (int q = 0; q < Shape::kInputs; ++q)
#pragma unroll
                  for (int p = 0; p < P; ++p) {
                    const int v = Shape::tap_column(p, q);
                    if (group * U + k < Shape::kRing && v >= 0 && tap_exists(PATTERN, k, v))
                      visit((k + XS * t) % U, k * DS + d, q, p, v);
                  }
            };
            if (need_data)
              products([&](int slot, int s, int q, int p, int v) {
                dh[slot][p] = fmaf(weight[s][v], dy[q], dh[slot][p]);
              });
            if (need_weight)
              products([&](int slot, int s, int q, int p, int v) {
                weight_sum[s][v] = fmaf(h[slot][p], dy[q], weight_sum[s][v]);
              });
          }
        }
        if (!need_data) continue;
        // The oldest rows leave: on to the next group, which meets them one chunk later, or done.
#pragma unroll
        for (int j = 0; j < XS; ++j) {
          const int slot = (j + XS * t) % U;
          const int row = chunk * U + XS * t + group * U + j + low;
          if constexpr (G > 1) {
            float* boundary = handed + (XS * t + j) * kRow;
            if (group < G - 1 && row >= a0)
#pragma unroll
              for (int p = 0; p < P; ++p)
                dh[slot][p] += boundary[(group * 2 + (~chunk & 1)) * (U * kRow) + p * kLanes];
            if (group > 0)
#pragma unroll
              for (int p = 0; p < P; ++p)
                boundary[((group - 1) * 2 + (chunk & 1)) * (U * kRow) + p * kLanes] = dh[slot][p];
          }
          if (group == 0 && row_here(row)) {
            NVAE_REGION(U);
            float gradient[P];
            Bits bits[P];
            char* to = grad_x + static_cast<int64_t>(row) * w.x.row;
            if (full) {
              NVAE_REGION(U);
              affine.template add<true, P>(dh[slot], kept + slot * kRow, columns_here, gradient);
              if (need_x) store_columns<D, true, P>(to, w.x.column, columns_here, gradient, bits);
            } else {
              NVAE_REGION(U);
              affine.template add<false, P>(dh[slot], kept + slot * kRow, columns_here, gradient);
              if (need_x && exists) store_columns<D, false, P>(to, w.x.column, columns_here, gradient, bits);
            }
          }
        }
      }
    }
  }
  if (!need_weight && !need_affine) return;
  NVAE_REGION(1);

  // The block's sums, warp after warp in a fixed order, to the workspace: [block][tap, shift,
  // scale][channel].
  float* sums = tile + walker * (Shape::kSums * kLanes) + lane;
  __syncthreads();
#pragma unroll
  for (int s = 0; s < R; ++s) {
    const int k = group * U + s / DS;
    const int row = DS == 2 ? s % 2 + 2 * (Shape::kRing - 1 - k) : k;
    if (row < 0 || row >= T) continue;
#pragma unroll
    for (int v = 0; v < T; ++v) sums[(row * T + v) * kLanes] = weight_sum[s][v];
  }
  if (group == 0) {
    sums[T * T * kLanes] = affine.shift_sum;
    sums[(T * T + 1) * kLanes] = affine.scale_sum;
  }
  __syncthreads();
  if (!exists) return;
  const float weight_unit = activation == kSwish ? 1.f / kSwishUnit : 1.f;
  const float affine_unit = activation == kSwish ? kSwishUnit : 1.f;
  float* partial = static_cast<float*>(a.p.workspace) +
                   static_cast<int64_t>(at.job_block * w.views + at.view) * Shape::kSums * channels + channel;
  for (int i = warp + (need_weight ? 0 : T * T); i < Shape::kSums;
       i += static_cast<int>(blockDim.x) / kLanes) {
    NVAE_REGION(1);
    float sum = 0.f;
#pragma unroll 1
    for (int n = 0; n < walkers; ++n) {
      NVAE_REGION(1);
      sum += tile[(n * Shape::kSums + i) * kLanes + lane];
    }
    partial[i * channels] = sum * (i < T * T ? weight_unit : affine_unit);
  }
}

}  // namespace cuda
}  // namespace nvae
