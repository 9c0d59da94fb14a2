// What the forward and the backward kernel of depthwise_conv2d share: how an image is partitioned and how its
// rows come into shared memory.
//
// A lane is a channel, a warp a group of kColumns columns of one image, and a block walks down the rows of a
// strip of columns. So weights are held in registers, shared memory is read without bank conflicts, and
// control flow is uniform within a warp. Dilation 2 needs no code of its own: the image is then seen as
// interleaved images ("views") of twice the strides, in each of which neighbours are adjacent.
#pragma once
#include "depthwise_conv2d.h"
#include "elements.cuh"

namespace nvae {
namespace cuda {

constexpr int kLanes = 32;                // channels of a block
constexpr int kColumns = 4;               // columns of a thread
constexpr int kQuad = 4;                  // channels that a lane moves at a time
constexpr int kQuads = kLanes / kQuad;    // of a pixel
constexpr int kPixels = kLanes / kQuads;  // that a warp moves at a time

// Resident blocks per multiprocessor decide how many registers a thread may have. ptxas keeps what is counted
// here without spilling for sm_90 alone; the others get one block less.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kSpare = 1;
#else
constexpr int kSpare = 0;
#endif

inline int map_bytes(const DepthwiseConv2d& p) { return p.dtype == Dtype::f32 ? 4 : 2; }

// How one map is seen: every row and column, or with `halved` every second one, from the view's phase on.
struct Lattice {
  int halved;  // 0 or 1
  int phased;  // 1: view (p, q) starts at row p and column q; 0: every view starts at 0
  int full_height, full_width;
  unsigned image;   // bytes from one image to the next
  int row, column;  // bytes from one row or column of the view to the next
  __device__ __forceinline__ int64_t bytes(int images) const {
    return static_cast<int64_t>(static_cast<uint64_t>(static_cast<unsigned>(images)) * image);
  }
};

// The launch, as data that the host works out (depthwise_conv2d_launch.cuh) and registers need not hold.
struct Walk {
  int channel_groups, views, job_blocks;  // the grid: channel groups, then views and ranges of jobs
  int column_groups, images;              // warps of a block (times groups of kernel rows)
  int segments, segment_rows, tiles;      // strips: rows, and columns
  unsigned jobs, jobs_per_block;
  Lattice x, y;
  int kernel;   // width of the weights
  int fold;     // forward only: upsampling as four filters of (kernel + 1) / 2 taps
  int vector;   // quads of channels are aligned
  int columns;  // of an image in the tile of shared memory, its halo included
};

// A value that is the same for all lanes of a warp. Read from one of them, so that the compiler knows.
__device__ __forceinline__ int uniform(int value) {
#ifdef __CUDA_ARCH__
  return __shfl_sync(0xffffffffu, value, 0);
#else
  return value;
#endif
}

// One map of a block's view.
struct Plane {
  int64_t base;  // bytes
  int height, width;
  __device__ Plane(const Lattice& l, int view) {
    const int p = l.phased ? view >> 1 : 0, q = l.phased ? view & 1 : 0;
    base = (p ? l.row >> l.halved : 0) + (q ? l.column >> l.halved : 0);
    height = (l.full_height - p + l.halved) >> l.halved;
    width = (l.full_width - q + l.halved) >> l.halved;
  }
};

struct Position {
  int channel_group, view, job_block;
  __device__ explicit Position(const Walk& w) {
    channel_group = static_cast<int>(blockIdx.x);
    view = w.views == 1 ? 0 : static_cast<int>(blockIdx.y & 3);
    job_block = static_cast<int>(w.views == 1 ? blockIdx.y : blockIdx.y >> 2);
  }
};

// One strip of one group of images.
struct Job {
  int image;  // the first of the group
  int segment, tile;
  __device__ Job(const Walk& w, unsigned index) {
    tile = segment = 0;
    if (w.tiles > 1) {
      tile = static_cast<int>(index % w.tiles);
      index /= w.tiles;
    }
    if (w.segments > 1) {
      segment = static_cast<int>(index % w.segments);
      index /= w.segments;
    }
    image = static_cast<int>(index) * w.images;
  }
};

// The weights of a block's channels times `factor`, contiguous; with `mask` dead taps are set to 0.
__device__ __forceinline__ void load_weights(const DepthwiseConv2d& p, bool mask, int64_t first, int here,
                                             int taps, float factor, float* to) {
  const int64_t begin = first * taps;
  const int count = here * taps, step = static_cast<int>(blockDim.x);
  NVAE_REGION(1);
  if (p.weight_dtype == Dtype::f32 && here == kLanes && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0) {
    NVAE_REGION(1);
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(p.weight) + begin);
    const int fours = kQuads * taps;
#pragma unroll 1
    for (int i = threadIdx.x; i < fours; i += 2 * step) {
      NVAE_REGION(1);
      const bool two = i + step < fours;
      const float4 one = from[i], other = two ? from[i + step] : one;
      reinterpret_cast<float4*>(to)[i] =
          make_float4(one.x * factor, one.y * factor, one.z * factor, one.w * factor);
      if (two)
        reinterpret_cast<float4*>(to)[i + step] =
            make_float4(other.x * factor, other.y * factor, other.z * factor, other.w * factor);
    }
  } else {
    NVAE_REGION(1);
    for (int i = threadIdx.x; i < count; i += step)
      to[i] = load_any<float>(p.weight, p.weight_dtype, begin + i) * factor;
  }
  __syncthreads();
  if (mask && p.masked) {
    NVAE_REGION(1);
#pragma unroll 1
    for (int i = threadIdx.x; i < count; i += step)
      if (!p.tap_is_live(i % taps)) to[i] = 0.f;
    __syncthreads();
  }
}

// The same value, of which the compiler knows nothing: so it does not merge a rare path with the common one.
__device__ __forceinline__ int opaque(int value) {
#ifdef __CUDA_ARCH__
  asm("" : "+r"(value));
#endif
  return value;
}

// Of full columns of 16-bit elements two lanes store their two channels together: the even lane the left half of the
// columns, the odd lane the right half. Bytes from where a lane's own elements begin to where it stores.
template <Dtype D>
__device__ __forceinline__ int full_offset(int column_bytes) {
  if constexpr (D == Dtype::f32) return 0;
  return threadIdx.x & 1 ? kColumns / 2 * column_bytes - 2 : 0;
}

// Rounds and stores adjacent columns, those that exist. FULL: at full_offset; all lanes of the warp.
template <Dtype D, bool FULL, int P>
__device__ __forceinline__ void store_columns(char* to, int column_bytes, int columns, const float* value,
                                              typename Word<D>::Type* bits) {
  static_assert(P == 4, "two pairs");
  if constexpr (FULL && D != Dtype::f32) {
    const unsigned left = narrow_pair<D>(value[0], value[1]), right = narrow_pair<D>(value[2], value[3]);
    const bool odd = threadIdx.x & 1;
    const unsigned mine = odd ? right : left, other = __shfl_xor_sync(0xffffffffu, odd ? left : right, 1);
    const unsigned even_channel = odd ? other : mine, odd_channel = odd ? mine : other;
    *reinterpret_cast<unsigned*>(to) = (even_channel & 0xffffu) | odd_channel << 16;
    *reinterpret_cast<unsigned*>(to + static_cast<unsigned>(column_bytes)) =
        even_channel >> 16 | (odd_channel & 0xffff0000u);
    bits[0] = static_cast<unsigned short>(left), bits[1] = static_cast<unsigned short>(left >> 16);
    bits[2] = static_cast<unsigned short>(right), bits[3] = static_cast<unsigned short>(right >> 16);
  } else {
#pragma unroll
    for (int p = 0; p < P; p += 2) narrow_two<D>(value[p], value[p + 1], bits + p);
    if (!FULL) column_bytes = opaque(column_bytes);
#pragma unroll
    for (int p = 0; p < P; ++p)
      if (FULL || p < columns)
        *reinterpret_cast<typename Word<D>::Type*>(
            to + static_cast<uint64_t>(static_cast<unsigned>(column_bytes)) * p) = bits[p];
  }
}

// The ROWS rows of a chunk of every image of a block on their way into shared memory: copied raw and
// asynchronously, then converted by the thread that copied them to floats [row][image][column][lane].
//
// A column group brings the STEP columns that are its own, four channels of four pixels per warp at a time,
// so that only the row changes from one to the next. The HALO columns around them belong to other tiles and
// are shared out among all warps; where there is one tile they are outside the image and set to zero once.
// Pixels outside the image and channels that do not exist are zeros. Rows outside the image are left out and
// never read. Where quads of channels are not aligned the conversion reads global memory itself.
template <Dtype D, int WARPS, int ROWS, int STEP, int HALO, int GROUPS, int SOURCES>
struct Stage {
  using Bits = typename Word<D>::Type;
  using Four = typename Word<D>::Four;
  static constexpr int kBits = static_cast<int>(sizeof(Bits));
  static constexpr int kPasses = (ROWS * STEP + kPixels - 1) / kPixels;  // of a column group
  static constexpr int kShare = (kPasses + GROUPS - 1) / GROUPS;         // of a warp
  static constexpr int kSides = STEP > kPixels ? STEP / kPixels : 1;     // passes of a row
  static constexpr int kHalo = ROWS * HALO;                              // pixels
  static constexpr int kPitch = WARPS * (STEP + HALO);  // columns of a row of all images, at most
  static constexpr int kTile = ROWS * kPitch * kLanes;  // floats
  static_assert((STEP == 2 || STEP == 4 || STEP == 8) && HALO > 0, "what the kernels use");

