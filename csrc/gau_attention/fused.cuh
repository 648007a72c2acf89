// Gated attention on chip: a block has kTile queries and makes of every tile of keys its own scores, which stay in
// registers as the next product takes them, in the names of kx_kernels/ops/gau_attention/README.md.
//
//   kernel   product            to
//   fused    A = c f(q kᵀ) v    o = gate ⊙ A, or for a segment of the keys its part of the sum
//   combine  –                  the sum of the parts, and o
#pragma once

#include "kernel.cuh"

namespace kx::gau_attention {

constexpr int kMaxKeyDim = 128;  // of queries that a block has room for

// How the kernel is laid out: kColumns of the values, kKeys keys at a time, which lie in kStages places in turn.
template <class T_, int kColumns_, bool kWgmma_>
struct OnChipForm {
  using T = T_;
  using E = typename Products<T>::Operand;
  static constexpr int kColumns = kColumns_;
  static constexpr bool kWgmma = kWgmma_, kTma = false;
  static constexpr int kStages = kWgmma ? 3 : 2;
  static constexpr int kKeys = 128 / sizeof(E);
  static constexpr int kDepth = 128 / sizeof(E);  // of a panel of queries or keys
  static constexpr int kPanels = kMaxKeyDim / kDepth;
  static constexpr int kSwizzle = kWgmma ? 128 : 0;
  static constexpr int kN = kColumns / 8, kScoreN = kKeys / 8;  // tiles of mma.sync that a warp has beside each other
};

template <class F>
using KeyTile = Tile<typename F::E, F::kKeys, F::kDepth, F::kSwizzle>;

// The keys of a tile, and the values of the tile before.
template <class F>
struct FusedStage {
  KeyTile<F> k[F::kPanels];
  Tile<typename F::E, F::kKeys, F::kColumns, F::kSwizzle> v;
};

template <class T, int kColumns, bool kWgmma>
struct Shared<OnChipForm<T, kColumns, kWgmma>> {
  using F = OnChipForm<T, kColumns, kWgmma>;
  union {
    struct {
      Tile<typename F::E, kTile, F::kDepth, F::kSwizzle> q[F::kPanels];
      FusedStage<F> stages[F::kStages];
    };
    float staged[kTile][kColumns + 4];  // a product, once it is whole
  };
  float own[kTile];  // sums of rows
  bool keep_key[F::kStages][F::kKeys];
};

struct FusedPass {
  Problem p;
  int segments, segment;  // keys of a segment, whole tiles
  float* parts;           // [segments, B, n_q, heads, pitch]: a segment's part of A before c, or null for one segment
  int64_t pitch;
  float* part_sums;  // [segments, B, n_q, heads], of a row's scores

  // Rows of parts before that of a segment's number, of a query of a sequence.
  __device__ __forceinline__ int64_t part(int number, const Sequence& s, int row, int head) const {
    return ((number * p.batch + s.batch) * p.queries + s.query_row + s.first + row) * p.heads + head;
  }
};

// Vectors of a part's columns from `first` on that a block has.
__device__ __forceinline__ int of_slice(const FusedPass& pass, int first, int columns) {
  const int64_t rest = pass.pitch - first;
  return static_cast<int>(rest < columns ? rest : columns) / 4;
}

// visit(f), f as a constant.
template <class Visit>
__device__ __forceinline__ void with_activation(Activation f, Visit&& visit) {
  switch (f) {
    case Activation::kRelu2:
      return visit(std::integral_constant<Activation, Activation::kRelu2>{});
    case Activation::kRelu:
      return visit(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kSilu:
      return visit(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kSigmoid:
      return visit(std::integral_constant<Activation, Activation::kSigmoid>{});
    case Activation::kLaplace:
      return visit(std::integral_constant<Activation, Activation::kLaplace>{});
    default:
      return visit(std::integral_constant<Activation, Activation::kIdentity>{});
  }
}

// Scores of a thread's rows, of which it has two.
template <class F>
class Scores {
 public:
  using T = typename F::T;

  __device__ __forceinline__ Scores(const Problem& p, const Sequence& s, int head)
      : p_(p),
        bias_(p.bias == nullptr
                  ? nullptr
                  : static_cast<const float*>(p.bias) + (p.bias_heads > 1 ? head : 0) * p.distances + p.distances / 2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int i = row(r), query = s.first + i;
      const int64_t at = static_cast<int64_t>(s.query_row) + query;
      const bool keep = query < s.queries && keeps(p.query_mask, p.query_mask_stride, s.batch, at);
      place_[r] = query + s.shift();
      seen_[r] = !keep ? 0 : p.causal && place_[r] < s.keys ? place_[r] + 1 : s.keys;
      scale_[r] = keep ? factor(p, p.scale, p.a, s, at) : 0;
      bias_scale_[r] = keep ? factor(p, p.bias_scale, p.b, s, at) : 0;
    }
  }

  // f of the scores of kKeys keys from `key` on, in their place.
  __device__ __forceinline__ void weigh(float (&scores)[F::kScoreN][4], int key, const bool* keep_key) {
    with_activation(p_.activation, [&](auto f) {
#pragma unroll
      for (int n = 0; n < F::kScoreN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int r = i / 2, column = 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
          const bool sees = key + column < seen_[r] && (p_.key_mask == nullptr || keep_key[column]);
          float x = scale_[r] * scores[n][i];
          if (bias_ != nullptr && sees) {
            x += bias_scale_[r] * bias_[key + column - place_[r]];
          }
          scores[n][i] = sees ? activate(decltype(f)::value, x) : 0;
        }
      }
    });
    if (p_.by_sum) {
#pragma unroll
      for (int n = 0; n < F::kScoreN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum_[i / 2] += widen(operand<T>(scores[n][i]));
        }
      }
    }
  }

