// The forward kernel of depthwise_conv2d. A thread reads each row of its columns once from shared memory
// (activated already) and adds it to the M output rows that it touches; these accumulators are a ring,
// unrolled so that every index is known to the compiler. Large kernels split their rows over G groups of
// warps, which hand the partial sums of a row on through shared memory.
#pragma once
#include "depthwise_conv2d_tile.cuh"

namespace nvae {
namespace cuda {

struct ForwardLaunch {
  DepthwiseForward p;
  Walk w;
};

// Patterns the compiler knows: 0 all taps, 1 the first 13 of 5x5 in raster order, 2 the last 13 (causal
// kernels).
__host__ __device__ constexpr bool tap_exists(int pattern, int u, int v) {
  return pattern == 0 || (pattern == 1 ? u * 5 + v < 13 : u * 5 + v >= 12);
}

// Rows and columns of a folded filter: upsampled offset d from phase p reaches source pixel floor((p + d) /
// 2).
__host__ __device__ constexpr int folded(int phase, int offset) { return (phase + offset + 1024) / 2 - 512; }
__host__ __device__ constexpr int folded_pad(int phase, int kernel) { return -folded(phase, -(kernel / 2)); }

// activation(scale * x + shift). Of swish scale and shift are times kSwishUnit, and so is the result.
template <int ACTIVATION>
struct OnLoad {
  const float* scale;  // in shared memory
  const float* shift;
  struct Four {
    float4 k, b;
    __device__ __forceinline__ float4 operator()(float4 x, float4) const {
      float u[4] = {fmaf(k.x, x.x, b.x), fmaf(k.y, x.y, b.y), fmaf(k.z, x.z, b.z), fmaf(k.w, x.w, b.w)};
      if (ACTIVATION == kSwish) {
#pragma unroll
        for (int i = 0; i < 4; ++i) u[i] = swish_of_units(u[i]);
      } else {
        activate_all<4>(u, ACTIVATION);
      }
      return make_float4(u[0], u[1], u[2], u[3]);
    }
  };
  __device__ __forceinline__ Four of(int channel) const {
    return {*reinterpret_cast<const float4*>(scale + channel),
            *reinterpret_cast<const float4*>(shift + channel)};
  }
  __device__ __forceinline__ float one(int channel, float x, float) const {
    const float u = fmaf(scale[channel], x, shift[channel]);
    return ACTIVATION == kSwish ? swish_of_units(u) : activate(u, ACTIVATION);
  }
  template <Dtype D>
  __device__ float load(const typename Word<D>::Type* from) const {
    return widen<D>(*from);
  }
};

// Sums of a thread's outputs. They are shifted by its first value, so that little is lost where |mean| >>
// std.
struct Moments {
  float pivot, sum, squares;
  int count;
  // The caller counts them when the job is done.
  template <Dtype D, bool FULL, int P>
  __device__ __forceinline__ void add(const typename Word<D>::Type* bits, int columns, bool first_row) {
    if (first_row && count == 0) pivot = widen<D>(bits[0]);
#pragma unroll
    for (int p = 0; p < P; ++p)
      if (FULL || p < columns) {
        const float d = widen<D>(bits[p]) - pivot;
        sum += d;
        squares = fmaf(d, d, squares);
      }
  }
  // Count, mean and the sum of squares around it.
  __device__ __forceinline__ void write(float* to) const {
    const float n = static_cast<float>(count), inverse = count ? reciprocal(n) : 0.f;
    to[0] = n;
    to[kLanes] = pivot + sum * inverse;
    to[2 * kLanes] = squares != squares ? squares : fmaxf(squares - sum * sum * inverse, 0.f);
  }
};

template <int K, int S, int M, int G>
struct ForwardShape {
  static constexpr int kRows = M * S;  // input rows of a chunk
  static constexpr int kInputs = S * (kColumns - 1) + K;
  static constexpr int kWarps = 4;     // column groups x images, at most
  static constexpr int kResident = 5;  // blocks of a multiprocessor, at most
  static constexpr int kThreads = kWarps * G * kLanes;
  static constexpr int kStep = S * kColumns, kHalo = K - S;
  template <Dtype D>
  using StageOf = Stage<D, kWarps, kRows, kStep, kHalo, G, 1>;

