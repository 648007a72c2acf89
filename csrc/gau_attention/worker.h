// Blocks of gated attention on a CPU: queries meet keys, whose scores never leave the caches. The formulas and their
// names are those of kx_kernels/ops/gau_attention/README.md.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <thread>
#include <type_traits>
#include <vector>

#include "../cpu/ahead.h"
#include "../cpu/gemm.h"
#include "../cpu/pairs.h"
#include "../cpu/rows.h"
#include "../cpu/simd.h"
#include "problem.h"

namespace kx::gau_attention {
namespace KX_ISA {
namespace {

using namespace ::kx::KX_ISA;  // the vectors of this instruction set

constexpr int kQueries = 128;  // rows of a block, at most
constexpr int kKeys = 64;      // columns of a block; twice as many pairs take as much room
constexpr int kColumns = 64;   // of values, that a product takes at a time, likewise: they stay in the first cache

// Rows of one sequence in memory.
struct Sequence {
  int64_t batch, query_row, key_row, queries, keys;

  int64_t shift() const { return keys - queries; }  // a query stands with the key so much further on
};

Sequence sequence(const Problem& p, int64_t n) {
  if (p.cu_seqlens == nullptr) {
    return {n, 0, 0, p.queries, p.keys};
  }
  const int64_t query = p.cu_seqlens[n], key = p.cu_seqlens_k[n];
  return {0, query, key, p.cu_seqlens[n + 1] - query, p.cu_seqlens_k[n + 1] - key};
}

// f of n scores in their place, and its derivative unless `slope` is null, up to the next whole vector. NaN stays NaN.
template <class A>
void activate(Activation f, int n, A* x, A* slope) {
  using V = vector_t<A>;
  const V zero = all(A{0}), one = all(A{1});
  const auto each = [&](auto&& value, auto&& derivative) {
    for (int j = 0; j < n; j += V::kLanes) {
      const V y = load(x + j);
      if (slope != nullptr) {
        store(slope + j, derivative(y));
      }
      store(x + j, value(y));
    }
  };
  const auto relu = [&](V y) { return max(zero, y); };
  const auto sigmoid = [&](V y) { return div(one, add(one, exp(mul(all(A{-1}), y)))); };
  switch (f) {
    case Activation::kRelu2:
      return each([&](V y) { return mul(relu(y), relu(y)); }, [&](V y) { return mul(all(A{2}), relu(y)); });
    case Activation::kRelu:
      return each(relu, [&](V y) { return each_lane(y, [](A z) { return z <= 0 ? A{0} : A{1}; }); });
    case Activation::kSilu:
      return each([&](V y) { return mul(y, sigmoid(y)); },
                  [&](V y) {
                    const V s = sigmoid(y);
                    return mul(s, fma(y, sigmoid(mul(all(A{-1}), y)), one));
                  });
    case Activation::kSigmoid:
      return each(sigmoid, [&](V y) { return mul(sigmoid(y), sigmoid(mul(all(A{-1}), y))); });
    case Activation::kLaplace: {
      const double mean = std::sqrt(0.5), pi = 3.14159265358979323846;
      const V middle = all(static_cast<A>(mean)), slope_of_erf = all(static_cast<A>(std::sqrt(2 * pi)));
      const V root = all(static_cast<A>(std::sqrt(2.0))), decay = all(static_cast<A>(-2 * pi));
      const auto apart = [=](V y) { return fms(one, y, middle); };
      return each(
          [=](V y) {
            const V part = each_lane(mul(apart(y), slope_of_erf), [](A z) { return std::erf(z); });
            return mul(all(A{0.5}), add(one, part));
          },
          [=](V y) { return mul(root, exp(mul(decay, mul(apart(y), apart(y))))); });
    }
    case Activation::kIdentity:
      return each([](V y) { return y; }, [=](V) { return one; });
  }
}

// Σ term(i), i < n. In parts, which round less than one long sum and do not wait for each other.
template <class A, class Term>
A total(int n, Term term) {
  constexpr int kParts = 16;
  A parts[kParts] = {};
  int i = 0;
  for (; i + kParts <= n; i += kParts) {
    for (int part = 0; part < kParts; ++part) {
      parts[part] += term(i + part);
    }
  }
  for (int part = 0; i + part < n; ++part) {
    parts[part] += term(i + part);
  }
  for (int half = kParts / 2; half > 0; half /= 2) {
    for (int part = 0; part < half; ++part) {
      parts[part] += parts[part + half];
    }
  }
  return parts[0];
}

// Blocks of keys that threads have at once add to gradients of the same queries one after the other, tile by tile.
struct Turn {
  const std::atomic<int64_t>* before = nullptr;  // tiles that the block before has added; null if there is none
  std::atomic<int64_t>* mine = nullptr;          // null if nobody waits

