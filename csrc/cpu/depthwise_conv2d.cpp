// nvae_fast::depthwise_conv2d and its backward on the CPU: layouts, tasks, the packing of taps and the second
// stage of all sums; the arithmetic is in depthwise_conv2d*.vec.cpp.
#include "depthwise_conv2d.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>
#include <tuple>

#include "../depthwise_conv2d_checks.h"
#include "depthwise_conv2d_plan.h"
#include "packed.h"

namespace nvae {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Memory of a thread that is kept between calls: pages that are new to the process would take as long as the
// kernel.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* at_least(int64_t bytes) {
    const size_t wanted = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    if (wanted > size_) {
      std::free(data_);
      size_ = 0;
      data_ = std::aligned_alloc(64, wanted);
      if (!data_) throw OutOfMemory(static_cast<double>(wanted), "cpu");
      size_ = wanted;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

Tensor empty_like_sums(const Tensor& like, int64_t n, ScalarType type) { return allocate({n}, type, like); }

// A map as it is where the kernels can walk it, else a dense copy.
DepthwiseMap view(const Tensor& t, std::vector<Tensor>& keep_alive) {
  const bool last = t.stride(1) == 1 || t.size(1) == 1;
  // Without elements every layout will do. A "copy" would be the same tensor, and this function would not end.
  if (!last && t.stride(3) != 1 && t.size(3) != 1 && t.numel() != 0) {
    keep_alive.push_back(as_contiguous(t));
    return view(keep_alive.back(), keep_alive);
  }
  DepthwiseMap m;
  m.data = const_cast<void*>(t.const_data_ptr());
  m.batch = t.stride(0);
  m.channel = t.stride(1);
  m.row = t.stride(2);
  m.pixel = t.stride(3);
  m.channels_last = last;
  m.height = t.size(2);
  m.width = t.size(3);
  keep_alive.push_back(Tensor(t));  // a copy of the handle: t may be an element of keep_alive
  return m;
}
DepthwiseMap view(const Tensor& t, bool channels_last, std::vector<Tensor>& keep_alive) {
  const DepthwiseMap m = view(t, keep_alive);
  if (m.channels_last == channels_last || t.numel() == 0) return m;
  return view(dense(t, channels_last, keep_alive), keep_alive);
}

const void* channel_values(const char* op, const char* name, const OptionalTensor& t, const Tensor& x,
                           ScalarType type, std::vector<Tensor>& keep_alive) {
  if (!t) return nullptr;
  check_floating(op, name, *t, {x.size(1)});
  keep_alive.push_back(as_contiguous(to_dtype(*t, type)));
  return keep_alive.back().const_data_ptr();
}

DepthwiseGeometry geometry_of(const char* op, const Tensor& x, const Tensor& weight, int64_t stride,
                              int64_t dilation, int64_t upsample,
                              const std::optional<std::vector<int64_t>>& taps) {
  check_depthwise(op, x, weight, stride, dilation, upsample, taps);
  DepthwiseGeometry g;
  g.kernel = static_cast<int>(weight.size(2));
  g.stride = static_cast<int>(stride);
  g.dilation = static_cast<int>(dilation);
  g.upsample = static_cast<int>(upsample);
  g.live.assign(static_cast<size_t>(g.kernel * g.kernel), !taps.has_value());
  if (taps)
    for (const int64_t tap : *taps) g.live[static_cast<size_t>(tap)] = true;
  return g;
}

// Taps of the plan as vectors of channels: [vector][tap][lane], folded. Zero for a tap that is left out and for
// a lane without a channel.
template <class S>
void pack_taps(const DepthwiseGeometry& g, const std::vector<DepthwiseFold>& folds, const S* weight,
               int64_t channels, int lanes, int64_t begin, int64_t end, S* out) {
  const int64_t k = g.kernel, n = static_cast<int64_t>(folds.size());
  for (int64_t vector = begin; vector < end; ++vector)
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t c = vector * lanes + lane;
      S* to = out + vector * n * lanes + lane;
      for (const DepthwiseFold& f : folds) {
        S sum = 0;
        if (c < channels)
          for (int u = f.u0; u <= f.u1; ++u)
            for (int v = f.v0; v <= f.v1; ++v)
              if (g.live[static_cast<size_t>(u * k + v)]) sum += weight[(c * k + u) * k + v];
        *to = sum;
        to += lanes;
      }
    }
}

// Arguments of both forward and backward.
struct Job {
  DepthwiseArgs args;
  ScalarType acc_dtype = ScalarType::Float;
  int lanes = 1;
  std::vector<Tensor> keep_alive;
  std::unique_ptr<DepthwisePlanner> planner;
  DepthwiseGeometry geometry;