  // The sums of all rows of the block.
  __device__ __forceinline__ void write_sums(float* sums) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] += __shfl_xor_sync(0xffffffffu, sum_[r], 1);
      sum_[r] += __shfl_xor_sync(0xffffffffu, sum_[r], 2);
      if (threadIdx.x % 4 == 0) {
        sums[row(r)] = sum_[r];
      }
    }
  }

 private:
  __device__ __forceinline__ static int row(int r) {
    const int thread = static_cast<int>(threadIdx.x);
    return thread / 32 * 16 + thread % 32 / 4 + 8 * r;
  }

  const Problem& p_;
  const float* const bias_;  // at distance 0
  int place_[2], seen_[2];   // the key that stands with the query, and how many it sees
  float scale_[2], bias_scale_[2], sum_[2] = {};
};

// kKeys keys from `key` on, and which of them are no padding.
template <class F, class S>
__device__ __forceinline__ void load_keys(Block<F>& block, const Problem& p, const Sequence& s, const Rows<S>& k,
                                          int key, KeyTile<F> (&to)[F::kPanels], bool (&keep)[F::kKeys]) {
  for (int i = 0; i < ceil_div(static_cast<int>(p.key_dim), F::kDepth); ++i) {
    block.load(to[i], k, key, i * F::kDepth);
  }
  for (int i = block.thread; p.key_mask != nullptr && i < F::kKeys; i += kThreads) {
    keep[i] =
        key + i < s.keys && keeps(p.key_mask, p.key_mask_stride, s.batch, static_cast<int64_t>(s.key_row) + key + i);
  }
}

