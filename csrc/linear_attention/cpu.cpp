// Linear attention on a CPU, chunk by chunk: within a chunk by the products of its rows, before it by the state. The
// formulas and their names are those of kx_kernels/ops/linear_attention/README.md.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/check.h"
#include "../cpu/ahead.h"
#include "../cpu/gemm.h"
#include "../cpu/isa.h"
#include "../cpu/rows.h"
#include "../cpu/simd.h"
#include "problem.h"

namespace kx::linear_attention {
namespace KX_ISA {
namespace {

using namespace ::kx::KX_ISA;  // the vectors of this instruction set

constexpr int kChunk = 64;                // tokens
constexpr int64_t kSegment = 8 * kChunk;  // tokens that are worth a thread of their own
constexpr int64_t kGrain = 1 << 15;       // multiplications that are
constexpr int64_t kFew = 8;               // tokens that are faster one by one than as a chunk

template <class A>
A dot(const A* x, const A* y, int n) {  // n counts whole vectors
  auto total = all(A{0});
  for (int i = 0; i < n; i += vector_t<A>::kLanes) {
    total = fma(load(x + i), load(y + i), total);
  }
  return sum(total).v[0];
}

// z = decay·y + c·x
template <class A>
void fade_and_add(A decay, const A* y, A c, const A* x, A* z, int n) {  // n counts whole vectors
  const auto kept = all(decay), factor = all(c);
  for (int i = 0; i < n; i += vector_t<A>::kLanes) {
    store(z + i, fma(factor, load(x + i), mul(kept, load(y + i))));
  }
}

template <class A>
void scale_row(A c, A* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] *= c;
  }
}

// A token's way through a state [rows, columns], and what a query reads after it: S = kept·S + b vᵀ, o = Sᵀa. Without b
// the state is only read. Its rows lie in memory without padding.
template <class A>
void pass_state(int rows, int columns, const A* a, const A* b, const A* v, A kept, A* state, A* o) {
  constexpr int kLanes = vector_t<A>::kLanes, kWide = 4;  // vectors of columns at a time
  int e = 0;
  const auto vectors = [&](auto count) {
    constexpr int kVectors = decltype(count)::value;
    for (; e + kVectors * kLanes <= columns; e += kVectors * kLanes) {
      vector_t<A> added[kVectors], sums[kVectors];
      for (int n = 0; n < kVectors; ++n) {
        added[n] = load(v + e + n * kLanes);
        sums[n] = all(A{0});
      }
      for (int d = 0; d < rows; ++d) {
        A* const row = state + static_cast<int64_t>(d) * columns + e;
        for (int n = 0; n < kVectors; ++n) {
          auto x = load(row + n * kLanes);
          if (b != nullptr) {
            x = fma(all(b[d]), added[n], mul(all(kept), x));
            store(row + n * kLanes, x);
          }
          sums[n] = fma(all(a[d]), x, sums[n]);
        }
      }
      for (int n = 0; n < kVectors; ++n) {
        store(o + e + n * kLanes, sums[n]);
      }
    }
  };
  vectors(std::integral_constant<int, kWide>{});
  vectors(std::integral_constant<int, 1>{});
  std::fill(o + e, o + columns, A{0});
  for (int d = 0; d < rows && e < columns; ++d) {
    A* const row = state + static_cast<int64_t>(d) * columns;
    for (int column = e; column < columns; ++column) {
      if (b != nullptr) {
        row[column] = kept * row[column] + b[d] * v[column];
      }
      o[column] += a[d] * row[column];
    }
  }
}

// Tokens of one sequence that one thread works on, of the heads that share a head of keys and values.
struct Span {
  int64_t sequence, kv_head, begin, end;  // places in the sequence
  bool first, last;                       // of its sequence
};

// A chunk of a span.
struct Rows {
  int64_t sequence, batch, row, place;  // of the first: row in memory, place in the sequence
  int count;
};

// What one thread works with. A is the type that arithmetic is done in; rows are padded with zeros to whole vectors.
template <class T, class A>
class Worker {
 public:
  // `chunk`: the tokens it works on together, kChunk or one.
  Worker(const Problem& p, int chunk)
      : p(p), chunk(chunk), key_dim(static_cast<int>(p.key_dim)), value_dim(static_cast<int>(p.value_dim)) {
    for (A** row : {&spare_slope, &total}) {
      *row = take(kw);
    }
    for (A** rows : {&a, &b, &z_rows}) {
      *rows = take(chunk * kw);
    }
    for (A** rows : {&v, &out}) {
      *rows = take(chunk * vw);
    }
    ra = p.cos != nullptr ? take(chunk * kw) : a;
    rb = p.cos != nullptr ? take(chunk * kw) : b;
    angles = take(2 * chunk * static_cast<size_t>(p.half));
    if (chunk == 1) {
      return;
    }
    for (A** rows : {&a_slope, &b_slope, &grad_a, &grad_b}) {
      *rows = take(chunk * kw);
    }
    grad_n = take(chunk * vw);
    for (A** square : {&scores, &grad_scores}) {
      *square = take(chunk * chunk);
    }
    b_columns = take(static_cast<size_t>(kw) * chunk);
    v_columns = take(static_cast<size_t>(vw) * chunk);
    turned = take(static_cast<size_t>(vw) * kw);
    own_state = take(state_size());
  }

