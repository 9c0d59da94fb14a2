// nvae_fast::mixture_logistic_log_prob, its backward, _sample and _mean on the CPU: threads here, arithmetic
// in mixture_logistic.vec.cpp and mixture_logistic_sample.vec.cpp.
#include "mixture_logistic.h"

#include <cstdlib>

#include "packed.h"
#include "philox.h"

namespace nvae {

static MixtureLogistic describe(const char* op, const Tensor& params, int64_t mixtures,
                                std::vector<Tensor>& keep_alive) {
  NVAE_CHECK(
      mixtures >= 1 && params.dim() == 4 && params.size(1) % 10 == 0 && params.size(1) / 10 == mixtures, op,
      ": params must have shape (B, 10 * num_mixtures, H, W) with ", mixtures, " mixtures, got ",
      shape_text(params));
  MixtureLogistic a;
  a.batches = params.size(0);
  a.pixels = params.size(2) * params.size(3);
  a.mixtures = mixtures;
  a.channels_last = is_channels_last(params);
  a.dtype = dtype_of(op, "params", params);
  a.params = packed_view(params, a.channels_last, keep_alive);
  return a;
}

static void add_image(const char* op, MixtureLogistic& a, const Tensor& params, const Tensor& x,
                      int64_t num_bits, std::vector<Tensor>& keep_alive) {
  check_floating(op, "x", x, {params.size(0), 3, params.size(2), params.size(3)});
  NVAE_CHECK(num_bits >= 1 && num_bits <= 16, op, ": num_bits must be between 1 and 16");
  const Tensor image = to_dtype(x, accumulation_type(a.dtype));
  a.image = packed_view(image, is_channels_last(image), keep_alive);
  a.levels = static_cast<double>((int64_t(1) << num_bits) - 1);
}

// Runs kernel(begin, end, scratch) over the tasks, in threads that have at least four of them.
template <class F>
static void for_tasks(const MixtureLogistic& a, F kernel) {
  const size_t bytes = static_cast<size_t>((a.scratch() + 63) / 64 * 64);
  parallel_for(0, a.tasks(), 4, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, bytes), std::free);
    if (!scratch) throw OutOfMemory(static_cast<double>(bytes), "cpu");
    kernel(begin, end, scratch.get());
  });
}

static Tensor log_prob(const Tensor& params, const Tensor& x, int64_t num_mixtures, int64_t num_bits) {
  const char* op = "mixture_logistic_log_prob";
  std::vector<Tensor> keep_alive;
  MixtureLogistic a = describe(op, params, num_mixtures, keep_alive);
  add_image(op, a, params, x, num_bits, keep_alive);
  const Tensor out =
      allocate({params.size(0), params.size(2), params.size(3)}, accumulation_type(a.dtype), params);
  a.out = out.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end, void* scratch) {
    NVAE_CALL(mixture_logistic_log_prob, a, begin, end, scratch);
  });
  return out;
}

static Tensor log_prob_backward(const Tensor& grad, const Tensor& params, const Tensor& x,
                                int64_t num_mixtures, int64_t num_bits) {
  const char* op = "mixture_logistic_log_prob_backward";
  std::vector<Tensor> keep_alive;
  MixtureLogistic a = describe(op, params, num_mixtures, keep_alive);
  add_image(op, a, params, x, num_bits, keep_alive);
  check_floating(op, "grad", grad, {params.size(0), params.size(2), params.size(3)});
  const Tensor dense_grad = as_contiguous(to_dtype(grad, accumulation_type(a.dtype)));
  a.grad = dense_grad.const_data_ptr();
  const Tensor out = empty_map(params, a.channels(), params.scalar_type(), a.channels_last);
  a.out = out.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end, void* scratch) {
    NVAE_CALL(mixture_logistic_log_prob_backward, a, begin, end, scratch);
  });
  return out;
}

// Element i of split_seed(parent).
static uint64_t sub_seed(uint64_t parent, int64_t i) {
  int64_t words[4];
  NVAE_CALL(philox_blocks, parent, 0x53504C54u, static_cast<uint64_t>(i), 1, words);
  return static_cast<uint64_t>(words[0] | ((words[1] & 0x7fffffff) << 32));
}

static Tensor sample(const Tensor& params, const Tensor& seed, int64_t num_mixtures, double temperature) {
  const char* op = "mixture_logistic_sample";
  std::vector<Tensor> keep_alive;
  MixtureLogistic a = describe(op, params, num_mixtures, keep_alive);
  NVAE_CHECK(params.numel() < int64_t(1) << 34, op, ": params must have fewer than 2^34 elements");
  const uint64_t parent = seed_of(op, seed);
  a.component_seed = sub_seed(parent, 0);
  a.noise_seed = sub_seed(parent, 1);
  a.temperature = temperature;
  const Tensor out = empty_map(params, 3, params.scalar_type(), false);
  a.out = out.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end, void* scratch) {
    NVAE_CALL(mixture_logistic_sample, a, begin, end, scratch);
  });
  return out;
}

static Tensor mean(const Tensor& params, int64_t num_mixtures) {
  std::vector<Tensor> keep_alive;
  MixtureLogistic a = describe("mixture_logistic_mean", params, num_mixtures, keep_alive);
  const Tensor out = empty_map(params, 3, params.scalar_type(), false);
  a.out = out.mutable_data_ptr();
  for_tasks(a, [&](int64_t begin, int64_t end, void* scratch) {
    NVAE_CALL(mixture_logistic_mean, a, begin, end, scratch);
  });
  return out;
}

}  // namespace nvae

STABLE_TORCH_LIBRARY_IMPL(nvae_fast, CPU, m) {
  NVAE_IMPL(m, "mixture_logistic_log_prob", &nvae::log_prob);
  NVAE_IMPL(m, "mixture_logistic_log_prob_backward", &nvae::log_prob_backward);
  NVAE_IMPL(m, "mixture_logistic_sample", &nvae::sample);
  NVAE_IMPL(m, "mixture_logistic_mean", &nvae::mean);
}
