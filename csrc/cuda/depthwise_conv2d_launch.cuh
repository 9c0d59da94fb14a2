// Which kernel of depthwise_conv2d runs, on which grid.
#pragma once
#include "depthwise_conv2d_backward.cuh"
#include "launch.cuh"

namespace nvae {
namespace cuda {

// Grids aim at this many blocks: eight for each of the 132 multiprocessors of an H200, more than are resident
// at a time. One number for every GPU, so that sums have the same order on all.
constexpr int64_t kBlocks = 1056;
// The shared memory of a block that every GPU from sm_80 on has (99 KB: sm_86, sm_89 and sm_120; sm_80 has
// 163, sm_90 and sm_100 have 227). A launch takes fewer images or columns per block rather than more than
// this, on every GPU, so that the order of sums does not depend on the GPU either.
constexpr size_t kSharedMemory = 99 * 1024;
constexpr int64_t kSegmentRows = 8;  // strips are not cut shorter: each repeats the rows of a kernel

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int map_bytes(const DepthwiseConv2d& p) { return p.dtype == Dtype::f32 ? 4 : 2; }
inline bool is_folded(const DepthwiseConv2d& p) { return p.upsample == 2 && p.dilation == 1; }
// The stride within a view: with dilation 2, stride 2 only meets the even rows and columns.
inline int inner_stride(const DepthwiseConv2d& p) { return p.stride == 2 && p.dilation == 1 ? 2 : 1; }

// The causal 5x5 kernels, whose dead taps the compiler leaves out.
inline int pattern(const DepthwiseConv2d& p) {
  if (!p.masked || p.kernel != 5) return 0;
  return p.live[0] == 0x1fffu ? 1 : p.live[0] == 0x1fff000u ? 2 : 0;
}

// height and width: of the map whose pixels are dealt out (y forward, x backward) in its largest view.
inline void cut(Walk& w, int64_t batch, int64_t height, int64_t width, int most_warps) {
  const int64_t wanted = ceil_divide(width, kColumns);
  w.tiles = static_cast<int>(ceil_divide(wanted, most_warps));
  w.column_groups = w.tiles ? static_cast<int>(ceil_divide(wanted, w.tiles)) : 1;
  w.images = most_warps / w.column_groups;
  if (w.images > batch) w.images = static_cast<int>(batch);
  if (w.images < 1) w.images = 1;
  const int64_t strips = ceil_divide(batch, w.images) * w.tiles * w.channel_groups * w.views;
  int64_t segments = strips ? kBlocks / 2 / strips : 1;
  if (segments > height / kSegmentRows) segments = height / kSegmentRows;
  if (segments < 1) segments = 1;
  w.segment_rows = static_cast<int>(ceil_divide(height, segments));
  w.segments = w.segment_rows ? static_cast<int>(ceil_divide(height, w.segment_rows)) : 0;
  const int64_t jobs = ceil_divide(batch, w.images) * w.tiles * w.segments;  // far fewer than pixels / 32
  w.jobs = static_cast<unsigned>(jobs);
  const int64_t share = kBlocks / (static_cast<int64_t>(w.channel_groups) * w.views);
  w.jobs_per_block = static_cast<unsigned>(ceil_divide(jobs, share < 1 ? 1 : share));
  if (w.jobs_per_block < 1) w.jobs_per_block = 1;
  w.job_blocks = static_cast<int>(ceil_divide(jobs, w.jobs_per_block));
  if (w.job_blocks < 1) w.job_blocks = 1;  // an empty batch has sums, too
}

inline Walk common_walk(const DepthwiseConv2d& p) {
  Walk w = {};
  w.channel_groups = static_cast<int>(ceil_divide(p.channels, kLanes));
  w.views = 1;
  w.x.step = w.y.step = 1;
  if (p.dilation == 2) {
    if (p.upsample == 1) w.x.step = 2, w.x.phased = p.stride == 1;
    if (p.stride == 1) w.y.step = 2, w.y.phased = p.upsample == 1;
    if (p.stride == 1 && p.upsample == 1) w.views = 4;
  }
  w.kernel = static_cast<int>(p.kernel);
  w.vector = p.channels % (16 / (p.dtype == Dtype::f32 ? 4 : 2)) == 0;
  return w;
}
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline void set_strides(Lattice& l, const DepthwiseConv2d& p, int64_t height, int64_t width) {
  l.full_height = static_cast<int>(height);
  l.full_width = static_cast<int>(width);
  l.image = height * width * p.channels;
  l.row = l.step * width * p.channels;
  l.column = l.step * p.channels;
}

template <class Shape>
Walk forward_walk(const DepthwiseForward& p) {
  Walk w = common_walk(p);
  if (p.upsample ==
      2) {  // the four phases of y: filters of their own, or with dilation 2 four times the same
    w.y.step = 2, w.y.phased = 1;
    w.views = 4;
    w.fold = p.dilation == 1;
  }
  w.vector = w.vector && aligned(p.x);
  set_strides(w.x, p, p.height, p.width);
  set_strides(w.y, p, p.out_height(), p.out_width());
  const int bytes = map_bytes(p);
  for (int warps = Shape::kWarps;; --warps) {
    cut(w, p.batch, ceil_divide(p.out_height(), w.y.step), ceil_divide(p.out_width(), w.y.step), warps);
    w.rectangle(Shape::kRows, Shape::columns(w), Shape::threads(w), bytes);
    if (warps == 1 || Shape::shared(w, bytes) <= kSharedMemory) return w;
  }
}
template <class Shape>
Walk backward_walk(const DepthwiseBackward& p) {
  Walk w = common_walk(p);
  w.vector = w.vector && aligned(p.grad) && aligned(p.out);
  set_strides(w.x, p, p.height, p.width);
  set_strides(w.y, p, p.out_height(), p.out_width());
  const int bytes = map_bytes(p);
  for (int warps = Shape::kWarps;; --warps) {
    cut(w, p.batch, ceil_divide(p.height, w.x.step), ceil_divide(p.width, w.x.step), warps);
    w.rectangle(Shape::kRows, Shape::columns(w), Shape::threads(w), bytes);
    if (warps == 1 || Shape::shared(w, bytes, p.out ? 2 : 1) <= kSharedMemory) return w;
  }
}

// Shapes of kernels, K taps each way and a stride in rings of so many rows: what fits into 128 registers, or
// 168 where few threads do.
template <int K_, int S_, int M_, int G_, int PATTERN_ = 0>
struct ForwardKind {
  static constexpr int K = K_, S = S_, M = M_, G = G_, PATTERN = PATTERN_;
  using Shape = ForwardShape<K, S, M, G>;
};
template <class Visit>
auto forward_kind(const DepthwiseConv2d& p, Visit visit) {
  const int s = inner_stride(p), k = static_cast<int>(is_folded(p) ? (p.kernel + 1) / 2 : p.kernel);
  if (s == 2) {
    if (k == 3) return visit(ForwardKind<3, 2, 2, 1>{});
    if (k == 5) return visit(ForwardKind<5, 2, 3, 1>{});
    if (k == 7) return visit(ForwardKind<7, 2, 4, 1>{});
    return visit(ForwardKind<11, 2, 3, 2>{});
  }
  if (k == 2) return visit(ForwardKind<2, 1, 2, 1>{});
  if (k == 3) return visit(ForwardKind<3, 1, 3, 1>{});
  if (k == 4) return visit(ForwardKind<4, 1, 4, 1>{});
  if (k == 5 && pattern(p) == 1) return visit(ForwardKind<5, 1, 5, 1, 1>{});
  if (k == 5 && pattern(p) == 2) return visit(ForwardKind<5, 1, 5, 1, 2>{});
  if (k == 5) return visit(ForwardKind<5, 1, 5, 1>{});
  if (k == 6) return visit(ForwardKind<6, 1, 6, 1>{});
  if (k == 7) return visit(ForwardKind<7, 1, 7, 1>{});
  return visit(ForwardKind<11, 1, 4, 3>{});
}

template <int K_, int XS_, int DS_, int U_, int PATTERN_ = 0>
struct BackwardKind {
  static constexpr int K = K_, XS = XS_, DS = DS_, U = U_, PATTERN = PATTERN_;
  using Shape = BackwardShape<K, XS, DS, U>;
};
template <class Visit>
auto backward_kind(const DepthwiseConv2d& p, Visit visit) {
  const int64_t k = p.kernel;
  if (inner_stride(p) == 2) {
    if (k == 3) return visit(BackwardKind<3, 2, 1, 4>{});
    if (k == 5) return visit(BackwardKind<5, 2, 1, 6>{});
    if (k == 7) return visit(BackwardKind<7, 2, 1, 4>{});
    return visit(BackwardKind<11, 2, 1, 2>{});
  }
  if (is_folded(p)) {
    if (k == 3) return visit(BackwardKind<3, 1, 2, 2>{});
    if (k == 5) return visit(BackwardKind<5, 1, 2, 3>{});
    if (k == 7) return visit(BackwardKind<7, 1, 2, 2>{});
    return visit(BackwardKind<11, 1, 2, 1>{});
  }
  if (k == 3) return visit(BackwardKind<3, 1, 1, 3>{});
  if (k == 5 && pattern(p) == 1) return visit(BackwardKind<5, 1, 1, 5, 1>{});
  if (k == 5 && pattern(p) == 2) return visit(BackwardKind<5, 1, 1, 5, 2>{});
  if (k == 5) return visit(BackwardKind<5, 1, 1, 5>{});
  if (k == 7) return visit(BackwardKind<7, 1, 1, 4>{});
  return visit(BackwardKind<11, 1, 1, 2>{});
}

// The kernels of each dtype are compiled in a file of their own.
template <Dtype D>
cudaError_t launch_forward(const DepthwiseForward& p, void* stream);
template <Dtype D>
cudaError_t launch_backward(const DepthwiseBackward& p, void* stream);

template <Dtype D>
cudaError_t start_forward(const DepthwiseForward& p, void* stream) {
  return forward_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    using Shape = typename Kind::Shape;
    ForwardLaunch a = {p, forward_walk<Shape>(p)};
    auto* kernel = depthwise_forward_kernel<D, Kind::K, Kind::S, Kind::M, Kind::G, Kind::PATTERN>;
    const size_t shared = Shape::shared(a.w, kBytes<D>);
    const cudaError_t error = allow_shared(kernel, shared, p.device);
    if (error != cudaSuccess) return error;
    const unsigned grid = static_cast<unsigned>(a.w.channel_groups) * a.w.views * a.w.job_blocks;
    NVAE_LAUNCH(kernel, grid, Shape::threads(a.w), shared, stream, a);
    return cudaGetLastError();
  });
}

template <Dtype D>
cudaError_t start_backward(const DepthwiseBackward& p, void* stream) {
  return backward_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    using Shape = typename Kind::Shape;
    BackwardLaunch a = {p, backward_walk<Shape>(p)};
    auto* kernel = depthwise_backward_kernel<D, Kind::K, Kind::XS, Kind::DS, Kind::U, Kind::PATTERN>;
    const size_t shared = Shape::shared(a.w, kBytes<D>, p.out ? 2 : 1);
    const cudaError_t error = allow_shared(kernel, shared, p.device);
    if (error != cudaSuccess) return error;
    const unsigned grid = static_cast<unsigned>(a.w.channel_groups) * a.w.views * a.w.job_blocks;
    NVAE_LAUNCH(kernel, grid, Shape::threads(a.w), shared, stream, a);
    return cudaGetLastError();
  });
}

}  // namespace cuda
}  // namespace nvae
