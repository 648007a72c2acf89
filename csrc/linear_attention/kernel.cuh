// Linear attention on tensor cores: one product of three serves the output and all gradients, as in _triton_kernel.py.
// With x, y and w rows of one sequence, in the names of kx_kernels/ops/linear_attention/README.md,
//
//   role      out  x  y  w   over    state Σ y wᵀ   sum beside it
//   kOut      N    ã  b̃  v   j ≤ i   S              z = Σ b
//   kQueries  ∂ã   g  v  b̃   j ≤ i   Sᵀ             z = Σ b
//   kKeys     ∂b̃   v  g  ã   j ≥ i   Uᵀ             w = Σ e·a
//   kValues   ∂v   b̃  ã  g   j ≥ i   U              none
//
// Where a head of queries takes more than one slice, kQueries runs twice: for the slices' parts of e, then for ∂ã.
// out_i = Σ_j γ^|i−j| (x_i·y_j) w_j. A block has x and y whole and kSlice columns of w: no sum is split.
#pragma once

#include "../cuda/copy.cuh"
#include "../cuda/memory.cuh"
#include "../cuda/tile.cuh"
#include "problem.h"

namespace kx::linear_attention {

constexpr int kThreads = 256, kWarps = kThreads / 32;

enum class Role : int { kOut, kQueries, kKeys, kValues };

// Which roles go against time, and of which the inner dimension of products is that of keys.
__host__ __device__ constexpr bool is_reverse(Role role) { return role == Role::kKeys || role == Role::kValues; }
__host__ __device__ constexpr bool has_inner_keys(Role role) { return role == Role::kOut || role == Role::kValues; }

// One role's part of a launch. States are [num_sequences, kv_heads, key_dim, value_dim] whatever the role.
struct Pass {
  Problem p;
  bool sum;     // write the sums over segments to `sums` and `z_sums`, nothing else
  bool only_e;  // of kQueries: write the slices' parts of e, nothing else
  bool fetch;   // copy a chunk's rows while the one before it is worked on
  int slices, segments;
  int segment;  // tokens
  int64_t blocks;
  View out;
  const float *state_in, *z_in;  // or null
  float *state_out, *z_out;
  float *sums, *z_sums;  // of every segment, or null
  float* e;              // [parts, B, T, heads]
  int e_parts;
};

// Tokens of a chunk: fewer where operands are wider.
template <class T>
constexpr int kChunk = std::is_same_v<T, bfloat16> ? 64 : 32;

// How a kernel is laid out: kInner is the widest inner dimension it takes; a block has kSlice columns of the output,
// and of the state; kWgmma says which tensor-core instructions its products are.
template <class T_, int kInner_, int kSlice_, bool kWgmma_>
struct Form {
  using T = T_;
  using E = typename Products<T>::Operand;
  static constexpr int kInner = kInner_, kSlice = kSlice_, kC = kChunk<T>;
  static constexpr int kZ = kInner > kSlice ? kInner : kSlice;
  static constexpr bool kWgmma = kWgmma_;
  using Rows = Tile<E, kC, kInner, kWgmma ? 128 : 0>;
  using Columns = Tile<E, kC, kSlice, kWgmma ? kSlice : 0>;  // a panel for each of two groups of four warps
  using State = Tile<E, kInner, kSlice, kWgmma ? kSlice : 0>;
  using Weights = Tile<E, kC, kC, kWgmma ? 128 : 0>;
};

template <class F>
struct Shared {
  typename F::Rows x, y;
  typename F::Columns w, plain;  // plain: of w, what RoPE has not turned
  union {
    typename F::State state;
    float staged[F::kC][F::kSlice + 4];  // of the output: once the state has been multiplied
  };
  typename F::Weights weights;  // of rows y for rows x
  float z[F::kZ];
  float rows[kWarps][F::kC];  // sums over the columns that a warp has
  float power[F::kC + 1];     // γ^n
  float lowest[F::kC], denominator[F::kC], e[F::kC];
  int64_t position[F::kC];
  bool keep[F::kC];
};

// With rows of the next chunk, and of this one what its output belongs to, as they lie in memory: a thread copies what
// it will read itself.
template <class F>
struct FetchingShared : Shared<F> {
  alignas(16) typename F::T fetched_x[F::kC * F::kInner], fetched_y[F::kC * F::kInner];
  alignas(16) typename F::T fetched_w[F::kC * F::kSlice], fetched_own[F::kC * F::kSlice];
};

__device__ inline double power(double x, int64_t n) {
  double y = 1;
  for (; n > 0; n /= 2, x *= x) {
    y *= n % 2 != 0 ? x : 1;
  }
  return y;
}

// y = change(y), each.
template <int N, class Change>
__device__ __forceinline__ void for_each(float (&y)[N], Change&& change) {
#pragma unroll
  for (float& x : y) {
    x = change(x);
  }
}

// φ of elements in their place, and its derivative.
template <int N>
__device__ __forceinline__ void apply_feature(const Problem& p, float (&y)[N], float lowest) {
  switch (p.feature) {
    case Feature::kElu1:
      return for_each(y, [](float x) { return x > 0 ? x + 1 : expf(x); });
    case Feature::kRelu:
      return for_each(y, [](float x) { return x < 0 ? 0 : x; });
    case Feature::kRelu2:
      return for_each(y, [](float x) { return x < 0 ? 0 : x * x; });
    case Feature::kExp:
      return for_each(y, [=](float x) { return expf(x - lowest); });
    default:
      return;
  }
}
template <int N>
__device__ __forceinline__ void apply_slope(const Problem& p, float (&y)[N], float lowest) {
  switch (p.feature) {
    case Feature::kElu1:
      return for_each(y, [](float x) { return x > 0 ? 1 : expf(x); });
    case Feature::kRelu:
      return for_each(y, [](float x) { return x > 0 ? 1.0f : 0.0f; });
    case Feature::kRelu2:
      return for_each(y, [](float x) { return x > 0 ? 2 * x : 0; });
    case Feature::kExp:
      return for_each(y, [=](float x) { return expf(x - lowest); });
    default:
      return for_each(y, [](float) { return 1.0f; });
  }
}

// The dimension of a head that a column of features holds: in an order in which RoPE's pairs are neighbours.
__device__ __forceinline__ int dim_of(const Problem& p, int column) {
  const int half = static_cast<int>(p.half);
  return p.interleaved || column >= 2 * half ? column : column / 2 + column % 2 * half;
}

__device__ __forceinline__ float table(const Problem& p, const void* data, int64_t at) {
  switch (p.table_dtype) {
    case DType::kFloat64:
      return static_cast<float>(static_cast<const double*>(data)[at]);
    case DType::kBFloat16:
      return widen(static_cast<const bfloat16*>(data)[at]);
    case DType::kFloat16:
      return widen(static_cast<const float16*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

// cos and sin at a position, of the pair that a column belongs to.
__device__ __forceinline__ void angle(const Problem& p, bool keep, int64_t position, int column, float& c, float& s) {
  const int pair = column / 2;
  c = 1;
  s = 0;
  if (!keep || pair >= p.half || position < 0) {
    return;
  }
  if (position >= p.table_length) {
    c = s = NAN;
    return;
  }
  c = table(p, p.cos, position * p.cos_stride[0] + pair * p.cos_stride[1]);
  s = table(p, p.sin, position * p.sin_stride[0] + pair * p.sin_stride[1]);
}

// What a block does; its members are the same for all threads but those at the end.
template <class F, Role kRole>
class Block {
  using T = typename F::T;
  using E = typename F::E;
  static constexpr int kInner = F::kInner, kSlice = F::kSlice, kC = F::kC;
  static constexpr bool kReverse = is_reverse(kRole), kInnerKeys = has_inner_keys(kRole);
  static constexpr int kRowTiles = kC / 16;           // of a [kC, …] product, one to a warp
  static constexpr int kGroups = kWarps / kRowTiles;  // of warps that share rows and have columns of their own
  static constexpr int kOutTiles = kSlice / 8 / kGroups;
  static constexpr int kScoreTiles = kC / 8 / kGroups;
  static constexpr int kStateRows = kInner / 16 < kWarps ? kInner / 16 : kWarps;  // tiles of rows of a state
  static constexpr int kStateGroups = kWarps / kStateRows;
  static constexpr int kStateRepeats = kInner / 16 / kStateRows;
  static constexpr int kStateTiles = kSlice / 8 / kStateGroups;
  static constexpr int kWide = 16 / sizeof(T);  // elements of a vector

 public:
  __device__ __forceinline__ Block(const Pass& pass, Shared<F>& shared, int id)
      : pass(pass), p(pass.p), shared(shared) {
    part = static_cast<int>(id % pass.slices);
    id /= pass.slices;
    const int heads = kReverse || pass.sum ? p.kv_heads : p.heads;
    head = id % heads;
    id /= heads;
    this_segment = id % pass.segments;
    n = id / pass.segments;
    kv_head = kReverse || pass.sum ? head : head / (p.heads / p.kv_heads);
    batch = p.cu_seqlens != nullptr ? 0 : n;
    tokens = static_cast<int>(p.length);
    if (p.cu_seqlens != nullptr) {
      begin = clamp(p.cu_seqlens[n], 0, tokens);
      tokens = clamp(p.cu_seqlens[n + 1], begin, tokens) - begin;
    }
    first = this_segment * pass.segment;
    last = first + pass.segment < tokens ? first + pass.segment : tokens;
    slice = part * kSlice;
    inner_dim = static_cast<int>(kInnerKeys ? p.key_dim : p.value_dim);
    slice_dim = static_cast<int>(kInnerKeys ? p.value_dim : p.key_dim);
    has_z = p.normalize && kRole != Role::kValues && !pass.only_e;
  }

  __device__ __forceinline__ void know_thread() {
    thread = unknown(static_cast<int>(threadIdx.x));
    warp = thread / 32;
    lane = thread % 32;
    row_tile = warp % kRowTiles;
    group = warp / kRowTiles;
    out_column = group * kOutTiles * 8;
  }

  __device__ __forceinline__ void run() {
    know_thread();
    if (first >= tokens && this_segment > 0) {
      return;
    }
    const int chunks = (last - first + kC - 1) / kC;
    const auto place = [&](int c) { return first + (kReverse ? chunks - 1 - c : c) * kC; };
    if (chunks > 0) {
      fetch_rows(place(0), 0);
    }
    for (int i = thread; i <= kC; i += kThreads) {
      shared.power[i] = static_cast<float>(power(decay(), i));
    }
    load_start();
    sync();
    for (int c = 0; c < chunks; ++c) {
      chunk(place(c), c + 1 < chunks ? place(c + 1) : -1);
    }
    store_end();
  }

 private:
  __device__ __forceinline__ static int clamp(int x, int low, int high) { return x < low ? low : x < high ? x : high; }

  __device__ __forceinline__ double decay() const { return p.decay != nullptr ? p.decay[kv_head] : 1; }

  // A barrier that what wgmma reads may have been written before.
  __device__ __forceinline__ static void sync() {
    if constexpr (F::kWgmma) {
      fence_proxy_async();
    }
    __syncthreads();
  }

  static constexpr bool kOutFeatures = !kInnerKeys;  // the output is gradients of features

  // Columns whose running sum z is kept: of all features, or of the slice.
  __device__ __forceinline__ int z_first() const { return kInnerKeys ? 0 : slice; }
  static constexpr int kZColumns = kInnerKeys ? kInner : kSlice;

  // A chunk that begins at `place`, before that at `next`; -1: it is the last.
  __device__ __forceinline__ void chunk(int place, int next) {
    know_thread();
    count = count_at(place);
    const bool turns = p.half > 0;
    auto& x = shared.x;
    auto& y = shared.y;
    auto& plain = shared.plain;
    auto& w = kInnerKeys || turns ? shared.w : shared.plain;
    enter(place);
    store_state_operand();
    sync();

    float total[kOutTiles][4] = {}, side[kOutTiles][4] = {};
    const int heads_here = kReverse ? static_cast<int>(p.heads / p.kv_heads) : 1;
    bool first_head = true;
    for (int h = 0; h < heads_here; ++h, first_head = false) {
      const int q_head = kReverse ? head * heads_here + h : head;
      if (!first_head) {
        sync();  // everybody has read the last head's tiles
      }
      load_rows(q_head);
      sync();
      wait_copies<0>();
      if (loads_x(h)) {
        load_tile<kX>(q_head);
      }
      load_tile<kY>(q_head);
      load_tile<kW>(q_head);
      sync();
      if (kOutFeatures && first_head && !pass.sum) {
        fetch_own(place);
      }
      if (h + 1 < heads_here) {
        fetch_rows(place, h + 1);
      } else if (next >= 0) {
        fetch_rows(next, 0);
      } else {
        commit_copies();  // nothing: fetch_own's group is always the second newest
      }

      float scores[kScoreTiles][4] = {};
      if (kRole == Role::kOut && p.normalize && !pass.sum) {
        if (p.causal) {
          score(scores);
        }
        sum_denominators(scores, q_head);
      }
      float added_z = 0;
      if (has_z && (p.causal || pass.sum)) {
        if constexpr (kInnerKeys) {
          added_z = column_sum(y);
        } else {
          added_z = column_sum(plain);
        }
      }
      if (turns) {
        sync();
        if constexpr (!kInnerKeys) {
          turn(plain, shared.w, slice, kSlice);
        } else {
          if (!pass.sum && first_head) {
            turn(x, x, 0, kInner);
          }
          turn(y, y, 0, kInner);
        }
        sync();
      }

      if (!pass.sum) {
        if (first_head) {
          multiply<T, false, true>(total, x, 16 * row_tile, shared.state, out_column, kInner);
          fade(total);
          if (kRole == Role::kKeys && p.normalize) {
            add_z(side, false);
          }
        }
        if (p.causal) {
          if (turns || kRole != Role::kOut || !p.normalize) {
#pragma unroll
            for (auto& tile : scores) {
#pragma unroll
              for (float& score : tile) {
                score = 0;
              }
            }
            score(scores);
          }
          store_weights(scores);
          sync();
          multiply<T, false, true>(total, shared.weights, 16 * row_tile, w, out_column, kC);
        }
        if (kRole == Role::kQueries && p.normalize) {
          if (pass.slices == 1 || pass.only_e) {
            sync();  // everybody has read the state
            stage(total);
            sync();
            sum_e(q_head);
          }
          add_z(side, true);
        }
        if (p.causal && p.normalize && (kRole == Role::kQueries || kRole == Role::kKeys)) {
          sync();
          store_row_weights();
          sync();
          multiply<T, false, true>(side, shared.weights, 16 * row_tile, plain, out_column, kC);
        }
      }

      if (p.causal || pass.sum) {
        sync();  // everybody has read the operands of this chunk's rows
        const float kept = first_head ? shared.power[count] : 1.0f;
        if (has_z && thread < kZColumns) {
          shared.z[thread] = kept * shared.z[thread] + added_z;
        }
        if (p.decay != nullptr) {
          fade_rows(w);
          sync();
        }
        add_to_state(kept, y, w);
      }
    }
    if (!pass.sum && !pass.only_e) {
      store_rows(total, side);
    }
    sync();
  }

  __device__ __forceinline__ int count_at(int place) const {
    return static_cast<int>(last - place < kC ? last - place : kC);
  }

  // Which rows there are, and their positions.
  __device__ __forceinline__ void enter(int place) {
    row = begin + place;
    for (int i = thread; i < kC; i += kThreads) {
      bool keep = i < count;
      if (keep && p.mask != nullptr) {
        keep = p.mask[batch * p.mask_stride[0] + (row + i) * p.mask_stride[1]] != 0;
      }
      shared.keep[i] = keep;
      shared.position[i] = place + i + (p.offsets != nullptr ? p.offsets[n] : p.offset);
    }
  }

  __device__ __forceinline__ int64_t row_of(int i, int q_head) const {
    return (batch * p.length + row + i) * p.heads + q_head;
  }

  // What a query head's rows need beside their elements.
  __device__ __forceinline__ void load_rows(int q_head) {
    const bool shifted = p.feature == Feature::kExp && p.normalize && !(pass.sum && !kReverse);
    for (int i = warp; i < kC; i += kWarps) {
      float lowest = static_cast<float>(p.stabilizer);
      if (shifted && shared.keep[i]) {
        lowest = -INFINITY;
        for (int d = lane; d < p.key_dim; d += 32) {
          lowest = fmaxf(lowest, element(p.q, i, q_head, d));
        }
        for (int mask = 16; mask > 0; mask /= 2) {
          lowest = fmaxf(lowest, __shfl_xor_sync(0xffffffffu, lowest, mask));
        }
      }
      if (lane == 0) {
        shared.lowest[i] = lowest;
      }
    }
    for (int i = thread; i < kC && p.normalize && (!pass.sum || kReverse); i += kThreads) {
      const bool keep = shared.keep[i];
      if (kRole != Role::kOut) {
        shared.denominator[i] = keep ? static_cast<const float*>(p.denominator)[row_of(i, q_head)] : 0;
      }
      if (kRole == Role::kKeys || (kRole == Role::kQueries && pass.slices > 1 && !pass.only_e)) {
        float e = 0;
        for (int m = 0; m < pass.e_parts && keep; ++m) {
          e += pass.e[m * p.batch * p.length * p.heads + row_of(i, q_head)];
        }
        shared.e[i] = e;
      }
    }
  }

  __device__ __forceinline__ const T* row_in(const View& x, int i, int its_head) const {
    return at_place(x, row - begin + i, its_head);
  }
  __device__ __forceinline__ float element(const View& x, int i, int its_head, int d) const {
    return widen(row_in(x, i, its_head)[d * x.stride[3]]);
  }

  // The three operands. w is of features where x and y are of values, and the other way round; in a role that goes with
  // time x is of queries (or of grad_o, the values that belong to them), against it y and w are.
  enum Operand { kX, kY, kW };
  template <Operand kOperand>
  static constexpr bool kFeatures = kInnerKeys == (kOperand != kW);
  template <Operand kOperand>
  static constexpr bool kOfQueries = kReverse == (kOperand != kX);
  template <Operand kOperand>
  static constexpr int kColumns = kOperand == kW ? kSlice : kInner;

  template <Operand kOperand>
  __device__ __forceinline__ const View& view() const {
    return kFeatures<kOperand> ? (kOfQueries<kOperand> ? p.q : p.k) : (kOfQueries<kOperand> ? p.grad_o : p.v);
  }
  template <Operand kOperand>
  __device__ __forceinline__ auto& tile() const {
    if constexpr (kOperand == kW && kInnerKeys) {
      return shared.w;
    } else if constexpr (kOperand == kW) {
      return shared.plain;
    } else {
      return kOperand == kX ? shared.x : shared.y;
    }
  }
  template <Operand kOperand>
  __device__ __forceinline__ T* fetched() const {
    auto& all = static_cast<FetchingShared<F>&>(shared);
    return kOperand == kX ? all.fetched_x : kOperand == kY ? all.fetched_y : all.fetched_w;
  }
  // x is needed once for all heads of queries, and not for sums.
  __device__ __forceinline__ bool loads_x(int h) const { return !pass.sum && (!kReverse || h == 0); }

  // Whether the vector from dimension d on lies in memory as in a tile. Columns of features are dimensions in dim_of's
  // order.
  template <Operand kOperand>
  __device__ __forceinline__ bool is_vector(int d) const {
    const bool in_order = !kFeatures<kOperand> || p.interleaved || p.half == 0;
    return in_order && view<kOperand>().wide && d + kWide <= (kFeatures<kOperand> ? p.key_dim : p.value_dim);
  }

  // Starts the copies of what load_tile will want of the chunk at `place`, for the h-th head of queries.
  __device__ __forceinline__ void fetch_rows(int place, int h) {
    if (pass.fetch) {
      const int q_head = kReverse ? head * (p.heads / p.kv_heads) + h : head;
      if (loads_x(h)) {
        fetch_tile<kX>(place, q_head);
      }
      fetch_tile<kY>(place, q_head);
      fetch_tile<kW>(place, q_head);
      commit_copies();
    }
  }
  template <Operand kOperand>
  __device__ __forceinline__ void fetch_tile(int place, int q_head) {
    constexpr int kVectors = kColumns<kOperand> / kWide;
    const View& from = view<kOperand>();
    const int its_head = kOfQueries<kOperand> ? q_head : kv_head;
    const int rows = count_at(place);
#pragma unroll 1
    for (int at = thread; at < kC * kVectors; at += kThreads) {
      const int i = at / kVectors, d = at % kVectors * kWide + (kOperand == kW ? slice : 0);
      if (i < rows && is_vector<kOperand>(d)) {
        copy_async<16>(fetched<kOperand>() + at * kWide, at_place(from, place + i, its_head) + d);
      }
    }
  }
  __device__ __forceinline__ const T* at_place(const View& x, int place, int its_head) const {
    return static_cast<const T*>(x.data) + batch * x.stride[0] + (begin + place) * x.stride[1] + its_head * x.stride[2];
  }

  // The rows that the output is gradients of, or what lies there of a vector of them.
  __device__ __forceinline__ const View& own() const { return kRole == Role::kQueries ? p.q : p.k; }
  __device__ __forceinline__ bool own_is_vector(int d) const {
    return (p.interleaved || p.half == 0) && own().wide && d + kWide <= p.key_dim;
  }
  __device__ __forceinline__ T* fetched_own() const { return static_cast<FetchingShared<F>&>(shared).fetched_own; }

  __device__ __forceinline__ void fetch_own(int place) {
    if (pass.fetch) {
#pragma unroll 1
      for (int at = thread; at < kC * kSlice / kWide; at += kThreads) {
        const int i = at / (kSlice / kWide), d = slice + at % (kSlice / kWide) * kWide;
        if (i < count && own_is_vector(d)) {
          copy_async<16>(fetched_own() + at * kWide, at_place(own(), place + i, head) + d);
        }
      }
      commit_copies();
    }
  }
  // Element of it from column d = slice + … on, in dim_of's order.
  __device__ __forceinline__ void load_own(int at, int i, int d, float (&y)[kWide]) const {
    load_vector(own(), i, head, d, static_cast<int>(p.key_dim), own_is_vector(d), true,
                pass.fetch ? fetched_own() + at * kWide : nullptr, y);
  }

  // An operand's tile: features, values, or gradients of numerators; 0 where there is no row, no such column, or
  // padding.
  template <Operand kOperand>
  __device__ __forceinline__ void load_tile(int q_head) {
    constexpr int kVectors = kColumns<kOperand> / kWide;
    constexpr int kStored = 16 / sizeof(E) < kWide ? 16 / sizeof(E) : kWide;
    const View& from = view<kOperand>();
    const int its_head = kOfQueries<kOperand> ? q_head : kv_head;
    const int dim = static_cast<int>(kFeatures<kOperand> ? p.key_dim : p.value_dim);
#pragma unroll 1
    for (int at = thread; at < kC * kVectors; at += kThreads) {
      const int i = at / kVectors, column = at % kVectors * kWide, d = column + (kOperand == kW ? slice : 0);
      float y[kWide] = {};
      if (shared.keep[i]) {
        load_vector(from, i, its_head, d, dim, is_vector<kOperand>(d), kFeatures<kOperand>,
                    pass.fetch ? fetched<kOperand>() + at * kWide : nullptr, y);
        change<kOperand>(i, y);
      }
#pragma unroll
      for (int m = 0; m < kWide; m += kStored) {
        Vector<E, kStored> v;
#pragma unroll
        for (int l = 0; l < kStored; ++l) {
          v.x[l] = operand<T>(d + m + l < dim ? y[m + l] : 0);
        }
        store(tile<kOperand>().at(i, column + m), v);
      }
    }
  }

  // kWide elements of a row, from column d on: as one vector if it is_vector, which may have been fetched already.
  __device__ __forceinline__ void load_vector(const View& from, int i, int its_head, int d, int dim, bool is_vector,
                                              bool of_features, const T* fetched, float (&y)[kWide]) const {
    if (is_vector) {
      const Vector<T, kWide> v = fetched != nullptr ? *reinterpret_cast<const Vector<T, kWide>*>(fetched)
                                                    : load_shared_by_many<kWide>(row_in(from, i, its_head) + d);
#pragma unroll
      for (int m = 0; m < kWide; ++m) {
        y[m] = widen(v.x[m]);
      }
    } else {
#pragma unroll
      for (int m = 0; m < kWide; ++m) {
        if (d + m < dim) {
          y[m] = element(from, i, its_head, of_features ? dim_of(p, d + m) : d + m);
        }
      }
    }
  }
  template <Operand kOperand>
  __device__ __forceinline__ void change(int i, float (&y)[kWide]) const {
    if constexpr (kFeatures<kOperand>) {
      const float lowest = kOfQueries<kOperand> ? shared.lowest[i] : static_cast<float>(p.stabilizer);
      apply_feature(p, y, lowest);
    } else if constexpr (kOfQueries<kOperand>) {
      const float factor = inverse(i);
#pragma unroll
      for (float& x : y) {
        x *= factor;
      }
    }
  }

  // What a numerator is multiplied with.
  __device__ __forceinline__ float inverse(int i) const {
    if (!p.normalize) {
      return static_cast<float>(p.scale);
    }
    return shared.denominator[i] != 0 ? 1 / shared.denominator[i] : 0;
  }

  // Rows of features turned by their positions' angles.
  template <class Turned>
  __device__ __forceinline__ void turn(Turned& from, Turned& to, int first_column, int columns) {
#pragma unroll 1
    for (int at = thread; at < kC * columns / 2; at += kThreads) {
      const int i = at / (columns / 2), column = at % (columns / 2) * 2;
      float c, s;
      angle(p, shared.keep[i], shared.position[i], first_column + column, c, s);
      const float x0 = widen(*from.at(i, column)), x1 = widen(*from.at(i, column + 1));
      *to.at(i, column) = operand<T>(x0 * c - x1 * s);
      *to.at(i, column + 1) = operand<T>(x1 * c + x0 * s);
    }
  }

  // scores += x·yᵀ
  __device__ __forceinline__ void score(float (&scores)[kScoreTiles][4]) {
    multiply<T, false, false>(scores, shared.x, 16 * row_tile, shared.y, group * kScoreTiles * 8, kInner);
  }

  // Row and column of a thread's r-th number of a product's n-th tile.
  __device__ __forceinline__ int row_at(int r) const { return 16 * row_tile + lane / 4 + r / 2 * 8; }
  __device__ __forceinline__ int column_at(int first, int n, int r) const {
    return first + 8 * n + lane % 4 * 2 + r % 2;
  }

  // γ^|i − j| where row i sees row j, else 0.
  __device__ __forceinline__ float weight(int i, int j) const {
    const int apart = kReverse ? j - i : i - j;
    return apart < 0 ? 0 : shared.power[apart];
  }
  // What is left of the state before the chunk at row i, and of row j in the state after it.
  __device__ __forceinline__ float since(int i) const {
    return !p.causal ? 1 : kReverse ? shared.power[i < count ? count - 1 - i : 0] : shared.power[i + 1];
  }
  __device__ __forceinline__ float until(int j) const {
    return kReverse ? shared.power[j + 1] : shared.power[j < count ? count - 1 - j : 0];
  }

  __device__ __forceinline__ void fade(float (&total)[kOutTiles][4]) {
    for (auto& tile : total) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        tile[r] *= since(row_at(r));
      }
    }
  }
  __device__ __forceinline__ void fade_rows(typename F::Columns& w) {
#pragma unroll 1
    for (int at = thread; at < kC * kSlice; at += kThreads) {
      E& x = *w.at(at / kSlice, at % kSlice);
      x = operand<T>(widen(x) * until(at / kSlice));
    }
  }

  template <class To>
  __device__ __forceinline__ static void put(To& to, int i, int j, float x0, float x1) {
    store(to.at(i, j), Vector<E, 2>{operand<T>(x0), operand<T>(x1)});
  }
  __device__ __forceinline__ void store_weights(const float (&scores)[kScoreTiles][4]) {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const int i = row_at(r), j = column_at(group * kScoreTiles * 8, n, r);
        put(shared.weights, i, j, scores[n][r] * weight(i, j), scores[n][r + 1] * weight(i, j + 1));
      }
    }
  }
  // Weights times e of the query's row: row i for queries, j for keys.
  __device__ __forceinline__ void store_row_weights() {
#pragma unroll 1
    for (int at = thread; at < kC * kC / 2; at += kThreads) {
      const int i = at / (kC / 2), j = at % (kC / 2) * 2;
      const bool of_row = kRole == Role::kQueries;
      put(shared.weights, i, j, weight(i, j) * shared.e[of_row ? i : j],
          weight(i, j + 1) * shared.e[of_row ? i : j + 1]);
    }
  }

