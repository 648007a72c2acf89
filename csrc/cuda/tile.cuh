// Products of tiles in shared memory by the tensor cores: by one warp, d [16, 8·N] += a [16, k] · b [k, 8·N], with
// mma.sync; or by four warps, of 64 rows of d, with wgmma.
//
// A tile's elements are an Operand: bfloat16, or float where the product is taken in TF32 or, each factor split in
// three, in six TF32 products, which together have float32's precision. d is laid out as in mma.cuh: four warps have of
// wgmma's d what each has of its own.
#pragma once

#include "barrier.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

namespace kx {

// A tile in shared memory. For mma.sync, kSwizzle is 0: rows are padded by 16 bytes, so that rows of 8 × 16 bytes and
// columns of floats fall on different banks. For wgmma the tile is cut into panels of kSwizzle bytes of columns, each
// with all rows, swizzled; whoever writes it calls fence_proxy_async() before the barrier that readers wait at.
template <class E, int kRows, int kColumns, int kSwizzle = 0>
struct Tile {
  using Element = E;
  static constexpr int kHeight = kRows;
  static constexpr int kPanel = kSwizzle == 0 ? kColumns : kSwizzle / static_cast<int>(sizeof(E));
  static constexpr int kStride = kSwizzle == 0 ? kColumns + 16 / static_cast<int>(sizeof(E)) : kPanel;
  static_assert(kColumns % kPanel == 0, "whole panels");

  alignas(kSwizzle == 0 ? 16 : 1024) E data[kColumns / kPanel * kRows * kStride];

  __device__ E* at(int row, int column) {
    if constexpr (kSwizzle == 0) {
      return data + row * kStride + column;
    } else {
      constexpr int kVector = 16 / sizeof(E);  // what the swizzle moves as one
      const int in_panel = column % kPanel;
      const int vector = in_panel / kVector ^ row / (128 / kSwizzle) % (kSwizzle / 16);
      return panel(column) + row * kStride + vector * kVector + in_panel % kVector;
    }
  }
  __device__ E* panel(int column) { return data + column / kPanel * kRows * kStride; }
};

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

// Whether the machine that this is compiled for is one that a kernel of these products is for: bfloat16's are made with
// wgmma and without.
template <class T, bool kWgmma>
__host__ __device__ constexpr bool runs_here() {
#ifdef KX_EMULATION
  return true;
#else
  return kWgmma == (KX_SM90A && std::is_same_v<T, bfloat16>);
#endif
}

// Where wgmma finds rows `row` on of a tile's columns `column` on: with k along the rows, or if kTurned down them.
template <bool kTurned, class E, int kRows, int kColumns, int kSwizzle>
__device__ inline MatrixDescriptor describe(Tile<E, kRows, kColumns, kSwizzle>& tile, int row, int column) {
  constexpr Swizzle kMode = kSwizzle == 128 ? Swizzle::k128 : kSwizzle == 64 ? Swizzle::k64 : Swizzle::k32;
  constexpr unsigned kLeading = kTurned ? kRows * kSwizzle : 16;
  E* const start = tile.panel(column) + row * tile.kStride + column % tile.kPanel;
  return describe_matrix(start, kLeading, 8 * kSwizzle, kMode);
}

// Whether wgmma reads these tiles, by four warps, or mma.sync.
template <class A>
__host__ __device__ constexpr bool is_swizzled() {
  return A::kPanel == A::kStride;
}

// Begins d += a · b for k in [0, depth). a is [16, k] from (a_row, 0) of its tile, or [k, 16] from (0, a_row) if
// kTurnedA; b is [8·N, k] from (b_row, 0), or [k, 8·N] from (0, b_row) if kTurnedB. With swizzled tiles four warps do
// it together, whose a_row are 16 apart from a multiple of 64 on, and d is whole after finish_products.
template <class T, bool kTurnedA, bool kTurnedB, int N, class A, class B>
__device__ inline void begin_product(float (&d)[N][4], A& a, int a_row, B& b, int b_row, int depth) {
  const int lane = threadIdx.x % 32;
  if constexpr (is_swizzled<A>()) {
    auto& registers = reinterpret_cast<float (&)[4 * N]>(d);
    constexpr Major kA = kTurnedA ? Major::kMN : Major::kK, kB = kTurnedB ? Major::kMN : Major::kK;
    a_row = a_row / 64 * 64;
    fence_products(registers);
#pragma unroll
    for (int k = 0; k < depth; k += 16) {
      wgmma<T, 8 * N, kA, kB>(registers, kTurnedA ? describe<true>(a, k, a_row) : describe<false>(a, a_row, k),
                              kTurnedB ? describe<true>(b, k, b_row) : describe<false>(b, b_row, k));
    }
    commit_products();
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    const int low = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
#pragma unroll 2  // all at once would keep every address in a register
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
#pragma unroll(N > 8 ? 1 : 2)
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

// What a warp has of a product's result, [16, 8·N], as the a of the next, whose k are its columns: in registers, as it
// was. TF32 takes column t of eight where the result has column 2t, and t + 4 for 2t + 1; so b's rows are read like
// that.
template <class T, int N>
struct Fragments {
  static constexpr int kDepth = Products<T>::kDepth, kSteps = 8 * N / kDepth;
  std::conditional_t<std::is_same_v<T, bfloat16>, uint32_t, float> x[kSteps][4];

  __device__ void take(const float (&d)[N][4]) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<T, bfloat16>) {
          const float* const pair = d[2 * k + i / 2] + i % 2 * 2;
          x[k][i] = pack<bfloat16>(pair[0], pair[1]);
        } else {
          x[k][i] = operand<T>(d[k][i % 2 * 2 + i / 2]);
        }
      }
    }
  }
};

