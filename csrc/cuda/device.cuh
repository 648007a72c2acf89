// What every kernel includes first: CUDA's own names (threadIdx, __syncthreads, __shfl_xor_sync, …), from the toolkit
// or, with KX_EMULATION, from csrc/emulation; and arithmetic whose rounding no compiler changes.
#pragma once

#include <cstdint>

#ifdef KX_EMULATION
#include "../emulation/device.h"
// The last parameter of a primitive: the line that calls it, for messages.
#define KX_CALLER , ::kx::emulation::Location here = {}
#define KX_ONLY_CALLER ::kx::emulation::Location here = {}
#define KX_FROM_CALLER , here
#else
#define KX_CALLER
#define KX_ONLY_CALLER
#define KX_FROM_CALLER
#endif

// Code that only the machines of one generation understand: it compiles for others, and stops there if it is reached.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define KX_SM90 1
#else
#define KX_SM90 0
#endif
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define KX_SM90A 1
#else
#define KX_SM90A 0
#endif

namespace kx {

#ifdef KX_EMULATION
inline float mul_rn(float a, float b) { return a * b; }
inline double mul_rn(double a, double b) { return a * b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float exp2_approx(float x) { return x < -126 ? 0 : std::exp2(x); }
inline float reciprocal_approx(float x) { return std::abs(x) > 0x1p126f ? std::copysign(0.0f, x) : 1 / x; }
#else
// Products and sums that the compiler neither fuses nor splits.
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double mul_rn(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fma_rn(double a, double b, double c) { return __fma_rn(a, b, c); }

// By one instruction each, to 22 bits, and 0 where the result is no normal number.
__device__ inline float exp2_approx(float x) {
  float y = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_approx(float x) {
  float y = 0;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A pointer into shared memory as the 32-bit number that PTX takes.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// x, of which the compiler knows nothing from here on: what follows from it is computed where it is used, and not once
// before a loop, to be kept in registers.
__device__ inline int unknown(int x) {
#ifndef KX_EMULATION
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// One lane of those in `mask`, the same for everyone who asks: for what one thread of a warp does. All lanes of `mask`
// call it together.
__device__ inline bool elect_one(uint32_t mask = 0xffffffffu KX_CALLER) {
#ifdef KX_EMULATION
  return emulation::elect_lane(mask, here);
#elif KX_SM90
  uint32_t elected = 0;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, %1;\n"
      "selp.b32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected)
      : "r"(mask));
  return elected != 0;
#else
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32 == __ffs(mask) - 1u;
#endif
}

// Gives registers back to the block's other warpgroups, or takes them: N per thread from here on, a multiple of 8.
// Every thread of a warpgroup calls it. Machines without it go on as they are.
template <int N>
__device__ inline void release_registers(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::set_max_registers(N, here);
#elif KX_SM90A
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N>
__device__ inline void claim_registers(KX_ONLY_CALLER) {
#ifdef KX_EMULATION
  emulation::set_max_registers(N, here);
#elif KX_SM90A
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

}  // namespace kx
