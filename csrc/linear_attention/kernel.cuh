// Linear attention on tensor cores: one product of three serves the output and all gradients, as in _triton_kernel.py.
// With x, y and w rows of one sequence, in the names of kx_kernels/ops/linear_attention/README.md,
//
//   role      out  x  y  w   over    state Σ y wᵀ   sum beside it
//   kOut      N    ã  b̃  v   j ≤ i   S              z = Σ b
//   kQueries  ∂ã   g  v  b̃   j ≤ i   Sᵀ             z = Σ b
//   kKeys     ∂b̃   v  g  ã   j ≥ i   Uᵀ             w = Σ e·a
//   kValues   ∂v   b̃  ã  g   j ≥ i   U              none
//   kE        as kQueries, of which it gives a slice's part of e: where a head of queries takes more than one slice
//
// out_i = Σ_j γ^|i−j| (x_i·y_j) w_j. A block has x and y whole and kSlice columns of w: no sum is split.
#pragma once

#include "../cuda/memory.cuh"
#include "../cuda/tile.cuh"
#include "problem.h"

namespace kx::linear_attention {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlice = 64;  // columns of the output, and of the state, that a block works on

enum class Role : int { kOut, kQueries, kKeys, kValues, kE };

// One launch. States are [num_sequences, kv_heads, key_dim, value_dim] whatever the role.
struct Pass {
  Problem p;
  Role role;
  bool sum;  // write the sums over segments to `sums` and `z_sums`, nothing else
  int slices, segments;
  int64_t segment;  // tokens
  View out;
  const float *state_in, *z_in;  // or null
  float *state_out, *z_out;
  float *sums, *z_sums;  // of every segment, or null
  float* e;              // [parts, B, T, heads]
  int e_parts;

