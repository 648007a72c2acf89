// A gated attention's inputs on a GPU, in the names of kx_kernels/ops/gau_inputs/README.md. Of the blocks of one launch
// some have rows of u, some of v, and some of z, from which all heads are made.
#pragma once

#include <cmath>

#include "../cuda/convert.cuh"
#include "../cuda/memory.cuh"
#include "../rope/angles.cuh"
#include "problem.h"

namespace kx::gau_inputs {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;   // per multiprocessor: enough loads on their way, and registers for each
constexpr int kRows = 4;     // of u or v that a thread meets
constexpr int kUnroll = 2;   // and vectors of a row whose loads are on their way at once
constexpr int kSummed = 32;  // columns that a block of the last launch sums

template <class T>
using arithmetic_t = decltype(widen(T{}));

// Of z a thread has two vectors of so many elements: 16 bytes.
template <class T>
constexpr int kWide = sizeof(T) < 8 ? 8 / sizeof(T) : 1;

// u or v, and what is made of it: its gate or values, or from their gradients its own.
struct Wide {
  View in, grad, out;
  int width;
  int threads;     // that share a row, of a block's
  bool vectors;    // 16 bytes at a time
  int64_t blocks;  // of kRows rows to a thread
};

struct Plan {
  Rows p;
  Wide wide[2];
  View parts[kCudaHeads];
  int threads;          // that share a row of z
  int64_t tiles;        // of rows of z
  int64_t head_blocks;  // that have them, in turn
  bool vectors;         // of z and all heads, 8 bytes at a time
  bool wide_affine, wide_tables;
  double* sums;  // [head_blocks, 2, heads, key_dim]: backward, of a block's rows, for gamma and beta
};

// Which rows of z a block has at once.
struct Tile {
  int64_t batch, first;
};

__device__ __forceinline__ Tile tile_at(const Rows& p, int64_t tile, int rows) {
  const int64_t tiles = (p.length + rows - 1) / rows;
  return {tile / tiles, tile % tiles * rows};
}

__device__ __forceinline__ bool keeps(const Rows& p, int64_t b, int64_t t) {
  return (p.mask == nullptr || p.mask[b * p.mask_stride[0] + t * p.mask_stride[1]] != 0) &&
         (p.cu_seqlens == nullptr || (t >= p.cu_seqlens[0] && t < p.cu_seqlens[p.num_sequences]));
}

// Where a row that is kept stands in its sequence, and in the tables.
__device__ __forceinline__ int64_t position_of(const Rows& p, int64_t b, int64_t t) {
  int64_t sequence = b, begin = 0;
  if (p.cu_seqlens != nullptr) {
    sequence = 0;
    for (int64_t end = p.num_sequences; end - sequence > 1;) {  // cu_seqlens[sequence] <= t < cu_seqlens[end]
      const int64_t middle = (sequence + end) / 2;
      (p.cu_seqlens[middle] <= t ? sequence : end) = middle;
    }
    begin = p.cu_seqlens[sequence];
  }
  return t - begin + (p.offsets != nullptr ? p.offsets[sequence] : p.offset);
}

template <class T>
__device__ __forceinline__ T* row_of(const View& x, int64_t b, int64_t t) {
  return static_cast<T*>(x.data) + b * x.stride[0] + t * x.stride[1];
}

// Of an element of type T. One of 16 bits is read or written too fast for a division of 10 instructions.
template <class T>
__device__ __forceinline__ arithmetic_t<T> sigmoid(arithmetic_t<T> x) {
  if constexpr (sizeof(T) == 2) {
    constexpr float kUnit = 0x1p-4f;  // so that the reciprocal is a normal number
    return kUnit * reciprocal_approx(fma_rn(kUnit, exp2_approx(-1.4426950409f * x), kUnit));
  } else {
    return 1 / (1 + std::exp(-x));
  }
}

// φ(x), and its derivative; NaN stays NaN.
template <class T>
__device__ __forceinline__ arithmetic_t<T> activate(Activation f, arithmetic_t<T> x) {
  return f == Activation::kSilu ? x * sigmoid<T>(x) : f == Activation::kRelu && x <= 0 ? 0 : x;
}
template <class T>
__device__ __forceinline__ arithmetic_t<T> slope(Activation f, arithmetic_t<T> x) {
  if (f == Activation::kSilu) {
    const arithmetic_t<T> s = sigmoid<T>(x);
    return s * (1 + x * (1 - s));
  }
  return f == Activation::kRelu && x <= 0 ? 0 : 1;
}

// W neighbours of a row.
template <class T, int W, bool kBackward>
__device__ __forceinline__ void activate_one(Activation f, Vector<T, W>& x, const Vector<T, W>& grad) {
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const arithmetic_t<T> value = widen(x.x[j]);
    x.x[j] = narrow<T>(kBackward ? widen(grad.x[j]) * slope<T>(f, value) : activate<T>(f, value));
  }
}