// kTile rows and kColumns columns of the output, or of a segment's part of it. The scores of a tile are multiplied
// beside the values of the tile before, and f taken while these still are.
template <class F>
__device__ __forceinline__ void make_fused_out(const FusedPass& pass, Shared<F>& shared, int id) {
  using T = typename F::T;
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int heads = static_cast<int>(p.heads), slices = ceil_div(static_cast<int>(p.value_dim), F::kColumns);
  const int slice = id % slices, number = id / slices % pass.segments, task = id / slices / pass.segments;
  const int head = task % heads, first_column = slice * F::kColumns;
  const Sequence s = tile_of_rows(p, task / heads);
  const int begin = number * pass.segment, seen = s.seen(p.causal);
  const int end = seen < begin + pass.segment ? seen : begin + pass.segment;
  if (s.first >= s.queries || (pass.parts != nullptr && begin >= end)) {
    return;
  }
  const Rows<T> q = queries_of<T>(p, p.q, s, head, p.key_dim), k = keys_of<T>(p, p.k, s, head, p.key_dim);
  const Rows<T> v = keys_of<T>(p, p.v, s, head, p.value_dim);
  const int tiles = ceil_div(end - begin, F::kKeys), panels = ceil_div(static_cast<int>(p.key_dim), F::kDepth);
  const auto fetch = [&](int step) {
    FusedStage<F>& stage = shared.stages[step % F::kStages];
    const int key = begin + step * F::kKeys;
    if (step < tiles) {
      load_keys(block, p, s, k, key, stage.k, shared.keep_key[step % F::kStages]);
    }
    if (step > 0 && step <= tiles) {
      block.load(stage.v, v, key - F::kKeys, first_column);
    }
    commit_copies();
  };
  const auto arrived = [&](int step) -> FusedStage<F>& {
    wait_copies<F::kStages - 2>();
    block.sync();
    return shared.stages[step % F::kStages];
  };
  Scores<F> rows(p, s, head);
  float d[F::kN][4] = {};
  if (tiles > 0) {
    for (int i = 0; i < panels; ++i) {
      block.load(shared.q[i], q, s.first, i * F::kDepth);
    }
    for (int step = 0; step < F::kStages - 1; ++step) {
      fetch(step);
    }
    float scores[F::kScoreN][4];
    const auto begin_scores = [&](FusedStage<F>& stage) {
#pragma unroll
      for (auto& x : scores) {
        x[0] = x[1] = x[2] = x[3] = 0;
      }
      for (int i = 0; i < panels; ++i) {
        begin_product<T, false, false>(scores, shared.q[i], 16 * block.warp, stage.k[i], 0, F::kDepth);
      }
    };
    Fragments<T, F::kScoreN> weights;
    begin_scores(arrived(0));
    fetch(F::kStages - 1);
    finish_products<0, F::kWgmma>(scores);
    for (int step = 1;; ++step) {
      rows.weigh(scores, begin + (step - 1) * F::kKeys, shared.keep_key[(step - 1) % F::kStages]);
      finish_products<0, F::kWgmma>(d);
      weights.take(scores);
      FusedStage<F>& stage = arrived(step);
      if (step == tiles) {
        begin_product(d, weights, 0, stage.v, F::kKeys);
        break;
      }
      if constexpr (F::kWgmma) {
        begin_scores(stage);
        fetch(step + F::kStages - 1);
        begin_product(d, weights, 0, stage.v, F::kKeys);
      } else {  // one after the other: the registers of weights are free before scores need them
        fetch(step + F::kStages - 1);
        begin_product(d, weights, 0, stage.v, F::kKeys);
        begin_scores(stage);
      }
      finish_products<1, F::kWgmma>(scores);
    }
    finish_products<0, F::kWgmma>(d);
    __syncthreads();
  }
  if (p.by_sum) {
    rows.write_sums(shared.own);
  }
  block.stage(d);
  if (pass.parts == nullptr) {
    return finish_out(block, p, s, head, first_column);
  }
  const int vectors = of_slice(pass, first_column, F::kColumns);
  for (int i = block.thread; i < s.count() * vectors; i += kThreads) {
    const int row = i / vectors, column = i % vectors * 4;
    store(pass.parts + pass.part(number, s, row, head) * pass.pitch + first_column + column,
          reinterpret_cast<const Vector<float, 4>&>(shared.staged[row][column]));
  }
  for (int i = block.thread; p.by_sum && slice == 0 && i < s.count(); i += kThreads) {
    pass.part_sums[pass.part(number, s, i, head)] = shared.own[i];
  }
}

// kTile rows and kColumns columns of the output, from all segments that have keys for them, in their order.
template <class F>
__device__ __forceinline__ void combine_parts(const FusedPass& pass, Shared<F>& shared, int id) {
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int heads = static_cast<int>(p.heads), slices = ceil_div(static_cast<int>(p.value_dim), F::kColumns);
  const int slice = id % slices, task = id / slices, head = task % heads, first_column = slice * F::kColumns;
  const Sequence s = tile_of_rows(p, task / heads);
  if (s.first >= s.queries) {
    return;
  }
  const int segments = ceil_div(s.seen(p.causal), pass.segment), vectors = of_slice(pass, first_column, F::kColumns);
  for (int i = block.thread; i < s.count() * vectors; i += kThreads) {
    const int row = i / vectors, column = i % vectors * 4;
    Vector<float, 4> sum{};
#pragma unroll 4
    for (int number = 0; number < segments; ++number) {
      const auto part = load_once<4>(pass.parts + pass.part(number, s, row, head) * pass.pitch + first_column + column);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        sum.x[e] += part.x[e];
      }
    }
    store(&shared.staged[row][column], sum);
  }
  for (int i = block.thread; p.by_sum && i < s.count(); i += kThreads) {
    float sum = 0;
    for (int number = 0; number < segments; ++number) {
      sum += pass.part_sums[pass.part(number, s, i, head)];
    }
    shared.own[i] = sum;
  }
  __syncthreads();
  finish_out(block, p, s, head, first_column);
}