  // side += z faded to each row, times its e for queries.
  __device__ __forceinline__ void add_z(float (&side)[kOutTiles][4], bool times_e) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = row_at(r);
        side[n][r] += shared.z[column_at(out_column, n, r)] * since(i) * (times_e ? shared.e[i] : 1);
      }
    }
  }

  // Sums over a row, of what each of its threads has of rows row_at(0) and row_at(2).
  __device__ __forceinline__ void sum_rows(float upper, float lower) {
    for (int mask = 1; mask < 4; mask *= 2) {
      upper += __shfl_xor_sync(0xffffffffu, upper, mask);
      lower += __shfl_xor_sync(0xffffffffu, lower, mask);
    }
    if (lane % 4 == 0) {
      shared.rows[group][row_at(0)] = upper;
      shared.rows[group][row_at(2)] = lower;
    }
    __syncthreads();
  }
  __device__ __forceinline__ float row_sum(int i) const {
    float sum = 0;
#pragma unroll
    for (int m = 0; m < kGroups; ++m) {
      sum += shared.rows[m][i];
    }
    return sum;
  }

  // Denominators of rows whose features lie in x, from the scores that have not turned.
  __device__ __forceinline__ void sum_denominators(const float (&scores)[kScoreTiles][4], int q_head) {
    float sums[2] = {};
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        sums[r / 2] += scores[n][r] * weight(row_at(r), column_at(group * kScoreTiles * 8, n, r));
      }
    }
    sum_rows(sums[0], sums[1]);
    for (int i = warp; i < kC; i += kWarps) {
      float before = 0;
      for (int d = lane; d < kInner; d += 32) {
        before += widen(*shared.x.at(i, d)) * shared.z[d];
      }
      for (int mask = 16; mask > 0; mask /= 2) {
        before += __shfl_xor_sync(0xffffffffu, before, mask);
      }
      if (lane == 0) {
        const float sum = row_sum(i) + before * since(i) + static_cast<float>(p.eps);
        shared.denominator[i] = sum;
        if (part == 0 && i < count && p.denominator != nullptr) {
          static_cast<float*>(p.denominator)[row_of(i, q_head)] = sum;
        }
      }
    }
    __syncthreads();
  }

  // Numbers of a product where any thread reads them.
  __device__ __forceinline__ void stage(const float (&total)[kOutTiles][4]) {
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        store(&shared.staged[row_at(r)][column_at(out_column, n, r)], Vector<float, 2>{total[n][r], total[n][r + 1]});
      }
    }
  }

  // A row's vector turned by its angles times `direction`.
  __device__ __forceinline__ void turn_vector(int i, int d, float direction, float (&y)[kWide]) const {
#pragma unroll
    for (int m = 0; m < kWide; m += 2) {
      float c, s;
      angle(p, shared.keep[i], shared.position[i], d + m, c, s);
      const float y0 = y[m], y1 = y[m + 1];
      s *= direction;
      y[m] = y0 * c - y1 * s;
      y[m + 1] = y1 * c + y0 * s;
    }
  }

  // e of each row, or the slice's part of it, from the staged gradients of turned features.
  __device__ __forceinline__ void sum_e(int q_head) {
    constexpr int kVectors = kSlice / kWide;  // lanes that share a row
    wait_copies<1>();                         // for fetch_own, not for fetch_rows
#pragma unroll 1
    for (int at = thread; at < kC * kVectors; at += kThreads) {
      const int i = at / kVectors, column = at % kVectors * kWide, d = slice + column;
      float a[kWide] = {}, sum = 0;
      if (shared.keep[i]) {
        load_own(at, i, d, a);
        apply_feature(p, a, shared.lowest[i]);
#pragma unroll
        for (int m = 0; m < kWide; ++m) {
          a[m] = d + m < p.key_dim ? widen(operand<T>(a[m])) : 0;
        }
        if (p.half > 0) {
          turn_vector(i, d, 1, a);
        }
#pragma unroll
        for (int m = 0; m < kWide; ++m) {
          sum += shared.staged[i][column + m] * widen(operand<T>(a[m]));
        }
      }
      for (int mask = 1; mask < kVectors; mask *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, mask);
      }
      if (at % kVectors == 0) {
        shared.e[i] = -sum * inverse(i);
        if (i < count) {
          pass.e[(pass.only_e ? part : 0) * p.batch * p.length * p.heads + row_of(i, q_head)] = shared.e[i];
        }
      }
    }
    __syncthreads();
  }

  // The sum of a column's rows, as they will have faded after the chunk; for keys of queries, times their e.
  template <class Features>
  __device__ __forceinline__ float column_sum(Features& features) const {
    float sum = 0;
    if (thread < kZColumns) {
      for (int j = 0; j < kC; ++j) {
        const float factor = kRole == Role::kKeys ? shared.e[j] : 1;
        sum += widen(*features.at(j, thread)) * until(j) * factor;
      }
    }
    return sum;
  }

  __device__ __forceinline__ int state_row(int repeat, int r) const {
    return 16 * (warp % kStateRows + repeat * kStateRows) + lane / 4 + r / 2 * 8;
  }
  __device__ __forceinline__ int state_column(int n, int r) const {
    return column_at(warp / kStateRows * kStateTiles * 8, n, r);
  }

  template <class Visit>
  __device__ __forceinline__ void for_state(Visit&& visit) {
#pragma unroll
    for (int repeat = 0; repeat < kStateRepeats; ++repeat) {
#pragma unroll
      for (int n = 0; n < kStateTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          visit(state[repeat][n][r], state_row(repeat, r), state_column(n, r));
        }
      }
    }
  }

  __device__ __forceinline__ void store_state_operand() {
#pragma unroll
    for (int repeat = 0; repeat < kStateRepeats; ++repeat) {
#pragma unroll
      for (int n = 0; n < kStateTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
          put(shared.state, state_row(repeat, r), state_column(n, r), state[repeat][n][r], state[repeat][n][r + 1]);
        }
      }
    }
  }

  // state = kept·state + yᵀ·w
  __device__ __forceinline__ void add_to_state(float kept, typename F::Rows& y, typename F::Columns& w) {
    constexpr int kTogether = kOutTiles < kStateTiles ? kOutTiles : kStateTiles;
#pragma unroll
    for (int repeat = 0; repeat < kStateRepeats; ++repeat) {
#pragma unroll
      for (int from = 0; from < kStateTiles; from += kTogether) {
        float added[kTogether][4] = {};  // on its own: tensor cores cut off what they add to a long sum
        multiply<T, true, true>(added, y, 16 * (warp % kStateRows + repeat * kStateRows), w,
                                (warp / kStateRows * kStateTiles + from) * 8, kC);
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            state[repeat][from + n][r] = kept * state[repeat][from + n][r] + added[n][r];
          }
        }
      }
    }
  }

  // Where a state in memory has row i and column j of this block's, or -1.
  __device__ __forceinline__ int64_t in_memory(int i, int j) const {
    const int inner = kInnerKeys ? dim_of(p, i) : i, outer = kInnerKeys ? slice + j : dim_of(p, slice + j);
    if (inner >= inner_dim || outer >= slice_dim) {
      return -1;
    }
    const int64_t at = (n * p.kv_heads + kv_head) * p.key_dim * p.value_dim;
    return at + (kInnerKeys ? inner * p.value_dim + outer : outer * p.value_dim + inner);
  }
  __device__ __forceinline__ int64_t z_in_memory(int column) const {
    const int d = dim_of(p, z_first() + column);
    return d < p.key_dim ? (n * p.kv_heads + kv_head) * p.key_dim + d : -1;
  }
  // Where the sums over a segment lie.
  __device__ __forceinline__ int64_t sums_of(int other) const {
    return ((n * pass.segments + other) * p.kv_heads + kv_head) * pass.slices + part;
  }

  // The state to and from memory, as many rows at a time as a chunk has, by way of `staged`.
  template <class Element, class Combine>
  __device__ __forceinline__ void load_state(Element&& element, Combine&& combine) {
#pragma unroll 1
    for (int base = 0; base < kInner; base += kC) {
      __syncthreads();
#pragma unroll 1
      for (int at = thread; at < kC * kSlice; at += kThreads) {
        shared.staged[at / kSlice][at % kSlice] = element(base + at / kSlice, at % kSlice);
      }
      __syncthreads();
      for_state([&](float& x, int i, int j) {
        if (i / kC == base / kC) {
          x = combine(x, shared.staged[i % kC][j]);
        }
      });
    }
  }
  template <class Put>
  __device__ __forceinline__ void store_state(Put&& put) {
#pragma unroll 1
    for (int base = 0; base < kInner; base += kC) {
      __syncthreads();
      for_state([&](float& x, int i, int j) {
        if (i / kC == base / kC) {
          shared.staged[i % kC][j] = x;
        }
      });
      __syncthreads();
#pragma unroll 1
      for (int at = thread; at < kC * kSlice; at += kThreads) {
        put(base + at / kSlice, at % kSlice, shared.staged[at / kSlice][at % kSlice]);
      }
    }
  }

  // The state that the segment starts from: the sum over all that is before it, or after it.
  __device__ __forceinline__ void load_start() {
    for_state([](float& x, int, int) { x = 0; });
    if (!pass.sum && pass.state_in != nullptr) {
      load_state(
          [&](int i, int j) {
            const int64_t at = in_memory(i, j);
            return at >= 0 ? pass.state_in[at] : 0;
          },
          [](float, float staged) { return staged; });
    }
    float z = 0;
    const bool mine = has_z && thread < kZColumns;
    if (mine && !pass.sum && pass.z_in != nullptr && z_in_memory(thread) >= 0) {
      z = pass.z_in[z_in_memory(thread)];
    }
    if (!pass.sum && pass.sums != nullptr) {
      const int used = tokens > 0 ? (tokens + pass.segment - 1) / pass.segment : 0;
      const int others = !p.causal ? used : kReverse ? used - 1 - this_segment : this_segment;
#pragma unroll 1
      for (int m = 0; m < others; ++m) {
        const int other = kReverse ? used - 1 - m : m;
        const int length = tokens - other * pass.segment < pass.segment ? tokens - other * pass.segment : pass.segment;
        const float kept = static_cast<float>(power(decay(), length));
        const float* const sums = pass.sums + sums_of(other) * kInner * kSlice;
        load_state([&](int i, int j) { return sums[i * kSlice + j]; },
                   [&](float x, float staged) { return kept * x + staged; });
        if (mine) {
          z = kept * z + pass.z_sums[sums_of(other) * F::kZ + thread];
        }
      }
    }
    if (thread < kZColumns) {
      shared.z[thread] = z;
    }
    __syncthreads();  // everybody has read what is staged
  }

  __device__ __forceinline__ void store_end() {
    if (pass.sum) {
      float* const sums = pass.sums + sums_of(this_segment) * kInner * kSlice;
      store_state([&](int i, int j, float x) { sums[i * kSlice + j] = x; });
      if (has_z && thread < kZColumns) {
        pass.z_sums[sums_of(this_segment) * F::kZ + thread] = shared.z[thread];
      }
      return;
    }
    const bool ends = kReverse ? this_segment == 0 : last >= tokens;
    if (!ends || (!kReverse && head % (p.heads / p.kv_heads) != 0)) {
      return;
    }
    if (pass.state_out != nullptr) {
      store_state([&](int i, int j, float x) {
        const int64_t at = in_memory(i, j);
        if (at >= 0) {
          pass.state_out[at] = x;
        }
      });
    }
    const bool writes_z = pass.z_out != nullptr && has_z && (part == 0 || !kInnerKeys);
    if (writes_z && thread < kZColumns && z_in_memory(thread) >= 0) {
      pass.z_out[z_in_memory(thread)] = shared.z[thread];
    }
  }

  // The chunk's part of the output.
  __device__ __forceinline__ void store_rows(float (&total)[kOutTiles][4], const float (&side)[kOutTiles][4]) {
    const bool turns = kOutFeatures && p.half > 0;
    sync();  // everybody has read the state
    if (turns) {
      stage(total);
      __syncthreads();
#pragma unroll 1
      for (int at = thread; at < kC * kSlice / kWide; at += kThreads) {
        const int i = at / (kSlice / kWide), column = at % (kSlice / kWide) * kWide;
        float y[kWide];
        load_staged(i, column, y);
        turn_vector(i, slice + column, -1, y);
        store_staged(i, column, y);
      }
      __syncthreads();
    }
    if (kOutFeatures) {
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float y = turns ? shared.staged[row_at(r)][column_at(out_column, n, r)] : total[n][r];
          total[n][r] = y + side[n][r];
        }
      }
    }
    stage(total);
    __syncthreads();
    if (kOutFeatures) {
      wait_copies<1>();
    }
    const int dim = slice_dim;