  void wait(int64_t tile) const {
    while (before != nullptr && before->load(std::memory_order_acquire) <= tile) {
      std::this_thread::yield();
    }
  }
  void pass(int64_t tile) const {
    if (mine != nullptr) {
      mine->store(tile + 1, std::memory_order_release);
    }
  }
};

// What one thread works with. A is the type that arithmetic is done in; rows are padded with zeros to whole vectors.
// With kPairs operands of products are pairs of bfloat16, two in the place of an A (pairs.h).
template <class T, class A, bool kPairs = false>
class Worker {
 public:
  static constexpr int kKeys = (kPairs ? 2 : 1) * KX_ISA::kKeys, kColumns = (kPairs ? 2 : 1) * KX_ISA::kColumns;

  Worker(const Problem& p, bool backward, int block_rows = kQueries)
      : p(p), block_rows(block_rows), key_dim(static_cast<int>(p.key_dim)), value_dim(static_cast<int>(p.value_dim)) {
    q = take(kQueries * static_cast<size_t>(kw));
    k = take(kKeys * static_cast<size_t>(kw));
    k_columns = take(static_cast<size_t>(key_dim) * kKeys);
    v = take(kKeys * static_cast<size_t>(vw));
    wide = take(kQueries * static_cast<size_t>(vw));
    scores = take(static_cast<size_t>(kQueries) * kKeys);
    slice = take(static_cast<size_t>(std::max<int>(kQueries, key_dim)) * kColumns);
    if (kPairs) {
      strided.resize(2 * static_cast<size_t>(std::max(key_dim, value_dim)));
      weights = take(static_cast<size_t>(kQueries) * kKeys / 2);
    }
    if (kPairs && backward) {
      turned = take(static_cast<size_t>(kKeys) * kQueries);
      turned_weights = take(static_cast<size_t>(kKeys) * kQueries / 2);
      q_rows = take(static_cast<size_t>(kQueries) / 2 * kw);
      k_rows = take(static_cast<size_t>(kKeys) / 2 * kw);
      g_rows = take(static_cast<size_t>(kQueries) / 2 * kColumns);
    }
    if (backward) {
      slopes = take(static_cast<size_t>(kQueries) * kKeys);
      grad_scores = take(static_cast<size_t>(kQueries) * kKeys);
      v_columns = take(static_cast<size_t>(value_dim) * kKeys);
      grad_v = take(kKeys * static_cast<size_t>(vw));
      grad_k = take(kKeys * static_cast<size_t>(kw));
      row = take(vw);
    }
  }

  // Sums of scores times columns [from, to) of values of a block of queries, each with its factor c, to `wide`.
  void attend(const Sequence& s, int64_t head, int64_t first, int from, int to) {
    const int count = block_of(s, first);
    load_queries(s, head, first, count);
    for (int i = 0; i < count; ++i) {
      std::fill_n(wide + static_cast<size_t>(i) * vw + from, whole_vectors(to - from), A{0});
    }
    A sums[kQueries] = {};
    const int64_t last = p.causal ? std::min(s.keys, first + count + s.shift()) : s.keys;
    for (int64_t key = 0; key < last; key += kKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kKeys, last - key));
      const int from_row = blind_rows(s, first, count, key);
      load_keys(s, head / group(), key, keys);
      score(s, head, first, from_row, count, key, keys, nullptr);
      if constexpr (kPairs) {
        pair_weights(scores, from_row, count, keys);
      }
      for (int i = from_row; i < count && p.by_sum; ++i) {
        sums[i] += total<A>(keys, [&](int j) { return scores[i * kKeys + j]; });
      }
      if (count == 1 && !kPairs) {
        weigh_values(s, head / group(), key, keys, from, to);
      } else {
        const int64_t next = std::min<int64_t>(kKeys, last - key - keys);
        multiply_values(s, head / group(), key, keys, next, from_row, count, from, to);
      }
    }
    for (int i = 0; i < count; ++i) {
      A* const o = wide + static_cast<size_t>(i) * vw;
      const int64_t at = s.query_row + first + i;
      if (p.by_sum && from == 0) {
        by_row(p.sums, (s.batch * p.queries + at) * p.heads + head) = sums[i];
      }
      const A c = keep_query[i] ? factor(s, at, head, sums[i]) : A{0};
      for (int e = from; e < to; ++e) {
        o[e] *= c;
      }
    }
  }

