// Which vector instructions to use, decided once per process.
//
// A kernel source csrc/cpu/<op>.vec.cpp is compiled once per capability, each time into its own namespace
// (NVAE_ISA, see vec.h). NVAE_PER_ISA declares a function in all of them; NVAE_CALL calls the one to use.
#pragma once

namespace nvae {

enum class Capability { baseline = 0, avx2 = 1, avx512 = 2 };

// What the processor has, lowered to NVAE_FAST_CPU_CAPABILITY (baseline, avx2, avx512) when that is set.
Capability capability();
const char* capability_name(Capability c);

// Whether the processor multiplies bfloat16 numbers at a higher rate than float32 ones.
bool fast_bfloat16();
// Whether it has AMX, whose rate of bfloat16 numbers is about eight times that.
bool has_amx();

// Whether PyTorch's float32 matrix products reach the processor's rate. MKL, which computes them, is made for Intel's.
bool fast_library_products();

}  // namespace nvae

#ifdef NVAE_HAVE_X86
#define NVAE_PER_ISA(declaration) \
  namespace baseline {            \
  declaration;                    \
  }                               \
  namespace avx2 {                \
  declaration;                    \
  }                               \
  namespace avx512 {              \
  declaration;                    \
  }
#define NVAE_CALL(function, ...)                                                              \
  (::nvae::capability() == ::nvae::Capability::avx512 ? ::nvae::avx512::function(__VA_ARGS__) \
   : ::nvae::capability() == ::nvae::Capability::avx2 ? ::nvae::avx2::function(__VA_ARGS__)   \
                                                      : ::nvae::baseline::function(__VA_ARGS__))
#else
#define NVAE_PER_ISA(declaration) \
  namespace baseline {            \
  declaration;                    \
  }
#define NVAE_CALL(function, ...) ::nvae::baseline::function(__VA_ARGS__)
#endif
