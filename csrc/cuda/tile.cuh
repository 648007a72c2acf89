// Products of tiles in shared memory by the tensor cores of one warp: d [16, 8·N] += a [16, k] · b [k, 8·N].
//
// A tile's elements are an Operand: bfloat16, or float where the product is taken in TF32 or, each factor split in two,
// in four TF32 products, which together have float32's precision. d is laid out as in mma.cuh.
#pragma once

#include "mma.cuh"

namespace kx {

// A tile in shared memory.
template <class E>
struct Tile {
  E* data;
  int stride;

  __device__ E* at(int row, int column) const { return data + row * stride + column; }
};

// The stride of a tile of so many columns, in elements: 16 bytes more than a multiple of 128, so that rows of 8 × 16
// bytes and columns of floats fall on different banks.
template <class E>
__host__ __device__ constexpr int padded(int columns) {
  return columns + 16 / static_cast<int>(sizeof(E));
}

// How the elements of type T of a call are multiplied.
template <class T>
struct Products {  // float16 and float: in TF32, whose range is float32's
  using Operand = float;
  static constexpr int kDepth = 8;
  static constexpr bool kSplit = std::is_same_v<T, float>;
};
template <>
struct Products<bfloat16> {
  using Operand = bfloat16;
  static constexpr int kDepth = 16;
  static constexpr bool kSplit = false;
};

// x as a tile holds it: rounded to what the product takes, so that sums of it elsewhere are of the same numbers.
template <class T>
__device__ inline typename Products<T>::Operand operand(float x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return narrow<bfloat16>(x);
  } else if constexpr (Products<T>::kSplit) {
    return x;
  } else {
    return as_float(to_tf32(x));
  }
}

// d += a · b for k in [0, depth). a is [16, k] from (a_row, 0) of its tile, or [k, 16] from (0, a_row) if kTurnedA; b
// is [8·N, k] from (b_row, 0), or [k, 8·N] from (0, b_row) if kTurnedB.
template <class T, bool kTurnedA, bool kTurnedB, int N>
__device__ inline void multiply(float (&d)[N][4], const Tile<typename Products<T>::Operand>& a, int a_row,
                                const Tile<typename Products<T>::Operand>& b, int b_row, int depth) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, bfloat16>) {
    const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
    for (int k = 0; k < depth; k += 16) {
      uint32_t x[4];
      if constexpr (kTurnedA) {
        load_matrices<true>(x, a.at(k + low + third, a_row + second));
      } else {
        load_matrices<false>(x, a.at(a_row + low + second, k + third));
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        uint32_t y[2];
        if constexpr (kTurnedB) {
          load_matrices<true>(y, b.at(k + low + second, b_row + 8 * n));
        } else {
          load_matrices<false>(y, b.at(b_row + 8 * n + low, k + second));
        }
        mma_m16n8k16<bfloat16>(d[n], x, y);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
    for (int k = 0; k < depth; k += 8) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = a_row + g + i % 2 * 8, column = k + t + i / 2 * 4;
        x[i] = kTurnedA ? *a.at(column, row) : *a.at(row, column);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float y[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = b_row + 8 * n + g, column = k + t + i * 4;
          y[i] = kTurnedB ? *b.at(column, row) : *b.at(row, column);
        }
        multiply_tf32<Products<T>::kSplit>(d[n], x, y);
      }
    }
  }
}

}  // namespace kx