  // Writes what `wide` holds of a block of queries in columns [from, to), and what it is after the gate.
  void store_outputs(const Sequence& s, int64_t head, int64_t first, int from, int to) {
    for (int i = 0; i < block_of(s, first); ++i) {
      A* const o = wide + static_cast<size_t>(i) * vw + from;
      const int64_t at = s.query_row + first + i;
      if (p.ungated.data != nullptr) {
        visit_ungated([&](auto type) {
          store_row(o, to - from, element<decltype(type)>(p.ungated, s.batch, at, head, from), p.ungated.stride[3]);
        });
      }
      if (p.gate.data != nullptr && keep_query[i]) {
        const T* const gate = element<const T>(p.gate, s.batch, at, head, from);
        for (int e = 0; e < to - from; ++e) {
          o[e] *= widen(gate[e * p.gate.stride[3]]);
        }
      }
      store_row(o, to - from, element<T>(p.o, s.batch, at, head, from), p.o.stride[3]);
    }
  }

  // Readies a block of keys and values for its gradients.
  void begin_gradients(const Sequence& s, int64_t kv_head, int64_t key) {
    const int keys = keys_of(s, key);
    load_keys(s, kv_head, key, keys);
    load_values(s, kv_head, key, keys, 0, value_dim);
    transpose(keys, depth(value_dim), v, vw, v_columns, kKeys);
    if constexpr (kPairs) {
      pair_kept(p.k, s.batch, s.key_row + key, kv_head, 0, key_dim, keys, keep_key, k_rows, kw);
    }
    std::fill_n(grad_v, static_cast<size_t>(keys) * vw, A{0});
    std::fill_n(grad_k, static_cast<size_t>(keys) * kw, A{0});
  }

  // Adds what a block of keys and values meets to its gradients, to those of queries, [n_q of the sequence, heads, kw],
  // and of the bias, [heads, distances], whose sums may be as long as there are tokens. Threads that are at other tiles
  // of a head in their turn are at other distances.
  void add_gradients(const Sequence& s, int64_t kv_head, int64_t key, Turn turn, A* grad_queries, double* grad_bias) {
    const int keys = keys_of(s, key);
    const int64_t seen_from = p.causal ? std::max<int64_t>(0, key - s.shift()) : 0;
    const int64_t tiles = (s.queries + kQueries - 1) / kQueries;  // of a head
    for (int64_t head = kv_head * group(); head < (kv_head + 1) * group(); ++head) {
      for (int64_t first = seen_from / kQueries * kQueries; first < s.queries; first += kQueries) {
        const int count = block_of(s, first);
        const int from_row = blind_rows(s, first, count, key), rows = count - from_row;
        const size_t from = static_cast<size_t>(from_row) * kKeys;
        load_queries(s, head, first, count);
        score(s, head, first, from_row, count, key, keys, slopes);
        if constexpr (kPairs) {
          turn_pairs(rows, keys, scores + from);
        }
        A factors[kQueries], shifts[kQueries] = {};
        for (int i = from_row; i < count; ++i) {
          const int64_t at = s.query_row + first + i;
          const A sum = p.by_sum ? by_row(p.sums, (s.batch * p.queries + at) * p.heads + head) : A{0};
          factors[i] = keep_query[i] ? factor(s, at, head, sum) : A{0};
        }
        int e = 0;
        do {  // a few columns of g at a time, which stay in the first cache
          const int columns = std::min(kColumns, value_dim - e);
          load_gradients(s, head, first, from_row, count, e, columns, factors, shifts);
          ask_for_gradients(s, head, first + from_row, rows, e + columns);
          const A* const values = v_columns + static_cast<size_t>(depth(e)) * kKeys;
          if constexpr (kPairs) {
            pair_gradients(rows, columns);
            gemm_pairs(rows, keys, depth(columns), slice, kColumns, values, kKeys, grad_scores + from, kKeys, e > 0,
                       [this] { ahead(); });
            gemm_pairs(keys, columns, depth(rows), turned_weights, kQueries / 2, g_rows, kColumns, grad_v + e, vw, true,
                       [this] { ahead(); });
          } else {
            gemm(rows, keys, columns, slice, kColumns, 1, values, kKeys, grad_scores + from, kKeys, e > 0, Part::kAll,
                 [this] { ahead(); });
            gemm(keys, columns, rows, scores + from, 1, kKeys, slice, kColumns, grad_v + e, vw, true, Part::kAll,
                 [this] { ahead(); });
          }
        } while ((e += kColumns) < value_dim);
        for (int i = from_row; i < count; ++i) {
          for (int j = 0; j < keys; ++j) {
            A& x = grad_scores[i * kKeys + j];
            x = slopes[i * kKeys + j] * (x - shifts[i]);
          }
        }
        const int64_t tile = (head - kv_head * group()) * tiles + first / kQueries;
        turn.wait(tile);
        if (grad_bias != nullptr) {
          add_to_bias(s, head, first, from_row, count, key, keys, grad_bias);
        }
        for (int i = from_row; i < count; ++i) {
          const A a = scale(p.scale, p.a, s, s.query_row + first + i);
          for (int j = 0; j < keys; ++j) {
            grad_scores[i * kKeys + j] *= a;
          }
        }
        A* const sums = grad_queries + ((first + from_row) * p.heads + head) * kw;
        if constexpr (kPairs) {
          turn_pairs(rows, keys, grad_scores + from);
          pair_kept(p.q, s.batch, s.query_row + first + from_row, head, 0, key_dim, rows, keep_query + from_row, q_rows,
                    kw);
          gemm_pairs(keys, key_dim, depth(rows), turned_weights, kQueries / 2, q_rows, kw, grad_k, kw, true, [] {});
          pair_weights(grad_scores, from_row, count, keys);
          gemm_pairs(rows, key_dim, depth(keys), weights + from_row * (kKeys / 2), kKeys / 2, k_rows, kw, sums,
                     p.heads * kw, true, [] {});
        } else {
          multiply(keys, key_dim, rows, grad_scores + from, 1, kKeys, q + from_row * kw, kw, grad_k, kw, true);
          multiply(rows, key_dim, keys, grad_scores + from, kKeys, 1, k, kw, sums, p.heads * kw, true);
        }
        turn.pass(tile);
      }
    }
  }

