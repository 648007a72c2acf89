// Gated attention on tensor cores: six products of tiles and what happens to each on its way to memory, in the names of
// kx_kernels/ops/gau_attention/README.md. Scores go through a workspace, for as many rows or keys at a time as it has
// room for (a panel): with e = 12·s, to compute them again for every slice of the values would cost more.
//
//   kernel   product                        to
//   scores   P = f(a q kᵀ + b β)            the workspace, and backward X = a f′ (G vᵀ − δ)
//   out      A = c P v                      o = gate ⊙ A
//   prepare  –                              G = c gate ⊙ ∂o, ∂gate, δ
//   values   ∂v = Pᵀ G
//   rows     ∂q = X k, ∂k = Xᵀ q
//   bias     ∂β: sums along the diagonals of X
#pragma once

#include "../cuda/copy.cuh"
#include "../cuda/memory.cuh"
#include "../cuda/tile.cuh"
#include "problem.h"

namespace kx::gau_attention {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = kCudaTile;       // rows of a tile, queries or keys
constexpr int kDiagonals = 2 * kTile;  // of a tile of scores, and one more

// How a kernel is laid out: a block makes kTile × kColumns numbers, from operands that lie in kStages places in turn.
template <class T_, int kColumns_, bool kWgmma_>
struct Form {
  using T = T_;
  using E = typename Products<T>::Operand;
  static constexpr int kColumns = kColumns_;
  static constexpr bool kWgmma = kWgmma_;
  static constexpr int kStages = kWgmma ? 3 : 2;
  static constexpr int kDepth = 128 / sizeof(E);  // of a product, taken at a time
  static constexpr int kSwizzle = kWgmma ? 128 : 0;
  static constexpr int kN = kColumns / 8;  // tiles of mma.sync that a warp has beside each other
  using A = Tile<E, kTile, kDepth, kSwizzle>;
  using TurnedA = Tile<E, kDepth, kTile, kSwizzle>;
  using B = Tile<E, kColumns, kDepth, kSwizzle>;
  using TurnedB = Tile<E, kDepth, kColumns, kSwizzle>;
};

template <class F>
struct Stage {
  union {
    typename F::A a;
    typename F::TurnedA turned_a;
  };
  union {
    typename F::B b;
    typename F::TurnedB turned_b;
  };
};

template <class F>
struct Shared {
  union {
    Stage<F> stages[F::kStages];
    float staged[kTile][F::kColumns + 4];  // a product, once it is whole
  };
  float scale[kTile], bias_scale[kTile], shift[kTile], sum[kTile];  // of rows
  bool keep_query[kTile], keep_key[kTile];
};

// The workspace and what one launch makes of it. Without gaps but for `pitch`.
struct Pass {
  Problem p;
  void *scores, *grads;  // P and X, of the operands' type: [tiles of rows, heads, kTile, pitch] forward, else
                         // [B, n_q, heads, pitch]
  int64_t pitch;         // elements of a row
  int64_t first;         // forward the first of the tiles, else the first key, of each sequence
  int tiles;             // forward of rows and heads, else of rows
  int keys;              // of a panel; forward of a sequence, at most
  bool last;             // panel of the backward pass

  // Backward.
  void* g;  // [B, n_q, heads, g_pitch], of the operands' type
  int64_t g_pitch;
  float* shift;         // δ, [B, n_q, heads]
  float* grad_queries;  // sums over panels, [B, n_q, heads, key_dim], or null for one panel
  float* diagonals;     // of b X, [tiles of rows, heads, tiles of keys, kDiagonals], or null
};

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

// A sequence, or at `first` up to kTile queries of it.
struct Sequence {
  int batch, query_row, key_row, queries, keys, first;

