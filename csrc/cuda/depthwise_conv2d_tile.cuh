// What the forward and the backward kernel of depthwise_conv2d share: how an image is cut up and how rows of
// it come into shared memory.
//
// A lane is a channel, a warp a group of kColumns columns of one image, and a block walks down the rows of a
// strip of columns. So weights live in registers, shared memory is read without bank conflicts, and all
// control flow is the same for the whole warp. Dilation 2 needs no code of its own: the image then falls
// apart into interleaved images ("views") of twice the strides, in each of which neighbours are neighbours.
#pragma once
#include "depthwise_conv2d.h"
#include "elements.cuh"

namespace nvae {
namespace cuda {

constexpr int kLanes = 32;   // channels of a block
constexpr int kColumns = 4;  // columns of a thread

// Blocks of a multiprocessor decide how many registers a thread may have. ptxas keeps what is counted here
// without spilling for sm_90 alone; the others get one block less.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
constexpr int kSpare = 1;
#else
constexpr int kSpare = 0;
#endif

// How one map is seen: every step-th row and column, from the view's phase on.
struct Lattice {
  int step;    // 1 or 2
  int phased;  // 1: view (p, q) starts at row p and column q; 0: every view starts at 0
  int full_height, full_width;
  int64_t image, row, column;  // strides in elements
};

// The launch, as data that the host works out (depthwise_conv2d_launch.cuh) and registers need not hold.
struct Walk {
  int channel_groups, views, job_blocks;  // blocks of the grid: groups of channels fastest
  int column_groups, images;              // warps of a block (times groups of kernel rows)
  int segments, segment_rows, tiles;      // strips: rows, and columns
  unsigned jobs, jobs_per_block;
  Lattice x, y;
  int kernel;  // width of the weights
  int fold;    // forward only: upsampling as four filters of (kernel + 1) / 2 taps
  int vector;  // 16-byte loads are possible
  // The rectangle of a chunk in shared memory, and how threads share it: [0] element by element, [1] by 16
  // bytes. Factors divide: n / d == n * ceil(2^20 / d) >> 20 for the small n that occur.
  int columns, raw_vectors;
  int bands[2], band_factor[2], column_factor;

  void rectangle(int rows, int columns_, int threads, int bytes) {
    columns = columns_;
    column_factor = ((1 << 20) + columns - 1) / columns;
    for (int i = 0; i < 2; ++i) {
      const int positions = images * columns * (i ? kLanes * bytes / 16 : kLanes), fit = threads / positions;
      bands[i] = fit < 1 ? 1 : fit > rows ? rows : fit;
      band_factor[i] = ((1 << 20) + positions - 1) / positions;
    }
    raw_vectors = images * rows * columns * kLanes * bytes / 16;
  }
};

// One map of a block's view.
struct Plane {
  int64_t base;
  int height, width;
  __device__ Plane(const Lattice& l, int view) {
    const int p = l.phased ? view >> 1 : 0, q = l.phased ? view & 1 : 0;
    base = (p * l.row + q * l.column) / l.step;
    height = (l.full_height - p + l.step - 1) / l.step;
    width = (l.full_width - q + l.step - 1) / l.step;
  }
};

struct Position {
  int channel_group, view, job_block;
  __device__ explicit Position(const Walk& w) {
    unsigned id = blockIdx.x;
    channel_group = static_cast<int>(id % w.channel_groups);
    id /= w.channel_groups;
    view = static_cast<int>(id % w.views);
    job_block = static_cast<int>(id / w.views);
  }
};

// One strip of one group of images.
struct Job {
  int64_t image;  // the first of the group
  int segment, tile;
  __device__ Job(const Walk& w, unsigned index) {
    tile = static_cast<int>(index % w.tiles);
    index /= w.tiles;
    segment = static_cast<int>(index % w.segments);
    image = static_cast<int64_t>(index / w.segments) * w.images;
  }
};

// A rectangle of ROWS rows of every image of a block on its way into shared memory: copied raw
// (asynchronously, each thread its own 16 bytes), then converted by the thread that copied it to floats
// [image][row][column][lane]. Outside the image, and in channels that do not exist, there are zeros; rows
// outside are left out altogether, nobody reads them. Without 16-byte alignment the conversion reads global
// memory itself.
template <Dtype D, int ROWS, int SOURCES>
struct Stage {
  using Bits = typename Word<D>::Type;
  static constexpr int kVector = 16 / kBytes<D>;      // channels of 16 bytes
  static constexpr int kPerPixel = kLanes / kVector;  // vectors of a pixel

