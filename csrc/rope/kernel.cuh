// rope on a GPU. A thread owns two vectors of a head row that rotate by the same angles or stand half a row apart; it
// loads their angles once and meets the same place of eight heads with them.
#pragma once

#include <limits>

#include "../cuda/convert.cuh"
#include "../cuda/device.cuh"
#include "../cuda/memory.cuh"
#include "position.h"

namespace kx::rope {

constexpr int kThreads = 256;
constexpr int kHeads = 8;   // that a block rotates with one set of angles
constexpr int kUnroll = 4;  // heads whose loads are on their way at once

struct Plan {
  Problem problem;
  int64_t q_groups;  // blocks of kHeads heads that belong to q; the others are k's
  int64_t units;     // pairs of vectors in a row's rotated part
  bool wide_tables;  // a vector's angles are neighbours, and aligned
};

template <class T>
using arithmetic_t = decltype(widen(T{}));

// N neighbouring angles from pair `first` on.
template <int N, class Table, class A>
__device__ inline void load_angles(const Table* row, int64_t stride, bool wide, int64_t first, A* out) {
  constexpr int kWidth = N * sizeof(Table) <= 16 ? N : 16 / sizeof(Table);
  if (wide) {
#pragma unroll
    for (int i = 0; i < N; i += kWidth) {
      const Vector<Table, kWidth> v = load_shared_by_many<kWidth>(row + first + i);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        out[i + j] = static_cast<A>(widen(v.x[j]));
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = static_cast<A>(widen(load_shared_by_many<1>(row + (first + i) * stride).x[0]));
    }
  }
}

template <int N, class A>
__device__ inline void load_angles(const void* table, DType dtype, int64_t row, int64_t stride, bool wide,
                                   int64_t first, A* out) {
  switch (dtype) {
    case DType::kFloat64:
      return load_angles<N>(static_cast<const double*>(table) + row, stride, wide, first, out);
    case DType::kBFloat16:
      return load_angles<N>(static_cast<const bfloat16*>(table) + row, stride, wide, first, out);
    case DType::kFloat16:
      return load_angles<N>(static_cast<const float16*>(table) + row, stride, wide, first, out);
    default:
      return load_angles<N>(static_cast<const float*>(table) + row, stride, wide, first, out);
  }
}

template <class T>
__device__ inline void rotate_pair(T& x0, T& x1, arithmetic_t<T> c, arithmetic_t<T> s) {
  const arithmetic_t<T> a = widen(x0), b = widen(x1);
  x0 = narrow<T>(fma_rn(a, c, -mul_rn(b, s)));
  x1 = narrow<T>(fma_rn(b, c, mul_rn(a, s)));
}

// Two vectors of W elements. kPairs: each holds W/2 whole pairs; else element j of one pairs with element j of the
// other.
template <bool kPairs, class T, int W>
__device__ inline void rotate(Vector<T, W>& x, Vector<T, W>& y, const arithmetic_t<T>* c, const arithmetic_t<T>* s) {
  if constexpr (kPairs) {
#pragma unroll
    for (int j = 0; j < W / 2; ++j) {
      rotate_pair(x.x[2 * j], x.x[2 * j + 1], c[j], s[j]);
      rotate_pair(y.x[2 * j], y.x[2 * j + 1], c[W / 2 + j], s[W / 2 + j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      rotate_pair(x.x[j], y.x[j], c[j], s[j]);
    }
  }
}

// Dimensions [begin, end) of heads [0, heads), as they are: in vectors where W > 1, then one by one.
template <class T, int W>
__device__ inline void copy(const Operand& x, const T* in, T* out, int64_t heads, int64_t begin, int64_t end) {
  const int64_t vectors = (end - begin) / W, tail = begin + vectors * W;
  for (int64_t h = 0; h < heads; ++h) {
    const T* from = in + h * x.in_stride[2];
    T* to = out + h * x.out_stride[2];
    for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) {
      const int64_t d = begin + v * W;
      store(to + d * x.out_stride[3], load_once<W>(from + d * x.in_stride[3]));
    }
    for (int64_t d = tail + threadIdx.x; d < end; d += blockDim.x) {
      store(to + d * x.out_stride[3], load_once<1>(from + d * x.in_stride[3]));
    }
  }
}

// W > 1 asks for neighbouring dimensions (stride 1), whose vectors are aligned everywhere.
// Grid: groups of heads, tiles of tokens, batch. Block: units × tokens.
template <class T, int W, bool kPairs>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ Plan plan) {
  using A = arithmetic_t<T>;
  const Problem& p = plan.problem;
  const bool is_k = blockIdx.x >= plan.q_groups;
  const Operand& x = is_k ? p.x[1] : p.x[0];
  const int64_t first_head = (is_k ? blockIdx.x - plan.q_groups : blockIdx.x) * kHeads;
  const int64_t heads = x.heads - first_head < kHeads ? x.heads - first_head : kHeads;
  const bool copies = x.in != x.out;

  for (int64_t b = blockIdx.z; b < p.batch; b += gridDim.z) {
    for (int64_t t = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; t < p.length;
         t += int64_t{gridDim.y} * blockDim.y) {
      const T* in = static_cast<const T*>(x.in) + b * x.in_stride[0] + t * x.in_stride[1] + first_head * x.in_stride[2];
      T* out = static_cast<T*>(x.out) + b * x.out_stride[0] + t * x.out_stride[1] + first_head * x.out_stride[2];
      const Row row = locate(p, b, t);
      const bool padding = row.position < 0;
      if (copies) {
        copy<T, W>(x, in, out, heads, 0, padding ? p.head_dim : p.start);
        copy<T, W>(x, in, out, heads, padding ? p.head_dim : p.start + 2 * p.half, p.head_dim);
      }
      if (padding) {
        continue;
      }
      const bool known = row.position < p.table_length;
      const int64_t cos_row = row.sequence * p.cos_stride[0] + row.position * p.cos_stride[1];
      const int64_t sin_row = row.sequence * p.sin_stride[0] + row.position * p.sin_stride[1];

      for (int64_t u = threadIdx.x; u < plan.units; u += blockDim.x) {
        // The unit's two vectors begin at d0 and d1 in the rotated part; where pairs lie within vectors and their
        // number is odd, the last one stands for both.
        const bool both = !kPairs || (u + plan.units) * W < 2 * p.half;
        const int64_t d0 = kPairs || !p.interleaved ? u * W : 2 * u;
        const int64_t d1 = kPairs ? (both ? d0 + plan.units * W : d0) : p.interleaved ? d0 + 1 : d0 + p.half;

        A c[W], s[W];
        if (known) {
          constexpr int kAngles = kPairs ? W / 2 : W;  // of one load
          const int64_t pair = kPairs ? d0 / 2 : u * W;
          load_angles<kAngles>(p.cos, p.table_dtype, cos_row, p.cos_stride[2], plan.wide_tables, pair, c);
          load_angles<kAngles>(p.sin, p.table_dtype, sin_row, p.sin_stride[2], plan.wide_tables, pair, s);
          if constexpr (kPairs) {
            load_angles<kAngles>(p.cos, p.table_dtype, cos_row, p.cos_stride[2], plan.wide_tables, d1 / 2, c + W / 2);
            load_angles<kAngles>(p.sin, p.table_dtype, sin_row, p.sin_stride[2], plan.wide_tables, d1 / 2, s + W / 2);
          }
        } else {
#pragma unroll
          for (int j = 0; j < W; ++j) {
            c[j] = s[j] = std::numeric_limits<A>::quiet_NaN();
          }
        }
        if (p.inverse) {
#pragma unroll
          for (int j = 0; j < W; ++j) {
            s[j] = -s[j];
          }
        }

        const int64_t in0 = (p.start + d0) * x.in_stride[3], in1 = (p.start + d1) * x.in_stride[3];
        const int64_t out0 = (p.start + d0) * x.out_stride[3], out1 = (p.start + d1) * x.out_stride[3];
        for (int64_t h = 0; h < heads; h += kUnroll) {
          Vector<T, W> x0[kUnroll], x1[kUnroll];
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) {
            if (h + i < heads) {
              x0[i] = load_once<W>(in + (h + i) * x.in_stride[2] + in0);
              x1[i] = load_once<W>(in + (h + i) * x.in_stride[2] + in1);
            }
          }
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) {
            if (h + i < heads) {
              rotate<kPairs>(x0[i], x1[i], c, s);
              store(out + (h + i) * x.out_stride[2] + out0, x0[i]);
              if (both) {
                store(out + (h + i) * x.out_stride[2] + out1, x1[i]);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace kx::rope