  void describe(const char* op, const Tensor& x, const OptionalTensor& scale, const OptionalTensor& shift,
                const std::optional<Text>& activation) {
    NVAE_CHECK(scale.has_value() == shift.has_value(), op, ": scale and shift must be given together");
    args.dtype = dtype_of(op, "x", x);
    acc_dtype = accumulation_type(args.dtype);
    lanes = NVAE_CALL(depthwise_lanes, args.dtype);
    args.activation = static_cast<int>(activation_of(op, "activation", activation));
    args.batches = x.size(0);
    args.channels = x.size(1);
    args.vectors = (args.channels + lanes - 1) / lanes;
    args.scale = channel_values(op, "scale", scale, x, acc_dtype, keep_alive);
    args.shift = channel_values(op, "shift", shift, x, acc_dtype, keep_alive);
  }

  void plan(bool backward, const DepthwiseMap& scanned, const DepthwiseMap& stationary) {
    const bool many_registers = capability() == Capability::avx512;
    const int columns = many_registers ? (backward ? 6 : 7) : (backward ? 3 : 6);
    planner =
        std::make_unique<DepthwisePlanner>(geometry, backward, columns, scanned.width, stationary.width);
    args.plan = planner->plan;
    // The cut into tasks depends on shapes alone, so that sums do not depend on the number of threads.
    const bool planar = !(scanned.channels_last && stationary.channels_last);
    const int64_t row = args.plan.left + scanned.width + args.plan.right;
    const int64_t bytes = (args.ring() * row + (backward ? 3 : 1) * stationary.width) * lanes *
                          (acc_dtype == ScalarType::Double ? 8 : 4);
    // A group whose scratch stays in the L1 cache is best. Where rows are so long that few vectors fit, and
    // these would cut cache lines of every pixel in two, the L2 cache is filled instead.
    int64_t fit = kNear / std::max<int64_t>(bytes, 1);
    const bool whole = scanned.pixel % lanes == 0 && stationary.pixel % lanes == 0;
    if (fit < (whole ? 1 : 3)) fit = std::max<int64_t>(kFar / std::max<int64_t>(bytes, 1), 1);
    args.group = planar ? 1 : std::max<int64_t>(1, std::min(args.vectors, fit));
    args.groups = (args.vectors + args.group - 1) / args.group;
    if (args.groups) args.group = (args.vectors + args.groups - 1) / args.groups;
    if (args.group) args.groups = (args.vectors + args.group - 1) / args.group;
    const int64_t rows = (stationary.height + args.plan.row_phases - 1) / args.plan.row_phases;
    const int64_t pixels = stationary.height * stationary.width;
    int64_t bands = std::max<int64_t>((pixels + kPixels - 1) / kPixels, 1);
    bands = std::max(bands, kTasks / std::max<int64_t>(args.batches * args.groups, 1));
    bands = std::min(bands, std::max<int64_t>(rows / (2 * geometry.kernel), 1));
    args.band = std::max<int64_t>((rows + bands - 1) / bands, 1);
    args.bands = pixels ? (rows + args.band - 1) / args.band : 0;
  }
  static constexpr int64_t kNear = 28 << 10, kFar = 7 << 17;  // bytes for the rings and rows of a group
  static constexpr int64_t kPixels = 1 << 13;                 // of a task: float32 sums of more lose digits
  static constexpr int64_t kTasks = 8;  // at least, for the threads, where the map is high enough