  // A state is S [key_dim, vw], then z [kw]; a gradient of states is U and w.
  size_t state_size() const { return static_cast<size_t>(key_dim) * vw + kw; }

  // Readies the thread for a span, with the state it starts from or null for a state of its own to fill.
  A* begin(const Span& span, A* state) {
    for (int n = 0; n <= chunk; ++n) {
      power[n] = p.decay != nullptr ? static_cast<A>(std::pow(p.decay[span.kv_head], n)) : A{1};
    }
    return state != nullptr ? state : own_state;
  }

  // Outputs of a span from the state before it, which becomes the state after it.
  void forward(const Span& span, A* state) {
    for (int64_t place = span.begin; place < span.end; place += kChunk) {
      const Rows rows = enter(span, place, 1, p.causal, true);
      if (p.causal) {
        load_keys(rows, span.kv_head, nullptr);
        load_values(rows, span.kv_head);
        transpose(rows.count, key_dim, rb, kw, b_columns, kChunk);
        sum_z(rows, z_of(state));
      }
      for (int64_t head = first_head(span); head < last_head(span); ++head) {
        load_queries(rows, head, nullptr);
        multiply(rows.count, value_dim, key_dim, ra, kw, 1, state, vw, out, vw, false);
        if (p.causal) {
          lower_product(rows.count, key_dim, ra, kw, b_columns, scores);
          fade_later(rows.count, out, vw);
          multiply(rows.count, value_dim, rows.count, scores, kChunk, 1, v, vw, out, vw, true, Part::kUpToRow);
        }
        store_outputs(rows, head, z_of(state));
      }
      if (p.causal) {
        add_keys(rows, state);
      }
    }
  }

  // The outputs token by token, in the place of the states: all that a few tokens cost is to read and write those.
  void decode(const Span& span) {
    begin(span, nullptr);
    A* const state = static_cast<A*>(p.kv) + state_of(span) * key_dim * value_dim;
    A* const z = p.normalize ? static_cast<A*>(p.z) + state_of(span) * key_dim : nullptr;
    for (int64_t place = span.begin; place < span.end; ++place) {
      const Rows rows = rows_at(span, place);
      load_angles(rows);
      load_keys(rows, span.kv_head, nullptr);
      load_values(rows, span.kv_head);
      for (int d = 0; d < key_dim && z != nullptr; ++d) {
        z[d] = power[1] * z[d] + b[d];
        z_rows[d] = z[d];
      }
      const A* added = rb;
      for (int64_t head = first_head(span); head < last_head(span); ++head, added = nullptr) {
        load_queries(rows, head, nullptr);
        pass_state(key_dim, value_dim, ra, added, v, power[1], state, out);
        store_outputs(rows, head, nullptr);
      }
    }
  }

  // Gradients of a span's queries and denominators, from the state before it.
  void backward_queries(const Span& span, A* state) {
    transpose(key_dim, value_dim, state, vw, turned, kw);
    for (int64_t place = span.begin; place < span.end; place += kChunk) {
      const Rows rows = enter(span, place, 1, p.causal, true);
      if (p.causal) {
        load_keys(rows, span.kv_head, nullptr);
        load_values(rows, span.kv_head);
        transpose(rows.count, value_dim, v, vw, v_columns, kChunk);
        sum_z(rows, z_of(state));
      }
      for (int64_t head = first_head(span); head < last_head(span); ++head) {
        load_queries(rows, head, a_slope);
        load_grad_numerators(rows, head);
        multiply(rows.count, key_dim, value_dim, grad_n, vw, 1, turned, kw, grad_a, kw, false);
        if (p.causal) {
          lower_product(rows.count, value_dim, grad_n, vw, v_columns, grad_scores);
          fade_later(rows.count, grad_a, kw);
          multiply(rows.count, key_dim, rows.count, grad_scores, kChunk, 1, rb, kw, grad_a, kw, true, Part::kUpToRow);
        }
        store_grad_queries(rows, head, z_of(state));
      }
      if (p.causal) {  // the state after the chunk, turned; rb is not needed again
        scale_row(power[rows.count], turned, static_cast<int64_t>(value_dim) * kw);
        fade_earlier(rows.count, rb, kw);
        multiply(value_dim, key_dim, rows.count, v_columns, kChunk, 1, rb, kw, turned, kw, true);
      }
    }
  }