  const Walk& w;
  const Lattice& from;
  const Bits* source[SOURCES];
  int height, width, channels;  // channels: those of this block that exist
  bool vector;
  uint4* raw;
  float* tile;

  // Of the strip at hand.
  int64_t offset;   // of the first image's pixel (0, 0)
  int images_here;  // that exist
  int left;         // column of the rectangle's first

  // visit(inside, element of the source, slot of raw, element of the tile, channel) for what this thread
  // moves.
  template <int PER, class Visit>
  __device__ __forceinline__ void each(int top, Visit visit) const {
    constexpr int kind = PER == kLanes ? 0 : 1;
    const int positions = w.images * w.columns * PER, all = positions * w.bands[kind];
    for (int i = threadIdx.x; i < all; i += blockDim.x) {
      const int band = w.bands[kind] > 1 ? i * w.band_factor[kind] >> 20 : 0, position = i - band * positions;
      const int lane = position % PER * (kLanes / PER), pixel = position / PER;
      const int b = w.images > 1 ? pixel * w.column_factor >> 20 : 0, j = pixel - b * w.columns;
      const bool inside = b < images_here && left + j >= 0 && left + j < width && lane < channels;
      const int64_t corner = offset + b * from.image + (left + j) * from.column + lane;
#pragma unroll 1
      for (int r = band; r < ROWS; r += w.bands[kind]) {
        if (top + r < 0 || top + r >= height) continue;
        visit(inside, corner + (top + r) * from.row, r * positions + position,
              ((b * ROWS + r) * w.columns + j) * kLanes + lane, lane);
      }
    }
  }

  __device__ __forceinline__ void copy(int top) const {
    if (!vector) return;
    each<kPerPixel>(top, [&](bool inside, int64_t at, int slot, int, int) {
      if (!inside) return;
#pragma unroll
      for (int n = 0; n < SOURCES; ++n)
        if (source[n]) copy_async(raw + n * w.raw_vectors + slot, source[n] + at);
    });
  }

  // Map: (channel, values of the sources) for four elements from that channel on, or for one.
  template <class Map>
  __device__ __forceinline__ void convert(int top, const Map& map) const {
    if (vector) {
      wait_copies();
      each<kPerPixel>(top, [&](bool inside, int64_t, int slot, int to, int lane) {
#pragma unroll
        for (int part = 0; part < kVector / 4; ++part) {
          float4 v[SOURCES];
#pragma unroll
          for (int n = 0; n < SOURCES; ++n) {
            v[n] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (inside && source[n]) v[n] = widen_four<D>(raw + n * w.raw_vectors + slot, part);
          }
          if (inside) v[0] = map.four(lane + 4 * part, v[0], v[SOURCES - 1]);
          *reinterpret_cast<float4*>(tile + to + 4 * part) = v[0];
        }
      });
    } else {
      each<kLanes>(top, [&](bool inside, int64_t at, int, int to, int lane) {
        float v[SOURCES];
#pragma unroll
        for (int n = 0; n < SOURCES; ++n) {
          v[n] = 0.f;
          if (inside && source[n]) v[n] = map.template load<D>(source[n] + at);
        }
        tile[to] = inside ? map.one(lane, v[0], v[SOURCES - 1]) : 0.f;
      });
    }
  }
};

}  // namespace cuda
}  // namespace nvae
