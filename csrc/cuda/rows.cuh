// Rows of a tensor, and their way into tiles of shared memory.
#pragma once

#include "copy.cuh"
#include "memory.cuh"
#include "tile.cuh"

namespace kx {

// Rows of one sequence and head: `rows` of them, of `columns` elements; those that a mask leaves out count as zeros.
template <class S>
struct Rows {
  const S* data;
  int64_t row_stride, column_stride;
  bool wide;  // rows are read 16 bytes at a time
  int rows, columns;
  const uint8_t* mask = nullptr;
  int64_t mask_stride = 0;
};

// A tile from (row, column) on, by kThreads threads; zeros where there are no such rows or columns. A thread has the
// same columns of every kTogether-th row. What copies bring is there after a wait and a barrier, all else after a
// barrier.
template <class T, int kThreads, class S, class E, int kRows, int kColumns, int kSwizzle>
__device__ __forceinline__ void load_tile(Tile<E, kRows, kColumns, kSwizzle>& to, const Rows<S>& from, int row,
                                          int column, int thread) {
  constexpr int kVector = 16 / sizeof(E), kVectors = kColumns / kVector, kTogether = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0 && kRows % kTogether == 0, "all threads load as many vectors");
  static_assert(kTogether % 8 == 0, "the swizzle of a thread's rows is the same");
  const int first = unknown(thread / kVectors), c = thread % kVectors * kVector, left = from.columns - (column + c);
  const auto inside = [&](int r) { return static_cast<unsigned>(row + r) < static_cast<unsigned>(from.rows); };
  const auto kept = [&](int r) { return inside(r) && from.mask[(row + r) * from.mask_stride] != 0; };
  const S* source = from.data + (row + first) * from.row_stride + (column + c) * from.column_stride;
  const int64_t step = kTogether * from.row_stride;
  if constexpr (std::is_same_v<S, E>) {
    if (from.wide) {
      const int bytes = left <= 0 ? 0 : left < kVector ? left * static_cast<int>(sizeof(E)) : 16;
      E* const start = to.at(first, c);
      const auto copy = [&](auto&& there) {
#pragma unroll
        for (int i = 0; i < kRows; i += kTogether) {
          copy_async<16>(start + i * to.kStride, source, there(first + i) ? bytes : 0);
          source += step;
        }
      };
      return from.mask == nullptr ? copy(inside) : copy(kept);
    }
  }
  for (int r = first; r < kRows; r += kTogether) {
    E* const x = to.at(r, c);
    const int n = (from.mask == nullptr ? inside(r) : kept(r)) ? left : 0;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      x[v] = v < n ? operand<T>(widen(source[v * from.column_stride])) : operand<T>(0);
    }
    source += step;
  }
}

}  // namespace kx