  // Gradients of a span's keys and values, from the sums U and w over what follows it, which become those at its begin.
  void backward_keys(const Span& span, A* state) {
    for (int64_t place = last_chunk(span); place >= span.begin; place -= kChunk) {
      const Rows rows = enter(span, place, -1, true, p.causal);
      load_keys(rows, span.kv_head, b_slope);
      load_values(rows, span.kv_head);
      multiply(rows.count, value_dim, key_dim, rb, kw, 1, state, vw, out, vw, false);
      transpose(key_dim, value_dim, state, vw, turned, kw);
      multiply(rows.count, key_dim, value_dim, v, vw, 1, turned, kw, grad_a, kw, false);
      for (int j = 0; j < rows.count; ++j) {
        std::copy_n(z_of(state), kw, grad_b + j * kw);
      }
      if (p.causal) {
        fade_earlier(rows.count, out, vw);
        fade_earlier(rows.count, grad_a, kw);
        fade_earlier(rows.count, grad_b, kw);
        transpose(rows.count, key_dim, rb, kw, b_columns, kChunk);
        transpose(rows.count, value_dim, v, vw, v_columns, kChunk);
        scale_row(power[rows.count], state, static_cast<int64_t>(state_size()));
        for (int64_t head = first_head(span); head < last_head(span); ++head) {
          load_queries(rows, head, nullptr);
          load_grad_numerators(rows, head);
          lower_product(rows.count, key_dim, ra, kw, b_columns, scores);
          lower_product(rows.count, value_dim, grad_n, vw, v_columns, grad_scores);
          multiply(rows.count, value_dim, rows.count, scores, 1, kChunk, grad_n, vw, out, vw, true, Part::kFromRow);
          multiply(rows.count, key_dim, rows.count, grad_scores, 1, kChunk, ra, kw, grad_a, kw, true, Part::kFromRow);
          add_queries(rows, head, state, grad_b);
        }
      }
      store_grad_keys(rows, span.kv_head);
    }
  }

  // Adds a span's keys and values to a state.
  void sum_keys(const Span& span, A* state) {
    for (int64_t place = span.begin; place < span.end; place += kChunk) {
      const Rows rows = enter(span, place, 1, true, false);
      load_keys(rows, span.kv_head, nullptr);
      load_values(rows, span.kv_head);
      transpose(rows.count, key_dim, rb, kw, b_columns, kChunk);
      sum_z(rows, z_of(state));
      add_keys(rows, state);
    }
  }

  // Adds a span's queries and the gradients of its numerators and denominators to U and w.
  void sum_queries(const Span& span, A* state) {
    for (int64_t place = last_chunk(span); place >= span.begin; place -= kChunk) {
      const Rows rows = enter(span, place, -1, false, true);
      scale_row(power[rows.count], state, static_cast<int64_t>(state_size()));
      for (int64_t head = first_head(span); head < last_head(span); ++head) {
        load_queries(rows, head, nullptr);
        load_grad_numerators(rows, head);
        add_queries(rows, head, state, nullptr);
      }
    }
  }

  int64_t state_of(const Span& span) const {
    return (p.slots != nullptr ? p.slots[span.sequence] : span.sequence) * p.kv_heads + span.kv_head;
  }

  // The states that a sequence begins with, kv and z or null for zeros.
  void load_state(const void* kv, const void* z, const Span& span, A* state) const {
    const int64_t at = state_of(span);
    std::fill_n(state, state_size(), A{0});
    for (int d = 0; d < key_dim && kv != nullptr; ++d) {
      std::copy_n(static_cast<const A*>(kv) + (at * key_dim + d) * value_dim, value_dim, state + d * vw);
    }
    if (z != nullptr) {
      std::copy_n(static_cast<const A*>(z) + at * key_dim, key_dim, z_of(state));
    }
  }

  void store_state(const A* state, const Span& span, void* kv, void* z) const {
    const int64_t at = state_of(span);
    for (int d = 0; d < key_dim && kv != nullptr; ++d) {
      std::copy_n(state + d * vw, value_dim, static_cast<A*>(kv) + (at * key_dim + d) * value_dim);
    }
    if (z != nullptr) {
      std::copy_n(state + static_cast<size_t>(key_dim) * vw, key_dim, static_cast<A*>(z) + at * key_dim);
    }
  }

 private:
  A* take(size_t n) {
    buffers_.push_back(zeros<A>(n));
    return buffers_.back().get();
  }

  A* z_of(A* state) const { return state + static_cast<size_t>(key_dim) * vw; }

  Rows rows_at(const Span& span, int64_t place) const {
    const bool packed = p.cu_seqlens != nullptr;
    return {span.sequence, packed ? 0 : span.sequence, (packed ? p.cu_seqlens[span.sequence] : 0) + place, place,
            static_cast<int>(std::min<int64_t>(chunk, span.end - place))};
  }