  __device__ __forceinline__ int count() const { return queries - first < kTile ? queries - first : kTile; }
  // A query stands with the key so much further on.
  __device__ __forceinline__ int shift() const { return keys - queries; }
  // Keys that a tile's rows see, from the first on.
  __device__ __forceinline__ int seen(bool causal) const {
    const int last = first + count() + shift();
    return !causal || last > keys ? keys : last < 0 ? 0 : last;
  }
};

__device__ __forceinline__ Sequence sequence(const Problem& p, int n) {
  if (p.cu_seqlens == nullptr) {
    return {n, 0, 0, static_cast<int>(p.queries), static_cast<int>(p.keys), 0};
  }
  const int query = p.cu_seqlens[n], key = p.cu_seqlens_k[n];
  return {0, query, key, p.cu_seqlens[n + 1] - query, p.cu_seqlens_k[n + 1] - key, 0};
}

__host__ __device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The `id`-th tile of queries of all sequences; with `queries` 0 if there is none. All lanes of a warp call it.
__device__ __forceinline__ Sequence tile_of_rows(const Problem& p, int id) {
  if (p.cu_seqlens == nullptr) {
    const int tiles = ceil_div(static_cast<int>(p.queries), kTile);
    Sequence s = sequence(p, id / tiles);
    s.first = id % tiles * kTile;
    return s;
  }
  const int lane = threadIdx.x % 32, sequences = static_cast<int>(p.num_sequences);
  for (int begin = 0; begin < sequences; begin += 32) {
    const int n = begin + lane;
    const int tiles = n < sequences ? ceil_div(p.cu_seqlens[n + 1] - p.cu_seqlens[n], kTile) : 0;
    int end = tiles;  // of this lane's sequence, in tiles from that of lane 0 on
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffffu, end, step);
      end += lane >= step ? before : 0;
    }
    const uint32_t beyond = __ballot_sync(0xffffffffu, end > id);
    if (beyond != 0) {
      const int owner = __ffs(static_cast<int>(beyond)) - 1;
      Sequence s = sequence(p, begin + owner);
      s.first = (id - __shfl_sync(0xffffffffu, end - tiles, owner)) * kTile;
      return s;
    }
    id -= __shfl_sync(0xffffffffu, end, 31);
  }
  return {};
}

template <class S>
__device__ __forceinline__ S* element(const View& x, int64_t batch, int64_t row, int64_t head) {
  return static_cast<S*>(x.data) + batch * x.stride[0] + row * x.stride[1] + head * x.stride[2];
}

__device__ __forceinline__ bool keeps(const uint8_t* mask, const int64_t* stride, int64_t batch, int64_t row) {
  return mask == nullptr || mask[batch * stride[0] + row * stride[1]] != 0;
}

template <class T>
__device__ __forceinline__ Rows<T> rows_of(const View& x, const Sequence& s, int row, int head, int rows,
                                           int64_t columns, const uint8_t* mask, const int64_t* mask_stride) {
  Rows<T> out{
      element<const T>(x, s.batch, row, head), x.stride[1], x.stride[3], x.wide, rows, static_cast<int>(columns)};
  if (mask != nullptr) {
    out.mask = mask + s.batch * mask_stride[0] + row * mask_stride[1];
    out.mask_stride = mask_stride[1];
  }
  return out;
}
template <class T>
__device__ __forceinline__ Rows<T> queries_of(const Problem& p, const View& x, const Sequence& s, int head,
                                              int64_t columns) {
  return rows_of<T>(x, s, s.query_row, head, s.queries, columns, p.query_mask, p.query_mask_stride);
}
template <class T>
__device__ __forceinline__ Rows<T> keys_of(const Problem& p, const View& x, const Sequence& s, int head,
                                           int64_t columns) {
  const int kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  return rows_of<T>(x, s, s.key_row, kv_head, s.keys, columns, p.key_mask, p.key_mask_stride);
}

// Of G, P and X in the backward pass: rows of queries of a sequence.
template <class E>
__device__ __forceinline__ Rows<E> own_rows(const Problem& p, const void* data, int64_t pitch, const Sequence& s,
                                            int head, int columns) {
  const int64_t row = s.batch * p.queries + s.query_row;
  return {static_cast<const E*>(data) + (row * p.heads + head) * pitch, p.heads * pitch, 1, true, s.queries, columns};
}

// d [16 of a warp, kColumns] etc.: what blocks share.
template <class F>
class Block {
 public:
  using T = typename F::T;
  using E = typename F::E;
  static constexpr int kN = F::kN, kVector = 16 / sizeof(E), kWide = 16 / sizeof(T);

  __device__ __forceinline__ Block(const Pass& pass, Shared<F>& shared)
      : pass(pass), p(pass.p), shared(shared), thread(static_cast<int>(threadIdx.x)), warp(thread / 32) {}

