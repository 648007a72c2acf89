// Mixed-chunk attention on tensor cores, from the parts of gated attention's kernels, in the names of
// kx_kernels/ops/mixed_chunk_attention/README.md. To the first sum a chunk is a sequence of its own. The second goes
// through the states of chunks and is further depth of the same products.
//
//   kernel   product                               to
//   scores   P = f(a q kᵀ + b β)                   the workspace c P, and backward X = a c f′ (g vᵀ)
//   states   S = k′ᵀ v of a chunk, U = (d q′)ᵀ g   the workspace
//   chain    –                                     their sums over the chunks before, or after, or all
//   out      A = d q′ S + (c P) v                  o = gate ⊙ A
//   prepare  –                                     g = gate ⊙ ∂o, ∂gate, d q′
//   values   ∂v = (c P)ᵀ g + k′ U
//   rows     ∂q′ = d g Sᵀ, ∂k′ = v Uᵀ, ∂q = X k, ∂k = Xᵀ q
//   bias     ∂β: sums along the diagonals of X
#pragma once

#include "../gau_attention/block.cuh"
#include "problem.h"

namespace kx::mixed_chunk_attention {

using namespace gau_attention;
using Problem = mixed_chunk_attention::Problem;

// States of one kind, [chunks, kv_heads, key_dim, pitch].
struct States {
  float* own;  // of a chunk's own tokens
  void* sums;  // what a chunk takes, of the operands' type; may be the same memory
};

// The workspaces of a call. `chunks` are places for chunks: packed sequences leave some empty.
struct Pass {
  Problem p;
  int chunks, longest;   // longest: tokens of the longest chunk
  void *scores, *grads;  // c P and X, [B, n, heads, pitch], of the operands' type
  int64_t pitch;
  States s, u;
  int64_t value_pitch;  // of a row of states and of g

  // Backward.
  void *g, *lin_q;  // g [B, n, heads, value_pitch] and d q′ [B, n, heads, key_pitch], of the operands' type
  int64_t key_pitch;
  float* diagonals;  // of b X, [chunks, tiles of a chunk twice, heads, kDiagonals], or null

  __host__ __device__ __forceinline__ int tiles() const { return ceil_div(longest, kTile); }
};

// One chunk as a sequence: the `index`-th of `chunks` of its own sequence, at `place` among all.
struct Chunk : Sequence {
  int place, index, chunks;