  // A chunk's place in memory. Readies its angles, and asks for what the chunk after it (in this direction) will read.
  Rows enter(const Span& span, int64_t place, int64_t direction, bool keys, bool queries) {
    const Rows rows = rows_at(span, place);
    load_angles(rows);
    ahead.forget();
    const int64_t next_place = place + direction * kChunk;
    if (next_place >= span.begin && next_place < span.end) {
      const Rows next = rows_at(span, next_place);
      for (int64_t head = first_head(span); head < last_head(span) && queries; ++head) {
        ask_for(p.q, next, head, key_dim);
        if (p.grad_o.data != nullptr) {
          ask_for(p.grad_o, next, head, value_dim);
        }
      }
      if (keys) {
        ask_for(p.k, next, span.kv_head, key_dim);
        ask_for(p.v, next, span.kv_head, value_dim);
      }
    }
    return rows;
  }
  void ask_for(const View& x, const Rows& rows, int64_t head, int n) {
    constexpr int64_t kBytes = sizeof(T);
    ahead.add(row<const T>(x, rows, 0, head), n * kBytes, x.stride[1] * kBytes, rows.count);
  }
  // Below span.begin where the span is empty.
  static int64_t last_chunk(const Span& span) {
    return span.begin + (span.end - span.begin + kChunk - 1) / kChunk * kChunk - kChunk;
  }

  int64_t first_head(const Span& span) const { return span.kv_head * (p.heads / p.kv_heads); }
  int64_t last_head(const Span& span) const { return first_head(span) + p.heads / p.kv_heads; }

  bool keeps(const Rows& rows, int i) const {
    return p.mask == nullptr || p.mask[rows.batch * p.mask_stride[0] + (rows.row + i) * p.mask_stride[1]] != 0;
  }

  template <class U>
  U* row(const View& x, const Rows& rows, int i, int64_t head) const {
    return static_cast<U*>(x.data) + rows.batch * x.stride[0] + (rows.row + i) * x.stride[1] + head * x.stride[2];
  }

  // Products, during which the next chunk's rows are asked for.
  void multiply(int m, int n, int k, const A* x, int64_t x_row, int64_t x_k, const A* y, int64_t y_row, A* to,
                int64_t to_row, bool add_to, Part part = Part::kAll) {
    gemm(m, n, k, x, x_row, x_k, y, y_row, to, to_row, add_to, part, [this] { ahead(); });
  }

  // Where [B, T, heads] holds a row's denominator, or its gradient.
  int64_t at(const Rows& rows, int i, int64_t head) const {
    return (rows.batch * p.length + rows.row + i) * p.heads + head;
  }
  A denominator(const Rows& rows, int i, int64_t head) const {
    return static_cast<const A*>(p.denominator)[at(rows, i, head)];
  }
  A& grad_denominator(const Rows& rows, int i, int64_t head) const {
    return static_cast<A*>(p.grad_denominator)[at(rows, i, head)];
  }

  // φ of a row in place, and its derivative.
  void apply_feature(A* x, A* slope, A stabilizer) const {
    switch (p.feature) {
      case Feature::kIdentity:
        std::fill_n(slope, kw, A{1});
        break;
      case Feature::kElu1:
        for (int i = 0; i < kw; i += kLanes) {  // of a NaN, max and min here give NaN
          const auto e = exp(min(all(A{0}), load(x + i)));
          store(slope + i, e);
          store(x + i, add(max(all(A{0}), load(x + i)), e));
        }
        break;
      case Feature::kRelu:
        for (int i = 0; i < kw; ++i) {
          slope[i] = x[i] > 0 ? A{1} : A{0};
          x[i] = x[i] < 0 ? A{0} : x[i];
        }
        break;
      case Feature::kRelu2:
        for (int i = 0; i < kw; ++i) {
          const A positive = x[i] < 0 ? A{0} : x[i];
          slope[i] = 2 * positive;
          x[i] = positive * positive;
        }
        break;
      case Feature::kExp:
        for (int i = 0; i < kw; i += kLanes) {
          const auto e = exp(add(load(x + i), all(-stabilizer)));
          store(x + i, e);
          store(slope + i, e);
        }
        break;
    }
    std::fill(x + key_dim, x + kw, A{0});
  }

