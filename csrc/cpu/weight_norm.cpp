// nvae_fast::weight_norm and weight_norm_many (all layers of a model in one call), forward and backward, on
// the CPU; the arithmetic is in weight_norm.vec.cpp.
#include "weight_norm.h"

#include <tuple>
#include <vector>

#include "../checks.h"

namespace nvae {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

constexpr int64_t kTaskElements = 8192;
constexpr int64_t kTasksAThread = 4;  // at least

// The strides of a dense (C_out, C_in, K, K) weight. `exact`: those of dimensions of one element count too.
static bool has_layout(const Tensor& t, bool channels_last, bool exact) {
  const int64_t in = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t expected[4] = {in * h * w, channels_last ? 1 : h * w, channels_last ? w * in : w,
                               channels_last ? in : 1};
  for (int64_t d = 0; d < 4; ++d)
    if (t.stride(d) != expected[d] && (exact || t.size(d) != 1)) return false;
  return true;
}

// t with its numbers in the order asked for: as it is where they are, else a copy.
static Tensor ordered(const Tensor& t, bool channels_last) {
  if (has_layout(t, channels_last, false)) return t;
  return torch::stable::contiguous(t, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

static Tensor cast(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

// The layers of one call, and the tensors that must live as long.
class Layers {
 public:
  explicit Layers(size_t count) { layers_.reserve(count); }

  // `type`: of the normalised weight. Returns the layer, whose outputs are still to be set.
  WeightNormLayer& add(const Tensor& weight, const Tensor& log_norm, const std::optional<Tensor>& mask,
                       ScalarType type) {
    const char* op = "weight_norm";
    STD_TORCH_CHECK(weight.dim() == 4, op, ": weight must have shape (C_out, C_in, K, K)");
    STD_TORCH_CHECK(
        log_norm.dim() == 4 && log_norm.numel() == weight.size(0) && log_norm.size(0) == weight.size(0), op,
        ": log_weight_norm must have shape (C_out, 1, 1, 1)");
    WeightNormLayer layer;
    layer.rows = weight.size(0);
    layer.columns = weight.size(1) * weight.size(2) * weight.size(3);
    layer.dtype = dtype_of(op, weight.scalar_type());
    layer.out_dtype = dtype_of(op, type);
    channels_last_ = !has_layout(weight, false, false) && has_layout(weight, true, false);
    layer.weight = keep(ordered(weight, channels_last_));
    const Tensor norm = cast(log_norm, weight.scalar_type());
    layer.log_norm = keep(norm);
    layer.log_norm_step = norm.size(0) > 1 ? norm.stride(0) : 1;
    if (mask) {
      STD_TORCH_CHECK(mask->dim() == 4 && mask->size(0) == weight.size(0) &&
                          mask->size(1) == weight.size(1) && mask->size(2) == weight.size(2) &&
                          mask->size(3) == weight.size(3),
                      op, ": mask must have the shape of weight");
      layer.mask = keep(ordered(cast(*mask, weight.scalar_type()), channels_last_));
    }
    layers_.push_back(layer);
    return layers_.back();
  }
  bool channels_last() const { return channels_last_; }  // of the layer added last

  const void* keep(const Tensor& t) {
    hold_.push_back(t);
    return t.const_data_ptr();
  }

  void run(double eps) const {
    std::vector<WeightNormTask> tasks;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const WeightNormLayer& layer = layers_[l];
      if (!layer.columns || !layer.rows) continue;
      const int64_t rows = (kTaskElements + layer.columns - 1) / layer.columns;
      for (int64_t begin = 0; begin < layer.rows; begin += rows)
        tasks.push_back(
            {static_cast<int64_t>(l), begin, begin + rows < layer.rows ? begin + rows : layer.rows});
    }
    const WeightNormArgs args{layers_.data(), tasks.data(), eps};
    torch::stable::parallel_for(
        0, static_cast<int64_t>(tasks.size()), kTasksAThread,
        [&](int64_t begin, int64_t end) { NVAE_CALL(weight_norm_tasks, args, begin, end); });
  }

 private:
  std::vector<WeightNormLayer> layers_;
  Tensors hold_;
  bool channels_last_ = false;
};

// A tensor shaped and laid out like `weight`. PyTorch's empty_like costs more, and is for strides of other
// kinds.
static Tensor empty_as(const Tensor& weight, ScalarType type, bool channels_last) {
  const int64_t size[4] = {weight.size(0), weight.size(1), weight.size(2), weight.size(3)};
  return torch::stable::empty({size, 4}, type, std::nullopt, weight.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// An output of the kernel, and what is returned for it: a copy where the weight has strides that the kernel
// cannot write.
class Output {
 public:
  Output(const Tensor& like, ScalarType type, bool channels_last)
      : like_(like), written_(empty_as(like, type, exact_channels_last(like) || channels_last)) {}
  void* data() const { return written_.mutable_data_ptr(); }
  Tensor result() const {
    if (has_layout(like_, false, true) || has_layout(like_, true, true)) return written_;
    Tensor out = torch::stable::empty_like(like_);
    if (out.scalar_type() != written_.scalar_type()) out = torch::stable::to(out, written_.scalar_type());
    return torch::stable::copy_(out, written_);
  }

 private:
  static bool exact_channels_last(const Tensor& t) {
    return !has_layout(t, false, true) && has_layout(t, true, true);
  }
  Tensor like_, written_;
};

static Tensors forward(const Tensors& weights, const Tensors& log_norms, const OptionalTensors& masks,
                       double eps, std::optional<ScalarType> dtype) {
  STD_TORCH_CHECK(weights.size() == log_norms.size() && weights.size() == masks.size(),
                  "weight_norm_many: lists must have equal length");
  Layers layers(weights.size());
  std::vector<Output> outputs;
  outputs.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const bool wide = weight.scalar_type() == ScalarType::Double || dtype == ScalarType::Double;
    const ScalarType type = wide ? weight.scalar_type() : dtype.value_or(weight.scalar_type());
    WeightNormLayer& layer = layers.add(weight, log_norms[i], masks[i], type);
    outputs.emplace_back(weight, type, layers.channels_last());
    layer.out = outputs.back().data();
  }
  layers.run(eps);
  Tensors results;
  results.reserve(outputs.size());
  for (const Output& output : outputs) {
    const Tensor out = output.result();
    results.push_back(cast(out, dtype.value_or(out.scalar_type())));
  }
  return results;
}

// Gradients of the weights where they are wanted, then of the log norms where they are wanted.
static Tensors backward(const Tensors& grads, const Tensors& weights, const Tensors& log_norms,
                        const OptionalTensors& masks, double eps, bool need_weights, bool need_log_norms) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(grads.size() == count && log_norms.size() == count && masks.size() == count,
                  "weight_norm_many_backward: lists must have equal length");
  Layers layers(count);
  std::vector<Output> outputs;
  outputs.reserve(count);
  Tensors of_norms;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    const ScalarType given = grads[i].scalar_type(), own = weight.scalar_type();
    const ScalarType type = own == ScalarType::Double || given == ScalarType::Double ? own : given;
    WeightNormLayer& layer = layers.add(weight, log_norms[i], masks[i], type);
    STD_TORCH_CHECK(grads[i].dim() == 4 && grads[i].numel() == weight.numel(),
                    "weight_norm_backward: a gradient must have the shape of its weight");
    layer.grad = layers.keep(ordered(cast(grads[i], type), layers.channels_last()));
    if (need_weights) {
      outputs.emplace_back(weight, own, layers.channels_last());
      layer.grad_weight = outputs.back().data();
    }
    if (need_log_norms) {
      const int64_t size[4] = {weight.size(0), 1, 1, 1};
      of_norms.push_back(torch::stable::empty({size, 4}, own, std::nullopt, weight.device()));
      if (!layer.columns) torch::stable::zero_(of_norms.back());
      layer.grad_log_norm = of_norms.back().mutable_data_ptr();
    }
  }
  layers.run(eps);
  Tensors results;
  results.reserve(outputs.size() + of_norms.size());
  for (const Output& output : outputs) results.push_back(output.result());
  for (size_t i = 0; i < of_norms.size(); ++i)
    results.push_back(cast(of_norms[i], log_norms[i].scalar_type()));
  return results;
}

static Tensor weight_norm(const Tensor& weight, const Tensor& log_norm, const std::optional<Tensor>& mask,
                          double eps) {
  return forward({weight}, {log_norm}, {mask}, eps, std::nullopt)[0];
}

static std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad, const Tensor& weight,
                                                       const Tensor& log_norm,
                                                       const std::optional<Tensor>& mask, double eps,
                                                       bool need_weight, bool need_log_norm) {
  const Tensors found = backward({grad}, {weight}, {log_norm}, {mask}, eps, need_weight, need_log_norm);
  const auto nothing = [&](const Tensor& like) {
    return torch::stable::empty({0}, like.scalar_type(), std::nullopt, like.device());
  };
  return {need_weight ? found.front() : nothing(weight), need_log_norm ? found.back() : nothing(log_norm)};
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  m.impl("weight_norm", TORCH_BOX(&nvae::weight_norm));
  m.impl("weight_norm_backward", TORCH_BOX(&nvae::weight_norm_backward));
  m.impl("weight_norm_many", TORCH_BOX(&nvae::forward));
  m.impl("weight_norm_many_backward", TORCH_BOX(&nvae::backward));
}