  // Whether S, or U, has any token for it.
  __device__ __forceinline__ bool after_others(bool causal) const { return !causal || index > 0; }
  __device__ __forceinline__ bool before_others(bool causal) const { return !causal || index + 1 < chunks; }
  // Where the sum of states is that it takes.
  __device__ __forceinline__ int sum(bool causal) const { return causal ? place : place - index; }
};

// Places of the chunks of the n-th sequence: it begins at row r, its chunks at r / C + n.
__device__ __forceinline__ int first_place(const Problem& p, int n) {
  return p.cu_seqlens == nullptr ? n * static_cast<int>((p.queries + p.chunk - 1) / p.chunk)
                                 : static_cast<int>(p.cu_seqlens[n] / p.chunk) + n;
}

// The chunk at a place; with `queries` 0 if there is none.
__device__ __forceinline__ Chunk chunk_at(const Problem& p, int place) {
  if (p.num_sequences == 0) {
    return {};
  }
  int n = 0;  // the last sequence that begins at or before the place
  for (int end = static_cast<int>(p.num_sequences); end - n > 1;) {
    const int middle = n + (end - n) / 2;
    (first_place(p, middle) <= place ? n : end) = middle;
  }
  const Sequence s = sequence(p, n);
  const int index = place - first_place(p, n);
  const int64_t first = index * p.chunk;
  if (index < 0 || first >= s.queries) {
    return {};
  }
  const int row = s.query_row + static_cast<int>(first);
  const int tokens = static_cast<int>(s.queries - first < p.chunk ? s.queries - first : p.chunk);
  return {{s.batch, row, row, tokens, tokens, 0}, place, index, static_cast<int>((s.queries + p.chunk - 1) / p.chunk)};
}

__device__ __forceinline__ float lin_factor(const Problem& p, const Sequence& s, int64_t row) {
  return factor(p, p.lin_scale, p.d, s, row);
}

// Elements before a state.
__device__ __forceinline__ int64_t state_at(const Pass& pass, int place, int kv_head) {
  return (place * pass.p.kv_heads + kv_head) * pass.p.key_dim * pass.value_pitch;
}
template <class E>
__device__ __forceinline__ Rows<E> state_rows(const Pass& pass, const void* sums, int place, int kv_head) {
  return {static_cast<const E*>(sums) + state_at(pass, place, kv_head),
          pass.value_pitch,
          1,
          true,
          static_cast<int>(pass.p.key_dim),
          static_cast<int>(pass.p.value_dim)};
}
template <class E>
__device__ __forceinline__ Rows<E> gradients_of(const Pass& pass, const Sequence& s, int head) {
  return own_rows<E>(pass.p, pass.g, pass.value_pitch, s, head, static_cast<int>(pass.p.value_dim));
}

// kTile queries and kTile keys of one head and chunk.
template <class F, bool kBackward>
__device__ __forceinline__ void make_scores(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int heads = static_cast<int>(p.heads), tiles = pass.tiles();
  const int key_tile = id % tiles, tile = id / tiles % tiles, head = id / tiles / tiles % heads;
  Chunk s = chunk_at(p, id / tiles / tiles / heads);
  s.first = tile * kTile;
  const int key = key_tile * kTile;
  if (s.first >= s.queries || key >= s.seen(p.causal)) {
    return;
  }
  const int count = s.count();
  for (int i = block.thread; i < kTile; i += kThreads) {
    shared.own[i] = i < count ? factor(p, p.out_scale, p.c, s, static_cast<int64_t>(s.query_row) + s.first + i) : 0;
  }
  const auto times_c = [&](int row, float x) { return shared.own[row] * x; };
  Rows<E> g{};
  if constexpr (kBackward) {
    g = gradients_of<E>(pass, s, head);
  }
  float scores[F::kN][4] = {}, grads[kBackward ? F::kN : 1][4] = {};
  score_tile<F, kBackward>(block, p, s, head, key, score_operands<typename F::T>(p, s, head, g), scores, grads, times_c,
                           times_c);
  const int64_t row = s.batch * p.queries + s.query_row + s.first;
  const int64_t to = (row * heads + head) * pass.pitch + key;
  write_scores(block, scores, static_cast<E*>(pass.scores) + to, heads * pass.pitch, count, false);
  if constexpr (kBackward) {
    __syncthreads();
    write_scores(block, grads, static_cast<E*>(pass.grads) + to, heads * pass.pitch, count, true);
    if (pass.diagonals != nullptr) {
      const int64_t at = ((static_cast<int64_t>(s.place) * tiles + tile) * tiles + key_tile) * heads + head;
      add_tile_diagonals(block, pass.diagonals + at * kDiagonals);
    }
  }
}

// kTile rows and kColumns columns of a chunk's S, or U.
template <class F, class Left, class Right>
__device__ __forceinline__ void make_state(const Pass& pass, Shared<F>& shared, const Chunk& s, int kv_head, int row,
                                           int slice, int heads, float* states, Left&& left, Right&& right) {
  Block<F> block(shared);
  const int first_column = slice * F::kColumns;
  float d[F::kN][4] = {};
  accumulate_rows(block, d, 0, s.queries, heads, left, row, right, first_column);
  block.stage(d);
  float* const to = states + state_at(pass, s.place, kv_head) + row * pass.value_pitch + first_column;
  const int64_t rows = pass.p.key_dim - row, columns = pass.value_pitch - first_column;
  constexpr int kVectors = F::kColumns / 4;
  for (int i = block.thread; i < (rows < kTile ? rows : kTile) * kVectors; i += kThreads) {
    const int r = i / kVectors, column = i % kVectors * 4;
    if (column < columns) {
      store(to + r * pass.value_pitch + column, reinterpret_cast<const Vector<float, 4>&>(shared.staged[r][column]));
    }
  }
}

template <class F, bool kBackward>
__device__ __forceinline__ void make_states(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  const Problem& p = pass.p;
  const int slices = ceil_div(static_cast<int>(p.value_dim), F::kColumns);
  const int tiles = ceil_div(static_cast<int>(p.key_dim), kTile), kv_heads = static_cast<int>(p.kv_heads);
  const int slice = id % slices, row = id / slices % tiles * kTile, kv_head = id / slices / tiles % kv_heads;
  const int task = id / slices / tiles / kv_heads;  // of both kinds
  const Chunk s = chunk_at(p, task % pass.chunks);
  if (s.queries == 0) {
    return;
  }
  const int group = static_cast<int>(p.heads / p.kv_heads);
  if (task < pass.chunks) {
    if (s.before_others(p.causal)) {
      make_state(
          pass, shared, s, kv_head, row, slice, 1, pass.s.own,
          [&](int) { return keys_of<T>(p, p.lin_k, s, kv_head * group, p.key_dim); },
          [&](int) { return keys_of<T>(p, p.v, s, kv_head * group, p.value_dim); });
    }
  } else if constexpr (kBackward) {
    if (s.after_others(p.causal)) {
      make_state(
          pass, shared, s, kv_head, row, slice, group, pass.u.own,
          [&](int i) {
            return own_rows<E>(p, pass.lin_q, pass.key_pitch, s, kv_head * group + i, static_cast<int>(p.key_dim));
          },
          [&](int i) { return gradients_of<E>(pass, s, kv_head * group + i); });
    }
  }
}

// Four neighbours of a state to a thread: the sum over chunks in their order, or for U in the other, before each chunk;
// if not causal over all, at the first.
template <class T>
__device__ __forceinline__ void chain_states(const Pass& pass, int64_t id) {
  using E = typename Products<T>::Operand;
  const Problem& p = pass.p;
  const int64_t vectors = p.kv_heads * p.key_dim * pass.value_pitch / 4;  // of a chunk
  int64_t at = id * kThreads + threadIdx.x;
  const bool reverse = at >= p.num_sequences * vectors;
  const States& states = reverse ? pass.u : pass.s;
  at -= reverse ? p.num_sequences * vectors : 0;
  if (at >= p.num_sequences * vectors || states.own == nullptr) {
    return;
  }
  const int n = static_cast<int>(at / vectors), first = first_place(p, n);
  const int count = static_cast<int>((sequence(p, n).queries + p.chunk - 1) / p.chunk);
  const auto element_of = [&](int place) { return (place * vectors + at % vectors) * 4; };
  float sum[4] = {};
  const auto write = [&](int place) {
    Vector<E, 4> out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.x[i] = operand<T>(sum[i]);
    }
    store(static_cast<E*>(states.sums) + element_of(place), out);
  };
  for (int i = 0; i < count; ++i) {
    const int place = first + (reverse ? count - 1 - i : i);
    Vector<float, 4> own{};
    if (!p.causal || i + 1 < count) {
      own = load_once<4>(states.own + element_of(place));
    }
    if (p.causal && i > 0) {
      write(place);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      sum[e] += own.x[e];
    }
  }
  if (!p.causal && count > 0) {
    write(first);
  }
}