  // cos and sin of the chunk's positions, [count, 2, half].
  void load_angles(const Rows& rows) {
    const int64_t first = (p.offsets != nullptr ? p.offsets[rows.sequence] : p.offset) + rows.place;
    for (int i = 0; i < rows.count && p.half > 0; ++i) {
      A* const c = angles + 2 * i * p.half;
      A* const s = c + p.half;
      const int64_t position = first + i;
      const bool stays = position < 0 || !keeps(rows, i);  // padding
      if (stays || position >= p.table_length) {           // or a position that no table knows
        const A unknown = std::numeric_limits<A>::quiet_NaN();
        std::fill_n(c, p.half, stays ? A{1} : unknown);
        std::fill_n(s, p.half, stays ? A{0} : unknown);
        continue;
      }
      for (int64_t pair = 0; pair < p.half; ++pair) {
        c[pair] = angle(p.cos, position * p.cos_stride[0] + pair * p.cos_stride[1]);
        s[pair] = angle(p.sin, position * p.sin_stride[0] + pair * p.sin_stride[1]);
      }
    }
  }
  A angle(const void* table, int64_t at) const {
    A out = 0;
    with_float(p.table_dtype,
               [&](auto example) { out = static_cast<A>(widen(static_cast<const decltype(example)*>(table)[at])); });
    return out;
  }

  // y = x, every row turned by its position's angles times `direction`.
  void rotate(int count, const A* x, A* y, A direction) const {
    for (int i = 0; i < count; ++i, x += kw, y += kw) {
      const A* const c = angles + 2 * i * p.half;
      const A* const s = c + p.half;
      if (x != y) {
        std::copy_n(x, kw, y);
      }
      const int64_t step = p.interleaved ? 2 : 1, apart = p.interleaved ? 1 : p.half;
      for (int64_t pair = 0; pair < p.half; ++pair) {
        const A x0 = x[pair * step], x1 = x[pair * step + apart], sine = direction * s[pair];
        y[pair * step] = x0 * c[pair] - x1 * sine;
        y[pair * step + apart] = x1 * c[pair] + x0 * sine;
      }
    }
  }

  // Padding has no features: whatever its memory holds never meets a number that counts.
  void load_features(const Rows& rows, const View& x, int64_t head, A stabilizer, bool shifted, A* to, A* slope) {
    for (int i = 0; i < rows.count; ++i) {
      A* const y = to + i * kw;
      A* const its_slope = slope != nullptr ? slope + i * kw : spare_slope;
      if (!keeps(rows, i)) {
        std::fill_n(y, kw, A{0});
        std::fill_n(its_slope, kw, A{0});
        continue;
      }
      load_row(row<const T>(x, rows, i, head), x.stride[3], key_dim, y);
      apply_feature(y, its_slope, shifted ? *std::max_element(y, y + key_dim) : stabilizer);
    }
  }

  void load_queries(const Rows& rows, int64_t head, A* slope) {
    const bool shifted = p.feature == Feature::kExp && p.normalize;
    load_features(rows, p.q, head, static_cast<A>(p.stabilizer), shifted, a, slope);
    if (ra != a) {
      rotate(rows.count, a, ra, A{1});
    }
  }

  void load_keys(const Rows& rows, int64_t head, A* slope) {
    load_features(rows, p.k, head, static_cast<A>(p.stabilizer), false, b, slope);
    if (rb != b) {
      rotate(rows.count, b, rb, A{1});
    }
  }

  void load_values(const Rows& rows, int64_t head) {
    for (int i = 0; i < rows.count; ++i) {
      if (keeps(rows, i)) {
        load_row(row<const T>(p.v, rows, i, head), p.v.stride[3], value_dim, v + i * vw);
      } else {
        std::fill_n(v + i * vw, vw, A{0});
      }
    }
  }

  // A numerator's way to the output, and a gradient's way back.
  void normalize(A denominator, A* x) const {
    if (!p.normalize) {
      scale_row(static_cast<A>(p.scale), x, value_dim);
    } else if (denominator != 0) {
      for (int e = 0; e < value_dim; ++e) {
        x[e] /= denominator;
      }
    } else {
      std::fill_n(x, value_dim, A{0});
    }
  }

  void load_grad_numerators(const Rows& rows, int64_t head) {
    for (int i = 0; i < rows.count; ++i) {
      A* const x = grad_n + i * vw;
      if (keeps(rows, i)) {
        load_row(row<const T>(p.grad_o, rows, i, head), p.grad_o.stride[3], value_dim, x);
        normalize(p.normalize ? denominator(rows, i, head) : A{1}, x);
      } else {
        std::fill_n(x, vw, A{0});
      }
    }
  }

  // x_i *= γ^(i + 1): how the state before the chunk has faded at its row i.
  void fade_later(int count, A* x, int width) const {
    for (int i = 0; i < count && p.decay != nullptr; ++i) {
      scale_row(power[i + 1], x + i * width, width);
    }
  }
  // x_j *= γ^(count - 1 - j): how row j has faded at the chunk's end.
  void fade_earlier(int count, A* x, int width) const {
    for (int j = 0; j < count && p.decay != nullptr; ++j) {
      scale_row(power[count - 1 - j], x + j * width, width);
    }
  }