#pragma unroll 1
    for (int at = thread; at < kC * kSlice / kWide; at += kThreads) {
      const int i = at / (kSlice / kWide), column = at % (kSlice / kWide) * kWide, d = slice + column;
      if (i >= count || d >= dim) {
        continue;
      }
      float y[kWide];
      load_staged(i, column, y);
      if (!shared.keep[i]) {
#pragma unroll
        for (float& x : y) {
          x = 0;
        }
      } else if constexpr (kOutFeatures) {
        float x[kWide] = {};
        load_own(at, i, d, x);
        apply_slope(p, x, kRole == Role::kQueries ? shared.lowest[i] : static_cast<float>(p.stabilizer));
#pragma unroll
        for (int m = 0; m < kWide; ++m) {
          y[m] *= x[m];
        }
      } else if (kRole == Role::kOut) {
        const float factor = static_cast<float>(p.scale), divisor = p.normalize ? shared.denominator[i] : 1;
#pragma unroll
        for (float& x : y) {
          x = !p.normalize ? x * factor : divisor != 0 ? x / divisor : 0;
        }
      }
      const View& out = pass.out;
      T* const to =
          static_cast<T*>(out.data) + batch * out.stride[0] + (row + i) * out.stride[1] + head * out.stride[2];
      Vector<T, kWide> v;
#pragma unroll
      for (int m = 0; m < kWide; ++m) {
        v.x[m] = narrow<T>(y[m]);
      }
      if (out.wide && d + kWide <= dim && (!kOutFeatures || p.interleaved || p.half == 0)) {
        store(to + d, v);
      } else {
#pragma unroll
        for (int m = 0; m < kWide; ++m) {
          if (d + m < dim) {
            to[(kOutFeatures ? dim_of(p, d + m) : d + m) * out.stride[3]] = v.x[m];
          }
        }
      }
    }
  }
  __device__ __forceinline__ void load_staged(int i, int column, float (&y)[kWide]) const {
#pragma unroll
    for (int m = 0; m < kWide; ++m) {
      y[m] = shared.staged[i][column + m];
    }
  }
  __device__ __forceinline__ void store_staged(int i, int column, const float (&y)[kWide]) {
#pragma unroll
    for (int m = 0; m < kWide; ++m) {
      shared.staged[i][column + m] = y[m];
    }
  }

  const Pass& pass;
  const Problem& p;
  Shared<F>& shared;
  bool has_z;
  int part, count = 0, slice, inner_dim, slice_dim;
  int head, kv_head, n, batch, begin = 0, tokens, this_segment, first, last, row = 0;

  int thread, warp, lane, row_tile, group, out_column;
  float state[kStateRepeats][kStateTiles][4];
};