  void store_gradients(const Sequence& s, int64_t kv_head, int64_t key) {
    for (int j = 0; j < keys_of(s, key); ++j) {
      const int64_t at = s.key_row + key + j;
      store_row(grad_v + static_cast<size_t>(j) * vw, value_dim, element<T>(p.grad_v, s.batch, at, kv_head),
                p.grad_v.stride[3]);
      store_row(grad_k + static_cast<size_t>(j) * kw, key_dim, element<T>(p.grad_k, s.batch, at, kv_head),
                p.grad_k.stride[3]);
    }
  }

  // The gradient of a row of the gate.
  void backward_gate(int64_t batch, int64_t at, int64_t head) {
    const bool kept = keeps(p.query_mask, p.query_mask_stride, batch, at);
    const T* const grad = element<const T>(p.grad_o, batch, at, head);
    load_ungated(batch, at, head, 0, value_dim);
    for (int e = 0; e < value_dim; ++e) {
      row[e] = kept ? row[e] * widen(grad[e * p.grad_o.stride[3]]) : A{0};
    }
    store_row(row, value_dim, element<T>(p.grad_gate, batch, at, head), p.grad_gate.stride[3]);
  }

  int row_width() const { return kw; }

 protected:
  static constexpr int kLanes = vector_t<A>::kLanes;
  static int whole_vectors(int64_t n) { return static_cast<int>((n + kLanes - 1) / kLanes * kLanes); }

  A* take(size_t n) {
    buffers_.push_back(zeros<A>(n + kLanes));
    return buffers_.back().get();
  }
  int64_t group() const { return p.heads / p.kv_heads; }
  int block_of(const Sequence& s, int64_t first) const {
    return static_cast<int>(std::min<int64_t>(block_rows, s.queries - first));
  }
  // The first rows of a block of queries that see no key from `key` on: whole tiles of them.
  int blind_rows(const Sequence& s, int64_t first, int count, int64_t key) const {
    const int64_t rows = p.causal ? std::clamp<int64_t>(key - first - s.shift(), 0, count) : 0;
    return static_cast<int>(rows / kTileRows * kTileRows);
  }
  int keys_of(const Sequence& s, int64_t key) const { return static_cast<int>(std::min<int64_t>(kKeys, s.keys - key)); }