  // to [count, count] = x·yᵀ for y given by its columns; γ^(i - j) on and below the diagonal, zero above.
  void lower_product(int count, int width, const A* x, int x_row, const A* y_columns, A* to) {
    multiply(count, count, width, x, x_row, 1, y_columns, kChunk, to, kChunk, false, Part::kLowerOutput);
    for (int i = 0; i < count; ++i) {
      A* const row = to + i * kChunk;
      for (int j = 0; j < i && p.decay != nullptr; ++j) {
        row[j] *= power[i - j];
      }
      std::fill(row + i + 1, row + std::min(kChunk, (i + kTileRows) / kTileRows * kTileRows), A{0});
    }
  }

  // z_rows = the sums of φ(k) up to each row, and z that of the last. Those of the chunk are summed first: short sums
  // round less.
  void sum_z(const Rows& rows, A* z) {
    if (!p.normalize) {
      return;
    }
    std::fill_n(total, kw, A{0});
    for (int i = 0; i < rows.count; ++i) {
      fade_and_add(power[1], total, A{1}, b + i * kw, total, kw);
      fade_and_add(power[i + 1], z, A{1}, total, z_rows + i * kw, kw);
    }
    std::copy_n(z_rows + (rows.count - 1) * kw, kw, z);
  }
  const A* z_at(int i, const A* z) const { return p.causal ? z_rows + i * kw : z; }

  // S = γ^count·S + Σ γ^(count - 1 - j)·rb_j vⱼᵀ, with the keys by their columns; v is not needed again.
  void add_keys(const Rows& rows, A* state) {
    if (p.decay != nullptr) {
      scale_row(power[rows.count], state, static_cast<int64_t>(key_dim) * vw);
    }
    fade_earlier(rows.count, v, vw);
    multiply(key_dim, value_dim, rows.count, b_columns, kChunk, 1, v, vw, state, vw, true);
  }

  // U += Σ γ^(i + 1)·ra_i grad_n_iᵀ and w += Σ γ^(i + 1)·grad_denominator_i·a_i, and unless null
  // grad_b_j += Σ_{i ≥ j} γ^(i - j)·grad_denominator_i·a_i; grad_n is not needed again.
  void add_queries(const Rows& rows, int64_t head, A* state, A* grad_b) {
    fade_later(rows.count, grad_n, vw);
    multiply(key_dim, value_dim, rows.count, ra, 1, kw, grad_n, vw, state, vw, true);
    if (!p.normalize) {
      return;
    }
    std::fill_n(total, kw, A{0});
    for (int i = rows.count - 1; i >= 0; --i) {
      fade_and_add(power[1], total, grad_denominator(rows, i, head), a + i * kw, total, kw);
      if (grad_b != nullptr) {
        fade_and_add(A{1}, grad_b + i * kw, A{1}, total, grad_b + i * kw, kw);
      }
    }
    fade_and_add(A{1}, z_of(state), power[1], total, z_of(state), kw);
  }

  void store_outputs(const Rows& rows, int64_t head, const A* z) {
    for (int i = 0; i < rows.count; ++i) {
      A* const o = out + i * vw;
      const A d = p.normalize ? dot(a + i * kw, z_at(i, z), kw) + static_cast<A>(p.eps) : A{1};
      if (p.denominator != nullptr) {
        static_cast<A*>(p.denominator)[at(rows, i, head)] = d;
      }
      if (keeps(rows, i)) {
        normalize(d, o);
      } else {
        std::fill_n(o, value_dim, A{0});
      }
      store_row(o, value_dim, row<T>(p.o, rows, i, head), p.o.stride[3]);
    }
  }

  // From grad_a, the gradients of the rotated features through the numerators.
  void store_grad_queries(const Rows& rows, int64_t head, const A* z) {
    for (int i = 0; i < rows.count && p.normalize; ++i) {  // grad_o·o is grad_a·ra: no o is needed
      const A d = denominator(rows, i, head);
      grad_denominator(rows, i, head) = d != 0 ? -dot(grad_a + i * kw, ra + i * kw, kw) / d : A{0};
    }
    if (ra != a) {
      rotate(rows.count, grad_a, grad_a, A{-1});
    }
    for (int i = 0; i < rows.count; ++i) {
      A* const grad = grad_a + i * kw;
      if (p.normalize) {
        fade_and_add(A{1}, grad, grad_denominator(rows, i, head), z_at(i, z), grad, kw);
      }
      store_grad_features(keeps(rows, i), grad, a_slope + i * kw, row<T>(p.grad_q, rows, i, head), p.grad_q.stride[3]);
    }
  }

