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

#include "block.cuh"

namespace kx::gau_attention {

// What the copy engine brings to one launch: both operands of its product, and backward of that of G and values.
struct Maps {
  TensorMap a, b, g, v;
};

// The workspace and what one launch makes of it. Without gaps but for `pitch`.
struct Pass {
  Problem p;
  Maps maps;
  void *scores, *grads;  // P and X, of the operands' type: [tiles of rows, heads, kTile, pitch] forward, else
                         // [B, n_q, heads, pitch]
  int64_t pitch;         // elements of a row
  int64_t first;         // forward the first of the tiles, else the first key, of each sequence
  int tiles, key_tiles;  // forward of rows and heads, else of rows and of keys
  int keys;              // of a panel; forward of a sequence, at most
  bool last;             // panel of the backward pass

  // Backward.
  void* g;  // [B, n_q, heads, g_pitch], of the operands' type
  int64_t g_pitch;
  float* shift;         // δ, [B, n_q, heads]
  float* grad_queries;  // sums over panels, [B, n_q, heads, key_dim], or null for one panel
  float* diagonals;     // of b X, [tiles of rows, heads, tiles of keys, kDiagonals], or null
};

// The `id`-th tile of all sequences, whose rows `ends` delimit, or of `rows` each; with `queries` and `keys` 0 if there
// is none. All lanes of a warp call it.
__device__ __forceinline__ Sequence tile_at(const Problem& p, const int32_t* ends, int64_t rows, int id) {
  if (ends == nullptr) {
    const int tiles = ceil_div(static_cast<int>(rows), kTile);
    Sequence s = sequence(p, id / tiles);
    s.first = id % tiles * kTile;
    return s;
  }
  const int lane = threadIdx.x % 32, sequences = static_cast<int>(p.num_sequences);
  for (int begin = 0; begin < sequences; begin += 32) {
    const int n = begin + lane;
    const int tiles = n < sequences ? ceil_div(ends[n + 1] - ends[n], kTile) : 0;
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
__device__ __forceinline__ Sequence tile_of_rows(const Problem& p, int id) {
  return tile_at(p, p.cu_seqlens, p.queries, id);
}

__device__ __forceinline__ float out_factor(const Problem& p, const Sequence& s, int64_t row, float sum) {
  if (p.by_sum) {
    return sum != 0 ? 1 / sum : 0;
  }
  return factor(p, p.out_scale, p.c, s, row);
}

// Boxes of a map from (row, head) of a sequence's batch entry on; or where threads copy, what rows() says.
template <class F, class OrRows>
__device__ __forceinline__ auto boxes_or(const TensorMap& map, const Sequence& s, int row, int head, OrRows&& rows) {
  if constexpr (F::kTma) {
    return Boxes{&map, s.batch, row, head};
  } else {
    return rows();
  }
}
// The same of a workspace [B, n_q, heads, pitch].
template <class F>
__device__ __forceinline__ auto own_operand(const Pass& pass, const TensorMap& map, const void* data, int64_t pitch,
                                            const Sequence& s, int head, int columns) {
  return boxes_or<F>(map, s, s.query_row, head,
                     [&] { return own_rows<typename F::E>(pass.p, data, pitch, s, head, columns); });
}

// kTile queries and kTile keys of one head.
template <class F, bool kBackward>
__device__ __forceinline__ void make_scores(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int heads = static_cast<int>(p.heads), key_tiles = ceil_div(pass.keys, kTile);
  const int key_tile = id % key_tiles, at = id / key_tiles;  // at: of rows and heads
  const int task = at + static_cast<int>(kBackward ? 0 : pass.first), head = task % heads;
  const Sequence s = tile_of_rows(p, task / heads);
  const int key = static_cast<int>(kBackward ? pass.first : 0) + key_tile * kTile;
  if (s.first >= s.queries || key >= s.seen(p.causal)) {
    return;
  }
  const int count = s.count();
  const int64_t row = s.batch * p.queries + s.query_row + s.first;
  for (int i = block.thread; kBackward && i < kTile; i += kThreads) {
    shared.own[i] = i < count ? pass.shift[(row + i) * heads + head] : 0;
  }
  const auto g = own_operand<F>(pass, pass.maps.g, pass.g, pass.g_pitch, s, head, static_cast<int>(p.value_dim));
  const int kv_head = head / static_cast<int>(p.heads / p.kv_heads);
  const ScoreOperands from{
      boxes_or<F>(pass.maps.a, s, s.query_row, head, [&] { return queries_of<T>(p, p.q, s, head, p.key_dim); }),
      boxes_or<F>(pass.maps.b, s, s.key_row, kv_head, [&] { return keys_of<T>(p, p.k, s, head, p.key_dim); }), g,
      boxes_or<F>(pass.maps.v, s, s.key_row, kv_head, [&] { return keys_of<T>(p, p.v, s, head, p.value_dim); })};
  float scores[F::kN][4] = {}, grads[kBackward ? F::kN : 1][4] = {};
  score_tile<F, kBackward>(
      block, p, s, head, key, from, scores, grads, [](int, float x) { return x; },
      [&](int i, float x) { return x - shared.own[i]; });
  if constexpr (!kBackward) {
    write_scores(block, scores, static_cast<E*>(pass.scores) + at * kTile * pass.pitch + key, pass.pitch, kTile, false);
  } else {
    const int64_t to = (row * heads + head) * pass.pitch + key_tile * kTile;
    write_scores(block, scores, static_cast<E*>(pass.scores) + to, heads * pass.pitch, count, false);
    __syncthreads();
    write_scores(block, grads, static_cast<E*>(pass.grads) + to, heads * pass.pitch, count, true);
    if (pass.diagonals != nullptr) {
      add_tile_diagonals(block, pass.diagonals + (static_cast<int64_t>(at) * key_tiles + key_tile) * kDiagonals);
    }
  }
}

// Columns of the output from `first` on, of what is staged, and the sums of rows, which shared.own are.
template <class F>
__device__ __forceinline__ void finish_out(Block<F>& block, const Problem& p, const Sequence& s, int head, int first) {
  const float* const sums = block.shared.own;
  write_outputs(block, p, s, head, first,
                [&](int i, int64_t row) { return out_factor(p, s, row, p.by_sum ? sums[i] : 0); });
  for (int i = block.thread; p.by_sum && first == 0 && i < s.count(); i += kThreads) {
    const int64_t row = static_cast<int64_t>(s.query_row) + s.first + i;
    static_cast<float*>(p.sums)[(s.batch * p.queries + row) * p.heads + head] = sums[i];
  }
}

// Adds half a row of a tile of scores to a thread's sum; the sums of two neighbours are of one row.
template <class E, int kColumns, int kSwizzle>
__device__ __forceinline__ void add_half_row(float& sum, Tile<E, kTile, kColumns, kSwizzle>& scores, int thread) {
#pragma unroll 4
  for (int c = 0; c < kColumns / 2; ++c) {
    sum += widen(*scores.at(thread / 2, thread % 2 * (kColumns / 2) + c));
  }
}
__device__ __forceinline__ void write_row_sum(float sum, float* sums, int thread) {
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  if (thread % 2 == 0) {
    sums[thread / 2] = sum;
  }
}

// kTile rows and kColumns columns of the output.
template <class F>
__device__ __forceinline__ void make_out(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int heads = static_cast<int>(p.heads);
  const int slices = ceil_div(static_cast<int>(p.value_dim), F::kColumns), slice = id % slices, at = id / slices;
  const int task = at + static_cast<int>(pass.first), head = task % heads;
  const Sequence s = tile_of_rows(p, task / heads);
  if (s.first >= s.queries) {
    return;
  }
  const int first_column = slice * F::kColumns;
  const auto scores = boxes_or<F>(pass.maps.a, Sequence{}, at * kTile, 0, [&] {
    return Rows<E>{static_cast<const E*>(pass.scores) + at * kTile * pass.pitch,
                   pass.pitch,
                   1,
                   true,
                   kTile,
                   static_cast<int>(pass.pitch)};
  });
  const auto v = boxes_or<F>(pass.maps.b, s, s.key_row, head / static_cast<int>(p.heads / p.kv_heads),
                             [&] { return keys_of<T>(p, p.v, s, head, p.value_dim); });
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
          add_half_row(sum, stage.a, block.thread);
        }
      });
  if (p.by_sum) {
    write_row_sum(sum, shared.own, block.thread);
  }
  block.stage(d);
  finish_out(block, p, s, head, first_column);
}