// A block's rows of u or v.
template <class T, int W, bool kBackward>
__device__ __forceinline__ void activate_rows(const Rows& p, const Wide& x, int64_t block) {
  const int together = kThreads / x.threads, thread = static_cast<int>(threadIdx.x) % x.threads;
  const Tile tile = tile_at(p, block, together * kRows);
  const int64_t step[] = {W > 1 ? 1 : x.in.stride[2], W > 1 ? 1 : x.grad.stride[2], W > 1 ? 1 : x.out.stride[2]};
  const int vectors = x.width / W;
  for (int r = 0; r < kRows; ++r) {
    const int64_t t = tile.first + r * together + threadIdx.x / x.threads;
    if (t >= p.length) {
      return;
    }
    const bool keep = keeps(p, tile.batch, t);
    const T* const in = row_of<const T>(x.in, tile.batch, t);
    const T* const grad = row_of<const T>(x.grad, tile.batch, t);
    T* const out = row_of<T>(x.out, tile.batch, t);
    for (int v = thread; v < vectors; v += kUnroll * x.threads) {
      Vector<T, W> value[kUnroll] = {}, its[kBackward ? kUnroll : 1] = {};
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const int64_t d = static_cast<int64_t>(v + i * x.threads) * W;
        if (keep && v + i * x.threads < vectors) {
          value[i] = load_once<W>(in + d * step[0]);
          if constexpr (kBackward) {
            its[i] = load_once<W>(grad + d * step[1]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        if (v + i * x.threads < vectors) {
          activate_one<T, W, kBackward>(p.activation, value[i], its[kBackward ? i : 0]);
          store(out + static_cast<int64_t>(v + i * x.threads) * W * step[2], value[i]);
        }
      }
    }
    for (int d = vectors * W + thread; d < x.width; d += x.threads) {  // the end of a row of vectors
      Vector<T, 1> value{}, its{};
      if (keep) {
        value.x[0] = in[d];
        its.x[0] = kBackward ? grad[d] : T{};
      }
      activate_one<T, 1, kBackward>(p.activation, value, its);
      store(out + d, value);
    }
  }
}

// W pairs of a row of z or of a head: element j of `first` turns with element j of `second`.
template <class A, int W>
struct Pairs {
  A first[W], second[W];
};

// Where they lie: in two vectors of W elements.
struct Place {
  int first, second;
  int pair;         // of the tables, or beyond them
  bool neighbours;  // pairs are of neighbours

  // Of the i-th element of both.
  __device__ __forceinline__ int column(int i, int width) const { return i < width ? first + i : second + i - width; }
};
template <int W>
__device__ __forceinline__ Place place_of(const Rows& p, int unit) {
  const int half = static_cast<int>(p.half), pair = unit * W;
  if (pair >= half || p.interleaved) {
    return {2 * pair, 2 * pair + W, pair, true};
  }
  return {pair, half + pair, pair, false};
}

template <int W, class A>
__device__ __forceinline__ Pairs<A, W> paired(const Place& at, const A (&x)[2 * W]) {
  Pairs<A, W> out;
#pragma unroll
  for (int j = 0; j < W; ++j) {
    out.first[j] = at.neighbours ? x[2 * j] : x[j];
    out.second[j] = at.neighbours ? x[2 * j + 1] : x[W + j];
  }
  return out;
}
// The i-th of both vectors.
template <int W, class A>
__device__ __forceinline__ A element(const Place& at, const Pairs<A, W>& x, int i) {
  const A as_halves = i < W ? x.first[i % W] : x.second[i % W];
  return at.neighbours ? (i % 2 == 0 ? x.first[i / 2] : x.second[i / 2]) : as_halves;
}

template <class T, int W>
__device__ __forceinline__ Pairs<arithmetic_t<T>, W> load_pairs(const Rows& p, const View& x, int64_t b, int64_t t,
                                                                const Place& at) {
  const T* const row = row_of<const T>(x, b, t);
  arithmetic_t<T> value[2 * W];
  if constexpr (W > 1) {
    const Vector<T, W> v[] = {load_once<W>(row + at.first), load_once<W>(row + at.second)};
#pragma unroll
    for (int i = 0; i < 2 * W; ++i) {
      value[i] = widen(v[i / W].x[i % W]);
    }
  } else {
    value[0] = widen(row[at.first * x.stride[2]]);
    value[1] = at.second < p.key_dim ? widen(row[at.second * x.stride[2]]) : 0;
  }
  return paired<W>(at, value);
}

template <class T, int W>
__device__ __forceinline__ void store_pairs(const Rows& p, const View& x, int64_t b, int64_t t, const Place& at,
                                            const Pairs<arithmetic_t<T>, W>& value) {
  T* const row = row_of<T>(x, b, t);
  if constexpr (W > 1) {
    Vector<T, W> v[2];
#pragma unroll
    for (int i = 0; i < 2 * W; ++i) {
      v[i / W].x[i % W] = narrow<T>(element(at, value, i));
    }
    store(row + at.first, v[0]);
    store(row + at.second, v[1]);
  } else {
    row[at.first * x.stride[2]] = narrow<T>(value.first[0]);
    if (at.second < p.key_dim) {
      row[at.second * x.stride[2]] = narrow<T>(value.second[0]);
    }
  }
}

// gamma or beta of one head.
template <int W, class A>
__device__ __forceinline__ Pairs<A, W> load_affine(const Plan& plan, const View& x, int64_t m, const Place& at) {
  const int second = at.second < plan.p.key_dim ? at.second : at.first;
  A value[2 * W];
  rope::with_table(x.data, plan.p.affine_dtype, [&](const auto* typed) {
    rope::load_angles<W>(typed + m * x.stride[0], x.stride[1], plan.wide_affine, at.first, value);
    rope::load_angles<W>(typed + m * x.stride[0], x.stride[1], plan.wide_affine, second, value + W);
  });
  return paired<W>(at, value);
}

// What a thread has of a row of z.
template <class T, int W>
struct Row {
  using A = arithmetic_t<T>;
  int64_t t;
  bool inside, keep, turns;
  Pairs<A, W> z;
  A cos[W], sin[W];

  __device__ __forceinline__ Row(const Plan& plan, const Tile& tile, int row, const Place& at)
      : t(tile.first + row), z{}, cos{}, sin{} {
    const Rows& p = plan.p;
    inside = t < p.length;
    keep = inside && keeps(p, tile.batch, t);
    turns = false;
    if (!keep) {
      return;
    }
    z = load_pairs<T, W>(p, p.z, tile.batch, t, at);
    if (at.pair >= p.half) {
      return;
    }
    const int64_t position = position_of(p, tile.batch, t);
    turns = position >= 0;
    if (turns && position < p.table_length) {
      rope::with_table(p.cos, p.table_dtype, [&](const auto* table) {
        rope::load_angles<W>(table + position * p.cos_stride[0], p.cos_stride[1], plan.wide_tables, at.pair, cos);
      });
      rope::with_table(p.sin, p.table_dtype, [&](const auto* table) {
        rope::load_angles<W>(table + position * p.sin_stride[0], p.sin_stride[1], plan.wide_tables, at.pair, sin);
      });
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        cos[j] = sin[j] = static_cast<A>(NAN);
      }
    }
  }

  // By the row's angles, or the opposite ones.
  __device__ __forceinline__ void turn(Pairs<A, W>& x, bool back) const {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const A s = back ? -sin[j] : sin[j], first = x.first[j], second = x.second[j];
      x.first[j] = turns ? fma_rn(first, cos[j], -mul_rn(second, s)) : first;
      x.second[j] = turns ? fma_rn(second, cos[j], mul_rn(first, s)) : second;
    }
  }
};