  // A barrier that what wgmma reads may have been written before.
  __device__ __forceinline__ static void sync() {
    if constexpr (F::kWgmma) {
      fence_proxy_async();
    }
    __syncthreads();
  }

  // A tile from (row, column) on.
  template <class S, int kRows, int kColumns, int kSwizzle>
  __device__ __forceinline__ void load(Tile<E, kRows, kColumns, kSwizzle>& to, const Rows<S>& from, int row,
                                       int column) {
    constexpr int kVectors = kColumns / kVector;
    for (int i = thread; i < kRows * kVectors; i += kThreads) {
      const int r = i / kVectors, c = i % kVectors * kVector;
      const bool there = row + r < from.rows && (from.mask == nullptr || from.mask[(row + r) * from.mask_stride] != 0);
      const int left = there ? from.columns - (column + c) : 0;
      const S* const source =
          left > 0 ? from.data + (row + r) * from.row_stride + (column + c) * from.column_stride : from.data;
      if constexpr (std::is_same_v<S, E>) {
        if (from.wide) {
          const int bytes = left <= 0 ? 0 : left < kVector ? left * static_cast<int>(sizeof(E)) : 16;
          copy_async<16>(to.at(r, c), source, bytes);
          continue;
        }
      }
      E* const x = to.at(r, c);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        x[v] = v < left ? operand<T>(widen(source[v * from.column_stride])) : operand<T>(0);
      }
    }
  }

  // d += a · b over `steps` times kDepth. fetch(stage, step) loads the operands of a step, seen(stage) is called while
  // they are there.
  template <bool kTurnedA, bool kTurnedB, class Fetch, class Seen>
  __device__ __forceinline__ void accumulate(float (&d)[kN][4], int steps, Fetch&& fetch, Seen&& seen) {
    for (int step = 0; step < F::kStages - 1; ++step) {
      if (step < steps) {
        fetch(shared.stages[step], step);
      }
      commit_copies();
    }
    for (int step = 0; step < steps; ++step) {
      wait_copies<F::kStages - 2>();
      sync();
      Stage<F>& stage = shared.stages[step % F::kStages];
      const auto fetch_next = [&] {
        const int next = step + F::kStages - 1;
        if (next < steps) {
          fetch(shared.stages[next % F::kStages], next);
        }
        commit_copies();
      };
      if constexpr (kTurnedA) {
        multiply<T, true, kTurnedB>(d, stage.turned_a, 16 * warp, b<kTurnedB>(stage), 0, F::kDepth, fetch_next);
      } else {
        multiply<T, false, kTurnedB>(d, stage.a, 16 * warp, b<kTurnedB>(stage), 0, F::kDepth, fetch_next);
      }
      seen(stage);
    }
    __syncthreads();
  }
  template <bool kTurnedA, bool kTurnedB, class Fetch>
  __device__ __forceinline__ void accumulate(float (&d)[kN][4], int steps, Fetch&& fetch) {
    accumulate<kTurnedA, kTurnedB>(d, steps, fetch, [](const Stage<F>&) {});
  }

  // change(row, column, index of the number in its warp's part) for every number that this thread has.
  template <class Change>
  __device__ __forceinline__ void for_each(Change&& change) {
    const int lane = thread % 32;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        change(16 * warp + lane / 4 + i / 2 * 8, 8 * n + lane % 4 * 2 + i % 2, n, i);
      }
    }
  }

  // The numbers where every thread finds them.
  __device__ __forceinline__ void stage(const float (&d)[kN][4]) {
    for_each([&](int row, int column, int n, int i) { shared.staged[row][column] = d[n][i]; });
    __syncthreads();
  }

  // write(row, column, n) of what is staged: n neighbours, a vector's number but at the end of a row.
  template <class Write>
  __device__ __forceinline__ void for_each_vector(int rows, int columns, Write&& write) {
    const int vectors = ceil_div(columns, kWide);
    for (int i = thread; i < rows * vectors; i += kThreads) {
      const int row = i / vectors, column = i % vectors * kWide;
      write(row, column, columns - column < kWide ? columns - column : kWide);
    }
  }

  // n neighbours of a row to memory, each change(what is staged, index).
  template <class Change>
  __device__ __forceinline__ static void write(const View& x, T* to, int n, Change&& change) {
    if (x.wide && n == kWide) {
      Vector<T, kWide> out;
#pragma unroll
      for (int v = 0; v < kWide; ++v) {
        out.x[v] = narrow<T>(change(v));
      }
      store(to, out);
      return;
    }
    for (int v = 0; v < n; ++v) {
      to[v * x.stride[3]] = narrow<T>(change(v));
    }
  }

  const Pass& pass;
  const Problem& p;
  Shared<F>& shared;
  const int thread, warp;

 private:
  template <bool kTurned>
  __device__ __forceinline__ static auto& b(Stage<F>& stage) {
    if constexpr (kTurned) {
      return stage.turned_b;
    } else {
      return stage.b;
    }
  }
};