  void pack(const Tensor& weight) {
    keep_alive.push_back(as_contiguous(to_dtype(weight, acc_dtype)));
    const void* from = keep_alive.back().const_data_ptr();
    keep_alive.push_back(empty_like_sums(weight, args.vectors * args.plan.taps * lanes + 1, acc_dtype));
    void* to = keep_alive.back().mutable_data_ptr();
    parallel_for(0, args.vectors, 4096 / (args.plan.taps * lanes + 1) + 1, [&](int64_t begin, int64_t end) {
      if (acc_dtype == ScalarType::Double)
        pack_taps(geometry, planner->folds, static_cast<const double*>(from), args.channels, lanes, begin,
                  end, static_cast<double*>(to));
      else
        pack_taps(geometry, planner->folds, static_cast<const float*>(from), args.channels, lanes, begin, end,
                  static_cast<float*>(to));
    });
    args.taps = to;
  }

  // Tasks to a thread: at least so many that its start pays.
  int64_t grain(const DepthwiseMap& stationary) const {
    const int64_t work = args.band * stationary.width * args.plan.row_phases * args.group * lanes;
    return 8192 / std::max<int64_t>(work, 1) + 1;
  }

  // The task of a vector in a band of a sample, and the vector's place in it.
  int64_t slot(int64_t sample_band, int64_t vector) const {
    return (sample_band * args.groups + vector / args.group) * args.group + vector % args.group;
  }
};

Tensor shaped_output(const Tensor& x, int64_t height, int64_t width) {
  return allocate({x.size(0), x.size(1), height, width}, x.scalar_type(), x, is_channels_last(x));
}

void store_sum(const Tensor& t, int64_t i, double value) {
  if (t.scalar_type() == ScalarType::Double)
    static_cast<double*>(t.mutable_data_ptr())[i] = value;
  else
    static_cast<float*>(t.mutable_data_ptr())[i] = static_cast<float>(value);
}

// Second stage of the statistics: partial ones are merged in a fixed order (Chan, Golub, LeVeque).
void merge_statistics(const Job& job, const double* sums, const Tensor& mean, const Tensor& m2) {
  const DepthwiseArgs& a = job.args;
  const int64_t lanes = job.lanes, rows = (a.y.height + a.plan.row_phases - 1) / a.plan.row_phases;
  for (int64_t c = 0; c < a.channels; ++c) {
    double count = 0, middle = 0, squares = 0;
    for (int64_t part = 0; part < a.batches * a.bands; ++part) {
      const double* p = sums + job.slot(part, c / lanes) * 3 * lanes + c % lanes;
      const int64_t first = part % a.bands * a.band, last = std::min(first + a.band, rows);
      const double n = static_cast<double>(
          (std::min(last * a.plan.row_phases, a.y.height) - first * a.plan.row_phases) * a.y.width);
      const double part_mean = p[2 * lanes] + p[0] / n, part_squares = p[lanes] - p[0] * p[0] / n;
      const double delta = part_mean - middle, both = count + n;
      middle += delta * n / both;
      squares += part_squares + delta * delta * count * n / both;
      count = both;
    }
    store_sum(mean, c, middle);
    store_sum(m2, c, squares < 0 ? 0 : squares);
  }
}

// x -> y by a job that has been described; fills args.sums when they are wanted.
Tensor run_forward(Job& job, const Tensor& x, const Tensor& weight, int64_t stride, int64_t upsample,
                   std::unique_ptr<double[]>* sums) {
  DepthwiseArgs& a = job.args;
  const Tensor y = shaped_output(x, depthwise_extent(x.size(2), stride, upsample),
                                 depthwise_extent(x.size(3), stride, upsample));
  a.x = view(x, job.keep_alive);
  a.y = view(y, job.keep_alive);
  job.plan(false, a.x, a.y);
  job.pack(weight);
  if (sums) {
    *sums = doubles(a.tasks() * a.group * 3 * job.lanes + 1);
    a.sums = sums->get();
  }
  const int64_t bytes = NVAE_CALL(depthwise_forward_scratch, a);
  parallel_for(0, a.tasks(), job.grain(a.y), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    NVAE_CALL(depthwise_forward, a, scratch.at_least(bytes), begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d(const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& scale, const OptionalTensor& shift,
                                                    int64_t stride, int64_t dilation, int64_t upsample,
                                                    std::optional<Text> activation, bool stats,
                                                    std::optional<std::vector<int64_t>> taps) {
  const char* op = "depthwise_conv2d";
  Job job;
  job.geometry = geometry_of(op, x, weight, stride, dilation, upsample, taps);
  job.describe(op, x, scale, shift, activation);
  std::unique_ptr<double[]> sums;
  const Tensor y = run_forward(job, x, weight, stride, upsample, stats ? &sums : nullptr);
  const Tensor mean = empty_like_sums(x, stats ? job.args.channels : 0, job.acc_dtype);
  const Tensor m2 = empty_like_sums(x, stats ? job.args.channels : 0, job.acc_dtype);
  if (stats) merge_statistics(job, sums.get(), mean, m2);
  return {y, mean, m2};
}

Tensor depthwise_conv2d_affine(const Tensor& x, const Tensor& weight, const Tensor& out_scale,
                               const Tensor& out_shift, int64_t stride, int64_t upsample,
                               std::optional<Text> activation, std::optional<Text> out_activation) {
  const char* op = "depthwise_conv2d_affine";
  Job job;
  job.geometry = geometry_of(op, x, weight, stride, 1, upsample, std::nullopt);
  job.describe(op, x, std::nullopt, std::nullopt, activation);
  job.args.out_activation = static_cast<int>(activation_of(op, "out_activation", out_activation));
  job.args.out_scale = channel_values(op, "out_scale", out_scale, x, job.acc_dtype, job.keep_alive);
  job.args.out_shift = channel_values(op, "out_shift", out_shift, x, job.acc_dtype, job.keep_alive);
  return run_forward(job, x, weight, stride, upsample, nullptr);
}

// Second stage of the weight gradient, for vectors begin .. end of channels.
template <class S>
void total_taps(const Job& job, const S* partial, int64_t begin, int64_t end, const Tensor& out) {
  const DepthwiseArgs& a = job.args;
  const int64_t lanes = job.lanes, k = job.geometry.kernel;
  const auto& folds = job.planner->folds;
  const size_t size = static_cast<size_t>(a.plan.taps * lanes);
  std::vector<double> total(size), gradient(static_cast<size_t>(k * k * lanes));
  for (int64_t vector = begin; vector < end; ++vector) {
    std::fill(total.begin(), total.end(), 0.0);
    std::fill(gradient.begin(), gradient.end(), 0.0);
    for (int64_t part = 0; part < a.batches * a.bands; ++part) {
      const S* p = partial + job.slot(part, vector) * a.plan.taps * lanes;
      for (size_t i = 0; i < size; ++i) total[i] += p[i];
    }
    for (size_t i = 0; i < folds.size(); ++i)
      for (int u = folds[i].u0; u <= folds[i].u1; ++u)
        for (int v = folds[i].v0; v <= folds[i].v1; ++v)
          for (int64_t lane = 0; lane < lanes; ++lane)
            gradient[static_cast<size_t>((u * k + v) * lanes + lane)] +=
                total[i * static_cast<size_t>(lanes) + static_cast<size_t>(lane)];
    for (int64_t lane = 0; lane < lanes && vector * lanes + lane < a.channels; ++lane)
      for (int64_t tap = 0; tap < k * k; ++tap)
        store_sum(out, (vector * lanes + lane) * k * k + tap,
                  job.geometry.live[static_cast<size_t>(tap)]
                      ? gradient[static_cast<size_t>(tap * lanes + lane)]
                      : 0.0);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_conv2d_backward(
    const Tensor& grad, const OptionalTensor& out, const OptionalTensor& alpha, const OptionalTensor& beta,
    const OptionalTensor& gamma, const OptionalTensor& pivot, const Tensor& x, const Tensor& weight,
    const OptionalTensor& scale, const OptionalTensor& shift, int64_t stride, int64_t dilation,
    int64_t upsample, std::optional<Text> activation, std::optional<std::vector<int64_t>> taps, bool need_x,
    bool need_weight, bool need_affine) {
  const char* op = "depthwise_conv2d_backward";
  Job job;
  DepthwiseArgs& a = job.args;
  job.geometry = geometry_of(op, x, weight, stride, dilation, upsample, taps);
  job.describe(op, x, scale, shift, activation);
  check_depthwise_backward(op, grad, out, alpha.has_value(), beta.has_value(), gamma.has_value(), x, stride,
                           upsample);
  a.x = view(x, job.keep_alive);
  // In the layout of x, so that a row has one form.
  const bool format = a.x.channels_last;
  a.grad = view(to_dtype(grad, x.scalar_type()), format, job.keep_alive);
  if (alpha) {
    a.out = view(to_dtype(*out, x.scalar_type()), a.grad.channels_last, job.keep_alive);
    a.alpha = channel_values(op, "alpha", alpha, x, job.acc_dtype, job.keep_alive);
    a.beta = channel_values(op, "beta", beta, x, job.acc_dtype, job.keep_alive);
    a.gamma = channel_values(op, "gamma", gamma, x, job.acc_dtype, job.keep_alive);
  }
  a.pivot = channel_values(op, "pivot", pivot, x, job.acc_dtype, job.keep_alive);
  const Tensor nothing = empty_like_sums(x, 0, x.scalar_type());
  const Tensor grad_x = need_x ? shaped_output(x, x.size(2), x.size(3)) : nothing;
  if (need_x) a.grad_x = view(grad_x, job.keep_alive);
  job.plan(true, a.grad, a.x);
  job.pack(weight);

  const int64_t parts = a.tasks() * a.group;
  Tensor partial;
  if (need_weight) {
    partial = empty_like_sums(x, parts * a.plan.taps * job.lanes + 1, job.acc_dtype);
    a.tap_gradients = partial.mutable_data_ptr();
  }
  std::unique_ptr<double[]> sums;
  if (need_affine) sums = doubles(parts * 2 * job.lanes + 1);
  a.sums = sums.get();
  if (need_x || need_weight || need_affine) {
    const int64_t bytes = NVAE_CALL(depthwise_backward_scratch, a);
    parallel_for(0, a.tasks(), job.grain(a.x), [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      NVAE_CALL(depthwise_backward, a, scratch.at_least(bytes), begin, end);
    });
  }

  Tensor grad_weight = empty_like_sums(x, 0, weight.scalar_type());
  if (need_weight) {
    const Tensor total = allocate(weight.sizes(), job.acc_dtype, x);
    parallel_for(0, a.vectors, 1, [&](int64_t begin, int64_t end) {
      if (job.acc_dtype == ScalarType::Double)
        total_taps(job, static_cast<const double*>(a.tap_gradients), begin, end, total);
      else
        total_taps(job, static_cast<const float*>(a.tap_gradients), begin, end, total);
    });
    grad_weight = to_dtype(total, weight.scalar_type());
  }
  const Tensor grad_scale = empty_like_sums(x, need_affine ? a.channels : 0, job.acc_dtype);
  const Tensor grad_shift = empty_like_sums(x, need_affine ? a.channels : 0, job.acc_dtype);
  if (need_affine)
    for (int64_t c = 0; c < a.channels; ++c) {
      double by_scale = 0, by_shift = 0;
      for (int64_t part = 0; part < a.batches * a.bands; ++part) {
        const double* p = sums.get() + job.slot(part, c / job.lanes) * 2 * job.lanes + c % job.lanes;
        by_scale += p[0];
        by_shift += p[job.lanes];
      }
      store_sum(grad_scale, c, by_scale);
      store_sum(grad_shift, c, by_shift);
    }
  return {grad_x, grad_weight, grad_scale, grad_shift};
}

}  // namespace
}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "depthwise_conv2d", &nvae::depthwise_conv2d);
  NVAE_IMPL(m, "depthwise_conv2d_affine", &nvae::depthwise_conv2d_affine);
  NVAE_IMPL(m, "depthwise_conv2d_backward", &nvae::depthwise_conv2d_backward);
}