  template <class U>
  static U* element(const View& x, int64_t batch, int64_t at, int64_t head, int64_t column = 0) {
    return static_cast<U*>(x.data) + batch * x.stride[0] + at * x.stride[1] + head * x.stride[2] + column * x.stride[3];
  }
  static A& by_row(void* x, int64_t at) { return static_cast<A*>(x)[at]; }
  static bool keeps(const uint8_t* mask, const int64_t* stride, int64_t batch, int64_t at) {
    return mask == nullptr || mask[batch * stride[0] + at * stride[1]] != 0;
  }
  // A factor of a row: a number times one of its own.
  A scale(double number, const void* rows, const Sequence& s, int64_t at) const {
    const A all_rows = static_cast<A>(number);
    return rows == nullptr ? all_rows : all_rows * static_cast<const A*>(rows)[s.batch * p.queries + at];
  }
  A factor(const Sequence& s, int64_t at, int64_t, A sum) const {
    if (p.by_sum) {
      return sum != 0 ? 1 / sum : A{0};
    }
    return scale(p.out_scale, p.c, s, at);
  }

  // Places that n neighbours along k take in an operand.
  static int depth(int n) { return kPairs ? pairs_of(n) : n; }
  // Rows [from_row, count) of x [kQueries, keys] as products take them, to `weights`.
  void pair_weights(const A* x, int from_row, int count, int keys) {
    for (int i = from_row; i < count; ++i) {
      pair_neighbours(x + i * kKeys, keys, weights + i * (kKeys / 2));
    }
  }
  // The transpose of x [rows, keys] as products take it, to `turned_weights`.
  void turn_pairs(int rows, int keys, const A* x) {
    transpose(rows, keys, x, kKeys, turned, kQueries);
    for (int j = 0; j < keys; ++j) {
      pair_neighbours(turned + j * kQueries, rows, turned_weights + j * (kQueries / 2));
    }
  }
  // g [rows, columns], in `slice`, as both of its products take it: in its place, and to `g_rows`.
  void pair_gradients(int rows, int columns) {
    for (int i = 0; i < rows; i += 2) {
      A* const g = slice + i * kColumns;
      pair_rows(g, i + 1 < rows ? g + kColumns : nullptr, columns, g_rows + i / 2 * kColumns);
      for (int l = i; l < std::min(i + 2, rows); ++l) {
        A copy[kColumns];
        std::copy_n(slice + l * kColumns, columns, copy);
        pair_neighbours(copy, columns, slice + l * kColumns);
      }
    }
  }
  // Columns of `rows` rows of a tensor as the second operand of a product, those that are not kept as zeros.
  void pair_kept(const View& x, int64_t batch, int64_t at, int64_t head, int column, int n, int rows, const bool* keep,
                 A* to, int64_t to_row) {
    const auto row = [&](int j, T* room) {
      return j < rows && keep[j] ? neighbours(element<const T>(x, batch, at + j, head, column), x.stride[3], n, room)
                                 : nullptr;
    };
    for (int j = 0; j < rows; j += 2) {
      pair_rows(row(j, strided.data()), row(j + 1, strided.data() + strided.size() / 2), n, to + j / 2 * to_row);
    }
  }
  // n elements of a row that are neighbours: where they lie, or copied to `room`.
  static const T* neighbours(const T* from, int64_t stride, int n, T* room) {
    for (int i = 0; i < n && stride != 1; ++i) {
      room[i] = from[i * stride];
    }
    return stride == 1 ? from : room;
  }