// f(x), and its derivative.
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

__device__ __forceinline__ float activate(Activation f, float x) {
  switch (f) {
    case Activation::kRelu2:
      return x > 0 ? x * x : 0;
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kLaplace:
      return 0.5f * (1 + erff((x - 0.70710678f) * 2.5066283f));
    default:
      return x;
  }
}
__device__ __forceinline__ float slope(Activation f, float x) {
  switch (f) {
    case Activation::kRelu2:
      return x > 0 ? 2 * x : 0;
    case Activation::kRelu:
      return x > 0 ? 1.0f : 0.0f;
    case Activation::kSilu: {
      const float s = sigmoid(x);
      return s * (1 + x * (1 - s));
    }
    case Activation::kSigmoid: {
      const float s = sigmoid(x);
      return s * (1 - s);
    }
    case Activation::kLaplace:
      return 1.41421356f * expf(-6.2831853f * (x - 0.70710678f) * (x - 0.70710678f));
    default:
      return 1;
  }
}

// A factor of a row: a number times one of its own.
__device__ __forceinline__ float factor(const Problem& p, double number, const void* rows, const Sequence& s,
                                        int64_t row) {
  const float all_rows = static_cast<float>(number);
  return rows == nullptr ? all_rows : all_rows * static_cast<const float*>(rows)[s.batch * p.queries + row];
}
__device__ __forceinline__ float out_factor(const Problem& p, const Sequence& s, int64_t row, float sum) {
  if (p.by_sum) {
    return sum != 0 ? 1 / sum : 0;
  }
  return factor(p, p.out_scale, p.c, s, row);
}

