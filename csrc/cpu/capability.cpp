#include "../capability.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#ifdef NVAE_HAVE_X86
#include <cpuid.h>
#endif

namespace nvae {

static Capability detect() {
  Capability best = Capability::baseline;
#ifdef NVAE_HAVE_X86
  __builtin_cpu_init();
  // Every processor with AVX2 and FMA also converts half precision (F16C).
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    best = Capability::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      best = Capability::avx512;
  }
#endif
  if (const char* asked = std::getenv("NVAE_FAST_CPU_CAPABILITY")) {
    for (Capability c : {Capability::baseline, Capability::avx2})
      if (!std::strcmp(asked, capability_name(c)) && c < best) best = c;
  }
  return best;
}

Capability capability() {
  static const Capability chosen = detect();
  return chosen;
}

bool fast_bfloat16() {
#ifdef NVAE_HAVE_X86
  // Bits of leaf 7. Intel's AVX512_BF16 is slower than float32 (on Emerald Rapids half the rate), AMD's twice as fast.
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool avx512_bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  return has_amx() || (avx512_bf16 && __builtin_cpu_is("amd"));
#else
  return true;
#endif
}

bool has_amx() {
#ifdef NVAE_HAVE_X86
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

bool fast_library_products() {
#ifdef NVAE_HAVE_X86
  return __builtin_cpu_is("intel");
#else
  return true;
#endif
}

const char* capability_name(Capability c) {
  return c == Capability::avx512 ? "avx512" : c == Capability::avx2 ? "avx2" : "baseline";
}

}  // namespace nvae