  __host__ __device__ bool reverse() const { return role == Role::kKeys || role == Role::kValues; }
  __host__ __device__ bool inner_keys() const { return role == Role::kOut || role == Role::kValues; }
  __host__ __device__ bool has_z() const { return p.normalize && role != Role::kValues && role != Role::kE; }
  // Heads that blocks are made for.
  __host__ __device__ int64_t heads() const { return reverse() || sum ? p.kv_heads : p.heads; }
};

// Tokens of a chunk: fewer where operands are wider.
template <class T>
constexpr int kChunk = std::is_same_v<T, bfloat16> ? 64 : 32;

template <class T, int kInner>
struct Shared {
  using E = typename Products<T>::Operand;
  static constexpr int kC = kChunk<T>;
  alignas(16) E x[kC * padded<E>(kInner)];
  alignas(16) E y[kC * padded<E>(kInner)];
  alignas(16) E w[kC * padded<E>(kSlice)];
  alignas(16) E plain[kC * padded<E>(kSlice)];  // of w, what RoPE has not turned
  alignas(16) E state[kInner * padded<E>(kSlice)];
  alignas(16) E weights[kC * padded<E>(kC)];  // of rows y for rows x
  float z[kInner];
  float rows[kWarps][kC];  // sums over the columns that a warp has
  float power[kC + 1];     // γ^n
  float lowest[kC], denominator[kC], e[kC];
  int64_t position[kC];
  bool keep[kC];
};

__device__ inline double power(double x, int64_t n) {
  double y = 1;
  for (; n > 0; n /= 2, x *= x) {
    y *= n % 2 != 0 ? x : 1;
  }
  return y;
}

// φ of an element, and its derivative.
__device__ __forceinline__ float feature(const Problem& p, float x, float lowest) {
  switch (p.feature) {
    case Feature::kElu1:
      return x > 0 ? x + 1 : expf(x);
    case Feature::kRelu:
      return x < 0 ? 0 : x;
    case Feature::kRelu2:
      return x < 0 ? 0 : x * x;
    case Feature::kExp:
      return expf(x - lowest);
    default:
      return x;
  }
}
__device__ __forceinline__ float slope(const Problem& p, float x, float lowest) {
  switch (p.feature) {
    case Feature::kElu1:
      return x > 0 ? 1 : expf(x);
    case Feature::kRelu:
      return x > 0 ? 1 : 0;
    case Feature::kRelu2:
      return x > 0 ? 2 * x : 0;
    case Feature::kExp:
      return expf(x - lowest);
    default:
      return 1;
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
template <class T, int kInner>
class Block {
  using E = typename Products<T>::Operand;
  static constexpr int kC = kChunk<T>;
  static constexpr int kRowTiles = kC / 16;           // of a [kC, …] product, one to a warp
  static constexpr int kGroups = kWarps / kRowTiles;  // of warps that share rows and have columns of their own
  static constexpr int kOutTiles = kSlice / 8 / kGroups;
  static constexpr int kScoreTiles = kC / 8 / kGroups;
  static constexpr int kStateRows = kInner / 16 < kWarps ? kInner / 16 : kWarps;  // tiles of rows of a state
  static constexpr int kStateGroups = kWarps / kStateRows;
  static constexpr int kStateRepeats = kInner / 16 / kStateRows;
  static constexpr int kStateTiles = kSlice / 8 / kStateGroups;

 public:
  __device__ __forceinline__ Block(const Pass& pass, Shared<T, kInner>& shared)
      : pass(pass), p(pass.p), shared(shared) {
    int64_t id = blockIdx.x;
    part = static_cast<int>(id % pass.slices);
    id /= pass.slices;
    head = id % pass.heads();
    id /= pass.heads();
    this_segment = id % pass.segments;
    n = id / pass.segments;
    kv_head = pass.reverse() || pass.sum ? head : head / (p.heads / p.kv_heads);
    batch = p.cu_seqlens != nullptr ? 0 : n;
    tokens = p.length;
    if (p.cu_seqlens != nullptr) {
      begin = clamp(p.cu_seqlens[n], 0, p.length);
      tokens = clamp(p.cu_seqlens[n + 1], begin, p.length) - begin;
    }
    first = this_segment * pass.segment;
    last = first + pass.segment < tokens ? first + pass.segment : tokens;
    slice = part * kSlice;
    decay = p.decay != nullptr ? p.decay[kv_head] : 1;
    inner_dim = static_cast<int>(pass.inner_keys() ? p.key_dim : p.value_dim);
    slice_dim = static_cast<int>(pass.inner_keys() ? p.value_dim : p.key_dim);
  }

  __device__ __forceinline__ void run() {
    if (first >= tokens && this_segment > 0) {
      return;
    }
    for (int i = thread; i <= kC; i += kThreads) {
      shared.power[i] = static_cast<float>(power(decay, i));
    }
    load_start();
    __syncthreads();
    const int64_t chunks = (last - first + kC - 1) / kC;
    for (int64_t c = 0; c < chunks; ++c) {
      chunk(first + (pass.reverse() ? chunks - 1 - c : c) * kC);
    }
    store_end();
  }

 private:
  __device__ __forceinline__ static int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x < high ? x : high;
  }

  // By value: a choice between addresses would put both into memory.
  template <class U>
  __device__ __forceinline__ static U either(bool first, U a, U b) {
    return first ? a : b;
  }

  // Columns whose running sum z is kept: of all features, or of the slice.
  __device__ __forceinline__ int z_first() const { return pass.inner_keys() ? 0 : slice; }
  __device__ __forceinline__ int z_columns() const { return pass.inner_keys() ? kInner : kSlice; }

  __device__ __forceinline__ void chunk(int64_t place) {
    count = static_cast<int>(last - place < kC ? last - place : kC);
    const Tile<E> x{shared.x, padded<E>(kInner)}, y{shared.y, padded<E>(kInner)},
        plain{shared.plain, padded<E>(kSlice)};
    const bool turns = p.half > 0;
    Tile<E> w{shared.w, padded<E>(kSlice)};
    if (!pass.inner_keys() && !turns) {
      w = plain;
    }
    enter(place);
    store_state_operand();
    __syncthreads();

    float total[kOutTiles][4] = {}, side[kOutTiles][4] = {};
    const int64_t heads_here = pass.reverse() ? p.heads / p.kv_heads : 1;
    bool first_head = true;
    for (int64_t h = 0; h < heads_here; ++h, first_head = false) {
      const int64_t q_head = pass.reverse() ? head * heads_here + h : head;
      if (!first_head) {
        __syncthreads();  // everybody has read the last head's tiles
      }
      load_rows(q_head);
      __syncthreads();
      switch (pass.role) {
        case Role::kOut:
          if (!pass.sum) {
            load_features(x, p.q, q_head, 0, kInner, true);
          }
          load_features(y, p.k, kv_head, 0, kInner, false);
          load_values(w, p.v, kv_head, slice, kSlice, false);
          break;
        case Role::kQueries:
        case Role::kE:
          if (!pass.sum) {
            load_values(x, p.grad_o, q_head, 0, kInner, true);
          }
          load_values(y, p.v, kv_head, 0, kInner, false);
          load_features(plain, p.k, kv_head, slice, kSlice, false);
          break;
        case Role::kKeys:
          if (first_head) {
            load_values(x, p.v, kv_head, 0, kInner, false);
          }
          load_values(y, p.grad_o, q_head, 0, kInner, true);
          load_features(plain, p.q, q_head, slice, kSlice, true);
          break;
        case Role::kValues:
          if (first_head) {
            load_features(x, p.k, kv_head, 0, kInner, false);
          }
          load_features(y, p.q, q_head, 0, kInner, true);
          load_values(w, p.grad_o, q_head, slice, kSlice, true);
          break;
      }
      __syncthreads();

      float scores[kScoreTiles][4] = {};
      if (pass.role == Role::kOut && p.normalize && !pass.sum) {
        if (p.causal) {
          score(x, y, scores);
        }
        sum_denominators(x, scores, q_head);
      }
      const float added_z =
          pass.has_z() && (p.causal || pass.sum) ? column_sum(either(pass.inner_keys(), y, plain)) : 0;
      if (turns) {
        __syncthreads();
        if (!pass.inner_keys()) {
          turn(plain, w, slice, kSlice);
        } else {
          if (!pass.sum && first_head) {
            turn(x, x, 0, kInner);
          }
          turn(y, y, 0, kInner);
        }
        __syncthreads();
      }

      if (!pass.sum) {
        if (first_head) {
          multiply<T, false, true>(total, x, 16 * row_tile, state_operand(), out_column, kInner);
          fade(total);
          if (pass.role == Role::kKeys && p.normalize) {
            add_z(side, false);
          }
        }
        if (p.causal) {
          if (turns || pass.role != Role::kOut || !p.normalize) {
#pragma unroll
            for (auto& tile : scores) {
#pragma unroll
              for (float& score : tile) {
                score = 0;
              }
            }
            score(x, y, scores);
          }
          store_weights(scores);
          __syncthreads();
          multiply<T, false, true>(total, weights_operand(), 16 * row_tile, w, out_column, kC);
        }
        if (pass.role == Role::kE || (pass.role == Role::kQueries && p.normalize && pass.slices == 1)) {
          sum_e(total, q_head);
        }
        if (pass.role == Role::kQueries && p.normalize) {
          add_z(side, true);
        }
        if (p.causal && p.normalize && (pass.role == Role::kQueries || pass.role == Role::kKeys)) {
          __syncthreads();
          store_row_weights();
          __syncthreads();
          multiply<T, false, true>(side, weights_operand(), 16 * row_tile, plain, out_column, kC);
        }
      }

      if (p.causal || pass.sum) {
        __syncthreads();  // everybody has read the operands of this chunk's rows
        const float kept = first_head ? shared.power[count] : 1.0f;
        if (pass.has_z() && thread < z_columns()) {
          shared.z[thread] = kept * shared.z[thread] + added_z;
        }
        if (p.decay != nullptr) {
          fade_rows(w);
          __syncthreads();
        }
        add_to_state(kept, y, w);
      }
    }
    if (!pass.sum && pass.role != Role::kE) {
      store_rows(total, side);
    }
    __syncthreads();
  }

  // Which rows there are, and their positions.
  __device__ __forceinline__ void enter(int64_t place) {
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

  __device__ __forceinline__ int64_t row_of(int i, int64_t q_head) const {
    return (batch * p.length + row + i) * p.heads + q_head;
  }

  // What a query head's rows need beside their elements.
  __device__ __forceinline__ void load_rows(int64_t q_head) {
    const bool shifted = p.feature == Feature::kExp && p.normalize && !(pass.sum && !pass.reverse());
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
    for (int i = thread; i < kC && p.normalize && (!pass.sum || pass.reverse()); i += kThreads) {
      const bool keep = shared.keep[i];
      if (pass.role != Role::kOut) {
        shared.denominator[i] = keep ? static_cast<const float*>(p.denominator)[row_of(i, q_head)] : 0;
      }
      if (pass.role == Role::kKeys || (pass.role == Role::kQueries && pass.slices > 1)) {
        float e = 0;
        for (int m = 0; m < pass.e_parts && keep; ++m) {
          e += pass.e[m * p.batch * p.length * p.heads + row_of(i, q_head)];
        }
        shared.e[i] = e;
      }
    }
  }

  __device__ __forceinline__ float element(const View& x, int i, int64_t head, int d) const {
    return widen(static_cast<const T*>(
        x.data)[batch * x.stride[0] + (row + i) * x.stride[1] + head * x.stride[2] + d * x.stride[3]]);
  }

  // to [kC, columns] = change(i, x's element); 0 where there is no row, no such column of `dim`, or padding. Columns of
  // features are dimensions in dim_of's order.
  template <class Change>
  __device__ __forceinline__ void load_tile(const Tile<E>& to, const View& x, int64_t its_head, int first_column,
                                            int columns, int64_t dim, bool of_features, Change&& change) {
    constexpr int kWide = 16 / sizeof(T), kStored = 16 / sizeof(E) < kWide ? 16 / sizeof(E) : kWide;
    const bool in_order = !of_features || p.interleaved || p.half == 0;
    for (int at = thread; at < kC * columns / kWide; at += kThreads) {
      const int i = at / (columns / kWide), column = at % (columns / kWide) * kWide, d = first_column + column;
      float y[kWide] = {};
      if (shared.keep[i] && in_order && x.wide && d + kWide <= dim) {
        const T* const from = static_cast<const T*>(x.data) + batch * x.stride[0] + (row + i) * x.stride[1];
        const Vector<T, kWide> v = load_shared_by_many<kWide>(from + its_head * x.stride[2] + d);
#pragma unroll
        for (int m = 0; m < kWide; ++m) {
          y[m] = change(i, widen(v.x[m]));
        }
      } else if (shared.keep[i]) {
#pragma unroll
        for (int m = 0; m < kWide; ++m) {
          const int one = of_features ? dim_of(p, d + m) : d + m;
          y[m] = one < dim ? change(i, element(x, i, its_head, one)) : 0;
        }
      }
#pragma unroll
      for (int m = 0; m < kWide; m += kStored) {
        Vector<E, kStored> v;
#pragma unroll
        for (int l = 0; l < kStored; ++l) {
          v.x[l] = operand<T>(y[m + l]);
        }
        store(to.at(i, column + m), v);
      }
    }
  }

  __device__ __forceinline__ void load_features(const Tile<E>& to, const View& x, int64_t its_head, int first_column,
                                                int columns, bool of_query) {
    load_tile(to, x, its_head, first_column, columns, p.key_dim, true, [&](int i, float y) {
      return feature(p, y, of_query ? shared.lowest[i] : static_cast<float>(p.stabilizer));
    });
  }

  // Rows of v, or of grad_o as gradients of numerators.
  __device__ __forceinline__ void load_values(const Tile<E>& to, const View& x, int64_t its_head, int first_column,
                                              int columns, bool of_numerator) {
    load_tile(to, x, its_head, first_column, columns, p.value_dim, false,
              [&](int i, float y) { return of_numerator ? y * inverse(i) : y; });
  }

  // What a numerator is multiplied with.
  __device__ __forceinline__ float inverse(int i) const {
    if (!p.normalize) {
      return static_cast<float>(p.scale);
    }
    return shared.denominator[i] != 0 ? 1 / shared.denominator[i] : 0;
  }

  // Rows of features turned by their positions' angles.
  __device__ __forceinline__ void turn(const Tile<E>& from, const Tile<E>& to, int first_column, int columns) {
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
  __device__ __forceinline__ void score(const Tile<E>& x, const Tile<E>& y, float (&scores)[kScoreTiles][4]) {
    multiply<T, false, false>(scores, x, 16 * row_tile, y, group * kScoreTiles * 8, kInner);
  }

  // Row and column of a thread's r-th number of a product's n-th tile.
  __device__ __forceinline__ int row_at(int r) const { return 16 * row_tile + lane / 4 + r / 2 * 8; }
  __device__ __forceinline__ static int column_at(int first, int n, int r) {
    return first + 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + r % 2;
  }

  // γ^|i − j| where row i sees row j, else 0.
  __device__ __forceinline__ float weight(int i, int j) const {
    const int apart = pass.reverse() ? j - i : i - j;
    return apart < 0 ? 0 : shared.power[apart];
  }
  // What is left of the state before the chunk at row i, and of row j in the state after it.
  __device__ __forceinline__ float since(int i) const {
    return !p.causal ? 1 : pass.reverse() ? shared.power[i < count ? count - 1 - i : 0] : shared.power[i + 1];
  }
  __device__ __forceinline__ float until(int j) const {
    return pass.reverse() ? shared.power[j + 1] : shared.power[j < count ? count - 1 - j : 0];
  }

  __device__ __forceinline__ void fade(float (&total)[kOutTiles][4]) {
    for (auto& tile : total) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        tile[r] *= since(row_at(r));
      }
    }
  }
  __device__ __forceinline__ void fade_rows(const Tile<E>& w) {
    for (int at = thread; at < kC * kSlice; at += kThreads) {
      E& x = *w.at(at / kSlice, at % kSlice);
      x = operand<T>(widen(x) * until(at / kSlice));
    }
  }

  __device__ __forceinline__ Tile<E> weights_operand() const { return {shared.weights, padded<E>(kC)}; }
  __device__ __forceinline__ Tile<E> state_operand() const { return {shared.state, padded<E>(kSlice)}; }

  __device__ __forceinline__ void store_weights(const float (&scores)[kScoreTiles][4]) {
#pragma unroll
    for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int i = row_at(r), j = column_at(group * kScoreTiles * 8, n, r);
        *weights_operand().at(i, j) = operand<T>(scores[n][r] * weight(i, j));
      }
    }
  }
  // Weights times e of the query's row: row i for queries, j for keys.
  __device__ __forceinline__ void store_row_weights() {
    for (int at = thread; at < kC * kC; at += kThreads) {
      const int i = at / kC, j = at % kC;
      *weights_operand().at(i, j) = operand<T>(weight(i, j) * shared.e[pass.role == Role::kQueries ? i : j]);
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
  __device__ __forceinline__ void sum_denominators(const Tile<E>& x, const float (&scores)[kScoreTiles][4],
                                                   int64_t q_head) {
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
        before += widen(*x.at(i, d)) * shared.z[d];
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

  // e of each row, or the slice's part of it, from the gradients of turned features.
  __device__ __forceinline__ void sum_e(const float (&total)[kOutTiles][4], int64_t q_head) {
    float sums[2] = {};
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const int i = row_at(r), column = slice + column_at(out_column, n, r);
        float a[2] = {};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int d = dim_of(p, column + m);
          if (shared.keep[i] && d < p.key_dim) {
            a[m] = widen(operand<T>(feature(p, element(p.q, i, q_head, d), shared.lowest[i])));
          }
        }
        float c, s;
        angle(p, shared.keep[i], shared.position[i], column, c, s);
        sums[r / 2] += total[n][r] * widen(operand<T>(a[0] * c - a[1] * s));
        sums[r / 2] += total[n][r + 1] * widen(operand<T>(a[1] * c + a[0] * s));
      }
    }
    sum_rows(sums[0], sums[1]);
    for (int i = thread; i < kC; i += kThreads) {
      shared.e[i] = -row_sum(i) * inverse(i);
      if (i < count) {
        pass.e[(pass.role == Role::kE ? part : 0) * p.batch * p.length * p.heads + row_of(i, q_head)] = shared.e[i];
      }
    }
    __syncthreads();
  }