// kTile queries and kTile keys of one head.
template <class F, bool kBackward>
__device__ __forceinline__ void make_scores(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  static_assert(F::kColumns == kTile, "tiles of scores are square");
  Block<F> block(pass, shared);
  const Problem& p = pass.p;
  const int thread = block.thread, heads = static_cast<int>(p.heads), key_tiles = ceil_div(pass.keys, kTile);
  const int key_tile = id % key_tiles, at = id / key_tiles;  // at: of rows and heads
  const int task = at + static_cast<int>(kBackward ? 0 : pass.first), head = task % heads;
  const Sequence s = tile_of_rows(p, task / heads);
  const int key = static_cast<int>(kBackward ? pass.first : 0) + key_tile * kTile;
  if (s.first >= s.queries || key >= s.seen(p.causal)) {
    return;
  }
  const int count = s.count();
  for (int i = thread; i < kTile; i += kThreads) {
    const int64_t row = s.query_row + s.first + i;
    const bool keep = i < count && keeps(p.query_mask, p.query_mask_stride, s.batch, row);
    shared.keep_query[i] = keep;
    shared.keep_key[i] =
        key + i < s.keys && keeps(p.key_mask, p.key_mask_stride, s.batch, static_cast<int64_t>(s.key_row) + key + i);
    shared.scale[i] = keep ? factor(p, p.scale, p.a, s, row) : 0;
    shared.bias_scale[i] = keep ? factor(p, p.bias_scale, p.b, s, row) : 0;
    if (kBackward) {
      shared.shift[i] = keep ? pass.shift[(s.batch * p.queries + row) * heads + head] : 0;
    }
  }

  float scores[F::kN][4] = {};
  const Rows<T> q = queries_of<T>(p, p.q, s, head, p.key_dim), k = keys_of<T>(p, p.k, s, head, p.key_dim);
  block.template accumulate<false, false>(scores, ceil_div(static_cast<int>(p.key_dim), F::kDepth),
                                          [&](Stage<F>& stage, int step) {
                                            block.load(stage.a, q, s.first, step * F::kDepth);
                                            block.load(stage.b, k, key, step * F::kDepth);
                                          });
  float grads[kBackward ? F::kN : 1][4] = {};
  if constexpr (kBackward) {
    const int value_dim = static_cast<int>(p.value_dim);
    const Rows<E> g = own_rows<E>(p, pass.g, pass.g_pitch, s, head, value_dim);
    const Rows<T> v = keys_of<T>(p, p.v, s, head, value_dim);
    block.template accumulate<false, false>(grads, ceil_div(value_dim, F::kDepth), [&](Stage<F>& stage, int step) {
      block.load(stage.a, g, s.first, step * F::kDepth);
      block.load(stage.b, v, key, step * F::kDepth);
    });
  }

  const float* const bias = p.bias == nullptr ? nullptr
                                              : static_cast<const float*>(p.bias) +
                                                    (p.bias_heads > 1 ? head : 0) * p.distances + p.distances / 2;
  const int apart = key - (s.first + s.shift());  // of the first key from the first query
  block.for_each([&](int row, int column, int n, int i) {
    const int distance = apart + column - row;
    const bool sees = shared.keep_query[row] && shared.keep_key[column] && !(p.causal && distance > 0);
    float x = shared.scale[row] * scores[n][i];
    if (bias != nullptr && sees) {
      x += shared.bias_scale[row] * bias[distance];
    }
    scores[n][i] = sees ? activate(p.activation, x) : 0;
    if constexpr (kBackward) {
      grads[n][i] = sees ? slope(p.activation, x) * (grads[n][i] - shared.shift[row]) : 0;
    }
  });

  // To the workspace, all kTile columns: of forward all rows, of backward those that there are.
  const auto write = [&](const float (&d)[F::kN][4], void* data, bool scaled) {
    block.stage(d);
    E* to = static_cast<E*>(data) + at * kTile * pass.pitch + key;
    int64_t row_stride = pass.pitch;
    if (kBackward) {
      const int64_t row = s.batch * p.queries + s.query_row + s.first;
      to = static_cast<E*>(data) + (row * heads + head) * pass.pitch + key_tile * kTile;
      row_stride *= heads;
    }
    constexpr int kVector = Block<F>::kVector, kVectors = kTile / kVector;
    for (int i = thread; i < (kBackward ? count : kTile) * kVectors; i += kThreads) {
      const int row = i / kVectors, column = i % kVectors * kVector;
      Vector<E, kVector> out;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const float x = shared.staged[row][column + v];
        out.x[v] = operand<T>(scaled ? shared.scale[row] * x : x);
      }
      store(to + row * row_stride + column, out);
    }
  };
  write(scores, pass.scores, false);
  if constexpr (kBackward) {
    __syncthreads();
    write(grads, pass.grads, true);
    if (pass.diagonals != nullptr) {
      // Diagonal d holds the distances apart + d - (kTile - 1).
      for (int d = thread; d < kDiagonals - 1; d += kThreads) {
        float sum = 0;
        for (int row = d < kTile ? kTile - 1 - d : 0; row < kTile && row + d - (kTile - 1) < kTile; ++row) {
          sum += shared.bias_scale[row] * shared.staged[row][row + d - (kTile - 1)];
        }
        pass.diagonals[(static_cast<int64_t>(at) * key_tiles + key_tile) * kDiagonals + d] = sum;
      }
    }
  }
}

