// nvae_fast::weight_norm and weight_norm_many (all layers of a model in one call), forward and backward, on
// the CPU; the arithmetic is in weight_norm.vec.cpp.
#include "weight_norm.h"

#include <tuple>
#include <vector>

#include "../memory.h"

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

// t itself where its elements are dense in the layout that is wanted, else a copy.
static Tensor ordered(const Tensor& t, bool channels_last) {
  if (has_layout(t, channels_last, false)) return t;
  return as_contiguous(t, channels_last);
}

// The layers of one call, and the tensors that must live as long.
class Layers {
 public:
  // `op` names its arguments in the singular when `in_list` is false.
  Layers(const char* op, bool in_list, size_t count) : op_(op), in_list_(in_list) { layers_.reserve(count); }

  // `type`: of the normalised weight. Returns the layer, whose outputs are still to be set.
  WeightNormLayer& add(const Tensor& weight, const Tensor& log_norm, const std::optional<Tensor>& mask,
                       ScalarType type) {
    NVAE_CHECK(weight.dim() == 4, op_, ": ", name("weight", layers_.size()),
               " must have shape (C_out, C_in, K, K), got ", shape_text(weight));
    check(log_norm, "log_weight_norm", std::initializer_list<int64_t>{weight.size(0), 1, 1, 1},
          layers_.size());
    WeightNormLayer layer;
    layer.rows = weight.size(0);
    layer.columns = weight.size(1) * weight.size(2) * weight.size(3);
    layer.dtype = dtype_of(op_, "weight", weight);
    layer.out_dtype = dtype_of(op_, "dtype", type);
    channels_last_ = !has_layout(weight, false, false) && has_layout(weight, true, false);
    layer.weight = keep(ordered(weight, channels_last_));
    const Tensor norm = to_dtype(log_norm, weight.scalar_type());
    layer.log_norm = keep(norm);
    layer.log_norm_step = norm.size(0) > 1 ? norm.stride(0) : 1;
    if (mask) {
      check(*mask, "mask", weight.sizes(), layers_.size());
      layer.mask = keep(ordered(to_dtype(*mask, weight.scalar_type()), channels_last_));
    }
    layers_.push_back(layer);
    return layers_.back();
  }
  // The upstream gradient of the layer added last.
  void set_grad(const Tensor& grad, const Tensor& weight, ScalarType type) {
    check(grad, "grad", weight.sizes(), layers_.size() - 1);
    layers_.back().grad = keep(ordered(to_dtype(grad, type), channels_last_));
  }
  bool channels_last() const { return channels_last_; }  // of the layer added last

  const void* keep(const Tensor& t) {
    keep_alive_.push_back(t);
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
    parallel_for(0, static_cast<int64_t>(tasks.size()), kTasksAThread,
                 [&](int64_t begin, int64_t end) { NVAE_CALL(weight_norm_tasks, args, begin, end); });
  }

 private:
  // An argument in an error message: mask, or masks[3].
  std::string name(const char* argument, size_t layer) const {
    return in_list_ ? std::string(argument) + "s[" + std::to_string(layer) + "]" : argument;
  }
  template <class Sizes>
  void check(const Tensor& t, const char* argument, const Sizes& expected, size_t layer) const {
    NVAE_CHECK(equal_sizes(t.sizes(), expected), op_, ": ", name(argument, layer), " must have shape ",
               shape_text(expected), ", got ", shape_text(t));
  }

  const char* op_;
  bool in_list_;
  std::vector<WeightNormLayer> layers_;
  Tensors keep_alive_;
  bool channels_last_ = false;
};

// A tensor shaped and laid out like `weight`. PyTorch's empty_like takes longer; other strides need it.
static Tensor empty_as(const Tensor& weight, ScalarType type, bool channels_last) {
  return allocate(weight.sizes(), type, weight, channels_last);
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
    Tensor out = to_dtype(allocate_like(like_), written_.scalar_type());
    return torch::stable::copy_(out, written_);
  }

 private:
  static bool exact_channels_last(const Tensor& t) {
    return !has_layout(t, false, true) && has_layout(t, true, true);
  }
  Tensor like_, written_;
};

static void check_length(const char* op, const char* name, size_t length, size_t expected) {
  NVAE_CHECK(length == expected, op, ": ", name, " must have ", expected, " entries, as weights, got ",
             length);
}