  static int columns(int column_groups) { return kStep * column_groups + kHalo; }
  static int threads(const Walk& w) { return w.column_groups * w.images * G * kLanes; }
  static size_t shared(const Walk& w, const DepthwiseForward& p) {
    using AnyStage = StageOf<Dtype::f32>;
    const size_t handed = (G - 1) * 2 * M * kColumns * w.column_groups * w.images * kLanes * sizeof(float);
    const size_t walking =
        AnyStage::kTile * sizeof(float) + AnyStage::raw_bytes(w, threads(w), map_bytes(p)) + handed;
    const size_t taps = w.kernel * w.kernel + (w.fold ? (K * K | 1) : 0);
    const size_t weights = taps * kLanes * sizeof(float);
    return 2 * kLanes * sizeof(float) + (walking > weights ? walking : weights);
  }
};

template <Dtype D, int K, int S, int M, int G, int PATTERN>
__global__ void __launch_bounds__((ForwardShape<K, S, M, G>::kThreads), (G > 1    ? 1
                                                                         : K <= 5 ? 4 + kSpare
                                                                                  : 4))
    depthwise_forward_kernel(const ForwardLaunch a) {
  using Shape = ForwardShape<K, S, M, G>;
  using Bits = typename Word<D>::Type;
  using Four = typename Word<D>::Four;
  constexpr int P = kColumns;
  NVAE_REGION(1);
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

  float* scale = reinterpret_cast<float*>(nvae_shared);
  float* shift = scale + kLanes;
  float* tile = shift + kLanes;
  const int activation = static_cast<int>(a.p.activation);
  const float unit = activation == kSwish ? kSwishUnit : 1.f;
  if (warp == 0) {
    const bool affine = a.p.scale != nullptr && exists;
    scale[lane] = affine ? static_cast<const float*>(a.p.scale)[channel] * unit : unit;
    shift[lane] = affine ? static_cast<const float*>(a.p.shift)[channel] * unit : 0.f;
  }

  // Weights: contiguous into shared memory, from there into registers (K^2 is odd: no bank conflicts).
  const int kernel = w.fold ? w.kernel : K, taps = kernel * kernel;
  load_weights(a.p, PATTERN == 0, first, here, taps, activation == kSwish ? 1.f / kSwishUnit : 1.f, tile);
  int pad_rows = K / 2, pad_columns = K / 2, pitch = taps;
  const float* weights = tile;
  if (w.fold) {
    NVAE_REGION(1);
    // Tap u of the folded filter is the sum of the rows of the kernel that reach its source row: two at most.
    const int fp = at.view >> 1, fq = at.view & 1;
    pad_rows = folded_pad(fp, kernel), pad_columns = folded_pad(fq, kernel);
    float* sums = tile + kLanes * taps;
    weights = sums, pitch = K * K | 1;
    for (int i = threadIdx.x; i < here * K * K; i += blockDim.x) {
      const int c = i / (K * K), u = i / K % K, v = i % K;
      const int s = 2 * (u - pad_rows) - fp + kernel / 2, t = 2 * (v - pad_columns) - fq + kernel / 2;
      float sum = 0.f;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = s + e / 2, column = t + e % 2;
        if (row >= 0 && row < kernel && column >= 0 && column < kernel)
          sum += tile[c * taps + row * kernel + column];
      }
      sums[c * pitch + u * K + v] = sum;
    }
    __syncthreads();
  }
  float weight[M * S][K];
#pragma unroll
  for (int r = 0; r < M * S; ++r)
#pragma unroll
    for (int v = 0; v < K; ++v) {
      const int u = S * M * group + r;
      weight[r][v] = exists && u < K ? weights[lane * pitch + u * K + v] : 0.f;
    }
  __syncthreads();  // the tile may now be overwritten

  using StageOf = typename Shape::template StageOf<D>;
  Four* raw = reinterpret_cast<Four*>(tile + StageOf::kTile);
  StageOf stage = {w,     w.x,           {static_cast<const char*>(a.p.x) + px.base + first * sizeof(Bits)},
                   0,     px.height,     px.width,
                   here,  w.vector != 0, pad_columns,
                   warp,  column_group,  group,
                   image, tile,          raw};
  stage.clear_halo();
  // [walker][boundary between groups][parity of chunk][row][column][lane]
  constexpr int kHanded = M * P * kLanes;
  float* handed = reinterpret_cast<float*>(raw) +
                  StageOf::raw_bytes(w, blockDim.x, sizeof(Bits)) / sizeof(float) +
                  walker * ((G - 1) * 2 * kHanded) + lane;
  const int walkers = w.column_groups * w.images;

  Moments moments = {};
  const int stats = uniform(a.p.mean != nullptr);

  const unsigned last_job = (at.job_block + 1) * w.jobs_per_block;
  for (unsigned index = at.job_block * w.jobs_per_block; index < last_job && index < w.jobs; ++index) {
    NVAE_REGION(1);
    const Job job(w, index);
    const int i0 = job.segment * w.segment_rows;
    const int rows = py.height - i0 < w.segment_rows ? py.height - i0 : w.segment_rows;
    const int j0 = (job.tile * w.column_groups) * P, j_mine = j0 + column_group * P;
    if (rows <= 0 || j0 >= py.width) continue;
    stage.begin(job.image, static_cast<int>(a.p.batch), S * j0);
    // Of the thread's columns, those that exist.
    const int columns_left = stage.inside_batch ? py.width - j_mine : 0;
    const int columns_here = !exists || columns_left < 0 ? 0 : columns_left < P ? columns_left : P;
    const bool full = w.vector && here == kLanes && columns_left >= P;
    char* out = static_cast<char*>(a.p.y) + py.base + w.y.bytes(job.image + image) +
                static_cast<int64_t>(i0) * w.y.row + static_cast<int64_t>(j_mine) * w.y.column +
                channel * sizeof(Bits);  // of the row that is complete next
    if (full) out += full_offset<D>(w.y.column);

    float acc[M][P];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int p = 0; p < P; ++p) acc[m][p] = 0.f;

