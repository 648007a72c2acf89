// What every kernel includes first: CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync, …), from the toolkit
// or, with KX_EMULATION, from csrc/emulation; and arithmetic whose rounding no compiler changes.
#pragma once

#include <cstdint>

#ifdef KX_EMULATION
#include "../emulation/device.h"
#endif

namespace kx {

#ifdef KX_EMULATION
inline float mul_rn(float a, float b) { return a * b; }
inline double mul_rn(double a, double b) { return a * b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
#else
// Products and sums that the compiler neither fuses nor splits.
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }
#endif

}  // namespace kx