// All heads of a block's rows.
template <class T, int W>
__device__ __forceinline__ void make_heads(const Plan& plan, int64_t block) {
  using A = arithmetic_t<T>;
  const Rows& p = plan.p;
  const int together = kThreads / plan.threads, mine = static_cast<int>(threadIdx.x) / plan.threads;
  const Tile tile = tile_at(p, block, together);
  for (int unit = threadIdx.x % plan.threads; mine < together && 2 * W * unit < p.key_dim; unit += plan.threads) {
    const Place at = place_of<W>(p, unit);
    Row<T, W> row(plan, tile, mine, at);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      row.z.first[j] = activate<T>(p.activation, row.z.first[j]);
      row.z.second[j] = activate<T>(p.activation, row.z.second[j]);
    }
    for (int64_t m = 0; m < p.heads && row.inside; ++m) {
      Pairs<A, W> head{};
      if (row.keep) {
        const Pairs<A, W> gamma = load_affine<W, A>(plan, p.gamma, m, at);
        const Pairs<A, W> beta = p.beta.data != nullptr ? load_affine<W, A>(plan, p.beta, m, at) : Pairs<A, W>{};
#pragma unroll
        for (int j = 0; j < W; ++j) {
          head.first[j] = fma_rn(row.z.first[j], gamma.first[j], beta.first[j]);
          head.second[j] = fma_rn(row.z.second[j], gamma.second[j], beta.second[j]);
        }
        row.turn(head, false);
      }
      store_pairs<T, W>(p, plan.parts[m], tile.batch, row.t, at, head);
    }
  }
}