template <class F>
__device__ __forceinline__ Shared<F>& shared_for(const Pass& pass) {
  return pass.fetch ? shared_memory<FetchingShared<F>>() : shared_memory<Shared<F>>();
}

template <class F, Role kRole>
__global__ void __launch_bounds__(kThreads, 1) linear_attention_kernel(const __grid_constant__ Pass pass) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    Block<F, kRole>(pass, shared_for<F>(pass), static_cast<int>(blockIdx.x)).run();
  } else {
    __trap();
  }
}

// The gradients of keys and those of values, side by side: two roles that go over the same rows.
template <class F>
__global__ void __launch_bounds__(kThreads, 1)
    linear_attention_keys_kernel(const __grid_constant__ Pass keys, const __grid_constant__ Pass values) {
  if constexpr (runs_here<typename F::T, F::kWgmma>()) {
    if (blockIdx.x < keys.blocks) {
      Block<F, Role::kKeys>(keys, shared_for<F>(keys), static_cast<int>(blockIdx.x)).run();
    } else {
      Block<F, Role::kValues>(values, shared_for<F>(values), static_cast<int>(blockIdx.x - keys.blocks)).run();
    }
  } else {
    __trap();
  }
}

// One or a few tokens, one after the other, in the place of the state: a block for a sequence and a head of keys, and
// the heads of queries that share it.
template <class T>
class Step {
 public:
  struct Shared {
    float b[256], turned_b[256];  // φ(k)
    float a[256], turned_a[256];  // φ(q)
    float v[256];
    float parts[kThreads], sums[kWarps];
  };

