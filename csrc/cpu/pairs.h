// Products of small matrices of bfloat16 by the instructions that AVX-512 has for them (AVX512-BF16): each takes two
// neighbours along k at once. Two such neighbours, a pair, lie in the place of one float, which is what holds them
// here.
//
//   operand     as pairs
//   a [m, k]    [m, k/2]: neighbours of a row
//   b [k, n]    [k/2, n]: two rows, column by column
//
// An odd k is filled up with zeros. Products are summed in float32, in one order for every row and column. The
// instructions take operands and sums below 2⁻¹²⁶ for 0.
#pragma once

#include "gemm.h"
#include "isa.h"

namespace kx::KX_ISA {
namespace {

inline int pairs_of(int n) { return (n + 1) / 2; }

#if defined(KX_ISA_avx512)

// Whether the machine has them.
inline bool multiplies_pairs() { return isa() == Isa::kAvx512Bf16; }

// n ≤ 16 neighbours in bfloat16, and zeros.
inline __m256i sixteen(const bfloat16* x, int n) { return _mm256_maskz_loadu_epi16(first(n), x); }
inline __m256i sixteen(const float* x, int n) { return to_bits(load(x, n).v, bfloat16{}); }

// A row as a has it.
template <class T>
inline void pair_neighbours(const T* from, int n, float* to) {
  for (int j = 0; j < n; j += 16) {
    const __m256i numbers = sixteen(from + j, std::min(16, n - j));
    _mm256_mask_storeu_epi32(to + j / 2, static_cast<__mmask8>((1u << pairs_of(std::min(16, n - j))) - 1), numbers);
  }
}

// Two rows as b has them, in whole vectors; either may be null, for zeros.
template <class T>
inline void pair_rows(const T* even, const T* odd, int n, float* to) {
  for (int j = 0; j < n; j += 16) {
    const auto widened = [&](const T* row) {
      return row == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(sixteen(row + j, std::min(16, n - j)));
    };
    _mm512_storeu_si512(to + j, _mm512_or_si512(widened(even), _mm512_slli_epi32(widened(odd), 16)));
  }
}

#define KX_WITH_BF16 __attribute__((target("avx512bf16")))

// c [kRows, kVectors·16] (+)= a [kRows, pairs] · b
template <int kRows, int kVectors>
KX_WITH_BF16 inline void pair_tile(int pairs, const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                                   int64_t c_row, bool add_to) {
  __m512 sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = add_to ? _mm512_loadu_ps(c + i * c_row + 16 * j) : _mm512_setzero_ps();
    }
  }
  for (int k = 0; k < pairs; ++k) {
    __m512bh row[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      row[j] = reinterpret_cast<__m512bh>(_mm512_loadu_ps(b + k * b_row + 16 * j));
    }
    for (int i = 0; i < kRows; ++i) {
      const auto x = reinterpret_cast<__m512bh>(_mm512_set1_ps(a[i * a_row + k]));
      for (int j = 0; j < kVectors; ++j) {
        sums[i][j] = _mm512_dpbf16_ps(sums[i][j], x, row[j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      _mm512_storeu_ps(c + i * c_row + 16 * j, sums[i][j]);
    }
  }
}

// c [m, n] = a · b, or c += with add_to, and `meanwhile()` now and then; as gemm.
template <class Meanwhile>
KX_WITH_BF16 inline void gemm_pairs(int m, int n, int pairs, const float* a, int64_t a_row, const float* b,
                                    int64_t b_row, float* c, int64_t c_row, bool add_to, Meanwhile&& meanwhile) {
  const auto rows = [&](auto count, int i) KX_WITH_BF16 {
    int j = 0;
    for (; j + 32 <= n; j += 32) {
      pair_tile<count, 2>(pairs, a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, add_to);
    }
    for (; j < n; j += 16) {
      pair_tile<count, 1>(pairs, a + i * a_row, a_row, b + j, b_row, c + i * c_row + j, c_row, add_to);
    }
  };
  int i = 0;
  for (; i + 8 <= m; i += 8) {
    meanwhile();
    rows(std::integral_constant<int, 8>{}, i);
  }
  for (; i < m; ++i) {
    rows(std::integral_constant<int, 1>{}, i);
  }
}

#undef KX_WITH_BF16

#endif

}  // namespace
}  // namespace kx::KX_ISA