  // The sum of a column's rows, as they will have faded after the chunk; for keys of queries, times their e.
  __device__ __forceinline__ float column_sum(const Tile<E>& features) const {
    float sum = 0;
    if (thread < z_columns()) {
      for (int j = 0; j < kC; ++j) {
        const float factor = pass.role == Role::kKeys ? shared.e[j] : 1;
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
    for_state([&](float& x, int i, int j) { *state_operand().at(i, j) = operand<T>(x); });
  }

  // state = kept·state + yᵀ·w
  __device__ __forceinline__ void add_to_state(float kept, const Tile<E>& y, const Tile<E>& w) {
#pragma unroll
    for (int repeat = 0; repeat < kStateRepeats; ++repeat) {
      float added[kStateTiles][4] = {};  // on its own: tensor cores cut off what they add to a long sum
      multiply<T, true, true>(added, y, 16 * (warp % kStateRows + repeat * kStateRows), w,
                              warp / kStateRows * kStateTiles * 8, kC);
#pragma unroll
      for (int n = 0; n < kStateTiles; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          state[repeat][n][r] = kept * state[repeat][n][r] + added[n][r];
        }
      }
    }
  }

  // Where a state in memory has row i and column j of this block's, or -1.
  __device__ __forceinline__ int64_t in_memory(int i, int j) const {
    const int inner = pass.inner_keys() ? dim_of(p, i) : i,
              outer = pass.inner_keys() ? slice + j : dim_of(p, slice + j);
    if (inner >= inner_dim || outer >= slice_dim) {
      return -1;
    }
    const int64_t at = (n * p.kv_heads + kv_head) * p.key_dim * p.value_dim;
    return at + (pass.inner_keys() ? inner * p.value_dim + outer : outer * p.value_dim + inner);
  }
  __device__ __forceinline__ int64_t z_in_memory(int column) const {
    const int d = dim_of(p, z_first() + column);
    return d < p.key_dim ? (n * p.kv_heads + kv_head) * p.key_dim + d : -1;
  }
  // Where the sums over a segment lie.
  __device__ __forceinline__ int64_t sums_of(int64_t other) const {
    return ((n * pass.segments + other) * p.kv_heads + kv_head) * pass.slices + part;
  }

  // The state that the segment starts from: the sum over all that is before it, or after it.
  __device__ __forceinline__ void load_start() {
    for_state([&](float& x, int i, int j) {
      const int64_t at = pass.sum || pass.state_in == nullptr ? -1 : in_memory(i, j);
      x = at >= 0 ? pass.state_in[at] : 0;
    });
    float z = 0;
    const bool has_z = pass.has_z() && thread < z_columns();
    if (has_z && !pass.sum && pass.z_in != nullptr && z_in_memory(thread) >= 0) {
      z = pass.z_in[z_in_memory(thread)];
    }
    if (!pass.sum && pass.sums != nullptr) {
      const int64_t used = tokens > 0 ? (tokens + pass.segment - 1) / pass.segment : 0;
      const int64_t others = !p.causal ? used : pass.reverse() ? used - 1 - this_segment : this_segment;
      for (int64_t m = 0; m < others; ++m) {
        const int64_t other = pass.reverse() ? used - 1 - m : m;
        const int64_t length =
            tokens - other * pass.segment < pass.segment ? tokens - other * pass.segment : pass.segment;
        const float kept = static_cast<float>(power(decay, length));
        const float* const sums = pass.sums + sums_of(other) * kInner * kSlice;
        for_state([&](float& x, int i, int j) { x = kept * x + sums[i * kSlice + j]; });
        if (has_z) {
          z = kept * z + pass.z_sums[sums_of(other) * kInner + thread];
        }
      }
    }
    if (thread < kInner) {
      shared.z[thread] = z;
    }
  }

  __device__ __forceinline__ void store_end() {
    if (pass.sum) {
      float* const sums = pass.sums + sums_of(this_segment) * kInner * kSlice;
      for_state([&](float& x, int i, int j) { sums[i * kSlice + j] = x; });
      if (pass.has_z() && thread < z_columns()) {
        pass.z_sums[sums_of(this_segment) * kInner + thread] = shared.z[thread];
      }
      return;
    }
    const bool ends = pass.reverse() ? this_segment == 0 : last >= tokens;
    if (!ends || (!pass.reverse() && head % (p.heads / p.kv_heads) != 0)) {
      return;
    }
    for_state([&](float& x, int i, int j) {
      if (pass.state_out != nullptr && in_memory(i, j) >= 0) {
        pass.state_out[in_memory(i, j)] = x;
      }
    });
    const bool writes_z = pass.z_out != nullptr && pass.has_z() && (part == 0 || !pass.inner_keys());
    if (writes_z && thread < z_columns() && z_in_memory(thread) >= 0) {
      pass.z_out[z_in_memory(thread)] = shared.z[thread];
    }
  }

  // The chunk's part of the output.
  __device__ __forceinline__ void store_rows(float (&total)[kOutTiles][4], const float (&side)[kOutTiles][4]) {
    const bool of_features = !pass.inner_keys();
    const View from = either(pass.role == Role::kQueries, p.q, p.k);
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n) {
#pragma unroll
      for (int r = 0; r < 4; r += 2) {
        const int i = row_at(r), column = slice + column_at(out_column, n, r);
        if (i >= count) {
          continue;
        }
        float y[2] = {total[n][r], total[n][r + 1]};
        if (of_features && p.half > 0) {  // back
          float c, s;
          angle(p, shared.keep[i], shared.position[i], column, c, s);
          y[0] = total[n][r] * c + total[n][r + 1] * s;
          y[1] = total[n][r + 1] * c - total[n][r] * s;
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const int d = of_features ? dim_of(p, column + m) : column + m;
          if (d >= slice_dim) {
            continue;
          }
          if (!shared.keep[i]) {
            y[m] = 0;
          } else if (of_features) {
            const float lowest = pass.role == Role::kQueries ? shared.lowest[i] : static_cast<float>(p.stabilizer);
            y[m] = (y[m] + side[n][r + m]) * slope(p, element(from, i, head, d), lowest);
          } else if (pass.role == Role::kOut && p.normalize) {
            y[m] = shared.denominator[i] != 0 ? y[m] / shared.denominator[i] : 0;
          } else if (pass.role == Role::kOut) {
            y[m] *= static_cast<float>(p.scale);
          }
        }
        const View& out = pass.out;
        T* const to =
            static_cast<T*>(out.data) + batch * out.stride[0] + (row + i) * out.stride[1] + head * out.stride[2];
        const int d = of_features ? dim_of(p, column) : column, next = of_features ? dim_of(p, column + 1) : column + 1;
        if (out.wide && next == d + 1 && next < slice_dim) {
          store(to + d, Vector<T, 2>{narrow<T>(y[0]), narrow<T>(y[1])});
        } else {
          if (d < slice_dim) {
            to[d * out.stride[3]] = narrow<T>(y[0]);
          }
          if (next < slice_dim) {
            to[next * out.stride[3]] = narrow<T>(y[1]);
          }
        }
      }
    }
  }

  const Pass& pass;
  const Problem& p;
  Shared<T, kInner>& shared;
  int part, count = 0, slice, inner_dim, slice_dim;
  int64_t head, kv_head, n, batch, begin = 0, tokens, this_segment, first, last, row = 0;
  double decay;

  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int row_tile = warp % kRowTiles, group = warp / kRowTiles, out_column = group * kOutTiles * 8;
  float state[kStateRepeats][kStateTiles][4];
};

template <class T, int kInner>
__global__ void __launch_bounds__(kThreads, 1) linear_attention_kernel(const __grid_constant__ Pass pass) {
  Block<T, kInner>(pass, shared_memory<Shared<T, kInner>>()).run();
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
    const float y = keep ? feature(p, element(x, head, d), lowest) : 0;
    const bool turns = keep && column < 2 * p.half;
    const float pair = turns ? feature(p, element(x, head, other), lowest) : 0;
    plain[d] = y;
    turned[d] = turns ? y * c + (column % 2 == 0 ? -pair : pair) * s : y;
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