// A tile of P or X, as the next product takes it.
template <class F>
using Weights = Fragments<typename F::T, F::kN>;

// d += a · b, of kTile rows of b from `first_row` on and columns from `first_column` on.
template <class F, class S>
__device__ __forceinline__ void accumulate_own(Block<F>& block, float (&d)[F::kN][4], Weights<F>& a, const Rows<S>& b,
                                               int first_row, int first_column) {
  constexpr int kSteps = kTile / F::kDepth;
  const auto fetch = [&](int step) {
    if (step < kSteps) {
      block.load(block.shared.stages[step % F::kStages].turned_b, b, first_row + step * F::kDepth, first_column);
    }
    commit_copies();
  };
  for (int step = 0; step < F::kStages - 1; ++step) {
    fetch(step);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    wait_copies<F::kStages - 2>();
    block.sync();
    if constexpr (!F::kWgmma) {
      fetch(step + F::kStages - 1);
    }
    begin_product(d, a, step * F::kDepth, block.shared.stages[step % F::kStages].turned_b, F::kDepth);
    if constexpr (F::kWgmma) {
      fetch(step + F::kStages - 1);
    }
    finish_products<0, F::kWgmma>(d);
  }
  __syncthreads();
}

// What X takes besides f′ of kTile queries: δ, to where the tile of scores finds it.
template <class F>
__device__ __forceinline__ void load_shifts(const Pass& pass, Block<F>& block, const Sequence& s, int head) {
  const int64_t row = s.batch * pass.p.queries + s.query_row + s.first;
  for (int i = block.thread; i < kTile; i += kThreads) {
    block.shared.own[i] = i < s.count() ? pass.shift[(row + i) * pass.p.heads + head] : 0;
  }
}

// a X of kTile queries and kTile keys, or if kTurned its transpose.
template <class F, bool kTurned>
__device__ __forceinline__ Weights<F> own_gradients(const Pass& pass, Block<F>& block, const Sequence& s, int head,
                                                    int key) {
  const auto g =
      own_rows<typename F::E>(pass.p, pass.g, pass.g_pitch, s, unknown(head), static_cast<int>(pass.p.value_dim));
  float scores[F::kN][4] = {}, grads[F::kN][4] = {};
  score_tile<F, true, kTurned>(
      block, pass.p, s, head, key, score_operands<typename F::T>(pass.p, s, head, g), scores, grads,
      [](int, float x) { return x; },
      [&](int i, float x) { return block.shared.scale[i] * (x - block.shared.own[i]); });
  Weights<F> out;
  out.take(grads);
  return out;
}

// Pᵀ of kTile queries and kTile keys.
template <class F>
__device__ __forceinline__ Weights<F> own_scores(const Pass& pass, Block<F>& block, const Sequence& s, int head,
                                                 int key) {
  float scores[F::kN][4] = {}, none[1][4];
  score_tile<F, false, true>(
      block, pass.p, s, head, key, score_operands<typename F::T>(pass.p, s, head, {}), scores, none,
      [](int, float x) { return x; }, [](int, float x) { return x; });
  Weights<F> out;
  out.take(scores);
  return out;
}

