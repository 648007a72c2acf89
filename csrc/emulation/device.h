// CUDA's names for a kernel that g++ compiles: indices, barriers, shuffles and votes, with the meaning that the CUDA
// programming guide gives them. What it leaves undefined is a Fault.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

using dim3 = ::kx::emulation::Dim3;

#define threadIdx (::kx::emulation::Block::current().thread_index())
#define blockIdx (::kx::emulation::Block::current().index)
#define blockDim (::kx::emulation::Block::current().size)
#define gridDim (::kx::emulation::Block::current().grid)

#define KX_HERE (::kx::emulation::Location{__FILE__, __LINE__})
#define __syncthreads() (::kx::emulation::Block::current().sync_threads(KX_HERE))
#define __syncwarp(...) (::kx::emulation::sync_warp(KX_HERE __VA_OPT__(, ) __VA_ARGS__))
#define __shfl_sync(...) (::kx::emulation::shuffle(KX_HERE, __VA_ARGS__))
#define __shfl_xor_sync(...) (::kx::emulation::shuffle_xor(KX_HERE, __VA_ARGS__))
#define __shfl_up_sync(...) (::kx::emulation::shuffle_up(KX_HERE, __VA_ARGS__))
#define __shfl_down_sync(...) (::kx::emulation::shuffle_down(KX_HERE, __VA_ARGS__))
#define __ballot_sync(mask, predicate) (::kx::emulation::ballot(KX_HERE, mask, predicate))
#define __any_sync(mask, predicate) (::kx::emulation::ballot(KX_HERE, mask, predicate) != 0)
#define __all_sync(mask, predicate) (::kx::emulation::ballot(KX_HERE, mask, !(predicate)) == 0)

namespace kx::emulation {

inline void sync_warp(Location here, uint32_t mask = 0xffffffffu) { Block::current().sync_warp(mask, here); }

template <class T>
T shuffle_from(Location here, uint32_t mask, T value, unsigned source) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= 8 && sizeof(T) >= 4, "a shuffle moves 4 or 8 bytes");
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = Block::current().exchange(mask, word, source, here);
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <class T>
T shuffle(Location here, uint32_t mask, T value, int source, int width = 32) {
  const unsigned lane = Block::current().lane(), group = lane & ~static_cast<unsigned>(width - 1);
  return shuffle_from(here, mask, value, group + (static_cast<unsigned>(source) & (width - 1)));
}

template <class T>
T shuffle_xor(Location here, uint32_t mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = Block::current().lane(), other = lane ^ static_cast<unsigned>(lane_mask);
  const bool above = other / width > lane / width;  // a later group's lane cannot be read
  return shuffle_from(here, mask, value, above ? lane : other);
}

template <class T>
T shuffle_up(Location here, uint32_t mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = Block::current().lane();
  return shuffle_from(here, mask, value, lane % width < delta ? lane : lane - delta);
}

template <class T>
T shuffle_down(Location here, uint32_t mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = Block::current().lane();
  return shuffle_from(here, mask, value, lane % width + delta >= static_cast<unsigned>(width) ? lane : lane + delta);
}

inline uint32_t ballot(Location here, uint32_t mask, bool predicate) {
  Block& block = Block::current();
  const uint64_t* shown = block.gather(mask, predicate, here);
  uint32_t votes = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    votes |= static_cast<uint32_t>((mask >> lane & 1u) != 0 && shown[lane] != 0) << lane;
  }
  block.sync_warp(mask, here);
  return votes;
}

inline void check_access(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    throw Fault("misaligned " + std::string(what) + " of " + std::to_string(bytes) + " bytes at address " +
                std::to_string(reinterpret_cast<uintptr_t>(address)));
  }
}

inline void* block_shared_memory(size_t bytes) { return Block::current().shared(bytes); }

}  // namespace kx::emulation
