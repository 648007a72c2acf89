// Vectors of 2 to 16 bytes in global memory, and a block's shared memory.
#pragma once

#include "device.cuh"

namespace kx {

// N neighbours, moved by one instruction. Their address is a multiple of their size.
template <class T, int N>
struct alignas(N * sizeof(T)) Vector {
  static_assert(N * sizeof(T) <= 16, "one access moves at most 16 bytes");
  T x[N];
};

#ifndef KX_EMULATION
namespace detail {
template <int kBytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
}  // namespace detail
#endif

// Reads data that is not read again soon: it is the first to leave the caches.
template <int N, class T>
__device__ inline Vector<T, N> load_once(const T* p KX_CALLER) {
#ifdef KX_EMULATION
  emulation::check_aligned(p, sizeof(Vector<T, N>), "load", here);
  return *reinterpret_cast<const Vector<T, N>*>(p);
#else
  using Word = typename detail::Word<N * sizeof(T)>::type;
  const Word word = __ldcs(reinterpret_cast<const Word*>(p));
  return reinterpret_cast<const Vector<T, N>&>(word);
#endif
}

// Reads data that other threads read as well and that nobody writes while the kernel runs.
template <int N, class T>
__device__ inline Vector<T, N> load_shared_by_many(const T* p KX_CALLER) {
#ifdef KX_EMULATION
  return load_once<N>(p, here);
#else
  using Word = typename detail::Word<N * sizeof(T)>::type;
  const Word word = __ldg(reinterpret_cast<const Word*>(p));
  return reinterpret_cast<const Vector<T, N>&>(word);
#endif
}

template <int N, class T>
__device__ inline void store(T* p, const Vector<T, N>& v KX_CALLER) {
#ifdef KX_EMULATION
  emulation::check_aligned(p, sizeof v, "store", here);
#endif
  *reinterpret_cast<Vector<T, N>*>(p) = v;
}

// The block's shared memory, as the kernel's struct Shared; the launch passes sizeof(Shared).
template <class Shared>
__device__ inline Shared& shared_memory() {
#ifdef KX_EMULATION
  return *static_cast<Shared*>(emulation::block_shared_memory(sizeof(Shared)));
#else
  extern __shared__ __align__(1024) unsigned char bytes[];
  return *reinterpret_cast<Shared*>(bytes);
#endif
}

// An object in the block's shared memory that no launch has to provide for; one for each type Tag. All of a kernel's
// together have at most 48 KB.
template <class T, class Tag = T>
__device__ inline T& static_shared_memory() {
#ifdef KX_EMULATION
  static const char key = 0;
  return *static_cast<T*>(emulation::static_shared_memory(&key, sizeof(T)));
#else
  __shared__ __align__(16) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
#endif
}

}  // namespace kx