  __host__ __device__ static size_t raw_bytes(const Walk& w, int threads, int bytes) {
    if (!w.vector) return 0;
    return static_cast<size_t>(kQuad * bytes * SOURCES) *
           (kShare * threads + (w.tiles > 1 ? kHalo * kQuads : 0));
  }

  const Walk& w;
  const Lattice& from;
  const char* source[SOURCES];  // at the view's first pixel and the block's first channel
  int both;                     // whether there is a second source
  int height, width, channels;  // channels: those of this block that exist
  bool vector;
  int pad;  // columns of the halo that are on the left
  int warp, column_group, group, image;
  float* tile;
  Four* raw;

  // Of the job at hand.
  // In each source, what the lane brings in the first row of the next chunk.
  const char* next = nullptr;
  const char* second = nullptr;
  int64_t images_at = 0;                       // bytes from a source to the first image
  int64_t own_at = 0;                          // to the pixel in row 0 that this lane brings first
  int first_column = 0;                        // of the block's own
  bool inside_batch = false;                   // whether the warp's image exists
  bool whole = false;                          // whether every lane of the warp has something to bring
  bool inside = false, inside_second = false;  // whether the lane has something to bring, per side

  __device__ __forceinline__ static int lane() { return threadIdx.x % kLanes; }
  __device__ __forceinline__ static int quad() { return threadIdx.x % kQuads * kQuad; }
  __device__ __forceinline__ static int slot() { return threadIdx.x / kQuads % kPixels; }
  __device__ __forceinline__ bool brings(int side) const { return side == 0 ? inside : inside_second; }
  __device__ __forceinline__ bool row_inside(int row) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(height);
  }
  __device__ __forceinline__ const char* at(int n, int64_t offset, int row) const {
    return source[n] + offset + static_cast<int64_t>(row) * from.row;
  }