// kTile rows and kColumns columns of the output.
template <class F>
__device__ __forceinline__ void make_out(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int slices = ceil_div(static_cast<int>(p.value_dim), F::kColumns), heads = static_cast<int>(p.heads);
  const int slice = id % slices, head = id / slices % heads, tile = id / slices / heads % pass.tiles();
  Chunk s = chunk_at(p, id / slices / heads / pass.tiles());
  s.first = tile * kTile;
  if (s.first >= s.queries) {
    return;
  }
  for (int i = block.thread; i < kTile; i += kThreads) {
    shared.own[i] = i < s.count() ? lin_factor(p, s, static_cast<int64_t>(s.query_row) + s.first + i) : 0;
  }
  const int first_column = slice * F::kColumns, group = heads / static_cast<int>(p.kv_heads);
  float d[F::kN][4] = {};
  if (s.after_others(p.causal)) {
    const Rows<T> q = queries_of<T>(p, p.lin_q, s, head, p.key_dim);
    const Rows<E> state = state_rows<E>(pass, pass.s.sums, s.sum(p.causal), head / group);
    block.template accumulate<false, true>(d, ceil_div(q.columns, F::kDepth), [&](Stage<F>& stage, int step) {
      block.load(stage.a, q, s.first, step * F::kDepth);
      block.load(stage.turned_b, state, step * F::kDepth, first_column);
    });
    block.for_each([&](int row, int, int n, int i) { d[n][i] *= shared.own[row]; });
  }
  const Rows<E> scores = own_rows<E>(p, pass.scores, pass.pitch, s, head, static_cast<int>(pass.pitch));
  const Rows<T> v = keys_of<T>(p, p.v, s, head, p.value_dim);
  block.template accumulate<false, true>(d, ceil_div(s.seen(p.causal), F::kDepth), [&](Stage<F>& stage, int step) {
    block.load(stage.a, scores, s.first, step * F::kDepth);
    block.load(stage.turned_b, v, step * F::kDepth, first_column);
  });
  block.stage(d);
  write_outputs(block, p, s, head, first_column, [](int, int64_t) { return 1.0f; });
}

