// nvae_fast::mixture_logistic_log_prob, its backward, _sample and _mean on the CPU: threads here, arithmetic
// in mixture_logistic.vec.cpp and mixture_logistic_sample.vec.cpp.
#include "mixture_logistic.h"

#include <cstdlib>

#include "packed.h"
#include "philox.h"

namespace nvae {

static MixtureLogistic describe(const char* op, const Tensor& params, int64_t mixtures,
                                std::vector<Tensor>& keep_alive) {
  STD_TORCH_CHECK(mixtures >= 1 && params.dim() == 4 && params.size(1) == 10 * mixtures, op,
                  ": params must have shape (B, 10 * num_mixtures, H, W)");
  MixtureLogistic a;
  a.batches = params.size(0);
  a.pixels = params.size(2) * params.size(3);
  a.mixtures = mixtures;
  a.channels_last = is_channels_last(params);
  a.dtype = dtype_of(op, params.scalar_type());
  a.params = packed_view(params, a.channels_last, keep_alive);
  return a;
}

// The type of log-probabilities.
static ScalarType wide_type(const MixtureLogistic& a) {
  return a.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float;
}

static void add_image(const char* op, MixtureLogistic& a, const Tensor& params, const Tensor& x,
                      int64_t num_bits, std::vector<Tensor>& keep_alive) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == params.size(0) && x.size(1) == 3 &&
                      x.size(2) == params.size(2) && x.size(3) == params.size(3),
                  op, ": x must have shape (B, 3, H, W)");
  STD_TORCH_CHECK(num_bits >= 1 && num_bits <= 16, op, ": num_bits must be between 1 and 16");
  const ScalarType type = wide_type(a);
  keep_alive.push_back(x.scalar_type() == type ? x : torch::stable::to(x, type));
  const Tensor image = keep_alive.back();
  a.image = packed_view(image, is_channels_last(image), keep_alive);
  a.levels = static_cast<double>((int64_t(1) << num_bits) - 1);
}

// Runs kernel(begin, end, scratch) over the tasks, in threads that have at least four of them.
template <class F>
static void for_tasks(const MixtureLogistic& a, F kernel) {
  const size_t bytes = static_cast<size_t>((a.scratch() + 63) / 64 * 64);
  torch::stable::parallel_for(0, a.tasks(), 4, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, bytes), std::free);
    STD_TORCH_CHECK(scratch, "mixture_logistic: out of memory");
    kernel(begin, end, scratch.get());
  });
}

static Tensor empty_pixels(const Tensor& params, ScalarType type) {
  const int64_t size[3] = {params.size(0), params.size(2), params.size(3)};
  return torch::stable::empty({size, 3}, type, std::nullopt, params.device());
}

static Tensor log_prob(const Tensor& params, const Tensor& x, int64_t num_mixtures, int64_t num_bits) {
  const char* op = "mixture_logistic_log_prob";
  std::vector<Tensor> keep_alive;
  MixtureLogistic a = describe(op, params, num_mixtures, keep_alive);
  add_image(op, a, params, x, num_bits, keep_alive);
  const Tensor out = empty_pixels(params, wide_type(a));
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
  STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == params.size(0) && grad.size(1) == params.size(2) &&
                      grad.size(2) == params.size(3),
                  op, ": grad must have shape (B, H, W)");
  const Tensor wide = grad.scalar_type() == wide_type(a) ? grad : torch::stable::to(grad, wide_type(a));
  const Tensor dense_grad = torch::stable::contiguous(wide);
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
  STD_TORCH_CHECK(params.numel() < int64_t(1) << 34, op, ": params must have fewer than 2^34 elements");
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
  m.impl("mixture_logistic_log_prob", TORCH_BOX(&nvae::log_prob));
  m.impl("mixture_logistic_log_prob_backward", TORCH_BOX(&nvae::log_prob_backward));
  m.impl("mixture_logistic_sample", TORCH_BOX(&nvae::sample));
  m.impl("mixture_logistic_mean", TORCH_BOX(&nvae::mean));
}