  __device__ __forceinline__ Step(const Problem& p, Shared& shared) : p(p), shared(shared) {
    n = blockIdx.x / p.kv_heads;
    kv_head = blockIdx.x % p.kv_heads;
    const int64_t state = (p.slots != nullptr ? p.slots[n] : n) * p.kv_heads + kv_head;
    kv = static_cast<float*>(p.kv) + state * p.key_dim * p.value_dim;
    z = p.normalize ? static_cast<float*>(p.z) + state * p.key_dim : nullptr;
    gamma = p.decay != nullptr ? static_cast<float>(p.decay[kv_head]) : 1.0f;
  }

  __device__ __forceinline__ void run() {
    for (row = 0; row < p.length; ++row) {
      keep = p.mask == nullptr || p.mask[n * p.mask_stride[0] + row * p.mask_stride[1]] != 0;
      position = row + (p.offsets != nullptr ? p.offsets[n] : p.offset);
      load_features(p.k, kv_head, static_cast<float>(p.stabilizer), shared.b, shared.turned_b);
      if (thread < p.value_dim) {
        shared.v[thread] = keep ? element(p.v, kv_head, thread) : 0;
      }
      __syncthreads();
      for (int64_t at = thread; at < p.key_dim * p.value_dim; at += kThreads) {
        kv[at] = gamma * kv[at] + shared.turned_b[at / p.value_dim] * shared.v[at % p.value_dim];
      }
      if (z != nullptr && thread < p.key_dim) {
        z[thread] = gamma * z[thread] + shared.b[thread];
      }
      __syncthreads();
      for (int64_t h = 0; h < p.heads / p.kv_heads; ++h) {
        attend(kv_head * (p.heads / p.kv_heads) + h);
      }
    }
  }

