// Tensors and buffers that kernels allocate, and the registration of kernels, both so that running out of
// memory is an error that says which operator needed how much on which device.
#pragma once
#include <atomic>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>

#include "checks.h"

// What PyTorch's last error says. Versions before 2.13 do not have this function.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace nvae {

struct OutOfMemory : std::bad_alloc {
  OutOfMemory(double bytes, std::string device) : bytes(bytes), device(std::move(device)) {}
  double bytes;
  std::string device;
};

inline std::string device_text(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

inline std::string bytes_text(double bytes) {
  const char* const units[] = {"bytes", "kB", "MB", "GB", "TB", "PB", "EB"};
  int unit = 0;
  for (; bytes >= 1000 && unit < 6; ++unit) bytes /= 1000;
  char text[64];
  std::snprintf(text, sizeof text, unit ? "%.1f %s" : "%.0f %s", bytes, units[unit]);
  return text;
}

inline double size_in_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
    case ScalarType::Long:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::Byte:
      return 1;
    default:
      return 2;
  }
}

// Throws for a call of PyTorch that was to allocate `elements` and failed: OutOfMemory, unless PyTorch names
// another reason (on a GPU it may be the error of an earlier kernel).
[[noreturn]] __attribute__((noinline, cold)) inline void fail_to_allocate(double elements, ScalarType type,
                                                                          const std::string& device) {
  const char* what =
      torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  const std::string reason = what ? what : "out of memory";
  for (const char* word : {"memory", "alloc", "overflow"})
    if (reason.find(word) != std::string::npos) throw OutOfMemory(elements * size_in_bytes(type), device);
  throw std::runtime_error(reason);
}

// An uninitialised tensor on the device of `like`.
inline Tensor allocate(torch::headeronly::IntHeaderOnlyArrayRef size, ScalarType type, const Tensor& like,
                       bool channels_last = false) {
  try {
    return torch::stable::empty(size, type, std::nullopt, like.device(), std::nullopt,
                                channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  } catch (const std::exception&) {
    double elements = 1;
    for (const int64_t extent : size) elements *= static_cast<double>(extent);
    fail_to_allocate(elements, type, device_text(like));
  }
}
inline Tensor allocate(std::initializer_list<int64_t> size, ScalarType type, const Tensor& like,
                       bool channels_last = false) {
  return allocate(torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), type, like,
                  channels_last);
}

// The same tensor where it already is in the memory format or dtype, else a copy.
inline Tensor as_contiguous(const Tensor& t, bool channels_last = false) {
  try {
    return torch::stable::contiguous(t,
                                     channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  } catch (const std::exception&) {
    fail_to_allocate(static_cast<double>(t.numel()), t.scalar_type(), device_text(t));
  }
}
inline Tensor to_dtype(const Tensor& t, ScalarType type) {
  if (t.scalar_type() == type) return t;
  try {
    return torch::stable::to(t, type);
  } catch (const std::exception&) {
    fail_to_allocate(static_cast<double>(t.numel()), type, device_text(t));
  }
}
inline Tensor allocate_like(const Tensor& t) {
  try {
    return torch::stable::empty_like(t);
  } catch (const std::exception&) {
    fail_to_allocate(static_cast<double>(t.numel()), t.scalar_type(), device_text(t));
  }
}
inline Tensor copy_of(const Tensor& t) {
  try {
    return torch::stable::clone(t);
  } catch (const std::exception&) {
    fail_to_allocate(static_cast<double>(t.numel()), t.scalar_type(), device_text(t));
  }
}

// Working memory on the CPU, not initialised.
inline std::unique_ptr<double[]> doubles(int64_t n) {
  try {
    return std::unique_ptr<double[]>(new double[static_cast<size_t>(n)]);
  } catch (const std::bad_alloc&) {
    throw OutOfMemory(8 * static_cast<double>(n), "cpu");
  }
}

// torch::stable::parallel_for, which would hide what an exception in `run` says.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& run) {
  std::exception_ptr error;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    try {
      run(first, last);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// Runs a boxed kernel, and says which operator ran out of memory. The Python side (nvae_fast/ops/_op.py)
// raises torch.OutOfMemoryError for what contains "out of memory"; other packages look for "CUDA out of memory.".
inline void run_boxed(const char* op, void (*kernel)(StableIValue*, uint64_t, uint64_t), StableIValue* stack,
                      uint64_t num_args, uint64_t num_outputs) {
  const auto text_of = [op](const std::string& amount, const std::string& device) {
    return std::string(op) + (device == "cpu" ? ": out of memory: " : ": CUDA out of memory. ") +
           "could not allocate " + amount + " on " + device;
  };
  try {
    kernel(stack, num_args, num_outputs);
  } catch (const OutOfMemory& error) {
    throw std::runtime_error(text_of(bytes_text(error.bytes), error.device));
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(text_of("working memory", "cpu"));
  } catch (const std::length_error&) {  // a vector of more elements than there are addresses
    throw std::runtime_error(text_of("working memory", "cpu"));
  }
}

}  // namespace nvae

// In STABLE_TORCH_LIBRARY_IMPL: registers `function` as the kernel of an operator.
#define NVAE_IMPL(library, op, function)                                              \
  library.impl(op, [](StableIValue* stack, uint64_t num_args, uint64_t num_outputs) { \
    ::nvae::run_boxed(op, TORCH_BOX(function), stack, num_args, num_outputs);         \
  })