  // From grad_a, which holds the gradients of the rotated features, grad_b of the features and out of the values.
  void store_grad_keys(const Rows& rows, int64_t head) {
    if (rb != b) {
      rotate(rows.count, grad_a, grad_a, A{-1});
    }
    for (int j = 0; j < rows.count; ++j) {
      A* const grad = grad_a + j * kw;
      if (p.normalize) {
        fade_and_add(A{1}, grad, A{1}, grad_b + j * kw, grad, kw);
      }
      store_grad_features(keeps(rows, j), grad, b_slope + j * kw, row<T>(p.grad_k, rows, j, head), p.grad_k.stride[3]);
      if (!keeps(rows, j)) {
        std::fill_n(out + j * vw, value_dim, A{0});
      }
      store_row(out + j * vw, value_dim, row<T>(p.grad_v, rows, j, head), p.grad_v.stride[3]);
    }
  }

  void store_grad_features(bool kept, A* grad, const A* slope, T* to, int64_t stride) const {
    for (int d = 0; d < key_dim; ++d) {
      grad[d] = kept ? grad[d] * slope[d] : A{0};
    }
    store_row(grad, key_dim, to, stride);
  }

  static constexpr int kLanes = vector_t<A>::kLanes;
  static int whole_vectors(int64_t n) { return static_cast<int>((n + kLanes - 1) / kLanes * kLanes); }

  const Problem& p;
  const int chunk, key_dim, value_dim;
  const int kw = whole_vectors(p.key_dim), vw = whole_vectors(p.value_dim);  // widths of rows
  A *a, *ra, *a_slope;       // [chunk, kw]: φ(q), rotated, and its derivative
  A *b, *rb, *b_slope;       // of k
  A *v, *out, *grad_n;       // [chunk, vw]
  A *grad_a, *grad_b;        // [chunk, kw]
  A* z_rows;                 // [chunk, kw]: the sum of φ(k) up to each row
  A *spare_slope, *total;    // [kw]
  A *scores, *grad_scores;   // [chunk, chunk]
  A *b_columns, *v_columns;  // [kw, chunk] and [vw, chunk]: rb and v turned
  A* turned;                 // a state turned, [vw, kw]
  A* angles;                 // [chunk, 2, half]
  A* own_state;
  A power[kChunk + 1];  // of the head's decay
  Ahead ahead;
  std::vector<Buffer<A>> buffers_;
};

int64_t length_of(const Problem& p, int64_t sequence) {
  return p.cu_seqlens != nullptr ? p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence] : p.length;
}

// Each sequence and head in one span, or in more where that would leave threads without work; in order of time.
std::vector<Span> split(const Problem& p, int threads) {
  std::vector<Span> spans;
  const int64_t share = std::max(kSegment, p.batch * p.length * p.kv_heads / threads);
  for (int64_t sequence = 0; sequence < p.num_sequences; ++sequence) {
    const int64_t length = length_of(p, sequence);
    const int64_t count = std::max<int64_t>(1, (length + share - 1) / share);
    const int64_t step = (length + count * kChunk - 1) / (count * kChunk) * kChunk;
    for (int64_t head = 0; head < p.kv_heads; ++head) {
      for (int64_t begin = 0; begin < length || begin == 0; begin += step) {
        const int64_t end = std::min(length, begin + step);
        spans.push_back({sequence, head, begin, end, begin == 0, end == length});
        if (end == length) {
          break;
        }
      }
    }
  }
  return spans;
}

// One pass over all tokens, with time or against it.
template <class T, class A>
struct Pass {
  bool reverse;
  void (Worker<T, A>::*run)(const Span&, A*);  // takes the state that a span starts from to the one it ends with
  void (Worker<T, A>::*sum)(const Span&, A*);  // adds what the span adds to a state, and nothing else
  const void *from_kv, *from_z;                // the states that sequences start from, or null for zeros
  void *to_kv, *to_z;                          // where to put those they end with, or null

  bool starts(const Span& span) const { return reverse ? span.last : span.first; }
  bool ends(const Span& span) const { return reverse ? span.first : span.last; }
};

// Turns the sums over spans into the states that they start from; without causality that is the sum over all.
template <class T, class A>
void chain(const Problem& p, const Pass<T, A>& pass, const std::vector<Span>& spans, Worker<T, A>& worker, A* states) {
  const int64_t count = static_cast<int64_t>(spans.size()), size = worker.state_size();
  Buffer<A> carry = zeros<A>(size);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = pass.reverse ? count - 1 - n : n;
    const Span& span = spans[i];
    A* const state = states + i * size;
    if (pass.starts(span)) {
      worker.load_state(pass.from_kv, pass.from_z, span, carry.get());
    }
    const double decay = p.decay != nullptr ? p.decay[span.kv_head] : 1;
    const A kept = static_cast<A>(std::pow(decay, static_cast<double>(span.end - span.begin)));
    for (int64_t j = 0; j < size; ++j) {
      const A sum = state[j];
      state[j] = carry[j];
      carry[j] = kept * carry[j] + sum;
    }
    for (int64_t j = i; !p.causal && pass.ends(span);) {
      std::copy_n(carry.get(), size, states + j * size);
      if (pass.starts(spans[j])) {
        break;
      }
      j += pass.reverse ? 1 : -1;
    }
  }
}

