// Matrix products of one warp, and the loads and stores of 8×8 matrices that feed them. sm_80 and later; stores sm_90.
//
// Lane l holds, with g = l / 4 and t = l % 4 (the lower column in the lower half of a register of two):
//   a, 16×16: rows g, g + 8 of columns 2t, 2t + 1; then the same rows of columns 2t + 8, 2t + 9
//   b, 16×8:  column g of rows 2t, 2t + 1; then of rows 2t + 8, 2t + 9
//   d, 16×8:  row g, columns 2t, 2t + 1; then row g + 8
// so two tiles of d side by side, rounded to 16 bits, are an a of the next product.
#pragma once

#include "convert.cuh"
#include "device.cuh"

namespace kx {

// d += a · b: 16×8 += 16×16 · 16×8, T bfloat16 or float16, sums in float32.
template <class T>
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] KX_CALLER) {
  static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>, "16-bit elements");
#ifdef KX_EMULATION
  emulation::mma(emulation::element<T>, d, a, b, here);
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d += a · b: 16×8 += 16×8 · 8×8 of tf32 (float32 whose low 13 bits are ignored, see to_tf32). One element to a
// register: a holds rows g, g + 8 of column t, then of column t + 4; b holds column g of rows t and t + 4.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] KX_CALLER) {
#ifdef KX_EMULATION
  emulation::mma(emulation::Element::kTf32, d, a, b, here);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// x as a sum of 8, 11 and 5 bits.
__device__ inline void split_tf32(float x, uint32_t& high, uint32_t& middle, uint32_t& low) {
  high = to_bits(x) & 0xffff0000u;
  const float rest = x - as_float(high);
  middle = to_bits(rest) & 0xffffe000u;
  low = to_bits(rest - as_float(middle));
}

// d += a · b of float32, its layout that of mma_m16n8k8_tf32: each factor rounded to TF32, or with kSplit as a sum of
// three such numbers, the first of 8 bits. Tensor cores cut off what they add; the products of the first parts have 16
// bits of the 24 that are kept, so that little is lost of them, and the others are small. Their sums are added to d by
// ordinary additions.
template <bool kSplit>
__device__ inline void multiply_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2] KX_CALLER) {
  if constexpr (kSplit) {
    uint32_t a_high[4], a_middle[4], a_low[4], b_high[2], b_middle[2], b_low[2];
    for (int i = 0; i < 4; ++i) {
      split_tf32(a[i], a_high[i], a_middle[i], a_low[i]);
    }
    for (int i = 0; i < 2; ++i) {
      split_tf32(b[i], b_high[i], b_middle[i], b_low[i]);
    }
    float small[4] = {}, large[4] = {};
    mma_m16n8k8_tf32(small, a_low, b_high KX_FROM_CALLER);
    mma_m16n8k8_tf32(small, a_high, b_low KX_FROM_CALLER);
    mma_m16n8k8_tf32(small, a_middle, b_middle KX_FROM_CALLER);
    mma_m16n8k8_tf32(small, a_middle, b_high KX_FROM_CALLER);
    mma_m16n8k8_tf32(small, a_high, b_middle KX_FROM_CALLER);
    mma_m16n8k8_tf32(large, a_high, b_high KX_FROM_CALLER);
    for (int i = 0; i < 4; ++i) {
      d[i] += large[i] + small[i];
    }
  } else {
    uint32_t a_rounded[4], b_rounded[2];
    for (int i = 0; i < 4; ++i) {
      a_rounded[i] = to_tf32(a[i]);
    }
    for (int i = 0; i < 2; ++i) {
      b_rounded[i] = to_tf32(b[i]);
    }
    mma_m16n8k8_tf32(d, a_rounded, b_rounded KX_FROM_CALLER);
  }
}

// Loads N (1, 2 or 4) 8×8 matrices of 16-bit elements from shared memory. Lane 8m + j gives the address of row j of
// matrix m, 16 bytes, aligned to 16. Register m of lane l is row g, columns 2t and 2t + 1 of matrix m; transposed: rows
// 2t and 2t + 1 of column g.
template <bool kTransposed, int N>
__device__ inline void load_matrices(uint32_t (&r)[N], const void* row KX_CALLER) {
  static_assert(N == 1 || N == 2 || N == 4, "1, 2 or 4 matrices");
#ifdef KX_EMULATION
  emulation::load_matrices(r, N, row, kTransposed, here);
#else
  const uint32_t at = shared_address(row);
  if constexpr (N == 4 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else if constexpr (N == 2 && kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
  }
#endif
}

// The inverse of load_matrices: same lanes, same addresses. sm_90.
template <bool kTransposed, int N>
__device__ inline void store_matrices(void* row, const uint32_t (&r)[N] KX_CALLER) {
  static_assert(N == 1 || N == 2 || N == 4, "1, 2 or 4 matrices");
#ifdef KX_EMULATION
  emulation::store_matrices(row, r, N, kTransposed, here);
#elif KX_SM90
  const uint32_t at = shared_address(row);
  if constexpr (N == 4 && kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else if constexpr (N == 4) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  } else if constexpr (N == 2 && kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(r[0]), "r"(r[1])
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(r[0]), "r"(r[1]) : "memory");
  } else if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(at), "r"(r[0]) : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x1.shared.b16 [%0], {%1};" ::"r"(at), "r"(r[0]) : "memory");
  }
#else
  __trap();
#endif
}

}  // namespace kx