 private:
  __device__ __forceinline__ float element(const View& x, int64_t head, int64_t d) const {
    return widen(
        static_cast<const T*>(x.data)[n * x.stride[0] + row * x.stride[1] + head * x.stride[2] + d * x.stride[3]]);
  }

  // φ of a row, by dimension, and that turned.
  __device__ __forceinline__ void load_features(const View& x, int64_t head, float lowest, float* plain,
                                                float* turned) {
    const int column = thread, d = dim_of(p, column), other = dim_of(p, column ^ 1);
    if (column >= p.key_dim) {
      return;
    }
    float c, s;
    angle(p, keep, position, column, c, s);
    const bool turns = keep && column < 2 * p.half;
    float y[2] = {keep ? element(x, head, d) : 0, turns ? element(x, head, other) : 0};
    apply_feature(p, y, lowest);
    plain[d] = keep ? y[0] : 0;
    turned[d] = turns ? y[0] * c + (column % 2 == 0 ? -y[1] : y[1]) * s : plain[d];
  }

  // The sum over the block of what each thread has.
  __device__ __forceinline__ float block_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) {
      x += __shfl_xor_sync(0xffffffffu, x, mask);
    }
    if (thread % 32 == 0) {
      shared.sums[thread / 32] = x;
    }
    __syncthreads();
    float sum = 0;
    for (int m = 0; m < kWarps; ++m) {
      sum += shared.sums[m];
    }
    __syncthreads();
    return sum;
  }

  __device__ __forceinline__ float row_maximum(int64_t head) {
    float largest = thread < p.key_dim ? element(p.q, head, thread) : -INFINITY;
    for (int mask = 16; mask > 0; mask /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, mask));
    }
    if (thread % 32 == 0) {
      shared.sums[thread / 32] = largest;
    }
    __syncthreads();
    for (int m = 0; m < kWarps; ++m) {
      largest = fmaxf(largest, shared.sums[m]);
    }
    __syncthreads();
    return largest;
  }

  // The output of one head of queries, from the state.
  __device__ __forceinline__ void attend(int64_t head) {
    const float lowest =
        p.feature == Feature::kExp && p.normalize && keep ? row_maximum(head) : static_cast<float>(p.stabilizer);
    load_features(p.q, head, lowest, shared.a, shared.turned_a);
    __syncthreads();
    float denominator = 1;
    if (p.normalize) {
      denominator = block_sum(thread < p.key_dim ? shared.a[thread] * z[thread] : 0) + static_cast<float>(p.eps);
    }
    // A column's sum in parts of neighbouring rows, then these: kThreads / columns of them.
    const int64_t columns = p.value_dim, parts = kThreads / columns, mine = thread / columns;
    float sum = 0;
    if (mine < parts) {
      for (int64_t d = p.key_dim * mine / parts; d < p.key_dim * (mine + 1) / parts; ++d) {
        sum += shared.turned_a[d] * kv[d * columns + thread % columns];
      }
    }
    shared.parts[thread] = sum;
    __syncthreads();
    if (thread < columns) {
      float total = 0;
      for (int64_t m = 0; m < parts; ++m) {
        total += shared.parts[m * columns + thread];
      }
      if (!keep || denominator == 0) {
        total = 0;
      } else {
        total = p.normalize ? total / denominator : total * static_cast<float>(p.scale);
      }
      const View& o = p.o;
      static_cast<T*>(o.data)[n * o.stride[0] + row * o.stride[1] + head * o.stride[2] + thread * o.stride[3]] =
          narrow<T>(total);
    }
    __syncthreads();
  }

  const Problem& p;
  Shared& shared;
  int64_t n, kv_head, row = 0, position = 0;
  bool keep = true;
  float *kv, *z, gamma;
  const int thread = static_cast<int>(threadIdx.x);
};

template <class T>
__global__ void __launch_bounds__(kThreads, 1) step_kernel(const __grid_constant__ Problem p) {
  Step<T>(p, static_shared_memory<typename Step<T>::Shared>()).run();
}

}  // namespace kx::linear_attention
