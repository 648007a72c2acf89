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

}  // namespace kx