template <class T, class A>
void run(const Problem& p, const Pass<T, A>& pass, const std::vector<Span>& spans, int threads) {
  const int64_t count = static_cast<int64_t>(spans.size());
  const bool summed = !p.causal || count > p.num_sequences * p.kv_heads;
  Buffer<A> states;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker<T, A> worker(p, kChunk);
    const int64_t size = worker.state_size();
    if (summed) {
#pragma omp single
      states = zeros<A>(count * size);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < count; ++i) {
        if (!p.causal || !pass.ends(spans[i])) {
          (worker.*pass.sum)(spans[i], worker.begin(spans[i], states.get() + i * size));
        }
      }
#pragma omp single
      chain(p, pass, spans, worker, states.get());
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      A* const state = worker.begin(spans[i], summed ? states.get() + i * size : nullptr);
      if (!summed) {
        worker.load_state(pass.from_kv, pass.from_z, spans[i], state);
      }
      (worker.*pass.run)(spans[i], state);
      if (pass.ends(spans[i])) {
        worker.store_state(state, spans[i], pass.to_kv, pass.to_z);
      }
    }
  }
}

// Rows that belong to no sequence are zero.
template <class T>
void clear_surplus(const Problem& p, const View& x, int64_t heads, int64_t dim) {
  if (p.cu_seqlens == nullptr) {
    return;
  }
  for (int64_t t = 0; t < p.length; ++t) {
    if (t >= p.cu_seqlens[0] && t < p.cu_seqlens[p.num_sequences]) {
      continue;
    }
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t d = 0; d < dim; ++d) {
        narrow(compute_t<T>{0}, static_cast<T*>(x.data) + t * x.stride[1] + h * x.stride[2] + d * x.stride[3]);
      }
    }
  }
}

int threads_for(const Problem& p, int num_threads) {
  const int64_t work = p.batch * p.length * p.heads * p.key_dim * p.value_dim;
  return static_cast<int>(std::clamp<int64_t>(work / kGrain, 1, std::max(1, num_threads)));
}

template <class T>
void decode(const Problem& p, int threads) {
  const int64_t count = p.num_sequences * p.kv_heads;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Worker<T, compute_t<T>> worker(p, 1);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      worker.decode({i / p.kv_heads, i % p.kv_heads, 0, p.length, true, true});
    }
  }
}

template <class T>
void forward(const Problem& p, int num_threads) {
  using A = compute_t<T>;
  const int threads = threads_for(p, num_threads);
  const bool in_place = p.kv != nullptr && p.kv == p.kv0;
  if (in_place && p.length <= kFew) {
    return decode<T>(p, threads);
  }
  const Pass<T, A> pass{false, &Worker<T, A>::forward, &Worker<T, A>::sum_keys, p.kv0, p.z0, p.kv, p.z};
  run(p, pass, split(p, threads), threads);
  clear_surplus<T>(p, p.o, p.heads, p.value_dim);
}

template <class T>
void backward(const Problem& p, int num_threads) {
  using A = compute_t<T>;
  const int threads = threads_for(p, num_threads);
  const std::vector<Span> spans = split(p, threads);
  const Pass<T, A> queries{false,  &Worker<T, A>::backward_queries, &Worker<T, A>::sum_keys, p.kv0, p.z0, nullptr,
                           nullptr};
  const Pass<T, A> keys{
      true, &Worker<T, A>::backward_keys, &Worker<T, A>::sum_queries, p.grad_kv, p.grad_z, p.grad_kv0, p.grad_z0};
  run(p, queries, spans, threads);
  run(p, keys, spans, threads);
  clear_surplus<T>(p, p.grad_q, p.heads, p.key_dim);
  clear_surplus<T>(p, p.grad_k, p.kv_heads, p.key_dim);
  clear_surplus<T>(p, p.grad_v, p.kv_heads, p.value_dim);
}

}  // namespace

void run(const Problem& p, bool is_backward, int num_threads) {
  with_float(p.dtype, [&](auto example) {
    using T = decltype(example);
    is_backward ? backward<T>(p, num_threads) : forward<T>(p, num_threads);
  });
}

}  // namespace KX_ISA

#ifdef KX_ISA_portable

KX_DECLARE_FOR_ISAS(void run(const Problem& p, bool is_backward, int num_threads);)

void cpu(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, false);
  KX_DISPATCH(run, p, false, num_threads);
}

void cpu_backward(const Tensors& in, const Tensors& out, const Options& options, int num_threads) {
  const Problem p = make_problem(in, out, options, true);
  KX_CHECK(!p.normalize || out[5], "linear_attention: the gradients of the denominators have nowhere to go");
  KX_DISPATCH(run, p, true, num_threads);
}

#endif

}  // namespace kx::linear_attention