// One row to a warp: G, δ and the gradient of the gate.
template <class T>
__device__ __forceinline__ void prepare_rows(const Pass& pass, int64_t id) {
  using E = typename Products<T>::Operand;
  const Problem& p = pass.p;
  const int64_t at = id * kWarps + threadIdx.x / 32;  // of [B, n_q, heads]
  if (at >= p.batch * p.queries * p.heads) {
    return;
  }
  const int64_t head = at % p.heads, row = at / p.heads % p.queries, batch = at / p.heads / p.queries;
  const bool keep = keeps_query(p, batch, row);
  const Sequence s{static_cast<int>(batch), 0, 0, 0, 0, 0};
  const float c = keep ? out_factor(p, s, row, p.by_sum ? static_cast<const float*>(p.sums)[at] : 0) : 0;
  float shift = prepare_row<T>(p, batch, row, head, keep, c, static_cast<E*>(pass.g) + at * pass.g_pitch);
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    shift += __shfl_xor_sync(0xffffffffu, shift, step);
  }
  if (threadIdx.x % 32 == 0) {
    pass.shift[at] = shift;
  }
}

// kTile keys and kColumns columns of Pᵀ G or Xᵀ q, for all heads that share the keys.
template <class F, class Left, class Right>
__device__ __forceinline__ void make_key_gradients(const Pass& pass, Shared<F>& shared, const Sequence& s, int kv_head,
                                                   int key, int slice, int64_t columns, const View& grad, Left&& left,
                                                   Right&& right) {
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int group = static_cast<int>(p.heads / p.kv_heads), head = kv_head * group;
  const int begin = s.first_seeing(p.causal, key), first_column = slice * F::kColumns;
  float d[F::kN][4] = {};
  accumulate_rows(
      block, d, begin, s.queries - begin, group, [&](int i) { return left(head + i); },
      key - static_cast<int>(pass.first), [&](int i) { return right(head + i); }, first_column);
  write_gradients(block, d, grad, s.batch, static_cast<int64_t>(s.key_row) + key,
                  s.keys - key < kTile ? s.keys - key : kTile, kv_head, first_column, columns,
                  [](int, float x) { return x; });
}

