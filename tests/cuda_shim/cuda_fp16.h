#pragma once
#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half value) { return static_cast<float>(shim_bits<_Float16>(value.bits)); }
inline __half __float2half_rn(float value) {
  return {shim_bits<unsigned short>(static_cast<_Float16>(value))};
}
