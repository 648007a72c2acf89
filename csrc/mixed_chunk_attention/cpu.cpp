// Mixed-chunk attention on a CPU: within a chunk the blocks of gated attention, between chunks a state. The formulas
// and their names are those of kx_kernels/ops/mixed_chunk_attention/README.md.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "../cpu/isa.h"
#include "../gau_attention/worker.h"
#include "problem.h"

namespace kx::mixed_chunk_attention {
namespace KX_ISA {
namespace {

using namespace ::kx::KX_ISA;  // the vectors of this instruction set
using gau_attention::KX_ISA::clear_surplus;
using gau_attention::KX_ISA::kKeys;
using gau_attention::KX_ISA::kQueries;
using gau_attention::KX_ISA::Sequence;  // here a chunk, or several
using gau_attention::KX_ISA::store_bias;
using gau_attention::KX_ISA::Turn;

constexpr int64_t kSegment = 256;  // tokens that are worth a thread of their own

// Chunks that one thread works on, one after the other, of the heads that share a head of keys and values.
struct Segment {
  int64_t batch, row, kv_head;  // row: where its sequence begins in memory
  int64_t begin, end, length;   // places in the sequence, which has so many tokens
};

// Those of one sequence and head are neighbours, in order. `groups` counts their sequences and heads.
std::vector<Segment> split(const Problem& p, int threads, int64_t* groups) {
  std::vector<Segment> out;
  const int64_t tokens = (p.cu_seqlens != nullptr ? p.queries : p.num_sequences * p.queries) * p.kv_heads;
  const int64_t most = std::max(kSegment, (tokens + threads - 1) / threads);
  const int64_t size = (most + p.chunk - 1) / p.chunk * p.chunk;
  *groups = 0;
  for (int64_t n = 0; n < p.num_sequences; ++n) {
    const Sequence s = gau_attention::KX_ISA::sequence(p, n);
    for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
      for (int64_t begin = 0; begin < s.queries; begin += size) {
        out.push_back({s.batch, s.query_row, kv_head, begin, std::min(s.queries, begin + size), s.queries});
        *groups += begin == 0;
      }
    }
  }
  return out;
}

// What one thread works with. A state is [key_dim, vw]: S, or U of the gradients.
template <class T, class A>
class Worker : public gau_attention::KX_ISA::Worker<T, A> {
 public:
  using Base = gau_attention::KX_ISA::Worker<T, A>;

  Worker(const Problem& p, bool backward) : Base(p, backward), p(p) {
    lin = this->take(kQueries * static_cast<size_t>(kw));
    turned = this->take(backward ? static_cast<size_t>(value_dim) * kw : 0);
    own_state = this->take(state_size());
  }

  size_t state_size() const { return static_cast<size_t>(key_dim) * vw; }
  A* empty_state() {
    std::fill_n(own_state, state_size(), A{0});
    return own_state;
  }

  // Outputs. `state` is S before the segment, and becomes S after it; or, if not causal, S of the sequence.
  void forward(const Segment& g, A* state) {
    for (int64_t place = g.begin; place < g.end; place += p.chunk) {
      const Sequence s = chunk(g, place);
      each_block(g, s, [&](int64_t head, int64_t first) {
        this->attend(s, head, first, 0, value_dim);
        add_linear(s, head, first, state);
        this->store_outputs(s, head, first, 0, value_dim);
      });
      if (p.causal && place + p.chunk < g.length) {
        add_keys(g, s, state);
      }
    }
  }

  // Gradients of lin_q and the gate, with the same states.
  void backward_queries(const Segment& g, A* state) {
    for (int64_t place = g.begin; place < g.end; place += p.chunk) {
      const Sequence s = chunk(g, place);
      transpose(key_dim, value_dim, state, vw, turned, kw);
      each_block(g, s, [&](int64_t head, int64_t first) {
        load_gradients(s, head, first);
        const int count = this->block_of(s, first);
        this->multiply(count, key_dim, value_dim, wide, vw, 1, turned, kw, lin, kw, false);
        for (int i = 0; i < count; ++i) {
          const int64_t at = s.query_row + first + i;
          scale_row(this->scale(p.lin_scale, p.d, s, at), lin + i * kw);
          store(lin + i * kw, key_dim, p.grad_lin_q, s.batch, at, head);
          if (p.grad_gate.data != nullptr) {
            this->backward_gate(s.batch, at, head);
          }
        }
      });
      if (p.causal && place + p.chunk < g.length) {
        add_keys(g, s, state);
      }
    }
  }