// Which keys and columns a block has, of `slices`: a tile of a sequence's keys, and the head.
struct KeyBlock {
  Sequence s;
  int kv_head, key, slice;

  // Whether the tile is of the panel.
  __device__ __forceinline__ bool in(const Pass& pass) const {
    return key < s.keys && key >= pass.first && key < pass.first + pass.keys;
  }
};
__device__ __forceinline__ KeyBlock key_block(const Pass& pass, int slices, int id) {
  const Problem& p = pass.p;
  const int kv_heads = static_cast<int>(p.kv_heads), tiles = ceil_div(pass.keys, kTile);
  const int slice = id % slices, kv_head = id / slices % kv_heads, tile = id / slices / kv_heads;
  if (p.cu_seqlens_k == nullptr) {
    return {sequence(p, tile / tiles), kv_head, static_cast<int>(pass.first) + tile % tiles * kTile, slice};
  }
  const Sequence s = tile_at(p, p.cu_seqlens_k, p.keys, tile);
  return {s, kv_head, s.first, slice};
}

template <class F>
__device__ __forceinline__ void make_value_gradients(const Pass& pass, Shared<F>& shared, int id) {
  const Problem& p = pass.p;
  const int dim = static_cast<int>(p.value_dim);
  const KeyBlock b = key_block(pass, ceil_div(dim, F::kColumns), id);
  if (b.in(pass)) {
    make_key_gradients(
        pass, shared, b.s, b.kv_head, b.key, b.slice, dim, p.grad_v,
        [&](int head) { return own_operand<F>(pass, pass.maps.a, pass.scores, pass.pitch, b.s, head, pass.keys); },
        [&](int head) { return own_operand<F>(pass, pass.maps.b, pass.g, pass.g_pitch, b.s, head, dim); });
  }
}

// kTile rows and kColumns columns of the gradient of queries: what this panel adds.
template <class F>
__device__ __forceinline__ void make_query_gradients(const Pass& pass, Shared<F>& shared, int id) {
  using E = typename F::E;
  using T = typename F::T;
  Block<F> block(shared);
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
  if (b.in(pass)) {
    make_key_gradients(
        pass, shared, b.s, b.kv_head, b.key, b.slice, p.key_dim, p.grad_k,
        [&](int head) { return own_rows<typename F::E>(p, pass.grads, pass.pitch, b.s, head, pass.keys); },
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