  void multiply(int m, int n, int depth, const A* x, int64_t x_row, int64_t x_k, const A* y, int64_t y_row, A* to,
                int64_t to_row, bool add_to) {
    gemm(m, n, depth, x, x_row, x_k, y, y_row, to, to_row, add_to, Part::kAll, [] {});
  }
  // to [m, vw] += x · y, y of many columns: a few at a time are copied to where rows follow each other, for rows as far
  // apart as y's take each other's places in the first cache.
  void multiply_wide(int m, int n, int depth, const A* x, int64_t x_row, int64_t x_k, const A* y, int64_t y_row,
                     A* to) {
    for (int e = 0; e < n; e += kColumns) {
      const int columns = std::min(kColumns, n - e);
      for (int d = 0; d < depth; ++d) {
        std::copy_n(y + d * y_row + e, whole_vectors(columns), slice + d * kColumns);
      }
      multiply(m, columns, depth, x, x_row, x_k, slice, kColumns, to + e, vw, true);
    }
  }
  // wide += scores · columns [from, to) of the values of a block of keys. A few columns are loaded at a time, while the
  // machine is asked for those that follow: of the same keys, or of the `next` ones.
  void multiply_values(const Sequence& s, int64_t kv_head, int64_t key, int keys, int64_t next, int from_row, int count,
                       int from, int to) {
    for (int e = from; e < to; e += kColumns) {
      const int columns = std::min(kColumns, to - e);
      if constexpr (kPairs) {
        pair_kept(p.v, s.batch, s.key_row + key, kv_head, e, columns, keys, keep_key, slice, kColumns);
      } else {
        for (int j = 0; j < keys; ++j) {
          load_kept(keep_key[j], element<const T>(p.v, s.batch, s.key_row + key + j, kv_head, e), p.v.stride[3],
                    columns, slice + j * kColumns);
        }
      }
      ahead.forget();
      if (e + kColumns < to) {
        ask_for_values(s, kv_head, key, keys, e + kColumns, std::min(kColumns, to - e - kColumns));
      } else if (next > 0) {
        ask_for_values(s, kv_head, key + keys, static_cast<int>(next), from, std::min(kColumns, to - from));
      }
      A* const sums = wide + static_cast<size_t>(from_row) * vw + e;
      if constexpr (kPairs) {
        gemm_pairs(count - from_row, columns, depth(keys), weights + from_row * (kKeys / 2), kKeys / 2, slice, kColumns,
                   sums, vw, true, [this] { ahead(); });
      } else {
        gemm(count - from_row, columns, keys, scores + from_row * kKeys, kKeys, 1, slice, kColumns, sums, vw, true,
             Part::kAll, [this] { ahead(); });
      }
    }
  }
  void ask_for_values(const Sequence& s, int64_t kv_head, int64_t key, int keys, int from, int columns) {
    ahead.add(element<const T>(p.v, s.batch, s.key_row + key, kv_head, from), columns * sizeof(T),
              p.v.stride[1] * static_cast<int64_t>(sizeof(T)), keys);
  }
  // The same for one query, which meets each value once: they are read where they lie if they can be.
  void weigh_values(const Sequence& s, int64_t kv_head, int64_t key, int keys, int from, int to) {
    const A* values = v;
    int64_t values_row = vw;
    if (!in_place(s, kv_head, key, keys, &values, &values_row)) {
      load_values(s, kv_head, key, keys, from, to);
    }
    multiply(1, to - from, keys, scores, kKeys, 1, values + from, values_row, wide + from, vw, true);
  }

  // Padding is zeros: whatever its memory holds never meets a number that counts.
  void load_queries(const Sequence& s, int64_t head, int64_t first, int count) {
    for (int i = 0; i < count; ++i) {
      const int64_t at = s.query_row + first + i;
      keep_query[i] = keeps(p.query_mask, p.query_mask_stride, s.batch, at);
      load_operand(keep_query[i], element<const T>(p.q, s.batch, at, head), p.q.stride[3], key_dim, q + i * kw);
    }
  }
  void load_keys(const Sequence& s, int64_t head, int64_t key, int keys) {
    keep_all_keys = true;
    for (int j = 0; j < keys; ++j) {
      const int64_t at = s.key_row + key + j;
      keep_key[j] = keeps(p.key_mask, p.key_mask_stride, s.batch, at);
      keep_all_keys = keep_all_keys && keep_key[j];
      load_operand(keep_key[j], element<const T>(p.k, s.batch, at, head), p.k.stride[3], key_dim, k + j * kw);
    }
    transpose(keys, depth(key_dim), k, kw, k_columns, kKeys);
  }
  void load_values(const Sequence& s, int64_t head, int64_t key, int keys, int from, int to) {
    for (int j = 0; j < keys; ++j) {
      load_operand(keep_key[j], element<const T>(p.v, s.batch, s.key_row + key + j, head, from), p.v.stride[3],
                   to - from, v + static_cast<size_t>(j) * vw + from);
    }
  }
  // A row as the first operand of a product.
  void load_operand(bool kept, const T* from, int64_t stride, int n, A* to) {
    if constexpr (kPairs) {
      if (kept) {
        pair_neighbours(neighbours(from, stride, n, strided.data()), n, to);
      } else {
        std::fill_n(to, depth(n), A{0});
      }
    } else {
      load_kept(kept, from, stride, n, to);
    }
  }
  void load_kept(bool kept, const T* from, int64_t stride, int n, A* to) const {
    if (kept) {
      load_row(from, stride, n, to);
    } else {
      std::fill_n(to, n, A{0});
    }
  }
  // Whether products can read the values where they lie.
  bool in_place(const Sequence& s, int64_t head, int64_t key, int keys, const A** values, int64_t* values_row) const {
    if constexpr (std::is_same_v<T, A>) {
      bool whole = p.v.stride[3] == 1 && value_dim % kLanes == 0;
      for (int j = 0; j < keys; ++j) {
        whole = whole && keep_key[j];
      }
      if (whole) {
        *values = element<const T>(p.v, s.batch, s.key_row + key, head);
        *values_row = p.v.stride[1];
      }
      return whole;
    } else {
      return false;
    }
  }