// kTile rows and kColumns columns of the output.
template <class F>
__device__ __forceinline__ void make_out(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(pass, shared);
  const Problem& p = pass.p;
  const int thread = block.thread, heads = static_cast<int>(p.heads);
  const int slices = ceil_div(static_cast<int>(p.value_dim), F::kColumns), slice = id % slices, at = id / slices;
  const int task = at + static_cast<int>(pass.first), head = task % heads;
  const Sequence s = tile_of_rows(p, task / heads);
  if (s.first >= s.queries) {
    return;
  }
  const int first_column = slice * F::kColumns, count = s.count();
  const Rows<E> scores{static_cast<const E*>(pass.scores) + at * kTile * pass.pitch,
                       pass.pitch,
                       1,
                       true,
                       kTile,
                       static_cast<int>(pass.pitch)};
  const Rows<T> v = keys_of<T>(p, p.v, s, head, p.value_dim);
  float d[F::kN][4] = {};
  float sum = 0;  // of half of this thread's row
  block.template accumulate<false, true>(
      d, ceil_div(s.seen(p.causal), F::kDepth),
      [&](Stage<F>& stage, int step) {
        block.load(stage.a, scores, 0, step * F::kDepth);
        block.load(stage.turned_b, v, step * F::kDepth, first_column);
      },
      [&](Stage<F>& stage) {
        if (p.by_sum) {
#pragma unroll 4
          for (int c = 0; c < F::kDepth / 2; ++c) {
            sum += widen(*stage.a.at(thread / 2, thread % 2 * (F::kDepth / 2) + c));
          }
        }
      });
  if (p.by_sum) {
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (thread % 2 == 0) {
      shared.sum[thread / 2] = sum;
    }
  }
  block.stage(d);
  const int columns = static_cast<int>(p.value_dim) - first_column;
  block.for_each_vector(count, columns < F::kColumns ? columns : F::kColumns, [&](int i, int column, int n) {
    const int64_t row = static_cast<int64_t>(s.query_row) + s.first + i;
    const bool keep = keeps(p.query_mask, p.query_mask_stride, s.batch, row);
    const float c = keep ? out_factor(p, s, row, p.by_sum ? shared.sum[i] : 0) : 0;
    const float* const ungated = &shared.staged[i][column];
    const auto place = [&](const View& x) {
      return element<T>(x, s.batch, row, head) + (first_column + column) * x.stride[3];
    };
    if (p.ungated.data != nullptr) {
      block.write(p.ungated, place(p.ungated), n, [&](int e) { return c * ungated[e]; });
    }
    if (p.gate.data != nullptr && keep) {
      const T* const gate = place(p.gate);
      if (p.gate.wide && n == Block<F>::kWide) {
        const auto u = load_once<Block<F>::kWide>(gate);
        block.write(p.o, place(p.o), n, [&](int e) { return c * ungated[e] * widen(u.x[e]); });
      } else {
        block.write(p.o, place(p.o), n, [&](int e) { return c * ungated[e] * widen(gate[e * p.gate.stride[3]]); });
      }
    } else {
      block.write(p.o, place(p.o), n, [&](int e) { return c * ungated[e]; });
    }
  });
  if (p.by_sum && slice == 0) {
    for (int i = thread; i < count; i += kThreads) {
      const int64_t row = static_cast<int64_t>(s.query_row) + s.first + i;
      static_cast<float*>(p.sums)[(s.batch * p.queries + row) * heads + head] = shared.sum[i];
    }
  }
}

