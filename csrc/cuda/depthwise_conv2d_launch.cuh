// Which kernel of depthwise_conv2d runs, on which grid.
#pragma once
#include "depthwise_conv2d_backward.cuh"
#include "launch.cuh"

namespace nvae {
namespace cuda {

// Grids aim at this many blocks: eight for each of the 132 multiprocessors of an H200, more than are resident
// at a time. One number for every GPU, so that sums have the same order on all.
constexpr int64_t kBlocks = 1056;
constexpr int64_t kMultiprocessors = 132;
// The shared memory of a block that every GPU from sm_80 on has (99 KB: sm_86, sm_89 and sm_120; sm_80 has
// 163, sm_90 and sm_100 have 227). A launch takes fewer images or columns per block rather than more than
// this, on every GPU, so that the order of sums does not depend on the GPU either.
constexpr size_t kSharedMemory = 99 * 1024;
constexpr int64_t kSegmentRows = 8;  // strips are not cut shorter: each repeats the rows of a kernel

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool is_folded(const DepthwiseConv2d& p) { return p.upsample == 2 && p.dilation == 1; }
// The stride within a view: with dilation 2, stride 2 only meets the even rows and columns.
inline int inner_stride(const DepthwiseConv2d& p) { return p.stride == 2 && p.dilation == 1 ? 2 : 1; }

// The causal 5x5 kernels, whose dead taps the compiler leaves out.
inline int pattern(const DepthwiseConv2d& p) {
  if (!p.masked || p.kernel != 5) return 0;
  return p.live[0] == 0x1fffu ? 1 : p.live[0] == 0x1fff000u ? 2 : 0;
}

// height and width: of the map whose pixels are dealt out (y forward, x backward) in its largest view.
inline void cut(Walk& w, int64_t batch, int64_t height, int64_t width, int most_warps, int resident) {
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
  const int64_t columns = static_cast<int64_t>(w.channel_groups) * w.views;
  const int64_t share = kBlocks / columns;
  int64_t most = ceil_divide(jobs, share < 1 ? 1 : share), least_time = 0;
  if (most < 1) most = 1;
  // Blocks of more jobs, as long as every multiprocessor has as many as it can hold, where that takes less time: to
  // start and to end a block takes as long as one or two rows.
  for (int64_t count = most; count <= jobs || count == most; ++count) {
    const int64_t blocks = ceil_divide(ceil_divide(jobs, count) * columns, kMultiprocessors);
    if (count > most && blocks < resident) break;
    const int64_t time = blocks * (2 * count * w.segment_rows + 3);
    if (least_time == 0 || time < least_time)
      least_time = time, w.jobs_per_block = static_cast<unsigned>(count);
  }
  w.job_blocks = static_cast<int>(ceil_divide(jobs, w.jobs_per_block));
  if (w.job_blocks < 1) w.job_blocks = 1;  // an empty batch has sums, too
}

inline Walk common_walk(const DepthwiseConv2d& p) {
  Walk w = {};
  w.channel_groups = static_cast<int>(ceil_divide(p.channels, kLanes));
  w.views = 1;
  if (p.dilation == 2) {
    if (p.upsample == 1) w.x.halved = 1, w.x.phased = p.stride == 1;
    if (p.stride == 1) w.y.halved = 1, w.y.phased = p.upsample == 1;
    if (p.stride == 1 && p.upsample == 1) w.views = 4;
  }
  w.kernel = static_cast<int>(p.kernel);
  w.vector = p.channels % kQuad == 0;
  return w;
}
inline bool aligned(const void* data, const DepthwiseConv2d& p) {
  return reinterpret_cast<uintptr_t>(data) % (kQuad * map_bytes(p)) == 0;
}

inline void set_strides(Lattice& l, const DepthwiseConv2d& p, int64_t height, int64_t width) {
  const int64_t pixel = p.channels * map_bytes(p);
  l.full_height = static_cast<int>(height);
  l.full_width = static_cast<int>(width);
  l.image = static_cast<unsigned>(height * width * pixel);
  l.row = static_cast<int>(width * pixel << l.halved);
  l.column = static_cast<int>(pixel << l.halved);
}
inline int64_t of_view(const Lattice& l, int64_t extent) { return (extent + l.halved) >> l.halved; }

// The launch that fits into kSharedMemory. height and width: of the map that is dealt out, in its largest
// view.
template <class Shape, class Problem>
Walk fitted(Walk w, const Problem& p, int64_t height, int64_t width) {
  set_strides(w.x, p, p.height, p.width);
  set_strides(w.y, p, p.out_height(), p.out_width());
  for (int warps = Shape::kWarps;; --warps) {
    cut(w, p.batch, height, width, warps, Shape::kResident);
    w.columns = Shape::columns(w.column_groups);
    if (warps == 1 || Shape::shared(w, p) <= kSharedMemory) return w;
  }
}

template <class Shape>
Walk walk_of(const DepthwiseForward& p) {
  Walk w = common_walk(p);
  // The four phases of y: filters of their own, or with dilation 2 four times the same.
  if (p.upsample == 2) w.y.halved = w.y.phased = 1, w.views = 4, w.fold = p.dilation == 1;
  w.vector = w.vector && aligned(p.x, p) && aligned(p.y, p);
  return fitted<Shape>(w, p, of_view(w.y, p.out_height()), of_view(w.y, p.out_width()));
}
template <class Shape>
Walk walk_of(const DepthwiseBackward& p) {
  Walk w = common_walk(p);
  w.vector = w.vector && aligned(p.x, p) && aligned(p.grad, p) && aligned(p.out, p) && aligned(p.grad_x, p);
  return fitted<Shape>(w, p, of_view(w.x, p.height), of_view(w.x, p.width));
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

template <class Shape, class Launch, class Problem>
cudaError_t start(void (*kernel)(Launch), const Problem& p, void* stream) {
  const Launch a = {p, walk_of<Shape>(p)};
  const size_t shared = Shape::shared(a.w, p);
  const cudaError_t error = allow_shared(kernel, shared, p.device);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(a.w.channel_groups),
                  static_cast<unsigned>(a.w.views) * static_cast<unsigned>(a.w.job_blocks));
  NVAE_LAUNCH(kernel, grid, static_cast<unsigned>(Shape::threads(a.w)), shared, stream, a);
  return cudaGetLastError();
}
template <Dtype D>
cudaError_t start_forward(const DepthwiseForward& p, void* stream) {
  return forward_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    return start<typename Kind::Shape>(
        depthwise_forward_kernel<D, Kind::K, Kind::S, Kind::M, Kind::G, Kind::PATTERN>, p, stream);
  });
}
template <Dtype D>
cudaError_t start_backward(const DepthwiseBackward& p, void* stream) {
  return backward_kind(p, [&](auto kind) {
    using Kind = decltype(kind);
    return start<typename Kind::Shape>(
        depthwise_backward_kernel<D, Kind::K, Kind::XS, Kind::DS, Kind::U, Kind::PATTERN>, p, stream);
  });
}

}  // namespace cuda
}  // namespace nvae