  // Gradients of the others. `state` is U after the segment, and becomes U before it; or, if not causal, U of the
  // sequence. `grad_queries` [n of the sequence, heads, kw] are zeros, `grad_bias` sums of [heads, distances].
  void backward_keys(const Segment& g, A* state, A* grad_queries, double* grad_bias) {
    for (int64_t place = (g.end - 1) / p.chunk * p.chunk; place >= g.begin; place -= p.chunk) {
      const Sequence s = chunk(g, place);
      A* const queries = grad_queries + place * p.heads * kw;
      transpose(key_dim, value_dim, state, vw, turned, kw);
      for (int64_t key = 0; key < s.keys; key += kKeys) {
        this->begin_gradients(s, g.kv_head, key);
        add_linear_gradients(g, s, key, state);
        this->add_gradients(s, g.kv_head, key, Turn{}, queries, grad_bias);
        this->store_gradients(s, g.kv_head, key);
      }
      each_block(g, s, [&](int64_t head, int64_t first) {
        for (int i = 0; i < this->block_of(s, first); ++i) {
          store(queries + ((first + i) * p.heads + head) * kw, key_dim, p.grad_q, s.batch, s.query_row + first + i,
                head);
        }
      });
      if (p.causal && place > 0) {
        add_queries(g, s, state);
      }
    }
  }

  // Adds a segment's keys and values to S.
  void sum_keys(const Segment& g, A* state) { add_keys(g, whole(g), state); }
  // Adds a segment's queries and the gradients of their sums to U.
  void sum_queries(const Segment& g, A* state) { add_queries(g, whole(g), state); }

 private:
  using Base::keep_key;
  using Base::keep_query;
  using Base::key_dim;
  using Base::kw;
  using Base::value_dim;
  using Base::vw;
  using Base::wide;

  Sequence rows(const Segment& g, int64_t begin, int64_t end) const {
    return {g.batch, g.row + begin, g.row + begin, end - begin, end - begin};
  }
  Sequence chunk(const Segment& g, int64_t place) const { return rows(g, place, std::min(g.end, place + p.chunk)); }
  Sequence whole(const Segment& g) const { return rows(g, g.begin, g.end); }

  // Calls block(head, first) for each block of queries.
  template <class Block>
  void each_block(const Segment& g, const Sequence& s, Block&& block) {
    for (int64_t head = g.kv_head * this->group(); head < (g.kv_head + 1) * this->group(); ++head) {
      for (int64_t first = 0; first < s.queries; first += kQueries) {
        block(head, first);
      }
    }
  }

  void scale_row(A c, A* x) const {
    for (int i = 0; i < key_dim; ++i) {
      x[i] *= c;
    }
  }
  void store(const A* from, int n, const View& x, int64_t batch, int64_t at, int64_t head) const {
    store_row(from, n, this->template element<T>(x, batch, at, head), x.stride[3]);
  }

  // d·lin_q of a block of queries to `lin`.
  void load_queries(const Sequence& s, int64_t head, int64_t first) {
    for (int i = 0; i < this->block_of(s, first); ++i) {
      const int64_t at = s.query_row + first + i;
      keep_query[i] = this->keeps(p.query_mask, p.query_mask_stride, s.batch, at);
      this->load_kept(keep_query[i], this->template element<const T>(p.lin_q, s.batch, at, head), p.lin_q.stride[3],
                      key_dim, lin + i * kw);
      scale_row(this->scale(p.lin_scale, p.d, s, at), lin + i * kw);
    }
  }
  // Gradients of a block's sums, before c and d, to `wide`.
  void load_gradients(const Sequence& s, int64_t head, int64_t first) {
    for (int i = 0; i < this->block_of(s, first); ++i) {
      const int64_t at = s.query_row + first + i;
      keep_query[i] = this->keeps(p.query_mask, p.query_mask_stride, s.batch, at);
      this->load_gradient(s.batch, at, head, 0, value_dim, A{1}, keep_query[i], wide + static_cast<size_t>(i) * vw);
    }
  }
  // lin_k of a block of keys to `lin`.
  void load_keys(const Sequence& s, int64_t kv_head, int64_t key, int keys) {
    for (int j = 0; j < keys; ++j) {
      const int64_t at = s.key_row + key + j;
      keep_key[j] = this->keeps(p.key_mask, p.key_mask_stride, s.batch, at);
      this->load_kept(keep_key[j], this->template element<const T>(p.lin_k, s.batch, at, kv_head), p.lin_k.stride[3],
                      key_dim, lin + j * kw);
    }
  }