  // Once, before the first job.
  __device__ __forceinline__ void clear_halo() const {
    NVAE_REGION(1);
    if (w.tiles > 1) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < w.images * kHalo * kQuads; i += blockDim.x) {
      NVAE_REGION(1);
      const int pixel = i / kQuads, r = pixel / HALO, h = pixel - r * HALO, b = r / ROWS;
      const int j = b * w.columns + (h < pad ? h : h + STEP * w.column_groups);
      *reinterpret_cast<float4*>(tile + ((r - b * ROWS) * kPitch + j) * kLanes + quad()) =
          make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  __device__ __forceinline__ void begin(int first_image, int batch, int column) {
    NVAE_REGION(1);
    first_column = column;
    images_at = from.bytes(first_image);
    const int mine = column + column_group * STEP + (vector ? slot() % STEP : 0);
    own_at = from.bytes(first_image + image) + static_cast<int64_t>(mine) * from.column +
             (vector ? quad() : lane()) * kBits;
    inside_batch = first_image + image < batch;
    whole = inside_batch && channels == kLanes && column + (column_group + 1) * STEP <= width;
    const bool exists = inside_batch && (vector ? quad() : lane()) < channels;
    inside = exists && mine < width;
    inside_second = exists && mine + kPixels < width;
  }

  // visit(pass's place among the warp's, row of the chunk, first or second side) for each pass of a warp, but
  // rows outside the image.
  template <int UNROLL, class Visit>
  __device__ __forceinline__ void each_pass(int top, Visit visit) const {
#pragma unroll UNROLL
    for (int i = 0; i < kShare; ++i) {
      NVAE_REGION(UNROLL);
      const int pass = GROUPS == 1 ? i : i * GROUPS + group;
      const int r = STEP < kPixels ? pass * (kPixels / STEP) + slot() / STEP : pass / kSides;
      if ((GROUPS == 1 && ROWS * STEP % kPixels == 0) || r < ROWS)
        if (row_inside(top + r)) visit(i, r, kSides > 1 ? pass % kSides : 0);
    }
  }
  // visit(number, row, inside, bytes from a source, element of the tile, channel), PER to a pixel.
  template <int PER, class Visit>
  __device__ __forceinline__ void each_halo(int top, Visit visit) const {
    NVAE_REGION(1);
    if (w.tiles == 1) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < kHalo * PER; i += blockDim.x) {
      NVAE_REGION(1);
      const int pixel = i / PER, r = pixel / HALO, h = pixel - r * HALO, channel = i % PER * (kLanes / PER);
      const int j = h < pad ? h : h + STEP * w.column_groups, column = first_column - pad + j;
      if (!row_inside(top + r)) continue;
      visit(i, top + r, column >= 0 && column < width && channel < channels,
            images_at + static_cast<int64_t>(column) * from.column + channel * kBits,
            (r * kPitch + j) * kLanes + channel, channel);
    }
  }
  // A thread's copies, of one source after the other: at distances that the compiler knows.
  __device__ __forceinline__ Four* raw_own(int n, int i) const {
    return raw + warp * (SOURCES * kShare * kLanes) + lane() + (n * kShare + i) * kLanes;
  }
  __device__ __forceinline__ Four* raw_halo(int n, int i) const {
    return raw + SOURCES * kShare * static_cast<int>(blockDim.x) + n * (kHalo * kQuads) + i;
  }

