// rope on a GPU. A thread owns two vectors of a head row that rotate by the same angles or stand half a row apart; it
// loads their angles once and meets the same place of eight heads with them.
#pragma once

#include <cmath>

#include "../cuda/convert.cuh"
#include "../cuda/device.cuh"
#include "../cuda/memory.cuh"
#include "angles.cuh"
#include "position.h"

namespace kx::rope {

constexpr int kThreads = 128;
constexpr int kBlocks = 5;  // per multiprocessor: enough loads in flight, and registers for each
constexpr int kHeads = 8;   // that a block rotates with one set of angles
constexpr int kUnroll = 2;  // heads whose loads are on their way at once

struct Plan {
  Problem problem;
  unsigned q_groups;  // blocks of kHeads heads that belong to q; the others are k's
  int units;          // pairs of vectors in a row's rotated part
  bool wide_tables;   // a vector's angles are neighbours, and aligned
};

struct Strides {
  int64_t in_head, out_head, in_dim, out_dim;
};

template <class T>
using arithmetic_t = decltype(widen(T{}));

// A unit's W angles: from pair `first` on, or (kPairs) half of them from there and half from `apart` pairs further.
template <bool kPairs, class A, int W>
__device__ inline void load_angles(const void* table, DType dtype, const int64_t* stride, Row row, bool wide, int first,
                                   int apart, A (&out)[W]) {
  const int64_t at = row.sequence * stride[0] + row.position * stride[1];
  with_table(table, dtype, [&](const auto* typed) {
    constexpr int kNeighbours = kPairs ? W / 2 : W;
    load_angles<kNeighbours>(typed + at, stride[2], wide, first, out);
    if constexpr (kPairs) {
      load_angles<kNeighbours>(typed + at, stride[2], wide, first + apart, out + W / 2);
    }
  });
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

// Dimensions [begin, end) of `heads` heads, as they are: in vectors, then one by one.
template <class T, int W>
__device__ inline void copy(const T* in, T* out, const Strides& stride, int heads, int begin, int end) {
  const int vectors = (end - begin) / W, tail = begin + vectors * W;
  for (int h = 0; h < heads; ++h) {
    for (int v = threadIdx.x; v < vectors; v += blockDim.x) {
      const int64_t d = begin + v * W;
      store(out + d * stride.out_dim, load_once<W>(in + d * stride.in_dim));
    }
    for (int64_t d = tail + threadIdx.x; d < end; d += blockDim.x) {
      store(out + d * stride.out_dim, load_once<1>(in + d * stride.in_dim));
    }
    in += stride.in_head;
    out += stride.out_head;
  }
}

// W > 1 asks for neighbouring dimensions (stride 1), whose vectors are aligned everywhere.
// Grid: groups of heads, tiles of tokens, batch. Block: units × tokens.
template <class T, int W, bool kPairs>
__global__ void __launch_bounds__(kThreads, kBlocks) rope_kernel(const __grid_constant__ Plan plan) {
  using A = arithmetic_t<T>;
  const Problem& p = plan.problem;
  const bool is_k = blockIdx.x >= plan.q_groups;
  const Operand& x = is_k ? p.x[1] : p.x[0];
  const int64_t first_head = static_cast<int64_t>(is_k ? blockIdx.x - plan.q_groups : blockIdx.x) * kHeads;
  const int heads = x.heads - first_head < kHeads ? static_cast<int>(x.heads - first_head) : kHeads;
  const Strides stride{x.in_stride[2], x.out_stride[2], W > 1 ? 1 : x.in_stride[3], W > 1 ? 1 : x.out_stride[3]};
  const int head_dim = static_cast<int>(p.head_dim), half = static_cast<int>(p.half), start = static_cast<int>(p.start);

  for (unsigned b = blockIdx.z; b < p.batch; b += gridDim.z) {
    for (int64_t t = int64_t{blockIdx.y} * blockDim.y + threadIdx.y; t < p.length; t += gridDim.y * blockDim.y) {
      const T* in = static_cast<const T*>(x.in) + b * x.in_stride[0] + t * x.in_stride[1] + first_head * x.in_stride[2];
      T* out = static_cast<T*>(x.out) + b * x.out_stride[0] + t * x.out_stride[1] + first_head * x.out_stride[2];
      const Row row = locate(p, b, t);
      const bool padding = row.position < 0;
      if (x.in != x.out) {
        copy<T, W>(in, out, stride, heads, 0, padding ? head_dim : start);
        copy<T, W>(in, out, stride, heads, padding ? head_dim : start + 2 * half, head_dim);
      }
      if (padding) {
        continue;
      }
      for (int u = threadIdx.x; u < plan.units; u += blockDim.x) {
        // The unit's two vectors begin at d0 and d0 + apart in the rotated part. Where pairs lie within vectors and the
        // number of these is odd, the last one stands for both.
        const bool both = !kPairs || (u + plan.units) * W < 2 * half;
        const int d0 = kPairs || !p.interleaved ? u * W : 2 * u;
        const int apart = kPairs ? (both ? plan.units * W : 0) : p.interleaved ? 1 : half;
        A c[W], s[W];
        if (row.position < p.table_length) {
          const int pair = kPairs ? d0 / 2 : u * W;
          load_angles<kPairs>(p.cos, p.table_dtype, p.cos_stride, row, plan.wide_tables, pair, apart / 2, c);
          load_angles<kPairs>(p.sin, p.table_dtype, p.sin_stride, row, plan.wide_tables, pair, apart / 2, s);
        } else {
#pragma unroll
          for (int j = 0; j < W; ++j) {
            c[j] = s[j] = static_cast<A>(NAN);
          }
        }
        if (p.inverse) {
#pragma unroll
          for (int j = 0; j < W; ++j) {
            s[j] = -s[j];
          }
        }
        const T* from = in + (start + d0) * stride.in_dim;
        T* to = out + (start + d0) * stride.out_dim;
        for (int h = 0; h < heads; h += kUnroll) {
          Vector<T, W> x0[kUnroll], x1[kUnroll];
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) {
            if (h + i < heads) {
              x0[i] = load_once<W>(from + i * stride.in_head);
              x1[i] = load_once<W>(from + i * stride.in_head + apart * stride.in_dim);
            }
          }
#pragma unroll
          for (int i = 0; i < kUnroll; ++i) {
            if (h + i < heads) {
              rotate<kPairs>(x0[i], x1[i], c, s);
              store(to + i * stride.out_head, x0[i]);
              if (both) {
                store(to + i * stride.out_head + apart * stride.out_dim, x1[i]);
              }
            }
          }
          from += kUnroll * stride.in_head;
          to += kUnroll * stride.out_head;
        }
      }
    }
  }
}

}  // namespace kx::rope