  void add_linear(const Sequence& s, int64_t head, int64_t first, const A* state) {
    load_queries(s, head, first);
    this->multiply_wide(this->block_of(s, first), value_dim, key_dim, lin, kw, 1, state, vw, wide);
  }

  void add_linear_gradients(const Segment& g, const Sequence& s, int64_t key, const A* state) {
    const int keys = this->keys_of(s, key);
    load_keys(s, g.kv_head, key, keys);
    this->multiply_wide(keys, value_dim, key_dim, lin, kw, 1, state, vw, this->grad_v);
    this->multiply(keys, key_dim, value_dim, this->v, vw, 1, turned, kw, lin, kw, false);
    for (int j = 0; j < keys; ++j) {
      store(lin + j * kw, key_dim, p.grad_lin_k, s.batch, s.key_row + key + j, g.kv_head);
    }
  }

  void add_keys(const Segment& g, const Sequence& s, A* state) {
    for (int64_t key = 0; key < s.keys; key += kKeys) {
      const int keys = this->keys_of(s, key);
      load_keys(s, g.kv_head, key, keys);
      this->load_values(s, g.kv_head, key, keys, 0, value_dim);
      this->multiply_wide(key_dim, value_dim, keys, lin, 1, kw, this->v, vw, state);
    }
  }

  void add_queries(const Segment& g, const Sequence& s, A* state) {
    each_block(g, s, [&](int64_t head, int64_t first) {
      load_queries(s, head, first);
      load_gradients(s, head, first);
      this->multiply_wide(key_dim, value_dim, this->block_of(s, first), lin, 1, kw, wide, vw, state);
    });
  }

  const Problem& p;
  A* lin;        // [kQueries, kw]: rows of lin_q or lin_k, or their gradients
  A* turned;     // [value_dim, kw]: a state
  A* own_state;  // [key_dim, vw]
};

// The states [count, size] of segments become those before each (after it, if `reverse`), or that of its whole
// sequence: elements [begin, end) of them.
template <class A>
void chain(const Problem& p, const std::vector<Segment>& segments, bool reverse, int64_t size, int64_t begin,
           int64_t end, A* states) {
  const int64_t count = static_cast<int64_t>(segments.size());
  std::vector<A> sum(end - begin);
  for (int64_t first = 0, last; first < count; first = last) {
    for (last = first + 1; last < count && segments[last].begin > 0;) {
      ++last;
    }
    std::fill(sum.begin(), sum.end(), A{0});
    for (int64_t n = 0; n < last - first; ++n) {
      A* const state = states + (reverse ? last - 1 - n : first + n) * size + begin;
      for (int64_t j = 0; j < end - begin; ++j) {
        const A own = state[j];
        state[j] = sum[j];
        sum[j] += own;
      }
    }
    for (int64_t i = first; i < last && !p.causal; ++i) {
      std::copy(sum.begin(), sum.end(), states + i * size + begin);
    }
  }
}

// Calls each(worker, i, state) for the i-th segment with the state it starts from. What another segment starts from is
// summed up first, in parts, so that all threads have some of it.
template <class W, class A, class Each>
void pass(const Problem& p, const std::vector<Segment>& segments, bool is_split, bool is_backward, bool reverse,
          int threads, void (W::*sum)(const Segment&, A*), Each&& each) {
  const int64_t count = static_cast<int64_t>(segments.size());
  const auto is_needed = [&](const Segment& g) { return !p.causal || (reverse ? g.begin > 0 : g.end < g.length); };
  const int64_t needed = std::max<int64_t>(1, std::count_if(segments.begin(), segments.end(), is_needed));
  const int64_t parts = (threads + needed - 1) / needed;
  Buffer<A> states, sums;
#pragma omp parallel num_threads(static_cast<int>(std::clamp<int64_t>(count, 1, threads))) if (threads > 1)
  {
    W worker(p, is_backward);
    const int64_t size = static_cast<int64_t>(worker.state_size()), width = size / p.key_dim;
    if (is_split) {
#pragma omp single
      {
        states = zeros<A>(count * size);
        sums = zeros<A>(count * (parts - 1) * size + 1);
      }
      // Of a segment, the first part is in its state, and others beside it.
      const auto part_at = [&](int64_t i, int64_t part) {
        return part == 0 ? states.get() + i * size : sums.get() + (i * (parts - 1) + part - 1) * size;
      };
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = 0; task < count * parts; ++task) {
        const int64_t i = task / parts, part = task % parts;
        Segment g = segments[i];
        const int64_t begin = g.begin, length = g.end - g.begin;
        g.begin = begin + length * part / parts;
        g.end = begin + length * (part + 1) / parts;
        if (is_needed(segments[i])) {
          (worker.*sum)(g, part_at(i, part));
        }
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < p.key_dim; ++row) {
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t part = 1; part < parts; ++part) {
            const A* const from = part_at(i, part);
            A* const to = part_at(i, 0);
            for (int64_t j = row * width; j < (row + 1) * width; ++j) {
              to[j] += from[j];
            }
          }
        }
        chain(p, segments, reverse, size, row * width, (row + 1) * width, states.get());
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      A* const state = is_split ? states.get() + i * size : worker.empty_state();
      if (!is_split && !p.causal) {
        (worker.*sum)(segments[i], state);
      }
      each(worker, i, state);
    }
  }
}