// One row to a warp: g, d q′ and the gradient of the gate.
template <class T>
__device__ __forceinline__ void prepare_rows(const Pass& pass, int64_t id) {
  using E = typename Products<T>::Operand;
  const Problem& p = pass.p;
  const int64_t at = id * kWarps + threadIdx.x / 32;  // of [B, n, heads]
  if (at >= p.batch * p.queries * p.heads) {
    return;
  }
  const int64_t head = at % p.heads, row = at / p.heads % p.queries, batch = at / p.heads / p.queries;
  const bool keep = keeps_query(p, batch, row);
  prepare_row<T>(p, batch, row, head, keep, 1, static_cast<E*>(pass.g) + at * pass.value_pitch);
  const float factor = lin_factor(p, {static_cast<int>(batch), 0, 0, 0, 0, 0}, row);
  const T* const q = element<const T>(p.lin_q, batch, row, head);
  E* const to = static_cast<E*>(pass.lin_q) + at * pass.key_pitch;
  for (int64_t e = threadIdx.x % 32; e < p.key_dim; e += 32) {
    to[e] = operand<T>(keep ? factor * widen(q[e * p.lin_q.stride[3]]) : 0);
  }
}

// Which keys and columns a block has, of `slices`.
struct KeyBlock {
  Chunk s;
  int kv_head, key, slice;

  __device__ __forceinline__ int count() const { return s.keys - key < kTile ? s.keys - key : kTile; }
};
__device__ __forceinline__ KeyBlock key_block(const Pass& pass, int slices, int id) {
  const int tiles = pass.tiles(), kv_heads = static_cast<int>(pass.p.kv_heads);
  const int slice = id % slices, kv_head = id / slices % kv_heads, tile = id / slices / kv_heads % tiles;
  return {chunk_at(pass.p, id / slices / kv_heads / tiles), kv_head, tile * kTile, slice};
}

// Adds what a chunk's keys get through their scores: Pᵀ g, or Xᵀ q.
template <class F, class Right>
__device__ __forceinline__ void add_through_scores(const Pass& pass, Block<F>& block, float (&d)[F::kN][4],
                                                   const KeyBlock& b, const void* scores, Right&& right) {
  using E = typename F::E;
  const Problem& p = pass.p;
  const int group = static_cast<int>(p.heads / p.kv_heads), head = b.kv_head * group;
  const int begin = b.s.first_seeing(p.causal, b.key);
  accumulate_rows(
      block, d, begin, b.s.queries - begin, group,
      [&](int i) { return own_rows<E>(p, scores, pass.pitch, b.s, head + i, static_cast<int>(pass.pitch)); }, b.key,
      [&](int i) { return right(head + i); }, b.slice * F::kColumns);
}