  // Columns [from, from + columns) of g, the gradients of sums of scores times values, to `slice`, from a row of the
  // block on; and to `shifts` what they add to the part of a score's gradient that is the whole row's.
  void load_gradients(const Sequence& s, int64_t head, int64_t first, int from_row, int count, int from, int columns,
                      const A* factors, A* shifts) {
    for (int i = from_row; i < count; ++i) {
      const int64_t at = s.query_row + first + i;
      A* const g = slice + (i - from_row) * kColumns;
      load_gradient(s.batch, at, head, from, columns, factors[i], keep_query[i], g);
      if (p.by_sum && keep_query[i]) {
        load_ungated(s.batch, at, head, from, columns);
        shifts[i] += total<A>(columns, [&](int e) { return g[e] * row[e]; });
      }
    }
  }
  void ask_for_gradients(const Sequence& s, int64_t head, int64_t first, int count, int from) {
    ahead.forget();
    const int64_t bytes = std::min<int64_t>(kColumns, value_dim - from) * static_cast<int64_t>(sizeof(T));
    for (const View* x : {&p.grad_o, &p.gate}) {
      if (x->data != nullptr && bytes > 0) {
        ahead.add(element<const T>(*x, s.batch, s.query_row + first, head, from), bytes,
                  x->stride[1] * static_cast<int64_t>(sizeof(T)), count);
      }
    }
  }
  // visit(a number of the type that `ungated` has).
  template <class Visit>
  void visit_ungated(Visit&& visit) const {
    if (p.by_sum) {
      visit(A{});
    } else {
      visit(T{});
    }
  }
  void load_ungated(int64_t batch, int64_t at, int64_t head, int from, int columns) {
    visit_ungated([&](auto type) {
      load_row(element<const decltype(type)>(p.ungated, batch, at, head, from), p.ungated.stride[3], columns, row);
    });
  }
  // Columns of a row of grad_o, gated, times c; zeros where it is not kept.
  void load_gradient(int64_t batch, int64_t at, int64_t head, int from, int columns, A c, bool kept, A* g) {
    using V = vector_t<A>;
    const T* const grad = element<const T>(p.grad_o, batch, at, head, from);
    const T* const gate = p.gate.data != nullptr ? element<const T>(p.gate, batch, at, head, from) : nullptr;
    const int64_t grad_stride = p.grad_o.stride[3], gate_stride = p.gate.stride[3];
    const bool whole = kept && grad_stride == 1 && (gate == nullptr || gate_stride == 1);
    int e = 0;
    for (; whole && e + V::kLanes <= columns; e += V::kLanes) {
      const V factor = gate != nullptr ? mul(all(c), load(gate + e)) : all(c);
      store(g + e, mul(load(grad + e), factor));
    }
    for (; e < columns; ++e) {
      const A factor = kept && gate != nullptr ? c * widen(gate[e * gate_stride]) : c;
      g[e] = kept ? widen(grad[e * grad_stride]) * factor : A{0};
    }
  }