// One row to a warp: G, δ and the gradient of the gate.
template <class T>
__device__ __forceinline__ void prepare_rows(const Pass& pass, int64_t id) {
  using E = typename Products<T>::Operand;
  const Problem& p = pass.p;
  const int lane = threadIdx.x % 32;
  const int64_t at = id * kWarps + threadIdx.x / 32;  // of [B, n_q, heads]
  if (at >= p.batch * p.queries * p.heads) {
    return;
  }
  const int64_t head = at % p.heads, row = at / p.heads % p.queries, batch = at / p.heads / p.queries;
  bool keep = keeps(p.query_mask, p.query_mask_stride, batch, row);
  if (p.cu_seqlens != nullptr) {
    keep = keep && row >= p.cu_seqlens[0] && row < p.cu_seqlens[p.num_sequences];
  }
  const Sequence s{static_cast<int>(batch), 0, 0, 0, 0, 0};
  const float c = keep ? out_factor(p, s, row, p.by_sum ? static_cast<const float*>(p.sums)[at] : 0) : 0;
  E* const g = static_cast<E*>(pass.g) + at * pass.g_pitch;
  const auto of = [&](const View& x, int64_t e) {
    return keep && x.data != nullptr ? widen(element<const T>(x, batch, row, head)[e * x.stride[3]]) : 0.0f;
  };
  float shift = 0;
  for (int64_t e = lane; e < p.value_dim; e += 32) {
    const float grad = of(p.grad_o, e), ungated = of(p.ungated, e);
    const float x = c * (p.gate.data != nullptr ? grad * of(p.gate, e) : grad);
    const E rounded = operand<T>(x);
    g[e] = rounded;
    shift += p.by_sum ? widen(rounded) * ungated : 0;  // of what the products take: it cancels where a row sees one key
    if (p.grad_gate.data != nullptr) {
      element<T>(p.grad_gate, batch, row, head)[e * p.grad_gate.stride[3]] = narrow<T>(grad * ungated);
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    shift += __shfl_xor_sync(0xffffffffu, shift, step);
  }
  if (lane == 0) {
    pass.shift[at] = shift;
  }
}

// kTile keys and kColumns columns of Pᵀ G or Xᵀ q, for all heads that share the keys.
template <class F, class S, class Right>
__device__ __forceinline__ void make_key_gradients(const Pass& pass, Shared<F>& shared, const Sequence& s, int kv_head,
                                                   int key, int slice, const void* left, int64_t columns,
                                                   const View& grad, Right&& right) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(pass, shared);
  const Problem& p = pass.p;
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int from_seen = key - s.shift();  // the first query that sees one of them, if causal
  const int begin = p.causal && from_seen > 0 ? from_seen / kTile * kTile : 0;
  const int steps = begin < s.queries ? ceil_div(s.queries - begin, F::kDepth) : 0;
  const int first_column = slice * F::kColumns;
  float d[F::kN][4] = {};
  block.template accumulate<true, true>(d, steps * group, [&](Stage<F>& stage, int step) {
    const int head = kv_head * group + step / steps, row = begin + step % steps * F::kDepth;
    const Rows<E> scores = own_rows<E>(p, left, pass.pitch, s, head, pass.keys);
    const Rows<S> other = right(head);
    block.load(stage.turned_a, scores, row, key - static_cast<int>(pass.first));
    block.load(stage.turned_b, other, row, first_column);
  });
  block.stage(d);
  const int rows = s.keys - key < kTile ? s.keys - key : kTile;
  const int64_t rest = columns - first_column;
  block.for_each_vector(rows, rest < F::kColumns ? static_cast<int>(rest) : F::kColumns, [&](int i, int column, int n) {
    T* const to = element<T>(grad, s.batch, static_cast<int64_t>(s.key_row) + key + i, kv_head) +
                  (first_column + column) * grad.stride[3];
    block.write(grad, to, n, [&](int e) { return shared.staged[i][column + e]; });
  });
}

// Which keys and columns a block has, of `slices`: the sequence, the head and a tile of the panel's keys.
struct KeyBlock {
  Sequence s;
  int kv_head, key, slice;
};
__device__ __forceinline__ KeyBlock key_block(const Pass& pass, int slices, int id) {
  const int tiles = ceil_div(pass.keys, kTile), kv_heads = static_cast<int>(pass.p.kv_heads);
  const int slice = id % slices, tile = id / slices % tiles, kv_head = id / slices / tiles % kv_heads;
  return {sequence(pass.p, id / slices / tiles / kv_heads), kv_head, static_cast<int>(pass.first) + tile * kTile,
          slice};
}

template <class F>
__device__ __forceinline__ void make_value_gradients(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  const Problem& p = pass.p;
  const int dim = static_cast<int>(p.value_dim);
  const KeyBlock b = key_block(pass, ceil_div(dim, F::kColumns), id);
  if (b.key < b.s.keys) {
    make_key_gradients<F, E>(pass, shared, b.s, b.kv_head, b.key, b.slice, pass.scores, dim, p.grad_v,
                             [&](int head) { return own_rows<E>(p, pass.g, pass.g_pitch, b.s, head, dim); });
  }
}

