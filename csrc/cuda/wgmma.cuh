// Matrix products of a warpgroup (four whole warps), that go on while its threads go on. sm_90a only.
//
// d, 64×N: thread t of the warpgroup holds rows 16(t / 32) + g and + g + 8 (g = t % 32 / 4) as N/2 registers; register
// i is row g + 8(i / 2 % 2), column 8(i / 4) + 2(t % 4) + i % 2. a in registers is laid out as for mma_m16n8k16, by
// warp.
//
//   fence_products(d);                     // registers are ready
//   wgmma<bfloat16, 128>(d, a, b);         // any number of them
//   commit_products();
//   wait_products<0>(d);                   // d, and what a and b name, may be touched again
//
// What the operands name in shared memory was written by TMA, or by threads that called fence_proxy_async() before a
// barrier.
#pragma once

#include <utility>

#include "convert.cuh"
#include "device.cuh"
#include "tma.cuh"
#include "wgmma_shapes.cuh"

namespace kx {

enum class Major { kK, kMN };  // which dimension of an operand is contiguous

// Where an operand lies in shared memory, in units of eight rows by W bytes, W the swizzle's width (16 for none).
//   kK: rows of k; `stride` is the distance in bytes of groups of 8 rows, `leading` of the two 16-byte halves of k
//   (only
//       without a swizzle).
//   kMN: rows of m or n; with a swizzle `stride` is the distance of groups of 8 k and `leading` of chunks W wide;
//   without,
//       `leading` is of groups of 8 k and `stride` of chunks 16 bytes wide.
struct MatrixDescriptor {
  uint64_t bits;
};

__device__ inline MatrixDescriptor describe_matrix(const void* start, unsigned leading, unsigned stride,
                                                   Swizzle swizzle KX_CALLER) {
#ifdef KX_EMULATION
  return {emulation::descriptor(start, leading, stride, static_cast<unsigned>(swizzle), here)};
#else
  const uint64_t mode = swizzle == Swizzle::k128 ? 1 : swizzle == Swizzle::k64 ? 2 : swizzle == Swizzle::k32 ? 3 : 0;
  const auto field = [](unsigned bytes) { return static_cast<uint64_t>((bytes & 0x3ffff) >> 4); };
  return {field(shared_address(start)) | field(leading) << 16 | field(stride) << 32 | mode << 62};
#endif
}

// The same operand `bytes` further on.
__device__ inline MatrixDescriptor advance(MatrixDescriptor matrix, unsigned bytes) {
  return {matrix.bits + (bytes >> 4)};
}

#ifndef KX_EMULATION
namespace detail {
__device__ inline void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ inline void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
template <class X, int N, size_t... kIndex>
__device__ inline void pin(X (&x)[N], std::index_sequence<kIndex...>) {
  (pin(x[kIndex]), ...);
}
// The compiler moves no use of these registers across. (A loop it might not unroll in a large kernel.)
template <class... X, int... kRegisters>
__device__ inline void pin(X (&... d)[kRegisters]) {
  (pin(d, std::make_index_sequence<kRegisters>()), ...);
}
}  // namespace detail
#endif

// Orders this warpgroup's registers before its next products, accumulators and fragments `d`: before the first, and
// after any of them was touched.
template <class... X, int... kRegisters>
__device__ inline void fence_products(X (&... d)[kRegisters]) {
#ifdef KX_EMULATION
  (static_cast<void>(d), ...);
  emulation::fence_products();
#elif KX_SM90A
  detail::pin(d...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void commit_products() {
#ifdef KX_EMULATION
  emulation::commit_products();
#elif KX_SM90A
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for all but the kNewest newest groups, which filled the accumulators `d`.
template <int kNewest, int... kRegisters>
__device__ inline void wait_products(float (&... d)[kRegisters]) {
#ifdef KX_EMULATION
  (static_cast<void>(d), ...);
  emulation::wait_products(kNewest, {});
#elif KX_SM90A
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNewest) : "memory");
  detail::pin(d...);
#endif
}

#if KX_SM90A
namespace detail {

#define KX_WGMMA(n, type, k, operands, pred, majors)                                                                   \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #pred ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k" #k ".f32." type "." type \
  " {" KX_NAMES_##n "}, " operands ", p, 1, 1" majors ";\n}"

#define KX_FROM_SHARED_16(type, n, o0, o1, o2, o3, o4)                                                   \
  asm volatile(KX_WGMMA(n, type, 16, "%" #o0 ", %" #o1, o2, ", %" #o3 ", %" #o4)                         \
               : KX_REGISTERS_##n(d)                                                                     \
               : "l"(a.bits), "l"(b.bits), "r"(accumulate), "n"(kA == Major::kMN), "n"(kB == Major::kMN) \
               : "memory")
#define KX_FROM_REGISTERS_16(type, n, o0, o1, o2, o3, o4, o5, o6)                                                \
  asm volatile(KX_WGMMA(n, type, 16, "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4, o5, ", %" #o6)           \
               : KX_REGISTERS_##n(d)                                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(accumulate), "n"(kB == Major::kMN) \
               : "memory")

template <class T, int N, Major kA, Major kB>
__device__ inline void wgmma(float (&d)[N / 2], MatrixDescriptor a, MatrixDescriptor b, int accumulate) {
#define KX_SHAPE(n, o0, o1, o2, o3, o4, o5, o6)                    \
  if constexpr (N == n && std::is_same_v<T, bfloat16>) {           \
    KX_FROM_SHARED_16("bf16", n, o0, o1, o2, o3, o4);              \
  } else if constexpr (N == n && std::is_same_v<T, float16>) {     \
    KX_FROM_SHARED_16("f16", n, o0, o1, o2, o3, o4);               \
  } else if constexpr (N == n) {                                   \
    asm volatile(KX_WGMMA(n, "tf32", 8, "%" #o0 ", %" #o1, o2, "") \
                 : KX_REGISTERS_##n(d)                             \
                 : "l"(a.bits), "l"(b.bits), "r"(accumulate)       \
                 : "memory");                                      \
  }
  KX_WGMMA_SHAPES(KX_SHAPE)
#undef KX_SHAPE
}

template <class T, int N, Major kB>
__device__ inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], MatrixDescriptor b, int accumulate) {
#define KX_SHAPE(n, o0, o1, o2, o3, o4, o5, o6)                                                    \
  if constexpr (N == n && std::is_same_v<T, bfloat16>) {                                           \
    KX_FROM_REGISTERS_16("bf16", n, o0, o1, o2, o3, o4, o5, o6);                                   \
  } else if constexpr (N == n && std::is_same_v<T, float16>) {                                     \
    KX_FROM_REGISTERS_16("f16", n, o0, o1, o2, o3, o4, o5, o6);                                    \
  } else if constexpr (N == n) {                                                                   \
    asm volatile(KX_WGMMA(n, "tf32", 8, "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4, o5, "") \
                 : KX_REGISTERS_##n(d)                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits), "r"(accumulate)        \
                 : "memory");                                                                      \
  }
  KX_WGMMA_SHAPES(KX_SHAPE)
#undef KX_SHAPE
}

#undef KX_FROM_SHARED_16
#undef KX_FROM_REGISTERS_16
#undef KX_WGMMA

}  // namespace detail
#endif

// d (+)= a · b: 64×N, of 32 bytes of k: 16 elements of bfloat16 or float16, or 8 of tf32 (T float, kK only). N is a
// multiple of 8 up to 256.
template <class T, int N, Major kA = Major::kK, Major kB = Major::kK>
__device__ inline void wgmma(float (&d)[N / 2], MatrixDescriptor a, MatrixDescriptor b,
                             bool accumulate = true KX_CALLER) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
  static_assert(sizeof(T) == 2 || (kA == Major::kK && kB == Major::kK), "operands of tf32 are contiguous along k");
#ifdef KX_EMULATION
  emulation::wgmma(emulation::element<T>, N, d, nullptr, {a.bits, kA == Major::kK}, {b.bits, kB == Major::kK},
                   accumulate, here);
#elif KX_SM90A
  detail::wgmma<T, N, kA, kB>(d, a, b, accumulate);
#else
  __trap();
#endif
}

// The same with a from registers.
template <class T, int N, Major kB = Major::kK>
__device__ inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], MatrixDescriptor b,
                             bool accumulate = true KX_CALLER) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256, "N is a multiple of 8 up to 256");
  static_assert(sizeof(T) == 2 || kB == Major::kK, "operands of tf32 are contiguous along k");
#ifdef KX_EMULATION
  emulation::wgmma(emulation::element<T>, N, d, a, {0, true}, {b.bits, kB == Major::kK}, accumulate, here);
#elif KX_SM90A
  detail::wgmma<T, N, kB>(d, a, b, accumulate);
#else
  __trap();
#endif
}

}  // namespace kx
