// CUDA's own names for a kernel that g++ compiles: indices, barriers, shuffles, votes, atomics, with the meaning that
// the CUDA programming guide gives them. What it leaves undefined is a Fault.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "async.h"
#include "block.h"
#include "tensor_core.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __grid_constant__

using dim3 = ::kx::emulation::Dim3;

#define threadIdx (::kx::emulation::thread_index())
#define blockIdx (::kx::emulation::block_index())
#define blockDim (::kx::emulation::block_size())
#define gridDim (::kx::emulation::grid_size())

namespace kx::emulation {

Dim3 thread_index();
Dim3 block_index();
Dim3 block_size();
Dim3 grid_size();
unsigned lane_index();
unsigned rank_in_cluster();
unsigned blocks_in_cluster();

uint64_t exchange(uint32_t mask, uint64_t value, unsigned source, Location here);
uint32_t ballot(uint32_t mask, bool predicate, Location here);

template <class T>
T shuffle_from(uint32_t mask, T value, unsigned source, Location here) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8 && sizeof(T) >= 4, "a shuffle moves 4 or 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = exchange(mask, word, source, here);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Every lane of `mask` gets `combine` over their values.
template <class T, class Combine>
T reduce(uint32_t mask, T value, Combine combine, Location here) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "a warp reduces integers of 32 bits");
  T result = value;
  bool first = true;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1u) != 0) {
      const T other = shuffle_from(mask, value, lane, here);
      result = first ? other : combine(result, other);
      first = false;
    }
  }
  return result;
}

}  // namespace kx::emulation

inline int __ffs(int x) { return __builtin_ffs(x); }
[[noreturn]] inline void __trap() { kx::emulation::fail("the kernel stopped itself"); }
inline void __syncthreads(kx::emulation::Location here = {}) { kx::emulation::sync_block(0, 0, true, here); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, kx::emulation::Location here = {}) {
  kx::emulation::sync_warp(mask, here);
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, kx::emulation::Location here = {}) {
  const unsigned group = kx::emulation::lane_index() & ~static_cast<unsigned>(width - 1);
  return kx::emulation::shuffle_from(mask, value, group + (static_cast<unsigned>(source) & (width - 1)), here);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, kx::emulation::Location here = {}) {
  const unsigned lane = kx::emulation::lane_index(), other = lane ^ static_cast<unsigned>(lane_mask);
  const bool above = other / width > lane / width;  // a later group's lane cannot be read
  return kx::emulation::shuffle_from(mask, value, above ? lane : other, here);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, kx::emulation::Location here = {}) {
  const unsigned lane = kx::emulation::lane_index();
  return kx::emulation::shuffle_from(mask, value, lane % width < delta ? lane : lane - delta, here);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, kx::emulation::Location here = {}) {
  const unsigned lane = kx::emulation::lane_index();
  const bool past = lane % width + delta >= static_cast<unsigned>(width);
  return kx::emulation::shuffle_from(mask, value, past ? lane : lane + delta, here);
}

inline uint32_t __ballot_sync(uint32_t mask, bool predicate, kx::emulation::Location here = {}) {
  return kx::emulation::ballot(mask, predicate, here);
}
inline bool __any_sync(uint32_t mask, bool predicate, kx::emulation::Location here = {}) {
  return kx::emulation::ballot(mask, predicate, here) != 0;
}
inline bool __all_sync(uint32_t mask, bool predicate, kx::emulation::Location here = {}) {
  return kx::emulation::ballot(mask, !predicate, here) == 0;
}
#define KX_REDUCE(name, expression)                                                                       \
  template <class T>                                                                                      \
  T name(uint32_t mask, T value, kx::emulation::Location here = {}) {                                     \
    return kx::emulation::reduce(mask, value, [](T a, T b) { return static_cast<T>(expression); }, here); \
  }
KX_REDUCE(__reduce_add_sync, a + b)
KX_REDUCE(__reduce_min_sync, b < a ? b : a)
KX_REDUCE(__reduce_max_sync, a < b ? b : a)
KX_REDUCE(__reduce_and_sync, a& b)
KX_REDUCE(__reduce_or_sync, a | b)
KX_REDUCE(__reduce_xor_sync, a ^ b)
#undef KX_REDUCE

#define KX_ATOMIC(name, expression)                                                                 \
  template <class T>                                                                                \
  T name(T* address, std::type_identity_t<T> x, kx::emulation::Location here = {}) {                \
    return kx::emulation::atomic(address, [x](T old) { return static_cast<T>(expression); }, here); \
  }
KX_ATOMIC(atomicAdd, old + x)
KX_ATOMIC(atomicSub, old - x)
KX_ATOMIC(atomicMin, x < old ? x : old)
KX_ATOMIC(atomicMax, old < x ? x : old)
KX_ATOMIC(atomicExch, (static_cast<void>(old), x))
KX_ATOMIC(atomicAnd, old& x)
KX_ATOMIC(atomicOr, old | x)
KX_ATOMIC(atomicXor, old ^ x)
#undef KX_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> x,
            kx::emulation::Location here = {}) {
  return kx::emulation::atomic(address, [=](T old) { return old == expected ? x : old; }, here);
}

inline void __threadfence(kx::emulation::Location here = {}) { kx::emulation::fence_threads(here); }
inline void __threadfence_block(kx::emulation::Location here = {}) { kx::emulation::fence_threads(here); }