  // Chunks are copied one after the other, the first of a job from row `top` on.
  __device__ __forceinline__ void rewind(int top) {
    next = at(0, own_at, top);
    if (SOURCES > 1) second = at(SOURCES - 1, own_at, top);
  }
  __device__ __forceinline__ void copy(int top) {
    NVAE_REGION(1);
    if (!vector) return;
    each_pass<kShare>(top, [&](int i, int r, int side) {
      NVAE_REGION(kShare);
      if (!brings(side)) return;
      const int64_t offset = static_cast<int64_t>(r) * from.row + (side ? kPixels * from.column : 0);
      copy_async(raw_own(0, i), next + offset);
      if (SOURCES > 1 && both) copy_async(raw_own(1, i), second + offset);
    });
    next += static_cast<int64_t>(ROWS) * from.row;
    if (SOURCES > 1) second += static_cast<int64_t>(ROWS) * from.row;
    each_halo<kQuads>(top, [&](int i, int row, bool in, int64_t offset, int, int) {
      NVAE_REGION(1);
      if (!in) return;
#pragma unroll
      for (int n = 0; n < SOURCES; ++n)
        if (n == 0 || both) copy_async(raw_halo(n, i), at(n, offset, row));
    });
  }

  // Map: of(channel) gives the function of four channels from there on, one(channel, ...) that of one.
  template <int UNROLL, class Map>
  __device__ __forceinline__ void convert(int top, const Map& map) const {
    NVAE_REGION(1);
    float* own = tile + (image * w.columns + pad + column_group * STEP) * kLanes;
    wait_copies();
    if (!vector) {
      NVAE_REGION(1);
      convert_single(top, map, own + lane());
      return;
    }
    const auto function = map.of(quad());
    own += slot() % STEP * kLanes + quad();
    if (whole) {
      NVAE_REGION(1);
      each_pass<UNROLL>(top, [&](int i, int r, int side) {
        NVAE_REGION(UNROLL);
        put_four(true, function, raw_own(0, i), raw_own(SOURCES - 1, i),
                 own + (r * kPitch + side * kPixels) * kLanes);
      });
    } else {
      NVAE_REGION(1);
      each_pass<1>(top, [&](int i, int r, int side) {
        NVAE_REGION(1);
        put_four(brings(side), function, raw_own(0, i), raw_own(SOURCES - 1, i),
                 own + (r * kPitch + side * kPixels) * kLanes);
      });
    }
    each_halo<kQuads>(top, [&](int i, int, bool in, int64_t, int to, int) {
      NVAE_REGION(1);
      put_four(in, function, raw_halo(0, i), raw_halo(SOURCES - 1, i), tile + to);
    });
  }

 private:
  template <class Function>
  __device__ __forceinline__ void put_four(bool in, const Function& function, const Four* copied,
                                           const Four* second_copied, float* to) const {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (in) v = function(widen_four<D>(*copied), SOURCES > 1 && both ? widen_four<D>(*second_copied) : v);
    *reinterpret_cast<float4*>(to) = v;
  }
  template <class Map>
  __device__ __forceinline__ void convert_single(int top, const Map& map, float* own) const {
    const auto put = [&](bool in, int64_t offset, int row, int channel, float* to) {
      float v[SOURCES];
#pragma unroll
      for (int n = 0; n < SOURCES; ++n) {
        v[n] = 0.f;
        if (in && (n == 0 || both))
          v[n] = map.template load<D>(reinterpret_cast<const Bits*>(at(n, offset, row)));
      }
      *to = in ? map.one(channel, v[0], v[SOURCES - 1]) : 0.f;
    };
#pragma unroll 1
    for (int i = group; i < ROWS * STEP; i += GROUPS) {
      const int r = i / STEP, c = i % STEP, column = first_column + column_group * STEP + c;
      if (row_inside(top + r))
        put(inside && column < width, own_at + c * from.column, top + r, lane(),
            own + (r * kPitch + c) * kLanes);
    }
    each_halo<kLanes>(top, [&](int, int row, bool in, int64_t offset, int to, int channel) {
      put(in, offset, row, channel, tile + to);
    });
  }
};

}  // namespace cuda
}  // namespace nvae