// What rows add to the gradients of gamma and of beta: of each thread's two vectors.
template <class T>
struct Sums {
  arithmetic_t<T> of[2][kThreads * 2 * kWide<T>];
};

// The gradient of z in a block's tiles, and the sums over their rows: of a tile in the order of its rows, then of
// tiles. Which rows a block has does not depend on W, so that bits do not depend on strides.
template <class T, int W>
__device__ __forceinline__ void head_gradients(const Plan& plan, Sums<T>& shared, int64_t block) {
  using A = arithmetic_t<T>;
  const Rows& p = plan.p;
  const int together = kThreads / plan.threads, mine = static_cast<int>(threadIdx.x) / plan.threads;
  const int values = plan.threads * 2 * W;  // of a row that threads have at once
  for (int64_t i = block; i < plan.tiles; i += plan.head_blocks) {
    const Tile tile = tile_at(p, i, together);
    for (int first = 0; 2 * W * first < p.key_dim; first += plan.threads) {
      const int unit = first + static_cast<int>(threadIdx.x) % plan.threads;
      const bool there = mine < together && 2 * W * unit < p.key_dim;
      const Place at = place_of<W>(p, there ? unit : first);
      const Row<T, W> row(plan, tile, mine, at);
      Pairs<A, W> grad{};
      for (int64_t m = 0; m < p.heads; ++m) {
        Pairs<A, W> g{}, by_gamma{};
        if (there && row.keep) {
          g = load_pairs<T, W>(p, plan.parts[m], tile.batch, row.t, at);
          row.turn(g, true);
          const Pairs<A, W> gamma = load_affine<W, A>(plan, p.gamma, m, at);
#pragma unroll
          for (int j = 0; j < W; ++j) {
            grad.first[j] = fma_rn(g.first[j], gamma.first[j], grad.first[j]);
            grad.second[j] = fma_rn(g.second[j], gamma.second[j], grad.second[j]);
            by_gamma.first[j] = g.first[j] * activate<T>(p.activation, row.z.first[j]);
            by_gamma.second[j] = g.second[j] * activate<T>(p.activation, row.z.second[j]);
          }
        }
#pragma unroll
        for (int e = 0; e < 2 * W; ++e) {
          shared.of[0][threadIdx.x * 2 * W + e] = element(at, by_gamma, e);
          shared.of[1][threadIdx.x * 2 * W + e] = element(at, g, e);
        }
        __syncthreads();
        for (int n = threadIdx.x; n < 2 * values; n += kThreads) {
          const int which = n / values, value = n % values, its = first + value / (2 * W);
          const int column = place_of<W>(p, its).column(value % (2 * W), W);
          if (2 * W * its < p.key_dim && column < p.key_dim) {
            double* const to = plan.sums + ((block * 2 + which) * p.heads + m) * p.key_dim + column;
            double sum = i == block ? 0 : *to;
            for (int r = 0; r < together; ++r) {
              sum += shared.of[which][r * values + value];
            }
            *to = sum;
          }
        }
        __syncthreads();
      }
      if (there && row.inside) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
          grad.first[j] *= slope<T>(p.activation, row.z.first[j]);
          grad.second[j] *= slope<T>(p.activation, row.z.second[j]);
        }
        store_pairs<T, W>(p, p.grad_z, tile.batch, row.t, at, grad);
      }
    }
  }
}