  // Products q·k as scores of rows [from_row, count): scaled, biased, through f, and 0 where a row does not see a key;
  // their slopes likewise.
  void score(const Sequence& s, int64_t head, int64_t first, int from_row, int count, int64_t key, int keys, A* slope) {
    using V = vector_t<A>;
    if constexpr (kPairs) {
      gemm_pairs(count - from_row, keys, depth(key_dim), q + from_row * kw, kw, k_columns, kKeys,
                 scores + from_row * kKeys, kKeys, false, [] {});
    } else {
      multiply(count - from_row, keys, key_dim, q + from_row * kw, kw, 1, k_columns, kKeys, scores + from_row * kKeys,
               kKeys, false);
    }
    const A* const distances = p.bias == nullptr ? nullptr
                                                 : static_cast<const A*>(p.bias) +
                                                       (p.bias_heads > 1 ? head : 0) * p.distances + p.distances / 2;
    for (int i = from_row; i < count; ++i) {
      A* const x = scores + i * kKeys;
      A* const slopes_here = slope != nullptr ? slope + i * kKeys : nullptr;
      const int64_t at = s.query_row + first + i, apart = key - (first + i + s.shift());
      int seen = keys;
      if (p.causal) {
        seen = static_cast<int>(std::clamp<int64_t>(1 - apart, 0, keys));
      }
      if (!keep_query[i]) {
        seen = 0;
      }
      const V a = all(scale(p.scale, p.a, s, at));
      const A b = distances == nullptr ? A{0} : scale(p.bias_scale, p.b, s, at);
      for (int j = 0; j < seen; j += V::kLanes) {
        V y = mul(a, load(x + j));
        if (distances != nullptr) {
          y = fma(all(b), load(distances + apart + j, std::min(V::kLanes, seen - j)), y);
        }
        store(x + j, y);
      }
      activate(p.activation, seen, x, slopes_here);
      for (A* const y : {x, slopes_here}) {
        for (int j = keep_all_keys ? seen : 0; y != nullptr && j < keys; ++j) {
          if (j >= seen || !keep_key[j]) {
            y[j] = 0;
          }
        }
      }
    }
  }

  void add_to_bias(const Sequence& s, int64_t head, int64_t first, int from_row, int count, int64_t key, int keys,
                   double* grad_bias) {
    double* const distances = grad_bias + head * p.distances + p.distances / 2;
    for (int i = from_row; i < count; ++i) {
      const A b = scale(p.bias_scale, p.b, s, s.query_row + first + i);
      const int64_t apart = key - (first + i + s.shift());
      for (int j = 0; j < keys; ++j) {
        if (slopes[i * kKeys + j] != 0) {  // else it may be a distance that there is none of
          distances[apart + j] += b * grad_scores[i * kKeys + j];
        }
      }
    }
  }

  const Problem& p;
  const int block_rows;  // of queries
  const int key_dim, value_dim;
  const int kw = whole_vectors(p.key_dim), vw = whole_vectors(p.value_dim);  // widths of rows
  A *q, *k, *k_columns;              // [kQueries, kw], [kKeys, kw], [key_dim, kKeys]
  A *v, *v_columns;                  // [kKeys, vw], [value_dim, kKeys]
  A* wide;                           // [kQueries, vw]: outputs, or gradients of their sums
  A* slice;                          // [kQueries or key_dim, kColumns] of a product's many columns
  A *scores, *slopes, *grad_scores;  // [kQueries, kKeys]
  A *grad_v, *grad_k;                // [kKeys, vw], [kKeys, kw]
  A* row;                            // [vw]
  // Pairs: P or X [kQueries, kKeys / 2] and their transpose [kKeys, kQueries / 2]; q, k and g as second operands.
  A *weights, *turned_weights, *q_rows, *k_rows, *g_rows;
  A* turned;               // [kKeys, kQueries]
  std::vector<T> strided;  // two rows of a tensor
  Ahead ahead;
  bool keep_query[kQueries], keep_key[kKeys], keep_all_keys;
  std::vector<Buffer<A>> buffers_;
};

// The gradient of the bias, of `count` sums [heads, distances].
template <class A>
void store_bias(const Problem& p, const double* sums, int64_t count) {
  for (int64_t i = 0; i < p.bias_heads * p.distances && p.grad_bias != nullptr; ++i) {
    const int64_t bias_head = i / p.distances, at = i % p.distances;
    double sum = 0;
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t head = bias_head; head < p.heads; head += p.bias_heads) {  // one of them, or all
        sum += sums[(n * p.heads + head) * p.distances + at];
      }
    }
    static_cast<A*>(p.grad_bias)[i] = static_cast<A>(sum);
  }
}

// Rows [from, to) of x are zero.
template <class T>
void clear(const View& x, int64_t from, int64_t to, int64_t heads, int64_t dim) {
  for (int64_t t = from; t < to && x.data != nullptr; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t d = 0; d < dim; ++d) {
        narrow(compute_t<T>{0}, static_cast<T*>(x.data) + t * x.stride[1] + h * x.stride[2] + d * x.stride[3]);
      }
    }
  }
}
// And those that belong to no sequence.
template <class T>
void clear_surplus(const Problem& p, const View& x, const int32_t* ends, int64_t rows, int64_t heads, int64_t dim) {
  if (ends != nullptr) {
    clear<T>(x, 0, ends[0], heads, dim);
    clear<T>(x, ends[p.num_sequences], rows, heads, dim);
  }
}

}  // namespace
}  // namespace KX_ISA
}  // namespace kx::gau_attention