// kTile keys and their slice of ∂k, or with kSlices of them of ∂v.
template <class F, int kSlices, bool kOfValues>
__device__ __forceinline__ void make_fused_key_gradients(const Pass& pass, Shared<F>& shared, const KeyBlock& b) {
  using T = typename F::T;
  Block<F> block(shared);
  const Problem& p = pass.p;
  Sequence s = b.s;
  const int group = static_cast<int>(p.heads / p.kv_heads), first_column = b.slice * kSlices * kTile;
  float d[kSlices][F::kN][4] = {};
  for (int head = b.kv_head * group; head < (b.kv_head + 1) * group; ++head) {
    for (s.first = s.first_seeing(p.causal, b.key); s.first < s.queries; s.first += kTile) {
      Block<F> block(shared);
      if constexpr (kOfValues) {
        Weights<F> scores = own_scores(pass, block, s, head, b.key);
        const auto g = own_rows<typename F::E>(p, pass.g, pass.g_pitch, s, head, static_cast<int>(p.value_dim));
#pragma unroll
        for (int i = 0; i < kSlices; ++i) {
          accumulate_own(block, d[i], scores, g, s.first, first_column + i * kTile);
        }
      } else {
        load_shifts(pass, block, s, head);
        Weights<F> grads = own_gradients<F, true>(pass, block, s, head, b.key);
        accumulate_own(block, d[0], grads, queries_of<T>(p, p.q, s, head, p.key_dim), s.first, first_column);
      }
    }
  }
  const View& grad = kOfValues ? p.grad_v : p.grad_k;
  const int64_t columns = kOfValues ? p.value_dim : p.key_dim;
#pragma unroll
  for (int i = 0; i < kSlices; ++i) {
    if (first_column + i * kTile < columns) {
      write_gradients(block, d[i], grad, s.batch, static_cast<int64_t>(s.key_row) + b.key,
                      s.keys - b.key < kTile ? s.keys - b.key : kTile, b.kv_head, first_column + i * kTile, columns,
                      [](int, float y) { return y; });
      __syncthreads();
    }
  }
}

// kTile queries and their slice of ∂q.
template <class F>
__device__ __forceinline__ void make_fused_query_gradients(const Pass& pass, Shared<F>& shared, int id) {
  using T = typename F::T;
  Block<F> block(shared);
  const Problem& p = pass.p;
  const int heads = static_cast<int>(p.heads), slices = ceil_div(static_cast<int>(p.key_dim), kTile);
  const int head = id / slices % heads, first_column = id % slices * kTile;
  const Sequence s = tile_of_rows(p, id / slices / heads);
  if (s.first >= s.queries) {
    return;
  }
  load_shifts(pass, block, s, head);
  float d[F::kN][4] = {};
  for (int key = 0; key < s.seen(p.causal); key += kTile) {
    Block<F> block(shared);
    Weights<F> grads = own_gradients<F, false>(pass, block, s, head, key);
    const Rows<T> k = keys_of<T>(p, p.k, s, head, p.key_dim);
    accumulate_own(block, d, grads, k, key, first_column);
  }
  write_gradients(block, d, p.grad_q, s.batch, static_cast<int64_t>(s.query_row) + s.first, s.count(), head,
                  first_column, p.key_dim, [](int, float y) { return y; });
}

template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_fused_kernel(const __grid_constant__ FusedPass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    // Those that see most keys first.
    make_fused_out(pass, shared_memory<Shared<F>>(), static_cast<int>(gridDim.x - 1 - blockIdx.x));
  } else {
    __trap();
  }
}
// Slices of the values that a block has of their gradients: as many as there are registers for.
template <class F>
constexpr int kValueSlices = std::is_same_v<typename F::T, bfloat16> ? 2 : 1;

template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_fused_values_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    const int slices = ceil_div(static_cast<int>(pass.p.value_dim), kValueSlices<F> * kTile);
    const KeyBlock b = key_block(pass, slices, static_cast<int>(blockIdx.x));
    if (b.in(pass)) {
      make_fused_key_gradients<F, kValueSlices<F>, true>(pass, shared_memory<Shared<F>>(), b);
    }
  } else {
    __trap();
  }
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_fused_keys_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    const KeyBlock b = key_block(pass, ceil_div(static_cast<int>(pass.p.key_dim), kTile), static_cast<int>(blockIdx.x));
    if (b.in(pass)) {
      make_fused_key_gradients<F, 1, false>(pass, shared_memory<Shared<F>>(), b);
    }
  } else {
    __trap();
  }
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_fused_queries_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    make_fused_query_gradients(pass, shared_memory<Shared<F>>(), static_cast<int>(gridDim.x - 1 - blockIdx.x));
  } else {
    __trap();
  }
}
template <class F>
__global__ void __launch_bounds__(kThreads, 1) gau_combine_kernel(const __grid_constant__ FusedPass pass) {
  combine_parts(pass, shared_memory<Shared<F>>(), static_cast<int>(blockIdx.x));
}

}  // namespace kx::gau_attention
