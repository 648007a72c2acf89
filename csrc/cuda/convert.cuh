// Element types to and from the type that arithmetic is done in, rounding to nearest even as the hardware does.
#pragma once

#ifndef KX_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "../common/half.h"
#include "device.cuh"

namespace kx {

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

#ifdef KX_EMULATION
inline float widen(bfloat16 x) { return to_float(x); }
inline float widen(float16 x) { return to_float(x); }
#else
__device__ inline float widen(bfloat16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ inline float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }
#endif

template <class T>
__device__ inline T narrow(decltype(widen(T{})) x) {
  if constexpr (sizeof(T) >= sizeof(float)) {
    return x;
#ifdef KX_EMULATION
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(x);
  } else {
    return to_float16(x);
#else
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return {__half_as_ushort(__float2half_rn(x))};
#endif
  }
}

// Two neighbours as tensor cores take them: `low` in the lower half.
template <class T>
__device__ inline uint32_t pack(float low, float high) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>, "16-bit elements");
#ifdef KX_EMULATION
  return narrow<T>(low).bits | static_cast<uint32_t>(narrow<T>(high).bits) << 16;
#else
  uint32_t both = 0;
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#endif
}

__device__ inline float as_float(uint32_t bits) {
#ifdef KX_EMULATION
  return float_of(bits);
#else
  return __uint_as_float(bits);
#endif
}

__device__ inline uint32_t to_bits(float x) {
#ifdef KX_EMULATION
  return bits_of(x);
#else
  return __float_as_uint(x);
#endif
}

// float32 rounded to the 10 bits of fraction that tensor cores use, ties away from zero.
__device__ inline uint32_t to_tf32(float x) {
#ifdef KX_EMULATION
  const uint32_t u = bits_of(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u & 0xffffe000u : (u + 0x1000u) & 0xffffe000u;
#else
  uint32_t u = 0;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(u) : "f"(x));
  return u;
#endif
}

}  // namespace kx