    const int chunks = (rows + G * M - 1 + M - 1) / M;
    const int top = S * i0 - pad_rows;
    stage.rewind(top);
    stage.copy(top);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      NVAE_REGION(1);
      const int chunk_top = top + chunk * Shape::kRows;
      __syncthreads();  // the tile has been read
      if (activation == kSwish) {
        NVAE_REGION(1);
        stage.template convert<StageOf::kShare>(chunk_top, OnLoad<kSwish>{scale, shift});
      } else if (activation == kElu) {
        NVAE_REGION(1);
        stage.template convert<1>(chunk_top, OnLoad<kElu>{scale, shift});
      } else {
        NVAE_REGION(1);
        stage.template convert<1>(chunk_top, OnLoad<kIdentity>{scale, shift});
      }
      if (chunk + 1 < chunks) stage.copy(chunk_top + Shape::kRows);
      __syncthreads();
      const float* from = tile + (image * w.columns + column_group * Shape::kStep) * kLanes + lane;
#pragma unroll
      for (int t = 0; t < M; ++t) {
        NVAE_REGION(M);
#pragma unroll
        for (int phase = 0; phase < S; ++phase) {
          if (stage.row_inside(chunk_top + t * S + phase)) {
            NVAE_REGION(M * S);
            float in[Shape::kInputs];
#pragma unroll
            for (int q = 0; q < Shape::kInputs; ++q)
              in[q] = from[((t * S + phase) * StageOf::kPitch + q) * kLanes];
#pragma unroll
            for (int m = 0; m < M; ++m) {
              const int u = S * (group * M + m) + phase;
              if (u < K) {
#pragma unroll
                for (int v = 0; v < K; ++v) {
                  if (!tap_exists(PATTERN, u, v)) continue;
#pragma unroll
                  for (int p = 0; p < P; ++p)
                    acc[(t - m + M) % M][p] =
                        fmaf(weight[m * S + phase][v], in[S * p + v], acc[(t - m + M) % M][p]);
                }
              }
            }
          }
        }
        // The oldest row of this group's ring is complete.
        const int slot = (t + 1) % M;
        const int o = chunk * M + t - group * M - (M - 1);
        if constexpr (G > 1) {
          float* row = handed + t * P * kLanes;
          if (group > 0 && o >= 0 && o < rows)
#pragma unroll
            for (int p = 0; p < P; ++p)
              acc[slot][p] += row[((group - 1) * 2 + (~chunk & 1)) * kHanded + p * kLanes];
          if (group < G - 1)
#pragma unroll
            for (int p = 0; p < P; ++p) row[(group * 2 + (chunk & 1)) * kHanded + p * kLanes] = acc[slot][p];
        }
        if (group == G - 1 && static_cast<unsigned>(o) < static_cast<unsigned>(rows)) {
          NVAE_REGION(M);
          Bits bits[P];
          if (full) {
            NVAE_REGION(M);
            store_columns<D, true, P>(out, w.y.column, columns_here, acc[slot], bits);
            if (stats) {
              NVAE_REGION(M);
              moments.template add<D, true, P>(bits, columns_here, t == M - 1 && o == 0);
            }
          } else {
            NVAE_REGION(M);
            store_columns<D, false, P>(out, w.y.column, columns_here, acc[slot], bits);
            if (stats) {
              NVAE_REGION(M);
              moments.template add<D, false, P>(bits, columns_here, t == M - 1 && o == 0);
            }
          }
          out += w.y.row;
        }
#pragma unroll
        for (int p = 0; p < P; ++p) acc[slot][p] = 0.f;
      }
    }
    moments.count += rows * columns_here;
  }
  if (!stats) return;
  NVAE_REGION(1);

  // Chan's merge of the block's warps, in their order.
  __syncthreads();
  float* of_warp = tile;  // [walker][count, mean, m2][lane]
  if (group == G - 1) {
    moments.write(of_warp + walker * 3 * kLanes + lane);
  }
  __syncthreads();
  if (warp == 0 && exists) {
    NVAE_REGION(1);
    float n = 0.f, mean = 0.f, m2 = 0.f;
#pragma unroll 1
    for (int i = 0; i < walkers; ++i) {
      NVAE_REGION(1);
      const float* other = of_warp + i * 3 * kLanes + lane;
      if (other[0] == 0.f) continue;
      const float all = n + other[0], part = other[0] * reciprocal(all), d = other[kLanes] - mean;
      mean += d * part;
      m2 += other[2 * kLanes] + d * d * n * part;
      n = all;
    }
    float* partial = static_cast<float*>(a.p.workspace) +
                     static_cast<int64_t>(at.job_block * w.views + at.view) * 3 * channels + channel;
    partial[0] = n;
    partial[channels] = mean;
    partial[2 * channels] = m2;
  }
}

}  // namespace cuda
}  // namespace nvae
