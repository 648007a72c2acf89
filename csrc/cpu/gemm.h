// Products of small matrices that lie in the first caches: register tiles of rows by two vectors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace kx::KX_ISA {
namespace {

// Which part of a product is needed, or not zero, when rows and columns (or k) count the same tokens.
enum class Part {
  kAll,
  kLowerOutput,  // columns up to the row's own: the rest, up to a vector's end or a tile's, may be written or not
  kUpToRow,      // k ≤ row: the rest of a is zero
  kFromRow,      // k ≥ row
};

constexpr int kTileRows = Floats::kLanes == 16 ? 8 : 4;  // as many as leave registers for a row of b
constexpr int kDepth = 64;  // products that are summed before they are added to other sums: short sums round less

// c [kRows, kVectors·lanes] (+)= a [kRows, k0 … k1] · b
template <int kRows, int kVectors, class A>
inline void tile(int k0, int k1, const A* a, int64_t a_row, int64_t a_k, const A* b, int64_t b_row, A* c, int64_t c_row,
                 bool add_to) {
  using V = vector_t<A>;
  V sums[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      sums[i][j] = all(A{0});
    }
  }
  for (int k = k0; k < k1; ++k) {
    V row[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      row[j] = load(b + k * b_row + j * V::kLanes);
    }
    for (int i = 0; i < kRows; ++i) {
      const V x = all(a[i * a_row + k * a_k]);
      for (int j = 0; j < kVectors; ++j) {
        sums[i][j] = fma(x, row[j], sums[i][j]);
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) {
      A* const to = c + i * c_row + j * V::kLanes;
      store(to, add_to ? add(load(to), sums[i][j]) : sums[i][j]);
    }
  }
}

// c [n] (+)= a [k0 … k1] · b of one row. It is b that such a product waits for: its rows are read as they lie in
// memory, four at a time, into sums that stay in the first cache.
template <class A>
inline void one_row(int n, int k0, int k1, const A* a, int64_t a_k, const A* b, int64_t b_row, A* c, bool add_to) {
  using V = vector_t<A>;
  constexpr int kColumns = 4096 / sizeof(A), kAtOnce = 4;
  alignas(64) A sums[kColumns];
  for (int j0 = 0; j0 < n; j0 += kColumns) {
    const int columns = std::min(kColumns, n - j0);
    std::fill_n(sums, (columns + V::kLanes - 1) / V::kLanes * V::kLanes, A{0});
    const auto add_rows = [&](auto count, int k) {
      V x[count];
      for (int l = 0; l < count; ++l) {
        x[l] = all(a[(k + l) * a_k]);
      }
      const A* const from = b + k * b_row + j0;
      for (int j = 0; j < columns; j += V::kLanes) {
        V sum = load(sums + j);
        for (int l = 0; l < count; ++l) {
          sum = fma(x[l], load(from + l * b_row + j), sum);
        }
        store(sums + j, sum);
      }
    };
    int k = k0;
    for (; k + kAtOnce <= k1; k += kAtOnce) {
      add_rows(std::integral_constant<int, kAtOnce>{}, k);
    }
    for (; k < k1; ++k) {
      add_rows(std::integral_constant<int, 1>{}, k);
    }
    for (int j = 0; j < columns; j += V::kLanes) {
      A* const to = c + j0 + j;
      store(to, add_to ? add(load(to), load(sums + j)) : load(sums + j));
    }
  }
}

template <int kRows, class A>
inline void rows(int n, int k0, int k1, const A* a, int64_t a_row, int64_t a_k, const A* b, int64_t b_row, A* c,
                 int64_t c_row, bool add_to) {
  constexpr int kLanes = vector_t<A>::kLanes;
  for (int k = k0; k < k1 || k == k0; k += kDepth) {
    const int end = std::min(k1, k + kDepth);
    if constexpr (kRows == 1) {
      one_row(n, k, end, a, a_k, b, b_row, c, add_to || k > k0);
      continue;
    }
    int j = 0;
    for (; j + 2 * kLanes <= n; j += 2 * kLanes) {
      tile<kRows, 2>(k, end, a, a_row, a_k, b + j, b_row, c + j, c_row, add_to || k > k0);
    }
    for (; j < n; j += kLanes) {
      tile<kRows, 1>(k, end, a, a_row, a_k, b + j, b_row, c + j, c_row, add_to || k > k0);
    }
  }
}

// c [m, n] = a [m, k] · b [k, n], or c += with add_to, and `meanwhile()` now and then. a's elements are a_row and a_k
// apart; b's and c's rows are b_row and c_row apart, and readable and writable up to the next whole vector past n.
template <class A, class Meanwhile>
inline void gemm(int m, int n, int k, const A* a, int64_t a_row, int64_t a_k, const A* b, int64_t b_row, A* c,
                 int64_t c_row, bool add_to, Part part, Meanwhile&& meanwhile) {
  for (int i = 0; i < m;) {
    meanwhile();
    const int count = std::min(kTileRows, m - i);
    const int columns = part == Part::kLowerOutput ? std::min(n, i + count) : n;
    const int k0 = part == Part::kFromRow ? i : 0, k1 = part == Part::kUpToRow ? std::min(k, i + count) : k;
    const A* const from = a + i * a_row;
    A* const to = c + i * c_row;
    if (count == kTileRows) {
      rows<kTileRows>(columns, k0, k1, from, a_row, a_k, b, b_row, to, c_row, add_to);
      i += kTileRows;
    } else if (count >= 4) {
      rows<4>(columns, k0, k1, from, a_row, a_k, b, b_row, to, c_row, add_to);
      i += 4;
    } else {
      rows<1>(columns, k0, k1, from, a_row, a_k, b, b_row, to, c_row, add_to);
      i += 1;
    }
  }
}

// to [n, m] = the transpose of from [m, n].
template <class A>
inline void transpose(int m, int n, const A* from, int64_t from_row, A* to, int64_t to_row) {
  int i = 0;
#if defined(KX_ISA_avx2) || defined(KX_ISA_avx512)
  if constexpr (std::is_same_v<A, float>) {
    for (; i + 4 <= m; i += 4) {
      int j = 0;
      for (; j + 4 <= n; j += 4) {
        const float* const p = from + i * from_row + j;
        __m128 r0 = _mm_loadu_ps(p), r1 = _mm_loadu_ps(p + from_row), r2 = _mm_loadu_ps(p + 2 * from_row),
               r3 = _mm_loadu_ps(p + 3 * from_row);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
        float* const q = to + j * to_row + i;
        _mm_storeu_ps(q, r0);
        _mm_storeu_ps(q + to_row, r1);
        _mm_storeu_ps(q + 2 * to_row, r2);
        _mm_storeu_ps(q + 3 * to_row, r3);
      }
      for (; j < n; ++j) {
        for (int l = 0; l < 4; ++l) {
          to[j * to_row + i + l] = from[(i + l) * from_row + j];
        }
      }
    }
  }
#endif
  for (; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      to[j * to_row + i] = from[i * from_row + j];
    }
  }
}

}  // namespace
}  // namespace kx::KX_ISA