template <class T, bool kBackward>
__device__ __forceinline__ void run(const Plan& plan, int64_t block) {
  if (block < plan.head_blocks) {
    if constexpr (kBackward) {
      Sums<T>& shared = static_shared_memory<Sums<T>>();
      plan.vectors ? head_gradients<T, kWide<T>>(plan, shared, block) : head_gradients<T, 1>(plan, shared, block);
    } else {
      plan.vectors ? make_heads<T, kWide<T>>(plan, block) : make_heads<T, 1>(plan, block);
    }
    return;
  }
  block -= plan.head_blocks;
  const bool first = block < plan.wide[0].blocks;
  const Wide& x = plan.wide[first ? 0 : 1];
  block -= first ? 0 : plan.wide[0].blocks;
  x.vectors ? activate_rows<T, 16 / sizeof(T), kBackward>(plan.p, x, block)
            : activate_rows<T, 1, kBackward>(plan.p, x, block);
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) gau_inputs_kernel(const __grid_constant__ Plan plan) {
  run<T, false>(plan, blockIdx.x);
}
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks) gau_inputs_backward_kernel(const __grid_constant__ Plan plan) {
  run<T, true>(plan, blockIdx.x);
}

// The gradients of gamma and beta, whose elements are Ts: kSummed columns of the sums [head_blocks, 2·heads·key_dim].
template <class T>
__global__ void __launch_bounds__(kThreads) gau_inputs_sum_kernel(const __grid_constant__ Plan plan) {
  struct Parts {
    double of[kThreads / kSummed][kSummed];
  };
  Parts& shared = static_shared_memory<Parts>();
  const Rows& p = plan.p;
  const int part = threadIdx.x / kSummed, mine = threadIdx.x % kSummed;
  const int64_t columns = 2 * p.heads * p.key_dim, column = int64_t{blockIdx.x} * kSummed + mine;
  double sum = 0;
  for (int64_t i = part; i < plan.head_blocks && column < columns; i += kThreads / kSummed) {
    sum += plan.sums[i * columns + column];
  }
  shared.of[part][mine] = sum;
  __syncthreads();
  if (part > 0 || column >= columns) {
    return;
  }
  for (int i = 1; i < kThreads / kSummed; ++i) {
    sum += shared.of[i][mine];
  }
  const int64_t m = column / p.key_dim % p.heads, d = column % p.key_dim;
  const View& grad = column < columns / 2 ? p.grad_gamma : p.grad_beta;
  if (grad.data != nullptr) {
    static_cast<T*>(grad.data)[m * grad.stride[0] + d * grad.stride[1]] = narrow<T>(static_cast<arithmetic_t<T>>(sum));
  }
}

}  // namespace kx::gau_inputs