template <class F>
__device__ __forceinline__ void make_value_gradients(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(shared);
  const Problem& p = pass.p;
  const KeyBlock b = key_block(pass, ceil_div(static_cast<int>(p.value_dim), F::kColumns), id);
  const Chunk& s = b.s;
  if (b.key >= s.keys) {
    return;
  }
  const int first_column = b.slice * F::kColumns;
  float d[F::kN][4] = {};
  if (s.before_others(p.causal)) {
    const Rows<T> k = keys_of<T>(p, p.lin_k, s, b.kv_head * static_cast<int>(p.heads / p.kv_heads), p.key_dim);
    const Rows<E> state = state_rows<E>(pass, pass.u.sums, s.sum(p.causal), b.kv_head);
    block.template accumulate<false, true>(d, ceil_div(k.columns, F::kDepth), [&](Stage<F>& stage, int step) {
      block.load(stage.a, k, b.key, step * F::kDepth);
      block.load(stage.turned_b, state, step * F::kDepth, first_column);
    });
  }
  add_through_scores(pass, block, d, b, pass.scores, [&](int head) { return gradients_of<E>(pass, s, head); });
  const auto keep = [&](int i, float x) {  // 0 · NaN is no 0
    return keeps(p.key_mask, p.key_mask_stride, s.batch, static_cast<int64_t>(s.key_row) + b.key + i) ? x : 0;
  };
  write_gradients(block, d, p.grad_v, s.batch, static_cast<int64_t>(s.key_row) + b.key, b.count(), b.kv_head,
                  first_column, p.value_dim, keep);
}

// kTile rows and kColumns columns of the gradient of a linear sum's queries, or keys: rows of g, or v, times what they
// take of the states.
template <class F, class S, class Change>
__device__ __forceinline__ void make_linear_gradients(const Pass& pass, Shared<F>& shared, const Chunk& s, int row,
                                                      int slice, bool reached, const Rows<S>& left, const void* states,
                                                      int kv_head, const View& grad, int head, Change&& change) {
  using E = typename F::E;
  Block<F> block(shared);
  const int first_column = slice * F::kColumns;
  float d[F::kN][4] = {};
  if (reached) {
    const Rows<E> state = state_rows<E>(pass, states, s.sum(pass.p.causal), kv_head);
    block.template accumulate<false, false>(d, ceil_div(left.columns, F::kDepth), [&](Stage<F>& stage, int step) {
      block.load(stage.a, left, row, step * F::kDepth);
      block.load(stage.b, state, first_column, step * F::kDepth);
    });
  }
  write_gradients(block, d, grad, s.batch, static_cast<int64_t>(s.query_row) + row,
                  s.queries - row < kTile ? s.queries - row : kTile, head, first_column, pass.p.key_dim, change);
}

// Gradients of rows of queries and keys, linear and not, in four groups of blocks, those of most depth first.
template <class F>
__device__ __forceinline__ void make_row_gradients(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  const Problem& p = pass.p;
  const int slices = ceil_div(static_cast<int>(p.key_dim), F::kColumns);
  const int heads = static_cast<int>(p.heads), kv_heads = static_cast<int>(p.kv_heads), group = heads / kv_heads;
  const int per_head = pass.chunks * pass.tiles() * slices, of_both = per_head * (heads + kv_heads);
  const bool linear = id < of_both;
  id -= linear ? 0 : of_both;
  const bool of_queries = id < per_head * heads;
  if (of_queries) {
    const int slice = id % slices, head = id / slices % heads, tile = id / slices / heads % pass.tiles();
    Chunk s = chunk_at(p, id / slices / heads / pass.tiles());
    s.first = tile * kTile;
    if (s.first >= s.queries) {
      return;
    }
    const int64_t row = static_cast<int64_t>(s.query_row) + s.first;
    if (linear) {
      const auto times_d = [&](int i, float x) {
        const bool keep = keeps(p.query_mask, p.query_mask_stride, s.batch, row + i);
        return keep ? lin_factor(p, s, row + i) * x : 0;
      };
      return make_linear_gradients(pass, shared, s, s.first, slice, s.after_others(p.causal),
                                   gradients_of<E>(pass, s, head), pass.s.sums, head / group, p.grad_lin_q, head,
                                   times_d);
    }
    Block<F> block(shared);
    const int first_column = slice * F::kColumns;
    const Rows<E> grads = own_rows<E>(p, pass.grads, pass.pitch, s, head, static_cast<int>(pass.pitch));
    const Rows<T> k = keys_of<T>(p, p.k, s, head, p.key_dim);
    float d[F::kN][4] = {};
    block.template accumulate<false, true>(d, ceil_div(s.seen(p.causal), F::kDepth), [&](Stage<F>& stage, int step) {
      block.load(stage.a, grads, s.first, step * F::kDepth);
      block.load(stage.turned_b, k, step * F::kDepth, first_column);
    });
    write_gradients(block, d, p.grad_q, s.batch, row, s.count(), head, first_column, p.key_dim,
                    [](int, float x) { return x; });
    return;
  }
  const KeyBlock b = key_block(pass, slices, id - per_head * heads);
  if (b.key >= b.s.keys) {
    return;
  }
  const int64_t row = static_cast<int64_t>(b.s.key_row) + b.key;
  if (linear) {
    const Rows<T> v = keys_of<T>(p, p.v, b.s, b.kv_head * group, p.value_dim);
    const auto keep = [&](int i, float x) { return keeps(p.key_mask, p.key_mask_stride, b.s.batch, row + i) ? x : 0; };
    return make_linear_gradients(pass, shared, b.s, b.key, b.slice, b.s.before_others(p.causal), v, pass.u.sums,
                                 b.kv_head, p.grad_lin_k, b.kv_head, keep);
  }
  Block<F> block(shared);
  float d[F::kN][4] = {};
  add_through_scores(pass, block, d, b, pass.grads,
                     [&](int head) { return queries_of<T>(p, p.q, b.s, head, p.key_dim); });
  write_gradients(block, d, p.grad_k, b.s.batch, row, b.count(), b.kv_head, b.slice * F::kColumns, p.key_dim,
                  [](int, float x) { return x; });
}

