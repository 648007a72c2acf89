// What the kernels of gated attention are made of, and those of mixed-chunk attention: products of tiles, where their
// operands come from, and what happens to each on its way to memory.
#pragma once

#include "../cuda/boxes.cuh"
#include "../cuda/rows.cuh"
#include "problem.h"

namespace kx::gau_attention {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = kCudaTile;       // rows of a tile, queries or keys
constexpr int kDiagonals = 2 * kTile;  // of a tile of scores, and one more

// How a kernel is laid out: a block makes kTile × kColumns numbers, from operands that lie in kStages places in turn.
// kTma: the copy engine brings them, and no thread does.
template <class T_, int kColumns_, bool kWgmma_, bool kTma_ = false>
struct Form {
  using T = T_;
  using E = typename Products<T>::Operand;
  static constexpr int kColumns = kColumns_;
  static constexpr bool kWgmma = kWgmma_, kTma = kTma_;
  static_assert(kWgmma || !kTma, "tiles that the copy engine writes are swizzled");
  static constexpr int kStages = kTma ? 4 : kWgmma ? 3 : 2;
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
  float scale[kTile], bias_scale[kTile], own[kTile];  // of rows; own: of what the kernel needs besides
  bool keep_query[kTile], keep_key[kTile];
  Mbarrier there[F::kTma ? F::kStages : 1], free[F::kTma ? F::kStages : 1];  // operands of a stage; a stage for others
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
  // The first query of the first tile that sees one of the keys from `key` on.
  __device__ __forceinline__ int first_seeing(bool causal, int key) const {
    return causal && key > shift() ? (key - shift()) / kTile * kTile : 0;
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

// What products take scores from: rows of queries and keys, and backward of G and values.
template <class Q, class K, class G, class V>
struct ScoreOperands {
  Q q;
  K k;
  G g;
  V v;
};
template <class Q, class K, class G, class V>
ScoreOperands(Q, K, G, V) -> ScoreOperands<Q, K, G, V>;
template <class T>
__device__ __forceinline__ auto score_operands(const Problem& p, const Sequence& s, int head,
                                               const Rows<typename Products<T>::Operand>& g) {
  return ScoreOperands{queries_of<T>(p, p.q, s, head, p.key_dim), keys_of<T>(p, p.k, s, head, p.key_dim), g,
                       keys_of<T>(p, p.v, s, head, p.value_dim)};
}

// Of a workspace [B, n_q, heads, pitch]: rows of queries of a sequence.
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
  static constexpr int kStaged = std::extent_v<decltype(Shared<F>::staged), 1> - 4;  // columns that are staged at once

  __device__ __forceinline__ explicit Block(Shared<F>& shared)
      : shared(shared), thread(unknown(static_cast<int>(threadIdx.x))), warp(thread / 32) {
    if constexpr (F::kTma) {
      if (thread == 0) {
        for (int i = 0; i < F::kStages; ++i) {
          shared.there[i].init(1);
          shared.free[i].init(kWarps);
        }
        fence_mbarriers();
      }
      __syncthreads();
    }
  }

  // A barrier that what wgmma reads may have been written before.
  __device__ __forceinline__ static void sync() {
    if constexpr (F::kWgmma) {
      fence_proxy_async();
    }
    __syncthreads();
  }

  template <class S, int kRows, int kColumns, int kSwizzle>
  __device__ __forceinline__ void load(Tile<E, kRows, kColumns, kSwizzle>& to, const Rows<S>& from, int row,
                                       int column) {
    load_tile<T, kThreads>(to, from, row, column, thread);
  }
  template <int kRows, int kColumns, int kSwizzle>
  __device__ __forceinline__ void load(Tile<E, kRows, kColumns, kSwizzle>& to, const Boxes& from, int row, int column) {
    load_boxes(to, from, row, column, shared.there[asked_ % F::kStages]);
  }

  // d += a · b over `steps` times kDepth. fetch(stage, step) loads the operands of a step, seen(stage) is called while
  // they are there.
  template <bool kTurnedA, bool kTurnedB, class Fetch, class Seen>
  __device__ __forceinline__ void accumulate(float (&d)[kN][4], int steps, Fetch&& fetch, Seen&& seen) {
    if constexpr (F::kTma) {
      accumulate_boxes<kTurnedA, kTurnedB>(d, steps, fetch, seen);
    } else {
      accumulate_copies<kTurnedA, kTurnedB>(d, steps, fetch, seen);
    }
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

  // The numbers where every thread finds them: kStaged columns from `first` on.
  __device__ __forceinline__ void stage(const float (&d)[kN][4], int first = 0) {
    for_each([&](int row, int column, int n, int i) {
      if (8 * n >= first && 8 * n < first + kStaged) {
        shared.staged[row][column - first] = d[n][i];
      }
    });
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
  template <class To, class Change>
  __device__ __forceinline__ static void write(const View& x, To* to, int n, Change&& change) {
    if (x.wide && n == kWide) {
      constexpr int kAtOnce = 16 / sizeof(To);
#pragma unroll
      for (int first = 0; first < kWide; first += kAtOnce) {
        Vector<To, kAtOnce> out;
#pragma unroll
        for (int v = 0; v < kAtOnce; ++v) {
          out.x[v] = narrow<To>(change(first + v));
        }
        store(to + first, out);
      }
      return;
    }
    for (int v = 0; v < n; ++v) {
      to[v * x.stride[3]] = narrow<To>(change(v));
    }
  }

  Shared<F>& shared;
  const int thread, warp;

 private:
  // accumulate, of what all threads copy.
  template <bool kTurnedA, bool kTurnedB, class Fetch, class Seen>
  __device__ __forceinline__ void accumulate_copies(float (&d)[kN][4], int steps, Fetch&& fetch, Seen&& seen) {
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

  // accumulate, of what thread 0 asks the copy engine for. A product goes on while the next one is begun; its stage is
  // free when each warp is through with it.
  template <bool kTurnedA, bool kTurnedB, class Fetch, class Seen>
  __device__ __forceinline__ void accumulate_boxes(float (&d)[kN][4], int steps, Fetch&& fetch, Seen&& seen) {
    const auto ask = [&](int step) {
      if (step < steps) {
        if (thread == 0) {
          const int at = asked_ % F::kStages, round = asked_ / F::kStages;
          if (round > 0) {
            shared.free[at].wait((round - 1) % 2);
          }
          shared.there[at].arrive_and_expect(sizeof(typename F::A) + sizeof(typename F::B));
          fetch(shared.stages[at], step);
        }
        __syncwarp();
        ++asked_;
      }
    };
    const auto release = [&](int taken) {
      if (thread % 32 == 0) {
        shared.free[taken % F::kStages].arrive();
      }
    };
    const int first = asked_;
    for (int step = 0; step < F::kStages - 1; ++step) {
      ask(step);
    }
    const auto begin = [&](int step) {
      const int at = (first + step) % F::kStages;
      Stage<F>& stage = shared.stages[at];
      shared.there[at].wait((first + step) / F::kStages % 2);
      if constexpr (kTurnedA) {
        begin_product<T, true, kTurnedB>(d, stage.turned_a, 16 * warp, b<kTurnedB>(stage), 0, F::kDepth);
      } else {
        begin_product<T, false, kTurnedB>(d, stage.a, 16 * warp, b<kTurnedB>(stage), 0, F::kDepth);
      }
      seen(stage);
    };
    if (steps > 0) {
      begin(0);
      ask(F::kStages - 1);
      for (int step = 1; step < steps; ++step) {
        begin(step);
        finish_products<1, true>(d);
        release(first + step - 1);
        ask(step + F::kStages - 1);
      }
      finish_products<0, true>(d);
      release(first + steps - 1);
    }
    __syncthreads();
  }

  int asked_ = 0;  // steps whose operands were asked for so far

  template <bool kTurned>
  __device__ __forceinline__ static auto& b(Stage<F>& stage) {
    if constexpr (kTurned) {
      return stage.turned_b;
    } else {
      return stage.b;
    }
  }
};

// f(x), and its derivative. NaN stays NaN.
__device__ __forceinline__ float sigmoid(float x) { return 1 / (1 + expf(-x)); }

__device__ __forceinline__ float activate(Activation f, float x) {
  switch (f) {
    case Activation::kRelu2:
      return x <= 0 ? 0 : x * x;
    case Activation::kRelu:
      return x <= 0 ? 0 : x;
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
      return x <= 0 ? 0 : 2 * x;
    case Activation::kRelu:
      return x <= 0 ? 0.0f : 1.0f;
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

// P of kTile queries and kTile keys of one head: scores[n][i] becomes of_value(row, f(x)). And backward X, but for the
// factor a: grads[n][i] becomes f′(x) of_grad(row, G vᵀ), g being rows of G. shared.own of rows are there already.
// kTurned: Pᵀ and Xᵀ, a row of which is a key's.
template <class F, bool kBackward, bool kTurned = false, class Operands, class OfValue, class OfGrad>
__device__ __forceinline__ void score_tile(Block<F>& block, const Problem& p, const Sequence& s, int head, int key,
                                           const Operands& from, float (&scores)[F::kN][4],
                                           float (&grads)[kBackward ? F::kN : 1][4], OfValue&& of_value,
                                           OfGrad&& of_grad) {
  static_assert(F::kColumns == kTile, "tiles of scores are square");
  Shared<F>& shared = block.shared;
  for (int i = block.thread; i < kTile; i += kThreads) {
    const int64_t row = s.query_row + s.first + i;
    const bool keep = i < s.count() && keeps(p.query_mask, p.query_mask_stride, s.batch, row);
    shared.keep_query[i] = keep;
    shared.keep_key[i] =
        key + i < s.keys && keeps(p.key_mask, p.key_mask_stride, s.batch, static_cast<int64_t>(s.key_row) + key + i);
    shared.scale[i] = keep ? factor(p, p.scale, p.a, s, row) : 0;
    shared.bias_scale[i] = keep ? factor(p, p.bias_scale, p.b, s, row) : 0;
  }

  const auto multiply = [&](float (&d)[F::kN][4], int64_t depth, const auto& of_queries, const auto& of_keys) {
    block.template accumulate<false, false>(
        d, ceil_div(static_cast<int>(depth), F::kDepth), [&](Stage<F>& stage, int step) {
          block.load(kTurned ? stage.b : stage.a, of_queries, s.first, step * F::kDepth);
          block.load(kTurned ? stage.a : stage.b, of_keys, key, step * F::kDepth);
        });
  };
  multiply(scores, p.key_dim, from.q, from.k);
  if constexpr (kBackward) {
    multiply(grads, p.value_dim, from.g, from.v);
  }

  const float* const bias = p.bias == nullptr ? nullptr
                                              : static_cast<const float*>(p.bias) +
                                                    (p.bias_heads > 1 ? head : 0) * p.distances + p.distances / 2;
  const int apart = key - (s.first + s.shift());  // of the first key from the first query
  block.for_each([&](int tile_row, int tile_column, int n, int i) {
    const int row = kTurned ? tile_column : tile_row, column = kTurned ? tile_row : tile_column;
    const int distance = apart + column - row;
    const bool sees = shared.keep_query[row] && shared.keep_key[column] && !(p.causal && distance > 0);
    float x = shared.scale[row] * scores[n][i];
    if (bias != nullptr && sees) {
      x += shared.bias_scale[row] * bias[distance];
    }
    scores[n][i] = sees ? of_value(row, activate(p.activation, x)) : 0;
    if constexpr (kBackward) {
      grads[n][i] = sees ? slope(p.activation, x) * of_grad(row, grads[n][i]) : 0;
    }
  });
}

// A tile of scores to a workspace: `rows` rows, all kTile columns, and times a if `scaled`.
template <class F>
__device__ __forceinline__ void write_scores(Block<F>& block, const float (&d)[F::kN][4], typename F::E* to,
                                             int64_t row_stride, int rows, bool scaled) {
  block.stage(d);
  constexpr int kVector = Block<F>::kVector, kVectors = kTile / kVector;
  for (int i = block.thread; i < rows * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * kVector;
    Vector<typename F::E, kVector> out;
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float x = block.shared.staged[row][column + v];
      out.x[v] = operand<typename F::T>(scaled ? block.shared.scale[row] * x : x);
    }
    store(to + row * row_stride + column, out);
  }
}

// Sums of the diagonals of b X, which is staged: that of distance d - (kTile - 1) between its columns and rows to
// to[d].
template <class F>
__device__ __forceinline__ void add_tile_diagonals(Block<F>& block, float* to) {
  for (int d = block.thread; d < kDiagonals - 1; d += kThreads) {
    float sum = 0;
    for (int row = d < kTile ? kTile - 1 - d : 0; row < kTile && row + d - (kTile - 1) < kTile; ++row) {
      sum += block.shared.bias_scale[row] * block.shared.staged[row][row + d - (kTile - 1)];
    }
    to[d] = sum;
  }
}

// Outputs of kTile queries, from column `first` on: of_row(i, row) times what is staged, with the gate and before it.
template <class F, class OfRow>
__device__ __forceinline__ void write_outputs(Block<F>& block, const Problem& p, const Sequence& s, int head, int first,
                                              OfRow&& of_row) {
  using T = typename F::T;
  const int columns = static_cast<int>(p.value_dim) - first;
  constexpr int kStaged = Block<F>::kStaged;
  block.for_each_vector(s.count(), columns < kStaged ? columns : kStaged, [&](int i, int column, int n) {
    const int64_t row = static_cast<int64_t>(s.query_row) + s.first + i;
    const bool keep = keeps(p.query_mask, p.query_mask_stride, s.batch, row);
    const float c = keep ? of_row(i, row) : 0;
    const float* const staged = &block.shared.staged[i][column];
    const auto ungated = [&](int e) { return keep ? c * staged[e] : 0; };  // 0 · NaN is no 0
    const auto place = [&](auto type, const View& x) {
      return element<decltype(type)>(x, s.batch, row, head) + (first + column) * x.stride[3];
    };
    if (p.ungated.data != nullptr && p.by_sum) {
      block.write(p.ungated, place(float{}, p.ungated), n, ungated);
    } else if (p.ungated.data != nullptr) {
      block.write(p.ungated, place(T{}, p.ungated), n, ungated);
    }
    T* const o = place(T{}, p.o);
    if (p.gate.data != nullptr && keep) {
      const T* const gate = place(T{}, p.gate);
      if (p.gate.wide && n == Block<F>::kWide) {
        const auto u = load_once<Block<F>::kWide>(gate);
        block.write(p.o, o, n, [&](int e) { return ungated(e) * widen(u.x[e]); });
      } else {
        block.write(p.o, o, n, [&](int e) { return ungated(e) * widen(gate[e * p.gate.stride[3]]); });
      }
    } else {
      block.write(p.o, o, n, ungated);
    }
  });
}

// One row of the gradients before the products, by a warp: G = c gate ⊙ ∂o and the gradient of the gate. The sum of
// what lanes return is δ.
template <class T>
__device__ __forceinline__ float prepare_row(const Problem& p, int64_t batch, int64_t row, int64_t head, bool keep,
                                             float c, typename Products<T>::Operand* g) {
  const auto read = [&](auto type, const View& x, int64_t e) {
    using From = decltype(type);
    return keep && x.data != nullptr ? widen(element<const From>(x, batch, row, head)[e * x.stride[3]]) : 0.0f;
  };
  const auto of = [&](const View& x, int64_t e) { return read(T{}, x, e); };
  float shift = 0;
  for (int64_t e = threadIdx.x % 32; e < p.value_dim; e += 32) {
    const float grad = of(p.grad_o, e), ungated = p.by_sum ? read(float{}, p.ungated, e) : of(p.ungated, e);
    const float x = c * (p.gate.data != nullptr ? grad * of(p.gate, e) : grad);
    const auto rounded = operand<T>(x);
    g[e] = rounded;
    shift += p.by_sum ? widen(rounded) * ungated : 0;  // of what the products take: it cancels where a row sees one key
    if (p.grad_gate.data != nullptr) {
      element<T>(p.grad_gate, batch, row, head)[e * p.grad_gate.stride[3]] = narrow<T>(grad * ungated);
    }
  }
  return shift;
}

// Whether row `row` is of a sequence, and no padding.
__device__ __forceinline__ bool keeps_query(const Problem& p, int64_t batch, int64_t row) {
  return keeps(p.query_mask, p.query_mask_stride, batch, row) &&
         (p.cu_seqlens == nullptr || (row >= p.cu_seqlens[0] && row < p.cu_seqlens[p.num_sequences]));
}

// d += Σ leftᵀ right, over `rows` rows from `begin` on of left(head) and right(head), of `heads` heads in turn: kTile
// columns of left from `left_column` on, kColumns of right from `right_column` on.
template <class F, class Left, class Right>
__device__ __forceinline__ void accumulate_rows(Block<F>& block, float (&d)[F::kN][4], int begin, int rows, int heads,
                                                Left&& left, int left_column, Right&& right, int right_column) {
  const int steps = rows > 0 ? ceil_div(rows, F::kDepth) : 0;
  block.template accumulate<true, true>(d, steps * heads, [&](Stage<F>& stage, int step) {
    const int head = step / steps, row = begin + step % steps * F::kDepth;
    block.load(stage.turned_a, left(head), row, left_column);
    block.load(stage.turned_b, right(head), row, right_column);
  });
}

// d to a gradient of `columns` columns: `rows` rows from `row` on, columns from `first` on. Each number x of the i-th
// row as change(i, x).
template <class F, class Change>
__device__ __forceinline__ void write_gradients(Block<F>& block, const float (&d)[F::kN][4], const View& grad,
                                                int64_t batch, int64_t row, int rows, int head, int first,
                                                int64_t columns, Change&& change) {
  block.stage(d);
  const int64_t rest = columns - first;
  block.for_each_vector(rows, rest < F::kColumns ? static_cast<int>(rest) : F::kColumns, [&](int i, int column, int n) {
    typename F::T* const to = element<typename F::T>(grad, batch, row + i, head) + (first + column) * grad.stride[3];
    block.write(grad, to, n, [&](int e) { return change(i, block.shared.staged[i][column + e]); });
  });
}

}  // namespace kx::gau_attention