// kTile rows and kColumns columns of the gradient of queries: what this panel adds.
template <class F>
__device__ __forceinline__ void make_query_gradients(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(pass, shared);
  const Problem& p = pass.p;
  const int heads = static_cast<int>(p.heads), slices = ceil_div(static_cast<int>(p.key_dim), F::kColumns);
  const int slice = id % slices, head = id / slices % heads;
  const Sequence s = tile_of_rows(p, id / slices / heads);
  if (s.first >= s.queries) {
    return;
  }
  const int key = static_cast<int>(pass.first), first_column = slice * F::kColumns;
  int keys = s.seen(p.causal) - key;
  keys = keys < 0 ? 0 : keys < pass.keys ? keys : pass.keys;
  const Rows<E> grads = own_rows<E>(p, pass.grads, pass.pitch, s, head, pass.keys);
  const Rows<T> k = keys_of<T>(p, p.k, s, head, p.key_dim);
  float d[F::kN][4] = {};
  block.template accumulate<false, true>(d, ceil_div(keys, F::kDepth), [&](Stage<F>& stage, int step) {
    block.load(stage.a, grads, s.first, step * F::kDepth);
    block.load(stage.turned_b, k, key + step * F::kDepth, first_column);
  });
  block.stage(d);
  const int columns = static_cast<int>(p.key_dim) - first_column;
  block.for_each_vector(s.count(), columns < F::kColumns ? columns : F::kColumns, [&](int i, int column, int n) {
    const int64_t row = static_cast<int64_t>(s.query_row) + s.first + i;
    float* const x = &shared.staged[i][column];
    if (pass.grad_queries != nullptr) {
      float* const sum =
          pass.grad_queries + ((s.batch * p.queries + row) * heads + head) * p.key_dim + first_column + column;
      for (int e = 0; e < n; ++e) {
        x[e] += key > 0 ? sum[e] : 0;
        sum[e] = x[e];
      }
    }
    if (pass.last) {
      T* const to = element<T>(p.grad_q, s.batch, row, head) + (first_column + column) * p.grad_q.stride[3];
      block.write(p.grad_q, to, n, [&](int e) { return x[e]; });
    }
  });
}

template <class F>
__device__ __forceinline__ void make_row_gradients(const Pass& pass, Shared<F>& shared, int id) {
  using T = typename F::T;
  const Problem& p = pass.p;
  const int slices = ceil_div(static_cast<int>(p.key_dim), F::kColumns);
  const int of_queries = pass.tiles * static_cast<int>(p.heads) * slices;
  if (id < of_queries) {
    return make_query_gradients(pass, shared, id);
  }
  const KeyBlock b = key_block(pass, slices, id - of_queries);
  if (b.key < b.s.keys) {
    make_key_gradients<F, T>(pass, shared, b.s, b.kv_head, b.key, b.slice, pass.grads, p.key_dim, p.grad_k,
                             [&](int head) { return queries_of<T>(p, p.q, b.s, head, p.key_dim); });
  }
}

// One distance of one head's bias to a thread: the sum over all tiles that have it, in their order.
__device__ __forceinline__ void add_diagonals(const Pass& pass, int64_t id) {
  const Problem& p = pass.p;
  const int64_t at = id * kThreads + threadIdx.x;
  const int heads = static_cast<int>(p.heads), key_tiles = ceil_div(pass.keys, kTile);
  const bool mine = at < p.bias_heads * p.distances;
  const int bias_head = static_cast<int>(at / p.distances);
  const int64_t distance = at % p.distances - p.distances / 2;
  float* const to = static_cast<float*>(p.grad_bias) + (mine ? at : 0);
  float sum = mine && pass.first > 0 ? *to : 0;
  for (int tile = 0; tile < pass.tiles; ++tile) {
    const Sequence s = tile_of_rows(p, tile);
    if (s.first >= s.queries) {
      break;
    }
    for (int key_tile = 0; key_tile < key_tiles; ++key_tile) {
      const int64_t key = pass.first + key_tile * kTile;
      const int64_t diagonal = distance - (key - (s.first + s.shift())) + (kTile - 1);
      if (key >= s.seen(p.causal) || diagonal < 0 || diagonal >= kDiagonals - 1) {
        continue;
      }
      for (int head = 0; head < heads; ++head) {
        if (mine && (p.bias_heads == 1 || head == bias_head)) {
          sum += pass.diagonals[((static_cast<int64_t>(tile) * heads + head) * key_tiles + key_tile) * kDiagonals +
                                diagonal];
        }
      }
    }
  }
  if (mine) {
    *to = sum;
  }
}

template <class F, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) gau_scores_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_scores<F, kBackward>(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_out_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_out(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
template <class T>
__global__ void __launch_bounds__(kThreads) gau_prepare_kernel(const __grid_constant__ Pass pass) {
  prepare_rows<T>(pass, blockIdx.x);
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_values_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_value_gradients(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_rows_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_row_gradients(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
__global__ void __launch_bounds__(kThreads) gau_bias_kernel(const __grid_constant__ Pass pass) {
  add_diagonals(pass, blockIdx.x);
}

}  // namespace kx::gau_attention