template <class T>
void forward(const Problem& p, int threads) {
  using W = Worker<T, compute_t<T>>;
  int64_t groups;
  const std::vector<Segment> segments = split(p, threads, &groups);
  const bool is_split = static_cast<int64_t>(segments.size()) > groups;
  pass(p, segments, is_split, false, false, threads, &W::sum_keys,
       [&](W& worker, int64_t i, compute_t<T>* state) { worker.forward(segments[i], state); });
  clear_surplus<T>(p, p.o, p.cu_seqlens, p.queries, p.heads, p.value_dim);
  clear_surplus<T>(p, p.ungated, p.cu_seqlens, p.queries, p.heads, p.value_dim);
}

template <class T>
void backward(const Problem& p, int threads) {
  using A = compute_t<T>;
  using W = Worker<T, A>;
  int64_t groups;
  const std::vector<Segment> segments = split(p, threads, &groups);
  const int64_t count = static_cast<int64_t>(segments.size());
  const bool is_split = count > groups;
  pass(p, segments, is_split, true, false, threads, &W::sum_keys,
       [&](W& worker, int64_t i, A* state) { worker.backward_queries(segments[i], state); });

  const int64_t width = W(p, true).row_width(), distances = p.heads * p.distances;
  Buffer<A> grad_q = zeros<A>(static_cast<size_t>(p.batch * p.queries * p.heads * width));
  Buffer<double> grad_bias = zeros<double>(static_cast<size_t>(count * distances));
  pass(p, segments, is_split, true, true, threads, &W::sum_queries, [&](W& worker, int64_t i, A* state) {
    const Segment& g = segments[i];
    A* const rows = grad_q.get() + (g.batch * p.queries + g.row) * p.heads * width;
    worker.backward_keys(g, state, rows, p.bias != nullptr ? grad_bias.get() + i * distances : nullptr);
  });
  store_bias<A>(p, grad_bias.get(), count);
  for (const View& x : {p.grad_q, p.grad_lin_q}) {
    clear_surplus<T>(p, x, p.cu_seqlens, p.queries, p.heads, p.key_dim);
  }
  for (const View& x : {p.grad_k, p.grad_lin_k}) {
    clear_surplus<T>(p, x, p.cu_seqlens, p.queries, p.kv_heads, p.key_dim);
  }
  clear_surplus<T>(p, p.grad_v, p.cu_seqlens, p.queries, p.kv_heads, p.value_dim);
  clear_surplus<T>(p, p.grad_gate, p.cu_seqlens, p.queries, p.heads, p.value_dim);
}

}  // namespace

void run(const Problem& p, bool is_backward, int num_threads) {
  with_float(p.dtype, [&](auto example) {
    using T = decltype(example);
    is_backward ? backward<T>(p, std::max(1, num_threads)) : forward<T>(p, std::max(1, num_threads));
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
  KX_DISPATCH(run, p, true, num_threads);
}

#endif

}  // namespace kx::mixed_chunk_attention