// Begins d += a · b for k in [first, first + depth) of a; b is [depth, 8·N].
template <class T, int N, int K, class B>
__device__ inline void begin_product(float (&d)[N][4], Fragments<T, K>& a, int first, B& b, int depth) {
  constexpr int kDepth = Fragments<T, K>::kDepth;
  const int lane = threadIdx.x % 32;
  if constexpr (is_swizzled<B>()) {
    auto& registers = reinterpret_cast<float (&)[4 * N]>(d);
    fence_products(registers, reinterpret_cast<uint32_t (&)[4 * Fragments<T, K>::kSteps]>(a.x));
#pragma unroll
    for (int k = 0; k < depth; k += kDepth) {
      wgmma<T, 8 * N, Major::kMN>(registers, a.x[(first + k) / kDepth], describe<true>(b, k, 0));
    }
    commit_products();
  } else {
#pragma unroll
    for (int k = 0; k < depth; k += kDepth) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if constexpr (std::is_same_v<T, bfloat16>) {
          uint32_t y[2];
          load_matrices<true>(y, b.at(k + lane % 16, 8 * n));
          mma_m16n8k16<bfloat16>(d[n], a.x[(first + k) / kDepth], y);
        } else {
          float y[2];
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            y[i] = *b.at(k + lane % 4 * 2 + i, 8 * n + lane / 4);
          }
          multiply_tf32<Products<T>::kSplit>(d[n], a.x[(first + k) / kDepth], y);
        }
      }
    }
  }
}

// Waits for all but the kNewest newest products that have begun, the last of which to finish is d.
template <int kNewest, bool kWgmma, int N>
__device__ inline void finish_products(float (&d)[N][4]) {
  if constexpr (kWgmma) {
    wait_products<kNewest>(reinterpret_cast<float (&)[4 * N]>(d));
  }
}

// A whole product. meanwhile() is called once, and should not touch d: wgmma goes on beside it.
template <class T, bool kTurnedA, bool kTurnedB, int N, class A, class B, class Meanwhile>
__device__ inline void multiply(float (&d)[N][4], A& a, int a_row, B& b, int b_row, int depth, Meanwhile&& meanwhile) {
  constexpr bool kWgmma = is_swizzled<A>();
  if constexpr (!kWgmma) {
    meanwhile();
  }
  begin_product<T, kTurnedA, kTurnedB>(d, a, a_row, b, b_row, depth);
  if constexpr (kWgmma) {
    meanwhile();
  }
  finish_products<0, kWgmma>(d);
}

template <class T, bool kTurnedA, bool kTurnedB, int N, class A, class B>
__device__ inline void multiply(float (&d)[N][4], A& a, int a_row, B& b, int b_row, int depth) {
  multiply<T, kTurnedA, kTurnedB>(d, a, a_row, b, b_row, depth, [] {});
}

}  // namespace kx