static Tensors forward(const char* op, bool in_list, const Tensors& weights, const Tensors& log_norms,
                       const OptionalTensors& masks, double eps, std::optional<ScalarType> dtype) {
  check_length(op, "log_weight_norms", log_norms.size(), weights.size());
  check_length(op, "masks", masks.size(), weights.size());
  if (dtype) dtype_of(op, "dtype", *dtype);
  Layers layers(op, in_list, weights.size());
  std::vector<Output> outputs;
  outputs.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    // The kernels convert between the types of 16 and 32 bits; PyTorch converts to and from float64.
    const bool has_double = weight.scalar_type() == ScalarType::Double || dtype == ScalarType::Double;
    const ScalarType type = has_double ? weight.scalar_type() : dtype.value_or(weight.scalar_type());
    WeightNormLayer& layer = layers.add(weight, log_norms[i], masks[i], type);
    outputs.emplace_back(weight, type, layers.channels_last());
    layer.out = outputs.back().data();
  }
  layers.run(eps);
  Tensors results;
  results.reserve(outputs.size());
  for (const Output& output : outputs) {
    const Tensor out = output.result();
    results.push_back(to_dtype(out, dtype.value_or(out.scalar_type())));
  }
  return results;
}

// Gradients of the weights where they are wanted, then of the log norms where they are wanted.
static Tensors backward(const char* op, bool in_list, const Tensors& grads, const Tensors& weights,
                        const Tensors& log_norms, const OptionalTensors& masks, double eps, bool need_weights,
                        bool need_log_norms) {
  const size_t count = weights.size();
  check_length(op, "grads", grads.size(), count);
  check_length(op, "log_weight_norms", log_norms.size(), count);
  check_length(op, "masks", masks.size(), count);
  Layers layers(op, in_list, count);
  std::vector<Output> outputs;
  outputs.reserve(count);
  Tensors of_norms;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = weights[i];
    const ScalarType given = grads[i].scalar_type(), own = weight.scalar_type();
    const ScalarType type = own == ScalarType::Double || given == ScalarType::Double ? own : given;
    WeightNormLayer& layer = layers.add(weight, log_norms[i], masks[i], type);
    layers.set_grad(grads[i], weight, type);
    if (need_weights) {
      outputs.emplace_back(weight, own, layers.channels_last());
      layer.grad_weight = outputs.back().data();
    }
    if (need_log_norms) {
      of_norms.push_back(allocate({weight.size(0), 1, 1, 1}, own, weight));
      if (!layer.columns) torch::stable::zero_(of_norms.back());
      layer.grad_log_norm = of_norms.back().mutable_data_ptr();
    }
  }
  layers.run(eps);
  Tensors results;
  results.reserve(outputs.size() + of_norms.size());
  for (const Output& output : outputs) results.push_back(output.result());
  for (size_t i = 0; i < of_norms.size(); ++i)
    results.push_back(to_dtype(of_norms[i], log_norms[i].scalar_type()));
  return results;
}

static Tensor weight_norm(const Tensor& weight, const Tensor& log_norm, const std::optional<Tensor>& mask,
                          double eps) {
  return forward("weight_norm", false, {weight}, {log_norm}, {mask}, eps, std::nullopt)[0];
}

static std::tuple<Tensor, Tensor> weight_norm_backward(const Tensor& grad, const Tensor& weight,
                                                       const Tensor& log_norm,
                                                       const std::optional<Tensor>& mask, double eps,
                                                       bool need_weight, bool need_log_norm) {
  const Tensors found = backward("weight_norm_backward", false, {grad}, {weight}, {log_norm}, {mask}, eps,
                                 need_weight, need_log_norm);
  const auto nothing = [&](const Tensor& like) { return allocate({0}, like.scalar_type(), like); };
  return {need_weight ? found.front() : nothing(weight), need_log_norm ? found.back() : nothing(log_norm)};
}

static Tensors weight_norm_many(const Tensors& weights, const Tensors& log_norms,
                                const OptionalTensors& masks, double eps, std::optional<ScalarType> dtype) {
  return forward("weight_norm_many", true, weights, log_norms, masks, eps, dtype);
}

static Tensors weight_norm_many_backward(const Tensors& grads, const Tensors& weights,
                                         const Tensors& log_norms, const OptionalTensors& masks, double eps,
                                         bool need_weights, bool need_log_norms) {
  return backward("weight_norm_many_backward", true, grads, weights, log_norms, masks, eps, need_weights,
                  need_log_norms);
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "weight_norm", &nvae::weight_norm);
  NVAE_IMPL(m, "weight_norm_backward", &nvae::weight_norm_backward);
  NVAE_IMPL(m, "weight_norm_many", &nvae::weight_norm_many);
  NVAE_IMPL(m, "weight_norm_many_backward", &nvae::weight_norm_many_backward);
}