// One distance of one head's bias to a warp: the sum over all tiles that have it.
__device__ __forceinline__ void add_diagonals(const Pass& pass, int64_t id) {
  const Problem& p = pass.p;
  const int64_t at = id * kWarps + threadIdx.x / 32;
  if (at >= p.bias_heads * p.distances) {
    return;
  }
  const int heads = static_cast<int>(p.heads), tiles = pass.tiles();
  const int head = static_cast<int>(at / p.distances);
  const int64_t distance = at % p.distances - p.distances / 2;
  float sum = 0;
  for (int64_t n = threadIdx.x % 32; n < static_cast<int64_t>(pass.chunks) * tiles * tiles; n += 32) {
    const int key = static_cast<int>(n % tiles) * kTile, first = static_cast<int>(n / tiles % tiles) * kTile;
    const int64_t diagonal = distance - (key - first) + (kTile - 1);
    if (diagonal < 0 || diagonal >= kDiagonals - 1) {
      continue;
    }
    Chunk s = chunk_at(p, static_cast<int>(n / tiles / tiles));
    s.first = first;
    if (s.first >= s.queries || key >= s.seen(p.causal)) {
      continue;
    }
    for (int h = p.bias_heads == 1 ? 0 : head; h < (p.bias_heads == 1 ? heads : head + 1); ++h) {
      sum += pass.diagonals[(n * heads + h) * kDiagonals + diagonal];
    }
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  if (threadIdx.x % 32 == 0) {
    static_cast<float*>(p.grad_bias)[at] = sum;
  }
}

template <class F, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) mixed_scores_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_scores<F, kBackward>(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
template <class F, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) mixed_states_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_states<F, kBackward>(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
template <class T>
__global__ void __launch_bounds__(kThreads) mixed_chain_kernel(const __grid_constant__ Pass pass) {
  chain_states<T>(pass, blockIdx.x);
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) mixed_out_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_out(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
template <class T>
__global__ void __launch_bounds__(kThreads) mixed_prepare_kernel(const __grid_constant__ Pass pass) {
  prepare_rows<T>(pass, blockIdx.x);
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) mixed_values_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_value_gradients(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) mixed_rows_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_row_gradients(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
  } else {
    __trap();
  }
}
__global__ void __launch_bounds__(kThreads) mixed_bias_kernel(const __grid_constant__ Pass pass) {
  add_diagonals(pass, blockIdx.x);
}

}  // namespace kx::mixed_chunk_attention
